"""What networks must know of a plant: constants that bring its quantities to order one (no running statistics), and
which columns and levels its observations have."""

from typing import NamedTuple

from gmel.scenario.schema import Scenario
from gmel.simulator.state import chosen_weights

__all__ = ["Scale", "scale_of"]


class Scale(NamedTuple):
    """One unit of each quantity, and the shape of the observations."""

    time_s: float
    size_bit: float
    work: float
    levels: int = 1
    """Ways to do a task at one place (`gmel.simulator.levels`)."""
    other_costs: bool = False
    """Whether observations have the column `gmel.simulator.state.OTHER_COST`."""
    share_weights: tuple[str, ...] = ()
    """Which of the columns `gmel.simulator.state.SHARE_WEIGHTS` they have."""


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
        chosen_weights(scenario.devices.band_weights, scenario.tasks.cpu_weights),
    )
