"""One class-conditional generator of features, trained in rounds over the sites: its weights go round and are averaged.

A denoiser of rows (Karras et al. 2022, as `gmel.synthesis.diffusion.edm` for photos) that knows the class. Each site
trains it on its own rows, so with disjoint classes no site can keep what the network has learned of the classes of the
others; :func:`train_apart` trains the same network without rounds, to tell what the averaging costs from what the
network can do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpy.typing import NDArray
from safetensors.numpy import save as write_arrays

from gmel.federation.average import Rule, Update, aggregate
from gmel.federation.training import RoundLog, SiteRows
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.edm import NoiseLevels, scalings
from gmel.synthesis.diffusion.samplers import karras_sigmas, solve
from gmel.synthesis.photo import Floats

__all__ = ["GeneratorPlan", "NeuralFeatures", "SharedGenerator", "train_apart", "train_generator"]

_FREQUENCIES = 4
"""Waves over the noise level that the network reads."""
_LOWEST, _HIGHEST = 0.02, 20.0
"""Noise levels of the sampler, in deviations of a feature: below the first nothing is left to remove, at the second
nothing is left of the row."""
_LIKELY, _LEVELS, _NOISES = (0.05, 5.0), 12, 8
"""Noise levels over which the likelihood is summed, their number, and noises at each."""
_GRID = 64
"""Rows of a site are padded to a multiple of this: sites of almost the same size share a compiled program."""


class RowDenoiser(eqx.Module):
    """D(x; sigma, class) over standardised rows, with the preconditioning of EDM at sigma_data 1.

    Two hidden layers. The last layer starts at zero: at first D is the best estimate for rows of independent features
    of unit variance.
    """

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear
    features: int = eqx.field(static=True)
    classes: int = eqx.field(static=True)

    def __init__(self, features: int, classes: int, hidden: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        beside = classes + 2 * _FREQUENCIES
        self.first = eqx.nn.Linear(features + beside, hidden, key=keys[0])
        self.second = eqx.nn.Linear(hidden + beside, hidden, key=keys[1])
        last = eqx.nn.Linear(hidden, features, key=keys[2])
        self.last = jax.tree.map(jnp.zeros_like, last)
        self.features = features
        self.classes = classes

    def __call__(self, x: Float[Array, " features"], sigma: Float[Array, ""], kind: Int[Array, ""]) -> Array:
        """The clean row, from a noisy one, its noise level and its class."""
        c = scalings(sigma, 1.0)
        return c.skip * x + c.out * self.network(c.into * x, c.noise, kind)

    def network(self, x: Float[Array, " features"], noise: Float[Array, ""], kind: Int[Array, ""]) -> Array:
        """F: what the layers give for a scaled row."""
        waves = noise * 2.0 ** jnp.arange(_FREQUENCIES)
        beside = jnp.concatenate([jax.nn.one_hot(kind, self.classes), jnp.sin(waves), jnp.cos(waves)])
        hidden = jax.nn.silu(self.first(jnp.concatenate([x, beside])))
        hidden = hidden + jax.nn.silu(self.second(jnp.concatenate([hidden, beside])))
        return self.last(hidden)


@dataclass(frozen=True)
class GeneratorPlan:
    """How one generator is trained over the sites.

    Attributes:
        rounds: how often sites and server exchange the weights.
        local_steps: updates (Adam, begun anew in each round) of a site in a round.
        batch: rows of an update, drawn by their weights.
        hidden: width of the two hidden layers.
        rate: of Adam in the first round; it falls to zero along a cosine over the rounds.
        sampling_steps: evaluations of the network for a drawn row.
        drop_out: probability that a site is absent in a round.
        straggler: probability that a site that is there manages only a part of its steps.
    """

    rounds: int = 20
    local_steps: int = 40
    batch: int = 64
    hidden: int = 128
    rate: float = 5e-3
    sampling_steps: int = 12
    drop_out: float = 0.0
    straggler: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rounds", "local_steps", "batch", "hidden", "sampling_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"generator {name}: {getattr(self, name)}, must be at least 1")
        if not 0 < self.rate < float("inf"):
            raise InputError(f"generator rate: {self.rate}, must be positive and finite")
        for name in ("drop_out", "straggler"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, must be 0 or more and less than 1")


@dataclass(frozen=True, eq=False)
class NeuralFeatures:
    """A trained network that draws rows.

    Attributes:
        labels: the classes that it has learned.
        classes: names of its class inputs; more than `labels` where it has not seen all.
        denoiser: the network.
        steps: evaluations for a row.
    """

    labels: tuple[str, ...]
    classes: tuple[str, ...]
    denoiser: RowDenoiser
    steps: int

    def sample(self, label: str, count: int, seed: int) -> Floats:
        """Rows of a class, [count, features]; the same seed gives the same rows.

        Raises:
            InputError: a class that it has not learned, or a negative count.
        """
        if label not in self.labels:
            raise InputError(f"class {label!r}: not learned, must be one of {', '.join(self.labels)}")
        if count < 0:
            raise InputError(f"count is {count}; must not be negative")
        place = self.classes.index(label)
        return np.asarray(_drawn(self.denoiser, jax.random.key(seed), place, count, self.steps), np.float32)

    def log_likelihood(self, label: str, features: Floats) -> NDArray[np.float64]:
        """A lower bound of the logarithm of the density of rows in a class, up to a constant, [rows].

        The denoising error over log-spaced noise levels, with the same noise for every row and call.

        Raises:
            InputError: a class that it has not learned.

        Source: Kingma et al. 2021 (arXiv 2107.00630), equation 18.
        """
        if label not in self.labels:
            raise InputError(f"class {label!r}: not learned, must be one of {', '.join(self.labels)}")
        return np.asarray(_bound(self.denoiser, jnp.asarray(features), self.classes.index(label)), np.float64)

    def to_bytes(self) -> bytes:
        """What is sent: one safetensors file of the weights."""
        return write_arrays(_arrays(self.denoiser))


@dataclass(frozen=True, eq=False)
class SharedGenerator:
    """What rounds over the sites came to.

    Attributes:
        generator: of all classes of all sites.
        log: of every round.
        sent_bytes: up and down over all sites and rounds, from the serialised weights.
    """

    generator: NeuralFeatures
    log: tuple[RoundLog, ...]
    sent_bytes: int


def train_generator(
    sites: Sequence[SiteRows],
    plan: GeneratorPlan,
    seed: int,
    rule: Rule | None = None,
    deliver: Callable[[list[Update]], list[Update]] | None = None,
) -> SharedGenerator:
    """Trains one generator over all sites by averaging its weights (McMahan et al. 2017, arXiv 1602.05629).

    In this process; the sites of a round train at once.

    Args:
        sites: rows of the sites.
        plan: how.
        seed: of first weights, batches, noise, drop-outs and stragglers.
        rule: how updates are averaged; by the sum of the weights of a site's rows where it is left out.
        deliver: what the way to the server does to the updates of a round; nothing where it is left out.

    Raises:
        InputError: sites of one name, or a site without rows.
    """
    rows = _Rows.of(sites)
    weights = _first(rows, plan, seed)
    size = len(write_arrays(_arrays(weights)))
    mass = [float(site.weights.sum()) for site in sites]
    random = np.random.default_rng(seed)
    log: list[RoundLog] = []
    sent = 0
    for number in range(1, plan.rounds + 1):
        there = random.random(len(sites)) >= plan.drop_out
        slow = random.random(len(sites)) < plan.straggler
        steps = np.where(slow, random.integers(1, max(plan.local_steps, 2), len(sites)), plan.local_steps)
        local = rows.trained(weights, _keys(seed, number, len(sites)), steps, plan, number)
        trees = _arrays(local)
        updates = [
            Update(site.name, number, mass[place], {name: value[place] for name, value in trees.items()})
            for place, site in enumerate(sites)
            if there[place]
        ]
        sent += 2 * size * len(updates)
        absent = tuple(site.name for site, present in zip(sites, there, strict=True) if not present)
        late = {s.name: int(n) for s, n, p in zip(sites, steps, there, strict=True) if p and n < plan.local_steps}
        try:
            average = aggregate(updates if deliver is None else deliver(updates), _arrays(weights), number, rule)
        except InputError as error:
            # The round is lost, not the work so far.
            log.append(RoundLog(number, (), absent, late, (), str(error)))
            continue
        log.append(RoundLog(number, average.used, absent, late, average.refusals))
        weights = _filled(weights, average.tree)
    return SharedGenerator(NeuralFeatures(rows.classes, rows.classes, weights, plan.sampling_steps), tuple(log), sent)


def train_apart(sites: Sequence[SiteRows], plan: GeneratorPlan, seed: int) -> dict[str, NeuralFeatures]:
    """The same network trained as long at each site, by itself, without rounds: what an exchange would send.

    Returns:
        A generator by site, each of its own classes.

    Raises:
        InputError: sites of one name, or a site without rows.
    """
    rows = _Rows.of(sites)
    start = _first(rows, plan, seed)
    local = jax.tree.map(lambda value: jnp.stack([value] * len(sites)), start)
    full = np.full(len(sites), plan.local_steps)
    for number in range(1, plan.rounds + 1):
        local = rows.trained(local, _keys(seed, number, len(sites)), full, plan, number, apart=True)
    found: dict[str, NeuralFeatures] = {}
    for place, site in enumerate(sites):
        own = tuple(sorted(set(site.labels.tolist())))
        weights = jax.tree.map(lambda value, at=place: value[at], local)
        found[site.name] = NeuralFeatures(own, rows.classes, weights, plan.sampling_steps)
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of the sites on one grid.

    Attributes:
        classes: of all sites.
        features: [sites, rows, features].
        kinds: place among the classes, [sites, rows].
        chances: logarithm of the chance to be drawn; minus infinity for the padding, [sites, rows].
    """

    classes: tuple[str, ...]
    features: Float[Array, "sites rows features"]
    kinds: Int[Array, "sites rows"]
    chances: Float[Array, "sites rows"]

    @classmethod
    def of(cls, sites: Sequence[SiteRows]) -> "_Rows":
        names = [site.name for site in sites]
        if not sites or len(set(names)) != len(names) or not all(site.labels.size for site in sites):
            raise InputError("sites: each needs a name of its own and at least one photo")
        classes = tuple(sorted({str(label) for site in sites for label in site.labels}))
        most = -(-max(site.labels.size for site in sites) // _GRID) * _GRID
        features = np.zeros((len(sites), most, sites[0].features.shape[1]), np.float32)
        kinds = np.zeros((len(sites), most), np.int32)
        chances = np.full((len(sites), most), -np.inf, np.float32)
        for place, site in enumerate(sites):
            rows = site.labels.size
            features[place, :rows] = site.features
            kinds[place, :rows] = [classes.index(str(label)) for label in site.labels]
            chances[place, :rows] = np.log(site.weights / site.weights.sum())
        return cls(classes, jnp.asarray(features), jnp.asarray(kinds), jnp.asarray(chances))

    def trained(
        self,
        start: RowDenoiser,
        keys: PRNGKeyArray,
        steps: NDArray[Any],
        plan: GeneratorPlan,
        number: int,
        apart: bool = False,
    ) -> RowDenoiser:
        """The networks of all sites after a round, stacked; from one, or where they are `apart` from each its own."""
        rate = plan.rate * 0.5 * (1.0 + np.cos(np.pi * (number - 1) / plan.rounds))
        return _local_networks(
            start,
            self.features,
            self.kinds,
            self.chances,
            keys,
            jnp.asarray(steps),
            jnp.asarray(rate, jnp.float32),
            plan.local_steps,
            plan.batch,
            apart,
        )


def _first(rows: _Rows, plan: GeneratorPlan, seed: int) -> RowDenoiser:
    wide = rows.features.shape[2]
    return RowDenoiser(wide, len(rows.classes), plan.hidden, jax.random.fold_in(jax.random.key(seed), 0))


def _keys(seed: int, number: int, sites: int) -> PRNGKeyArray:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), sites)


def _arrays(denoiser: RowDenoiser) -> dict[str, NDArray[Any]]:
    """The weights by name, as they are sent."""
    layers = {"first": denoiser.first, "second": denoiser.second, "last": denoiser.last}
    return {f"{name}.{part}": np.asarray(getattr(layer, part)) for name, layer in layers.items() for part in _PARTS}


_PARTS = ("weight", "bias")


def _filled(denoiser: RowDenoiser, arrays: dict[str, NDArray[Any]]) -> RowDenoiser:
    """The network with the weights of :func:`_arrays`."""

    def places(tree: RowDenoiser) -> list[Any]:
        return [getattr(layer, part) for layer in (tree.first, tree.second, tree.last) for part in _PARTS]

    values = [jnp.asarray(arrays[f"{name}.{part}"]) for name in ("first", "second", "last") for part in _PARTS]
    return eqx.tree_at(places, denoiser, values)


@partial(jax.jit, static_argnames=("most", "batch", "apart"))
def _local_networks(
    start: RowDenoiser,
    features: Float[Array, "sites rows features"],
    kinds: Int[Array, "sites rows"],
    chances: Float[Array, "sites rows"],
    keys: PRNGKeyArray,
    steps: Int[Array, " sites"],
    rate: Float[Array, ""],
    most: int,
    batch: int,
    apart: bool,
) -> RowDenoiser:
    """The networks of all sites after their steps; arrays of [sites, ...]."""
    levels = NoiseLevels()
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))

    def loss(own: RowDenoiser, x: Array, kind: Array, key: PRNGKeyArray) -> Array:
        # The EDM loss weighted by 1 / c_out^2: the plain squared error of the network against its target.
        level_key, noise_key = jax.random.split(key)
        sigma = levels.draw(level_key, batch)
        c = scalings(sigma, 1.0)
        noisy = x + sigma[:, None] * jax.random.normal(noise_key, x.shape)
        target = (x - c.skip[:, None] * noisy) / c.out[:, None]
        found = jax.vmap(own.network)(c.into[:, None] * noisy, c.noise, kind)
        return jnp.mean(jnp.square(found - target))

    def site(own: RowDenoiser, x: Array, kind: Array, chance: Array, key: PRNGKeyArray, count: Array) -> RowDenoiser:
        def step(number: int, carry: tuple[RowDenoiser, Any]) -> tuple[RowDenoiser, Any]:
            net, state = carry
            batch_key, loss_key = jax.random.split(jax.random.fold_in(key, number))
            chosen = jax.random.categorical(batch_key, chance, shape=(batch,))
            slope = jax.grad(loss)(net, x[chosen], kind[chosen], loss_key)
            change, state = adam.update(slope, state)
            moving = jnp.where(number < count, rate, 0.0)
            return jax.tree.map(lambda value, by: value - moving * by, net, change), state

        return jax.lax.fori_loop(0, most, step, (own, adam.init(own)))[0]  # pyright: ignore[reportArgumentType]

    return jax.vmap(site, in_axes=(0 if apart else None, 0, 0, 0, 0, 0))(start, features, kinds, chances, keys, steps)


@partial(jax.jit, static_argnames=("count", "steps"))
def _drawn(
    denoiser: RowDenoiser, key: PRNGKeyArray, place: int, count: int, steps: int
) -> Float[Array, "count features"]:
    """Rows along the probability flow, from pure noise."""
    kind = jnp.full((count,), place)
    start = _HIGHEST * jax.random.normal(key, (count, denoiser.features))

    def clean(x: Array, sigma: Array) -> Array:
        return jax.vmap(denoiser, in_axes=(0, None, 0))(x, sigma, kind)

    return solve(clean, start, karras_sigmas(steps, _LOWEST, _HIGHEST))


@jax.jit
def _bound(denoiser: RowDenoiser, rows: Float[Array, "rows features"], place: int) -> Float[Array, " rows"]:
    """-1/2 sum of the squared error of the denoiser over sigma^2, times the step of ln sigma."""
    kind = jnp.full((rows.shape[0],), place)
    levels = jnp.geomspace(_LIKELY[0], _LIKELY[1], _LEVELS)
    noises = jax.random.normal(jax.random.key(0), (_LEVELS, _NOISES, denoiser.features))
    stride = jnp.log(levels[1] / levels[0])

    def at_level(total: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, noise = given
        found = jax.vmap(lambda one: jax.vmap(denoiser, in_axes=(0, None, 0))(rows + sigma * one, sigma, kind))(noise)
        return total - 0.5 * stride * jnp.mean(jnp.sum((found - rows) ** 2, -1), 0) / sigma**2, None

    return jax.lax.scan(at_level, jnp.zeros(rows.shape[0]), (levels, noises))[0]
