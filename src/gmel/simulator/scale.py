"""Constants that bring the quantities of a plant to order one, for networks. Constants, not running statistics."""

from typing import NamedTuple

from gmel.scenario.schema import Scenario

__all__ = ["Scale", "scale_of"]


class Scale(NamedTuple):
    """One unit of each quantity, for the networks of a plant."""

    time_s: float
    size_bit: float
    work: float


def scale_of(scenario: Scenario) -> Scale:
    """Service time of a mean request on a mean GPU, mean size, mean work."""
    work = scenario.mean_work
    speed = scenario.capacity / sum(server.gpus for server in scenario.servers)
    return Scale(work / speed, max(scenario.mean_bits_in, 1.0), work)
