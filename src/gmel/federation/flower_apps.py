"""Our federated training as a ServerApp and a ClientApp of Flower: our average as the strategy, our local steps.

Needs the extra `flower`; imported in the processes that Flower starts. A site answers two messages: `query` (who it is,
what it has) and `train` (the head of all sites in, its own head out). Its rows never leave its process.

Source: Message API of Flower 1.42 (flower.ai/docs/framework).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as write_arrays

from gmel.federation.average import Refusal, Rule, Update
from gmel.federation.site_file import rows_from_bytes
from gmel.federation.training import Head, Plan, Rounds, SiteRows, Turn, classes_of, local_head, mass_of
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["FAILED", "HEAD", "PROGRESS", "RESULT", "Job", "client_app", "serve", "server_app", "train_at_home"]

HEAD, RESULT, PROGRESS, FAILED = "head.safetensors", "result.json", "progress.json", "failed.json"
"""What the server leaves in its folder: the trained head, what happened, the rounds so far; or why it failed."""

_POLL_S = 0.1
_PATIENCE = 2
"""A site that gave no answer in so many rounds in a row is not asked any more: each time costs the whole time-out."""
_LARGEST = 1000
"""Longest list of classes, and longest name, that a site may announce."""

AtHome = Callable[[SiteRows, tuple[str, ...], Head, Plan, int], Head]
"""From rows, classes, the head of all sites, the plan and a number of steps to the head of the site."""


@dataclass(frozen=True)
class Job:
    """What the server is to do.

    Attributes:
        sites: names of the sites that are expected.
        plan: of the training.
        seed: of drop-outs and stragglers.
        rule: how updates are averaged.
        start_s: longest wait for the sites to appear.
        round_s: longest wait for answers in a round.
    """

    sites: tuple[str, ...]
    plan: Plan
    seed: int
    rule: Rule
    start_s: float
    round_s: float

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Job":
        """From :meth:`to_text`."""
        told = json.loads(text)
        plan, rule = Plan(**told["plan"]), Rule(**told["rule"])
        return cls(tuple(told["sites"]), plan, told["seed"], rule, told["start_s"], told["round_s"])


@dataclass(frozen=True)
class _Known:
    """A site that has said who it is."""

    name: str
    node: int
    classes: tuple[str, ...]
    features: int
    mass: float


def server_app() -> Any:
    """The ServerApp; its run configuration names the folder with the job, `folder`."""
    app = import_module("flwr.serverapp").ServerApp()

    def main(grid: Any, context: Any) -> None:
        folder = Path(str(context.run_config["folder"]))
        try:
            serve(grid, Job.from_text((folder / "job.json").read_text("utf-8")), folder)
        except Exception as error:
            # Whoever started us waits for a file; Flower writes the traceback into its log.
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            replace_file(folder / FAILED, json.dumps({"reason": reason}).encode())
            raise

    app.main()(main)
    return app


def client_app(at_home: AtHome | None = None) -> Any:
    """The ClientApp; the configuration of its node names the file with its rows, `rows`.

    Args:
        at_home: the training of a site; our gradient steps where it is left out.
    """
    flower = import_module("flwr.app")
    app = import_module("flwr.clientapp").ClientApp()
    train_here: AtHome = local_head if at_home is None else at_home

    def rows_of(context: Any) -> SiteRows:
        path = Path(str(context.node_config["rows"]))
        return rows_from_bytes(path.read_bytes(), str(path))

    def query(message: Any, context: Any) -> Any:
        rows = rows_of(context)
        said: dict[str, Any] = {
            "name": rows.name,
            "classes": sorted(set(rows.labels.tolist())),
            "features": int(rows.features.shape[1]),
            "mass": mass_of(rows),
        }
        return flower.Message(flower.RecordDict({"site": flower.ConfigRecord(said)}), reply_to=message)

    def train(message: Any, context: Any) -> Any:
        content = train_at_home(rows_of(context), message.content, train_here)
        return flower.Message(content, reply_to=message)

    app.query()(query)
    app.train()(train)
    return app


def train_at_home(rows: SiteRows, content: Any, at_home: AtHome) -> Any:
    """What a site answers to a `train` message.

    Args:
        rows: of the site.
        content: the records of the message.
        at_home: the training.
    """
    flower = import_module("flwr.app")
    turn = content["turn"]
    head = {name: array.numpy() for name, array in content["head"].items()}
    plan = Plan(**json.loads(str(turn["plan"])))
    own = at_home(rows, tuple(turn["classes"]), head, plan, int(turn["steps"]))
    arrays = {name: flower.Array(np.asarray(value)) for name, value in own.items()}
    said = flower.ConfigRecord({"round": int(turn["round"])})
    return flower.RecordDict({"head": flower.ArrayRecord(arrays), "said": said})


def serve(grid: Any, job: Job, folder: Path) -> None:
    """Runs the rounds and leaves the trained head and what happened in a folder.

    Args:
        grid: Flower's way to the sites.
        job: what to do.
        folder: where the result goes.

    Raises:
        InputError: too few sites or classes.
    """
    began = time.monotonic()
    known, refused = _introduced(grid, job)
    classes = classes_of({label for site in known for label in site.classes})
    rounds = Rounds([site.name for site in known], classes, known[0].features, job.plan, job.seed, job.rule)
    missed = dict.fromkeys(rounds.names, 0)
    never = [name for name in job.sites if name not in rounds.names and name not in {r.site for r in refused}]
    for _ in range(job.plan.rounds):
        turn = rounds.open()
        online = set(grid.get_node_ids())
        asked = [s for s in known if s.name in turn.steps and s.node in online and missed[s.name] < _PATIENCE]
        updates, faults, sent = _round(grid, rounds, turn, asked, job.round_s)
        rounds.sent_bytes += sent
        heard = {update.site for update in updates} | {fault.site for fault in faults}
        silent = [name for name in turn.steps if name not in heard]
        for site in asked:
            missed[site.name] = 0 if site.name in heard else missed[site.name] + 1
        rounds.close(turn, updates, [*never, *silent], [*refused, *faults])
        replace_file(folder / PROGRESS, json.dumps({"rounds": turn.round}).encode())
    replace_file(folder / HEAD, write_arrays(rounds.head))
    told = {
        "classes": classes,
        "sent_bytes": rounds.sent_bytes,
        "seconds": time.monotonic() - began,
        "log": [asdict(entry) for entry in rounds.log],
    }
    # Last: whoever waits for it finds the head already there.
    replace_file(folder / RESULT, json.dumps(told).encode())


def _introduced(grid: Any, job: Job) -> tuple[list[_Known], list[Refusal]]:
    """Waits for the sites and asks each who it is: those that fit, in the order of the job, and the others."""
    flower = import_module("flwr.app")
    end = time.monotonic() + job.start_s
    nodes: list[int] = []
    while len(nodes) < len(job.sites) and time.monotonic() < end:
        nodes = sorted(grid.get_node_ids())
        time.sleep(_POLL_S)
    messages = [
        flower.Message(
            flower.RecordDict({"ask": flower.ConfigRecord({"round": 0})}), node, "query", ttl=job.round_s, group_id="0"
        )
        for node in nodes
    ]
    said: dict[str, _Known] = {}
    refused: list[Refusal] = []
    for node, reply in _answers(grid, messages, job.round_s):
        site = _site_of(node, reply)
        if isinstance(site, Refusal):
            refused.append(site)
        elif site.name not in job.sites or site.name in said:
            refused.append(
                Refusal(site.name, 0, "not expected" if site.name not in job.sites else "a second of a name")
            )
        else:
            said[site.name] = site
    widths = [site.features for site in said.values()]
    # The width that most have is the agreed one.
    agreed = max(set(widths), key=lambda width: (widths.count(width), width), default=0)
    known = [said[name] for name in job.sites if name in said and said[name].features == agreed]
    refused += [
        Refusal(site.name, 0, f"{site.features} features, agreed are {agreed}")
        for site in said.values()
        if site.features != agreed
    ]
    if not known:
        raise InputError(f"flower: none of {len(job.sites)} sites can take part; {refused or 'none answered'}")
    return known, refused


def _site_of(node: int, reply: Any) -> _Known | Refusal:
    if reply.has_error():
        return Refusal(f"node {node}", 0, _reason(reply))
    try:
        said = reply.content["site"]
        name, classes = str(said["name"]), tuple(str(label) for label in said["classes"])
        site = _Known(name, node, classes, int(said["features"]), float(said["mass"]))
    except (KeyError, TypeError, ValueError):
        return Refusal(f"node {node}", 0, "an answer that does not say who it is")
    if len(name) > _LARGEST or not 0 < len(classes) <= _LARGEST or not 0 < site.mass < float("inf"):
        return Refusal(name[:_LARGEST], 0, "says no name, no classes or no mass that could be")
    return site


def _round(
    grid: Any, rounds: Rounds, turn: Turn, asked: Sequence[_Known], round_s: float
) -> tuple[list[Update], list[Refusal], int]:
    """Sends the head, waits for those of the sites: updates, answers that are none, bytes of the heads."""
    flower = import_module("flwr.app")
    names = {site.node: site for site in asked}
    messages: list[Any] = []
    sent = 0
    for site in asked:
        head = flower.ArrayRecord({name: flower.Array(value) for name, value in rounds.head.items()})
        sent += int(head.count_bytes())
        facts: dict[str, Any] = {
            "round": turn.round,
            "steps": turn.steps[site.name],
            "classes": list(rounds.classes),
            "plan": json.dumps(asdict(rounds.plan)),
        }
        content = flower.RecordDict({"head": head, "turn": flower.ConfigRecord(facts)})
        messages.append(flower.Message(content, site.node, "train", ttl=round_s, group_id=str(turn.round)))
    updates: list[Update] = []
    faults: list[Refusal] = []
    for node, reply in _answers(grid, messages, round_s):
        site = names[node]
        if reply.has_error():
            faults.append(Refusal(site.name, turn.round, _reason(reply)))
            continue
        try:
            record = reply.content["head"]
            sent += int(record.count_bytes())
            tree: dict[str, NDArray[Any]] = {str(name): array.numpy() for name, array in record.items()}
            number = int(reply.content["said"]["round"])
        except Exception as error:
            # Bytes of another machine: whatever decoding them raises is a fault of that site, not ours.
            faults.append(Refusal(site.name, turn.round, f"an answer that is no head ({type(error).__name__})"))
            continue
        # Its weight is what it said at first: a site cannot grow during the training.
        updates.append(Update(site.name, number, site.mass, tree))
    return updates, faults, sent


def _answers(grid: Any, messages: Sequence[Any], wait_s: float) -> Iterator[tuple[int, Any]]:
    """Answers as they come, with the node that was asked, until all are there or the time is over."""
    nodes = [message.metadata.dst_node_id for message in messages]
    waiting = {i: n for i, n in zip(grid.push_messages(messages), nodes, strict=True) if i} if messages else {}
    end = time.monotonic() + wait_s
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, reply
        if waiting:
            time.sleep(_POLL_S)


def _reason(reply: Any) -> str:
    """Why an answer is an error, in one line."""
    return " ".join(str(reply.error.reason or f"error {reply.error.code}").split())[:_LARGEST]
