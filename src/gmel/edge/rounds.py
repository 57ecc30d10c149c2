"""Rounds of federated training over edge servers: heads go there and back, photos and features stay.

A server that was started with the rows of its site (`gmel server --site-rows`) answers two calls: what it could take
part in, and one round. The coordinator asks all sites at once, waits no longer than it was told to, and averages what
came by the same rules as in one process (`gmel.federation.training.Rounds`); garbage is refused by name.
"""

import asyncio
import json
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

from gmel.edge.processes import Processes
from gmel.evaluation.progress import Reporter
from gmel.federation.average import Refusal, Rule, Update
from gmel.federation.site_file import rows_from_bytes, rows_to_bytes
from gmel.federation.training import Head, Plan, Rounds, SiteRows, Trained, Turn, classes_of, local_head, mass_of
from gmel.scenario.errors import InputError

__all__ = ["Site", "train_over_http", "train_over_servers"]

_MOST_HEAD_BYTES = 64 * 2**20
"""Of a head on its way."""
_MOST_STEPS = 100_000


@dataclass(frozen=True, eq=False)
class Site:
    """The side of the server: rows of one site that never leave it."""

    rows: SiteRows

    @classmethod
    def read(cls, path: Path) -> "Site":
        """A site from its file.

        Raises:
            InputError: not readable, or corrupt.
        """
        try:
            return cls(rows_from_bytes(path.read_bytes(), str(path)))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error

    def facts(self) -> dict[str, Any]:
        """What others may know: names of classes, number of features and of photos, and what they count."""
        rows = self.rows
        return {
            "site": rows.name,
            "labels": sorted(set(rows.labels.tolist())),
            "features": int(rows.features.shape[1]),
            "photos": int(rows.labels.size),
            "mass": mass_of(rows),
        }

    def turn(self, body: bytes) -> bytes:
        """One round: the head of all sites in, the head of this site out.

        Raises:
            InputError: a head or a plan that cannot be used here.
        """
        arrays, said = _unpacked(body, "round")
        try:
            classes = tuple(str(each) for each in said["classes"])
            plan, steps, number = Plan(**said["plan"]), int(said["steps"]), int(said["round"])
            head: Head = {"weights": arrays["weights"], "bias": arrays["bias"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"round: {error} is missing or not as it should be") from error
        shape = (len(classes), self.rows.features.shape[1])
        if head["weights"].shape != shape or head["bias"].shape != shape[:1]:
            raise InputError(
                f"round: a head of {head['weights'].shape}, here are {shape[0]} classes and {shape[1]} features"
            )
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in head.values()):
            raise InputError("round: the head must be finite numbers, float32")
        if not set(self.rows.labels.tolist()) <= set(classes):
            raise InputError("round: the head does not know all classes of this site")
        if not 1 <= steps <= min(plan.local_steps, _MOST_STEPS):
            raise InputError(f"round: steps is {steps}, must be 1 to {min(plan.local_steps, _MOST_STEPS)}")
        learned = local_head(self.rows, classes, head, plan, steps)
        return _packed(learned, {"site": self.rows.name, "round": number, "mass": mass_of(self.rows)})


def train_over_http(
    urls: dict[str, str],
    plan: Plan,
    seed: int,
    reporter: Reporter,
    rule: Rule | None = None,
    round_s: float = 120.0,
    key: str | None = None,
    verify: bool | str = True,
) -> Trained:
    """Trains one head over the sites of edge servers, with the result of `gmel.federation.training.train_head`.

    Args:
        urls: address of each server by the name of its site.
        plan: how.
        seed: of drop-outs and stragglers.
        reporter: told of the rounds.
        rule: how updates are averaged; by weight where it is left out.
        round_s: longest wait for the answers of a round; then it goes on without the others.
        key: what servers are shown.
        verify: false, or a file of certificates.

    Raises:
        InputError: a server that does not answer at the start, or sites that do not fit together.
    """
    return asyncio.run(_train(urls, plan, seed, reporter, rule, round_s, key, verify))


def train_over_servers(
    sites: Sequence[SiteRows], plan: Plan, seed: int, reporter: Reporter, rule: Rule | None = None
) -> Trained:
    """The same with an edge server for each site, as processes on this machine, which end with the call.

    Args:
        sites: rows of the sites.
        plan: how.
        seed: of drop-outs and stragglers.
        reporter: told of the rounds.
        rule: how updates are averaged; by weight where it is left out.

    Raises:
        InputError: sites of one name or without rows, or servers that do not start.
    """
    names = [site.name for site in sites]
    if len(set(names)) != len(names) or not all(site.labels.size for site in sites):
        raise InputError("sites: each needs a name of its own and at least one photo")
    with tempfile.TemporaryDirectory(prefix="gmel-rounds-") as home, Processes(Path(home)) as processes:
        reporter.stage(f"{len(sites)} edge servers start")
        for place, site in enumerate(sites):
            rows = Path(home) / f"site-{place}.safetensors"
            rows.write_bytes(rows_to_bytes(site))
            processes.start(f"site-{place}", "server", f"site-{place}", "--gateway", "", "--site-rows", str(rows))
        urls = {name: processes.address(f"site-{place}") for place, name in enumerate(names)}
        return train_over_http(urls, plan, seed, reporter, rule)


async def _train(
    urls: dict[str, str],
    plan: Plan,
    seed: int,
    reporter: Reporter,
    rule: Rule | None,
    round_s: float,
    key: str | None,
    verify: bool | str,
) -> Trained:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=round_s, verify=verify, trust_env=False) as client:
        facts = await asyncio.gather(*(_facts(client, name, url) for name, url in urls.items()))
        features = {int(each["features"]) for each in facts}
        if len(features) != 1:
            raise InputError(f"sites: have {sorted(features)} features; all must compute the same")
        classes = classes_of({str(label) for each in facts for label in each["labels"]})
        rounds = Rounds(tuple(urls), classes, features.pop(), plan, seed, rule)
        reporter.stage(f"{plan.rounds} rounds over {len(urls)} servers")
        for number in range(plan.rounds):
            turn = rounds.open()
            answers = await asyncio.gather(
                *(_ask(client, urls[name], name, rounds, turn, steps, round_s) for name, steps in turn.steps.items())
            )
            updates = [each for each in answers if isinstance(each, Update)]
            refused = [each for each in answers if isinstance(each, Refusal)]
            silent = [name for name, each in zip(turn.steps, answers, strict=True) if each is None]
            rounds.close(turn, updates, silent, refused)
            reporter.advance(number + 1, plan.rounds, f"round {number + 1} of {plan.rounds}")
        return rounds.trained()


async def _facts(client: httpx.AsyncClient, name: str, url: str) -> dict[str, Any]:
    try:
        answer = await client.get(f"{url}/v1/rounds", timeout=10.0)
        if answer.status_code != 200:
            raise InputError(f"site {name}: {answer.status_code} {answer.text[:200]}")
        said: dict[str, Any] = answer.json()
        if said["site"] != name:
            raise InputError(f"site {name}: {url} is the site {str(said['site'])[:64]!r}")
        return {"labels": list(said["labels"]), "features": int(said["features"])}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise InputError(f"site {name}: {url} does not answer as a site would ({error})") from error


async def _ask(
    client: httpx.AsyncClient, url: str, name: str, rounds: Rounds, turn: Turn, steps: int, round_s: float
) -> Update | Refusal | None:
    """What a site made of a round; None where it gave no answer in time."""
    said = {"classes": rounds.classes, "plan": asdict(rounds.plan), "steps": steps, "round": turn.round}
    body = _packed(rounds.head, said)
    rounds.sent_bytes += len(body)
    try:
        async with asyncio.timeout(round_s):
            answer = await client.post(f"{url}/v1/rounds", content=body)
    except (httpx.HTTPError, TimeoutError):
        return None
    if answer.status_code != 200:
        return Refusal(name, turn.round, f"{answer.status_code} {answer.text[:200]}")
    rounds.sent_bytes += len(answer.content)
    try:
        arrays, facts = _unpacked(answer.content, "answer")
        return Update(name, int(facts["round"]), float(facts["mass"]), arrays)
    except (InputError, KeyError, TypeError, ValueError) as error:
        return Refusal(name, turn.round, f"no update: {error}")


def _packed(head: Head, said: dict[str, Any]) -> bytes:
    plain = {name: np.ascontiguousarray(array, np.float32) for name, array in head.items()}
    return write_arrays(plain, metadata={"said": json.dumps(said)})


def _unpacked(data: bytes, what: str) -> tuple[Head, dict[str, Any]]:
    if len(data) > _MOST_HEAD_BYTES:
        raise InputError(f"{what}: {len(data):,} bytes, at most {_MOST_HEAD_BYTES:,} are taken")
    try:
        arrays = parse_arrays(data)
        (length,) = struct.unpack("<Q", data[:8])
        said: Any = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["said"])
        if not isinstance(said, dict):
            raise TypeError("said is no object")
        return arrays, said  # pyright: ignore[reportUnknownVariableType]
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{what}: not a head with its facts ({type(error).__name__})") from error
