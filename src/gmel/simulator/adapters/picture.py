"""A plain picture of a slot for the adapters: how busy the servers are, and where the requests went."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from gmel.scenario.schema import Scenario

__all__ = ["SlotPicture", "draw", "write"]


class SlotPicture(NamedTuple):
    """What is shown."""

    slot: int
    backlog_s: Float[np.ndarray, "servers"]
    """Time until a GPU of each server is free."""
    sent: Int[np.ndarray, "options"]
    """Requests of the last slot by place, in whatever manner they are done."""
    reward: float
    """Reward of the team in the last slot."""


def write(picture: SlotPicture, scenario: Scenario) -> str:
    """The picture as text, one line a server."""
    longest = max(len("devices"), *(len(server.name) for server in scenario.servers))
    lines = [f"slot {picture.slot}, reward {picture.reward:.2f}", f"{'devices':{longest}} sent {picture.sent[0]:3d}"]
    for server, backlog_s, sent in zip(scenario.servers, picture.backlog_s, picture.sent[1:], strict=True):
        bar = "#" * min(40, round(float(backlog_s) / scenario.slot.length_s * 4))
        lines.append(f"{server.name:{longest}} sent {sent:3d} backlog {float(backlog_s):7.2f} s {bar}")
    return "\n".join(lines)


def draw(picture: SlotPicture, scenario: Scenario) -> UInt8[np.ndarray, "height width 3"]:
    """The picture as an image, 300 x 600 pixels."""
    # Figures without pyplot: no window, no state that instances would share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 -- slow to import, seldom used
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [server.name for server in scenario.servers]
    left.barh(names, picture.backlog_s)
    left.set_xlim(0, max(5 * scenario.slot.length_s, float(picture.backlog_s.max()) * 1.05))
    left.set_xlabel("backlog in s")
    left.invert_yaxis()
    right.barh(["devices", *names], picture.sent, color="tab:orange")
    right.set_xlim(0, max(5, int(picture.sent.max()) + 1))
    right.set_xlabel("requests sent")
    right.invert_yaxis()
    figure.suptitle(f"slot {picture.slot}, reward {picture.reward:.2f}")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
