"""Federated training of the linear head: sites take gradient steps at home, the average goes round.

Multinomial logistic regression on features that all sites standardise alike; its objective over all sites is the one of
`gmel.synthesis.detector.linear` on the pooled rows, so that with enough rounds both agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import NDArray
from safetensors.numpy import save as write_arrays

from gmel.evaluation.progress import Reporter
from gmel.federation.average import Refusal, Rule, Update, aggregate
from gmel.scenario.errors import InputError
from gmel.synthesis.photo import GOOD, Floats

__all__ = [
    "ALGORITHMS",
    "Elsewhere",
    "Head",
    "Plan",
    "RoundLog",
    "Rounds",
    "SiteRows",
    "Trained",
    "Turn",
    "classes_of",
    "local_head",
    "mass_of",
    "train_head",
]

ALGORITHMS = ("fedavg", "fedprox", "fedadam")

Head = dict[str, NDArray[np.float32]]
"""`weights` [classes, features] and `bias` [classes]."""


@dataclass(frozen=True, eq=False)
class SiteRows:
    """What a site trains on.

    Attributes:
        name: of the site.
        features: [rows, features], standardised as agreed.
        labels: [rows].
        weights: of the rows within their class over all sites: the rows of a class weigh one together, [rows].
    """

    name: str
    features: Floats
    labels: NDArray[np.str_]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        algorithm: `fedavg`; `fedprox`: with a pull towards the average of the last round; `fedadam`: the server takes
            Adam steps along the mean change.
        rounds: how often sites and server exchange the head.
        local_steps: gradient steps of a site in a round.
        rate: length of a local step.
        proximal: strength of the pull of `fedprox`.
        server_rate: length of a server step of `fedadam`.
        penalty: strength of the L2 penalty on the mean loss.
        drop_out: probability that a site is absent in a round.
        straggler: probability that a site that is there manages only a part of its steps.

    Source: McMahan et al. 2017 (arXiv 1602.05629); Li et al. 2020 (arXiv 1812.06127); Reddi et al. 2021 (arXiv
    2003.00295).
    """

    algorithm: str = "fedavg"
    rounds: int = 10
    local_steps: int = 20
    rate: float = 0.05
    proximal: float = 0.1
    server_rate: float = 0.05
    penalty: float = 1e-2
    drop_out: float = 0.0
    straggler: float = 0.0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise InputError(f"algorithm: {self.algorithm!r}, must be one of {', '.join(ALGORITHMS)}")
        for name in ("rounds", "local_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, must be at least 1")
        for name in ("rate", "server_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, must be positive and finite")
        for name in ("proximal", "penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, must not be negative")
        for name in ("drop_out", "straggler"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, must be 0 or more and less than 1")


@dataclass(frozen=True)
class RoundLog:
    """What happened in a round.

    Attributes:
        round: its number, from 1.
        used: sites in the average.
        absent: sites that dropped out.
        late: steps of the sites that did not manage all.
        refusals: updates that were not used.
        note: why the round changed nothing, where it did not.
    """

    round: int
    used: tuple[str, ...]
    absent: tuple[str, ...]
    late: dict[str, int]
    refusals: tuple[Refusal, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Trained:
    """A head of all sites.

    Attributes:
        classes: names of the columns, `GOOD` first where it is one.
        weights: [classes, features].
        bias: [classes].
        log: of every round.
        sent_bytes: up and down over all sites and rounds, from the serialised heads.
    """

    classes: tuple[str, ...]
    weights: Floats
    bias: Floats
    log: tuple[RoundLog, ...]
    sent_bytes: int

    def logits(self, features: Floats) -> Floats:
        """[rows, classes], of standardised features."""
        return features @ self.weights.T + self.bias


Elsewhere = Callable[[Sequence[SiteRows], Plan, int, Reporter], Trained]
"""Federated training of a head in other processes: from rows, plan and seed, as :func:`train_head`."""


@dataclass(frozen=True)
class Turn:
    """Who takes part in a round.

    Attributes:
        round: its number, from 1.
        steps: gradient steps of each site that is there.
        absent: sites that drop out.
        late: steps of those that do not manage all.
    """

    round: int
    steps: dict[str, int]
    absent: tuple[str, ...]
    late: dict[str, int]


class Rounds:
    """The server's side of federated training, wherever the sites are: it says who takes part, and closes rounds.

    Attributes:
        head: the head of all sites as it stands.
        log: of the rounds that are closed.
        sent_bytes: counted by whoever moves the heads.
    """

    def __init__(
        self, names: Sequence[str], classes: tuple[str, ...], features: int, plan: Plan, seed: int, rule: Rule | None
    ) -> None:
        self.names = tuple(names)
        self.classes = classes
        self.plan = plan
        self.head: Head = {
            "weights": np.zeros((len(classes), features), np.float32),
            "bias": np.zeros(len(classes), np.float32),
        }
        self.log: list[RoundLog] = []
        self.sent_bytes = 0
        self._rule = rule
        self._random = np.random.default_rng(seed)
        self._server = optax.adam(plan.server_rate, b1=0.9, b2=0.99, eps=1e-3)
        self._moments = self._server.init(self.head)  # pyright: ignore[reportArgumentType]

    def open(self) -> Turn:
        """The next round: drop-outs and stragglers are drawn."""
        plan, count = self.plan, len(self.names)
        there = self._random.random(count) >= plan.drop_out
        slow = self._random.random(count) < plan.straggler
        steps = np.where(slow, self._random.integers(1, max(plan.local_steps, 2), count), plan.local_steps)
        taking = {name: int(n) for name, n, present in zip(self.names, steps, there, strict=True) if present}
        absent = tuple(name for name in self.names if name not in taking)
        late = {name: n for name, n in taking.items() if n < plan.local_steps}
        return Turn(len(self.log) + 1, taking, absent, late)

    def close(
        self, turn: Turn, updates: list[Update], silent: Sequence[str] = (), refused: Sequence[Refusal] = ()
    ) -> None:
        """Averages what came. A round without any usable update changes nothing.

        Args:
            turn: the round, as it was opened.
            updates: that came.
            silent: sites that were asked and gave no answer, or could not be asked.
            refused: sites whose answer is no update.
        """
        absent = (*turn.absent, *silent)
        try:
            average = aggregate(updates, self.head, turn.round, self._rule)
        except InputError as error:
            # The round is lost, not the work so far.
            self.log.append(RoundLog(turn.round, (), absent, turn.late, tuple(refused), str(error)))
            return
        refusals = (*refused, *average.refusals)
        self.log.append(RoundLog(turn.round, average.used, absent, turn.late, refusals))
        if self.plan.algorithm == "fedadam":
            change = {key: self.head[key] - average.tree[key] for key in self.head}
            step, self._moments = self._server.update(change, self._moments)  # pyright: ignore[reportArgumentType]
            moved: Any = optax.apply_updates(self.head, step)  # pyright: ignore[reportArgumentType]
            self.head = {key: np.asarray(moved[key], np.float32) for key in self.head}
        else:
            self.head = average.tree

    def trained(self) -> Trained:
        """The head and what happened."""
        return Trained(self.classes, self.head["weights"], self.head["bias"], tuple(self.log), self.sent_bytes)


def train_head(
    sites: Sequence[SiteRows],
    plan: Plan,
    seed: int,
    rule: Rule | None = None,
    deliver: Callable[[list[Update]], list[Update]] | None = None,
) -> Trained:
    """Trains one head over all sites, in this process.

    Args:
        sites: rows of the sites; together at least two classes.
        plan: how.
        seed: of drop-outs and stragglers.
        rule: how updates are averaged.
        deliver: what the way to the server does to the updates of a round; nothing where it is left out.

    Raises:
        InputError: fewer than two classes, sites of one name, or a site without rows.
    """
    names = [site.name for site in sites]
    if len(set(names)) != len(names) or not all(site.labels.size for site in sites):
        raise InputError("sites: each needs a name of its own and at least one photo")
    classes = classes_of({str(label) for site in sites for label in site.labels})
    features, targets, weights = _padded(sites, classes)
    mass = {site.name: mass_of(site) for site in sites}
    rounds = Rounds(names, classes, features.shape[2], plan, seed, rule)
    size = len(write_arrays(rounds.head))
    for _ in range(plan.rounds):
        turn = rounds.open()
        steps = jnp.asarray([turn.steps.get(name, 0) for name in names])
        local = _local_heads(rounds.head, features, targets, weights, steps, *_local(plan))
        updates = [
            Update(name, turn.round, mass[name], {key: np.asarray(value[place]) for key, value in local.items()})
            for place, name in enumerate(names)
            if name in turn.steps
        ]
        rounds.sent_bytes += 2 * size * len(updates)
        rounds.close(turn, updates if deliver is None else deliver(updates))
    return rounds.trained()


def local_head(site: SiteRows, classes: tuple[str, ...], head: Head, plan: Plan, steps: int) -> Head:
    """The head of one site after its steps from the common one; what a site does at home.

    Args:
        site: its rows.
        classes: columns of the head.
        head: of all sites.
        plan: how.
        steps: gradient steps, at most those of the plan.
    """
    features, targets, weights = _padded([site], classes)
    local = _local_heads(head, features, targets, weights, jnp.asarray([steps]), *_local(plan))
    return {key: np.asarray(value[0]) for key, value in local.items()}


def mass_of(site: SiteRows) -> float:
    """What a site counts in the average: the sum of the weights of its rows."""
    return float(site.weights.astype(np.float64).sum())


def classes_of(found: set[str]) -> tuple[str, ...]:
    """Columns of a head that knows these classes.

    Raises:
        InputError: fewer than two.
    """
    if len(found) < 2:
        raise InputError(f"photos of {' and '.join(sorted(found)) or 'nothing'} alone; a detector needs two classes")
    return (*((GOOD,) if GOOD in found else ()), *(name for name in sorted(found) if name != GOOD))


def _local(plan: Plan) -> tuple[int, float, float, float]:
    """What local steps take of a plan: their number, length, penalty and pull."""
    return plan.local_steps, plan.rate, plan.penalty, plan.proximal if plan.algorithm == "fedprox" else 0.0


def _padded(
    sites: Sequence[SiteRows], classes: tuple[str, ...]
) -> tuple[Float[Array, "sites rows features"], Float[Array, "sites rows classes"], Float[Array, "sites rows"]]:
    """Rows of the sites on one grid; the weights of a site sum to one, those of the padding are zero."""
    most = max(site.labels.size for site in sites)
    wide = sites[0].features.shape[1]
    features = np.zeros((len(sites), most, wide), np.float32)
    targets = np.zeros((len(sites), most, len(classes)), np.float32)
    weights = np.zeros((len(sites), most), np.float32)
    for place, site in enumerate(sites):
        rows = site.labels.size
        features[place, :rows] = site.features
        targets[place, np.arange(rows), [classes.index(str(label)) for label in site.labels]] = 1.0
        weights[place, :rows] = site.weights / site.weights.sum()
    return jnp.asarray(features), jnp.asarray(targets), jnp.asarray(weights)


@partial(jax.jit, static_argnames=("most",))
def _local_heads(
    head: dict[str, Array],
    features: Float[Array, "sites rows features"],
    targets: Float[Array, "sites rows classes"],
    weights: Float[Array, "sites rows"],
    steps: Array,
    most: int,
    rate: float,
    penalty: float,
    pull: float,
) -> dict[str, Array]:
    """The heads of all sites after their steps from a common head; arrays of [sites, ...]."""

    def loss(own: dict[str, Array], x: Array, y: Array, w: Array) -> Array:
        logits = x @ own["weights"].T + own["bias"]
        entropy = jnp.sum(w * optax.softmax_cross_entropy(logits, y))
        away = sum(jnp.sum(jnp.square(own[key] - head[key])) for key in own)
        return entropy + 0.5 * penalty * jnp.sum(jnp.square(own["weights"])) + 0.5 * pull * away

    def site(x: Array, y: Array, w: Array, count: Array) -> dict[str, Array]:
        def step(number: int, own: dict[str, Array]) -> dict[str, Array]:
            slope = jax.grad(loss)(own, x, y, w)
            moving = jnp.where(number < count, rate, 0.0)
            return jax.tree.map(lambda value, change: value - moving * change, own, slope)

        return jax.lax.fori_loop(0, most, step, head)

    return jax.vmap(site)(features, targets, weights, steps)
