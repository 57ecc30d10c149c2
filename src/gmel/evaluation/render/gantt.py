"""The Gantt chart of the servers: one row per GPU, one bar per task; tasks that share a server side by side."""

# Matplotlib's types are partial; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gmel.evaluation.figures import BLACK, BLUE, SETTINGS, VERMILLION, YELLOW
from gmel.evaluation.render.scene import Scene, Server

__all__ = ["draw_gantt", "gantt_png", "legend_of_tasks"]

STATUS = {"done": BLUE, "late": VERMILLION}
_WORDS = {"done": "in time", "late": "late"}
_GAP = 0.6


def draw_gantt(axes: Axes, scene: Scene) -> None:
    """A row per GPU, or for each of the tasks that share a server; servers apart. Late tasks differ in colour and
    height, model loads are hatched."""
    row, ticks, labels = 0.0, list[float](), list[str]()
    for number, server in enumerate(scene.servers):
        ticks.append(row + server.height / 2)
        labels.append(_label(server, scene.shared))
        step = server.lane_height
        mine = scene.of_server(number)
        for status, colour in STATUS.items():
            for lane in range(server.lanes):
                bars = [(t.start_s, t.end_s - t.start_s) for t in mine if t.lane == lane and t.status == status]
                high = step * (0.78 if status == "done" else 0.5)
                middle = row + step * (lane + 0.5)
                axes.broken_barh(
                    bars, (middle - high / 2, high), facecolors=colour, edgecolors="white", linewidth=0.5 * step
                )
        for task in mine:
            if task.switch_s > 0:
                axes.broken_barh(
                    [(task.start_s, task.switch_s)],
                    (row + step * (task.lane + 0.11), step * 0.78),
                    facecolors=YELLOW,
                    edgecolors="#555555",
                    linewidth=0.4,
                    hatch="////",
                )
        gone = [t.finish_s for t in scene.tasks if t.server == number and t.dropped]
        if gone:
            axes.plot(gone, [row + step / 2] * len(gone), "x", color=BLACK, ms=6, mew=1.6)
        row += server.height + _GAP
    axes.set_yticks(ticks, labels)
    axes.set_ylim(row - _GAP + 0.1, -0.1)
    axes.set_xlim(scene.start_s, scene.end_s)
    axes.set_xlabel("time since the start of the episode (s)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _label(server: Server, shared: bool) -> str:
    words = [f"{server.gpus} GPUs"] if server.gpus > 1 else []
    words += [f"up to {server.lanes} at once"] if shared and server.lanes > server.gpus else []
    between = ("\n", "") if shared else (" (", ")")
    return server.name + (f"{between[0]}{', '.join(words)}{between[1]}" if words else "")


def legend_of_tasks(scene: Scene) -> list[Patch]:
    """What the colours of the bars mean, for those that occur."""
    seen = {task.status for task in scene.tasks if task.server >= 0}
    patches = [Patch(color=colour, label=_WORDS[status]) for status, colour in STATUS.items() if status in seen]
    if any(task.switch_s > 0 for task in scene.tasks):
        patches.append(Patch(facecolor=YELLOW, edgecolor="#555555", hatch="////", label="loads its model"))
    if "dropped" in seen:
        patches.append(Patch(color=BLACK, label="x dropped"))
    return patches


def gantt_png(scene: Scene) -> bytes:
    """The chart alone, 800 pixels wide, as PNG."""
    rows = sum(server.height for server in scene.servers) + _GAP * (len(scene.servers) - 1)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8.0, min(max(1.9 + 0.32 * rows, 3.0), 16.0)), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        draw_gantt(axes, scene)
        axes.set_title(f"{scene.title}\n", loc="left", fontsize=12)
        figure.legend(handles=legend_of_tasks(scene), loc="outside upper right", ncols=4)
        axes.text(0, 1.02, scene.subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
        sink = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
