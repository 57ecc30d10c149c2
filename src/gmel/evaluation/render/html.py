"""The scene as one HTML file that opens offline: hall and Gantt chart with one time cursor."""

# Matplotlib's types are partial; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
from html import escape
from importlib import resources
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

from gmel.evaluation.render.scene import Scene
from gmel.evaluation.render.state import deepest_s, rate_limits_bps

__all__ = ["FIELDS", "scene_html", "scene_json"]

FIELDS = (
    "device",
    "server",
    "lane",
    "model",
    "generated",
    "decided",
    "upload_start",
    "upload_end",
    "start",
    "switch",
    "end",
    "finish",
    "deadline",
    "status",
    "size",
    "rate",
)
"""Columns of a task in the data of the page; times in seconds, size in bit, rate in bit/s."""

SPEEDS = (0.25, 0.5, 1, 2, 5, 10)


def scene_html(scene: Scene) -> str:
    """The page: nothing is loaded from anywhere, the data are JSON inside it.

    Light and dark theme; Space plays and pauses, left and right arrows move by a slot, up and down arrows go through
    the tasks. `#t=SECONDS` at the end of the address opens the page at that time.
    """
    folder = resources.files("gmel.evaluation.render")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("viewer.css", "viewer.js"))
    speeds = "".join(f'<option value="{v:g}"{" selected" if v == 1 else ""}>{v:g} x</option>' for v in SPEEDS)
    where = "places are schematic" if scene.schematic else f"{scene.hall_m[0]:g} x {scene.hall_m[1]:g} m"
    low, high = (f"{rate / 1e6:.2g}" for rate in rate_limits_bps(scene))
    switching = any(task.switch_s > 0 for task in scene.tasks)
    bars = "time until all there has ended" if scene.shared else "work left per GPU"
    rows = "one row for each task at once" if scene.shared else "one row per GPU"
    loads = (
        '<span><i style="background:repeating-linear-gradient(45deg,#444 0 2px,var(--load) 2px 6px)"></i>'
        "loads its model</span>"
        if switching
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(scene.title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(scene.title)}</h1><p class="quiet">{escape(scene.subtitle)}</p></header>
<main>
<div class="bar" role="group" aria-label="Playback">
<button id="play" type="button" aria-keyshortcuts="Space">Play</button>
<input id="time" type="range" min="{scene.start_s:g}" max="{scene.end_s:g}" step="any" value="{scene.start_s:g}"
 aria-label="Time">
<output id="clock" for="time"></output>
<label>Speed <select id="speed">{speeds}</select></label>
<button id="theme" type="button">Dark</button>
</div>
<div class="views">
<div>
<h2>Hall from above ({escape(where)})</h2>
<canvas id="hall" role="img" aria-label="Hall from above">Needs a browser that draws.</canvas>
<p class="quiet" id="counts"></p>
</div>
<aside aria-live="polite"><h2 id="what">Details</h2><div id="facts"><p>Point at a task, a device or a server, or step
through the tasks with the up and down arrows.</p></div></aside>
</div>
<p class="keys"><span>upload, Mbit/s: {low}<b id="ramp"></b>{high}</span>
<span><i style="background:var(--late)"></i>bar at a server: {bars}, full at {deepest_s(scene):.2g} s</span>
<span><i style="background:var(--done)"></i>device that sends</span>
<span><i style="background:var(--local)"></i>device that runs a task itself</span></p>
<h2>Servers, {rows}</h2>
<svg id="gantt" role="img" aria-label="Gantt chart: which tasks each server runs when"></svg>
<p class="keys"><span><i style="background:var(--done)"></i>in time</span>
<span><i style="background:var(--late);height:7px;vertical-align:1px"></i>late (thin)</span>
{loads}<span>&times; dropped</span></p>
<p class="quiet">Keys: Space plays and pauses; left and right move by a slot (with Shift by ten), Home and End to the
ends; up and down go through the tasks; Escape lets go.</p>
</main>
<script type="application/json" id="scene">{scene_json(scene)}</script>
<script>
{script}</script>
</body>
</html>
"""


def scene_json(scene: Scene) -> str:
    """The data of the page as JSON that can stand inside a script element: it holds no `<`, `>` or `&`."""
    models = sorted({task.model for task in scene.tasks if task.model})
    content: dict[str, Any] = {
        "start": scene.start_s,
        "end": scene.end_s,
        "slot": scene.slot_s,
        "hall": list(scene.hall_m),
        "shared": scene.shared,
        "full": deepest_s(scene),
        "rates": list(rate_limits_bps(scene)),
        "ramp": {"light": _ramp(0.25, 1.0), "dark": _ramp(0.62, 0.0)},
        "devices": np.round(scene.devices_m, 2).tolist(),
        "servers": [
            {
                "name": s.name,
                "x": round(s.x_m, 2),
                "y": round(s.y_m, 2),
                "gpus": s.gpus,
                "speed": s.speed,
                "lanes": s.lanes,
                "laneHeight": round(s.lane_height, 4),
            }
            for s in scene.servers
        ],
        "models": models,
        "fields": list(FIELDS),
        "tasks": [
            [
                t.device,
                t.server,
                t.lane,
                models.index(t.model) if t.model else -1,
                *(
                    round(v, 3)
                    for v in (
                        t.generated_s,
                        t.decided_s,
                        t.upload_start_s,
                        t.upload_end_s,
                        t.start_s,
                        t.switch_s,
                        t.end_s,
                        t.finish_s,
                        t.deadline_s,
                    )
                ),
                t.status,
                round(t.size_bit),
                round(t.rate_bps),
            ]
            for t in scene.tasks
        ],
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _ramp(low: float, high: float) -> list[str]:
    """Part of Viridis, slow to fast: what cannot be seen on white, or on black, is cut off."""
    return [to_hex(colour) for colour in mpl.colormaps["viridis_r"](np.linspace(low, high, 12))]
