"""Places from maps: sites and users by latitude and longitude become servers and devices of a scenario, in metres."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gmel.scenario.errors import InputError
from gmel.scenario.load import validate_scenario
from gmel.scenario.schema import Scenario

__all__ = ["EARTH_RADIUS_M", "Placed", "on_plane_m", "place"]

EARTH_RADIUS_M = 6_371_008.8
"""Mean radius of the Earth (IUGG)."""

_MARGIN_M = 10.0
_MOST_SPAN_M = 50_000.0

Places = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Placed:
    """A scenario with its new places, and what a user should know of it."""

    scenario: Scenario
    notes: tuple[str, ...]


def on_plane_m(degrees: Places, centre: tuple[float, float]) -> Places:
    """East and north of a centre in metres, [places, 2] (equirectangular projection: good for a town, not a country).

    Args:
        degrees: latitude, longitude, [places, 2].
        centre: latitude, longitude.
    """
    north = EARTH_RADIUS_M * np.radians(degrees[:, 0] - centre[0])
    east = EARTH_RADIUS_M * np.cos(np.radians(centre[0])) * np.radians(degrees[:, 1] - centre[1])
    return np.stack([east, north], axis=1)


def place(scenario: Scenario, sites: Places, users: Places | None, servers: int | None = None) -> Placed:
    """The scenario with its servers on sites and its devices where users are.

    The hall becomes the rectangle around all places with 10 m to spare, its origin in the south-west. More sites than
    servers: the hardware of the scenario's servers repeats in its order.

    Args:
        scenario: the plant; its radio must have geometry.
        sites: latitude and longitude of the servers, [sites, 2].
        users: of the devices, [users, 2]; None leaves the devices as they are.
        servers: how many of the sites, from the first on, get a server; by default as many as the scenario has.

    Raises:
        InputError: the radio has no geometry, not so many sites, or places farther apart than 50 km.
    """
    if scenario.radio.model != "inf":
        raise InputError(
            f"radio.model = {scenario.radio.model!r}: places have no effect on it; use a scenario with 'inf'"
        )
    wanted = len(scenario.servers) if servers is None else servers
    if not 1 <= wanted <= len(sites):
        raise InputError(f"--count {wanted}: must be between 1 and the {len(sites)} sites of the file")
    sites = sites[:wanted]
    everything = sites if users is None else np.concatenate([sites, users])
    low, high = everything.min(axis=0), everything.max(axis=0)
    centre = (float(0.5 * (low[0] + high[0])), float(0.5 * (low[1] + high[1])))
    corner = on_plane_m(np.stack([low, high]), centre)
    span = corner[1] - corner[0]
    if span.max() > _MOST_SPAN_M:
        raise InputError(
            f"places are {span.max() / 1000:.0f} km apart, at most {_MOST_SPAN_M / 1000:.0f} km are allowed; "
            "give those of one town"
        )
    origin = corner[0] - _MARGIN_M
    data: dict[str, Any] = scenario.model_dump(mode="json", exclude_none=True)
    data["radio"]["hall_m"] = np.round(span + 2 * _MARGIN_M, 1).tolist()
    kinds = data["servers"]
    data["servers"] = []
    for number, spot in enumerate(np.round(on_plane_m(sites, centre) - origin, 1).tolist()):
        kind = kinds[number % len(kinds)]
        name = kind["name"] if number < len(kinds) else f"{kind['name']}-{number // len(kinds) + 1}"
        data["servers"].append({**kind, "name": name, "position_m": spot})
    if users is not None:
        data["devices"]["count"] = len(users)
        data["devices"]["positions_m"] = np.round(on_plane_m(users, centre) - origin, 1).tolist()
    else:
        data["devices"].pop("positions_m", None)
    placed = validate_scenario(data, f"scenario {scenario.name} with its new places")
    notes = [f"{wanted} servers and {placed.devices.count} devices on {span[0]:.0f} x {span[1]:.0f} m"]
    if span.max() > 600:
        notes.append(
            "TR 38.901 states the InF path loss for halls up to 600 m: farther links are extrapolated, and devices far "
            "from every server run their tasks themselves"
        )
    return Placed(placed, tuple(notes))
