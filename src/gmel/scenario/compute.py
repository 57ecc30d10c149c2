"""The sections of a scenario about servers: what they are, how they work on tasks, how they fail."""

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Finite, Name, NonNegative, Positive, Section, Share
from gmel.scenario.quality import Quality

__all__ = ["Cache", "Failures", "HostedService", "Server", "Service", "Stay"]


class HostedService(Section):
    """One of the services that a server offers, a version of the models of the catalogue: devices choose it with the
    place (ADSAC).

    The quality of a result is `base` of its model, one number for each of [[models]] in order (none: 0), plus the law
    by steps: `quality`, else that of the server, else that of the model.
    """

    name: Name
    quality: Quality | None = None
    base: tuple[Share, ...] = Field(default=(), max_length=256)


class Stay(Section):
    """A time in which a server is there, counted from the start of the episode: [from_s, to_s); no `to_s`: for good."""

    from_s: NonNegative = 0.0
    to_s: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.to_s is not None and self.to_s <= self.from_s:
            raise ValueError(f"to_s = {self.to_s:g} must exceed from_s = {self.from_s:g}")
        return self

    def within_s(self, episode_s: float) -> float:
        """How much of an episode it covers."""
        to_s = episode_s if self.to_s is None else min(self.to_s, episode_s)
        return max(0.0, to_s - self.from_s)


class Server(Section):
    """An edge server: `gpus` alike accelerators of `speed` work units per second each, one radio cell.

    `concurrency` is the most tasks in service at once where servers share their time (none: no limit), `round_share`
    the share of a denoising round that grows with the batch, a / (a + b) of a X + b (see :class:`Service`).

    `places`: most tasks at the server at once, waiting or in service; one more is rejected (sharing and batching).
    `capacity`: denoising steps that it can have in progress (discipline `capacity`). `quality`: of what is generated
    here, in place of that of the model. `services`: what it offers, if there is a choice.

    A server without a `cell` (a cloud) is reached through the device's own cell. What comes to a server from another
    cell takes `backhaul_delay_s` and its bits over `backhaul_bps` (none: the delay alone), without contention. `price`
    is paid for each work unit done there.

    `present`: when it is there (none: always). A server that is away starts nothing; what it has begun it finishes.
    """

    name: Name
    speed: Positive
    gpus: int = Field(default=1, ge=1, le=64)
    concurrency: int | None = Field(default=None, ge=1, le=1024)
    places: int | None = Field(default=None, ge=1, le=100_000)
    capacity: Positive | None = None
    round_share: Share = 1.0
    memory_gb: Positive = 24.0
    power_w: NonNegative = 5.0
    switch_power_w: NonNegative = 5.0
    price: NonNegative = 0.0
    quality: Quality | None = None
    services: tuple[HostedService, ...] = Field(default=(), max_length=16)
    cell: bool = True
    backhaul_bps: Positive | None = None
    backhaul_delay_s: NonNegative = 0.0
    position_m: tuple[Finite, Finite] | None = None
    present: tuple[Stay, ...] | None = Field(default=None, min_length=1, max_length=16)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for before, after in itertools.pairwise(self.present or ()):
            if before.to_s is None or after.from_s < before.to_s:
                raise ValueError(
                    f"present: the stay from_s = {after.from_s:g} begins before the one before it ends; "
                    "give them in order of time, without overlap"
                )
        return self

    def share_present(self, episode_s: float) -> float:
        """Share of an episode in which it is there."""
        if self.present is None:
            return 1.0
        return sum(stay.within_s(episode_s) for stay in self.present) / episode_s

    @property
    def laws(self) -> list[Quality | None]:
        """Law of the quality of each service, else of the server; None where it is that of the model."""
        return [service.quality or self.quality for service in self.services] or [self.quality]


class Service(Section):
    """How a server works on its tasks.

    `fifo`: one task a GPU, first in, first out. `sharing`: all tasks share the GPUs equally (processor sharing).
    `batching`: up to `servers.concurrency` tasks run together; one round of X tasks takes a X + b, so each is slowed
    down by 1 + round_share (X - 1) on one GPU. `capacity`: no queue; a task takes as many units of `servers.capacity`
    as it has denoising steps, for its own time whatever the others do; one that does not fit is rejected, or crashes
    the server, which loses all its tasks (`on_overload`; AGOD). `gang`: first in, first out, a task needs several GPUs
    at once (`models.gangs`; EAT).

    Admission control: with `max_wait_s` a task that would wait longer than that for its start is turned away.
    """

    discipline: Literal["fifo", "sharing", "batching", "capacity", "gang"] = "fifo"
    on_overload: Literal["crash", "reject"] = "crash"
    max_wait_s: Positive | None = None


class Failures(Section):
    """Servers that fail, come back, or are slow for a slot; what happens in a slot holds for the whole slot.

    Up and down times are exponential with the given means (no `mean_up_s`: nothing fails), rounded up to slots. A
    server that is down serves nothing; uploads to it go on and wait. When it is back, the tasks in service go on where
    they stopped (`resume`) or from the beginning (`restart`). `straggle` is the probability that a server has only
    `straggle_speed` of its speed in a slot.
    """

    mean_up_s: Positive | None = None
    mean_down_s: Positive = 60.0
    on_failure: Literal["resume", "restart"] = "restart"
    straggle: Share = 0.0
    straggle_speed: Annotated[float, Field(ge=1e-6, le=1)] = 0.25

    @property
    def any(self) -> bool:
        """Whether a server is ever slower than it should be."""
        return self.mean_up_s is not None or self.straggle > 0

    @property
    def availability(self) -> float:
        """Long-run mean of a server's relative speed."""
        up = 1.0 if self.mean_up_s is None else self.mean_up_s / (self.mean_up_s + self.mean_down_s)
        return up * (1.0 - self.straggle * (1.0 - self.straggle_speed))


class Cache(Section):
    """Which models a server holds, chosen every `decision_slots` slots and kept until the next choice.

    A task whose model its server does not hold loads it for itself alone, each time. Without this section models are
    loaded on demand and the least recently used leave. `policy`, where nobody else decides: `popular` (the most popular
    that fit, the same everywhere), `spread` (every model somewhere, then every model twice, ...), `recent` (those most
    asked for in the cell of the server since the last choice), `random`.
    """

    decision_slots: int = Field(ge=1, le=1_000_000)
    policy: Literal["popular", "spread", "recent", "random"] = "popular"
