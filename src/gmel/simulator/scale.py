"""What networks must know of a plant: constants that bring its quantities to order one (no running statistics), and
which columns and levels its observations have."""

from typing import NamedTuple

from gmel.scenario.schema import Scenario
from gmel.simulator.state import chosen_weights

__all__ = ["Identities", "Scale", "identities_of", "scale_of"]


class Identities(NamedTuple):
    """How many servers, services of a server, and models observations tell apart by number
    (`gmel.simulator.state.OPTION_IDENTITY`)."""

    servers: int
    services: int
    models: int


class Scale(NamedTuple):
    """One unit of each quantity, and the shape of the observations."""

    time_s: float
    size_bit: float
    work: float
    levels: int = 1
    """Ways to do a task at one place (`gmel.simulator.levels`)."""
    other_costs: bool = False
    """Whether observations have the column `gmel.simulator.state.OTHER_COST`."""
    identities: Identities | None = None
    """What observations tell apart by number; None where devices know the quality of their options."""
    share_weights: tuple[str, ...] = ()
    """Which of the columns `gmel.simulator.state.SHARE_WEIGHTS` they have."""


def identities_of(scenario: Scenario) -> Identities | None:
    """What observations tell apart by number: nothing unless quality is hidden."""
    if scenario.slot.quality_known:
        return None
    return Identities(len(scenario.servers), scenario.services, len(scenario.models))


def scale_of(scenario: Scenario) -> Scale:
    """Service time of a mean request on a mean GPU, mean size, mean work."""
    work = scenario.mean_work
    speed = scenario.capacity / sum(server.gpus for server in scenario.servers)
    return Scale(
        work / speed,
        max(scenario.mean_bits_in, 1.0),
        work,
        scenario.levels,
        scenario.counts_more_than_latency,
        identities_of(scenario),
        chosen_weights(scenario.devices.band_weights, scenario.tasks.cpu_weights),
    )
