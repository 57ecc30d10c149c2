"""The hall from above as frames: devices, servers with their queues as bars, links coloured by rate; as GIF."""

# Matplotlib's types are partial; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from gmel.evaluation.figures import BLACK, BLUE, ORANGE, SETTINGS, VERMILLION, YELLOW
from gmel.evaluation.render.gantt import draw_gantt, legend_of_tasks
from gmel.evaluation.render.scene import Scene, Task
from gmel.evaluation.render.state import backlog_s, deepest_s, instant, rate_limits_bps

__all__ = ["FRAMES_PER_S", "MAX_FRAMES", "hall_frame_png", "hall_gif", "rate_colours"]

MAX_FRAMES = 96
"""Most frames of a GIF; each is 800 x 640 pixels with 64 colours."""
FRAMES_PER_S = 8
_COLOURS = 64
MARKS = (BLUE, ORANGE, VERMILLION, YELLOW)
_BAR_M = 0.16  # height of a full bar, as a share of the hall's width


def rate_colours() -> ListedColormap:
    """Slow to fast: Viridis without its light end, which cannot be seen on white."""
    return ListedColormap(mpl.colormaps["viridis_r"](np.linspace(0.25, 1.0, 128)), name="rate")


class _Frames:
    """The figure of a scene, of which only what moves is drawn again."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        low, high = (rate / 1e6 for rate in rate_limits_bps(scene))
        self.norm = LogNorm(low, high)
        self.full_s = deepest_s(scene)
        self.figure = Figure(figsize=(8.0, 6.4), dpi=100, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        grid = self.figure.add_gridspec(2, 1, height_ratios=(1.75, 1.0))
        self.hall, gantt = self.figure.add_subplot(grid[0]), self.figure.add_subplot(grid[1])
        draw_gantt(gantt, scene)
        self.figure.suptitle(f"{scene.title}   {scene.subtitle}", fontsize=10, x=0.01, ha="left")
        self.figure.legend(handles=legend_of_tasks(scene), loc="outside lower right", ncols=4, fontsize=9)
        bar = self.figure.colorbar(
            ScalarMappable(self.norm, rate_colours()), ax=self.hall, fraction=0.03, pad=0.01, label="upload, Mbit/s"
        )
        bar.set_ticks([low, (low * high) ** 0.5, high])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.2g}"))
        bar.ax.minorticks_off()
        self.cursor = gantt.axvline(scene.start_s, color=BLACK, lw=1.4)
        _draw_hall(self.hall, scene, self.full_s)
        self.hall.set_title(" ", fontsize=10)
        self.moving: list[Any] = []
        # Laid out once: a layout that moves from frame to frame would shake.
        self.canvas.draw()
        self.figure.set_layout_engine("none")

    def draw(self, time_s: float) -> NDArray[np.uint8]:
        """The frame of a time, RGB [height, width, 3]."""
        for artist in self.moving:
            artist.remove()
        self.moving = _draw_moving(self.hall, self.scene, time_s, self.norm, self.full_s)
        self.cursor.set_xdata([time_s, time_s])
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def hall_gif(scene: Scene, frames: int = MAX_FRAMES, progress: Callable[[int, int], None] | None = None) -> bytes:
    """The window as an animated GIF that repeats, at most `MAX_FRAMES` frames, 8 a second.

    Args:
        scene: what to show.
        frames: how many; times are spread evenly over the window.
        progress: is told frames done and frames in all.
    """
    frames = max(2, min(frames, MAX_FRAMES))
    images: list[Image.Image] = []
    with mpl.rc_context(SETTINGS):
        drawing = _Frames(scene)
        for number, time_s in enumerate(np.linspace(scene.start_s, scene.end_s, frames, endpoint=False)):
            image = Image.fromarray(drawing.draw(float(time_s)))
            # One palette for all frames: colours must not flicker.
            if images:
                images.append(image.quantize(palette=images[0], dither=Image.Dither.NONE))
            else:
                images.append(_palette(drawing, scene))
                images[0] = image.quantize(palette=images[0], dither=Image.Dither.NONE)
            if progress is not None:
                progress(number + 1, frames)
    sink = io.BytesIO()
    images[0].save(
        sink, "GIF", save_all=True, append_images=images[1:], duration=1000 // FRAMES_PER_S, loop=0, optimize=False
    )
    return sink.getvalue()


def hall_frame_png(scene: Scene, time_s: float) -> bytes:
    """One frame as PNG."""
    with mpl.rc_context(SETTINGS):
        pixels = _Frames(scene).draw(time_s)
    sink = io.BytesIO()
    Image.fromarray(pixels).quantize(_COLOURS * 2, dither=Image.Dither.NONE).save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _palette(drawing: _Frames, scene: Scene) -> Image.Image:
    """A palette from several frames side by side, so that what comes later has its colours too."""
    times = np.linspace(scene.start_s, scene.end_s, 6, endpoint=False)
    frames = [drawing.draw(float(t)) for t in times]
    # Stripes of the colours that mean something: small marks of them would be too few to get a place of their own.
    stripe = np.array(frames[0][:60])
    marks = [np.broadcast_to(np.uint8(np.array(to_rgb(name)) * 255), stripe.shape) for name in MARKS]
    strip = np.concatenate([*frames, *marks])
    return Image.fromarray(strip).quantize(_COLOURS, dither=Image.Dither.NONE)


def _draw_hall(axes: Axes, scene: Scene, full_s: float) -> None:
    length, width = scene.hall_m
    axes.set_aspect("equal")
    axes.set_xlim(-0.02 * length, 1.02 * length)
    axes.set_ylim(-0.04 * width, 1.04 * width)
    axes.grid(visible=False)
    axes.add_patch(Rectangle((0, 0), length, width, fill=False, ec="#888888", lw=1.2))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    words = "places are schematic" if scene.schematic else f"hall of {length:g} x {width:g} m"
    bars = "until all there has ended" if scene.shared else "of work left per GPU"
    words += f"; bars: seconds {bars}, full at {full_s:.2g} s"
    axes.text(0.99 * length, -0.03 * width, words, ha="right", va="top", fontsize=9, color="#555555")
    axes.scatter(*scene.devices_m.T, s=22, c="#BBBBBB", edgecolors="#666666", lw=0.6, zorder=3)
    for server in scene.servers:
        axes.plot(server.x_m, server.y_m, "s", ms=11, color=BLACK, zorder=5)
        axes.annotate(
            server.name,
            (server.x_m, server.y_m),
            (0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=10,
            fontweight="bold",
            zorder=6,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6},
        )


def _draw_moving(axes: Axes, scene: Scene, time_s: float, norm: LogNorm, full_s: float) -> list[Any]:
    """Links, queues and busy devices of one time."""
    now, left_s = instant(scene, time_s), backlog_s(scene, time_s)
    length, width = scene.hall_m
    colours, drawn = rate_colours(), list[Any]()

    def ends(task: Task) -> tuple[Any, Any]:
        server = scene.servers[task.server]
        return scene.devices_m[task.device], np.array([server.x_m, server.y_m])

    for task in now.returning:
        server_m, device_m = ends(task)[::-1]
        drawn += axes.plot(*np.stack([server_m, device_m]).T, ":", color="#888888", lw=1.2, zorder=1)
    for task in now.sending:
        device_m, server_m = ends(task)
        colour = colours(norm(task.rate_bps / 1e6))
        share = (time_s - task.upload_start_s) / max(task.upload_end_s - task.upload_start_s, 1e-9)
        drawn += axes.plot(*np.stack([device_m, server_m]).T, color=colour, lw=2.2, zorder=2)
        drawn += axes.plot(*(device_m + share * (server_m - device_m)), "o", ms=6, color=colour, mec="white", zorder=4)
    for number, server in enumerate(scene.servers):
        waiting = sum(task.server == number for task in now.waiting)
        high = _BAR_M * width * min(left_s[number] / full_s, 1.0)
        x, y = server.x_m + 0.015 * length, server.y_m - 0.02 * width
        back = Rectangle((x, y), 0.014 * length, _BAR_M * width, fc="white", ec="#888888", lw=0.8, zorder=5)
        front = Rectangle((x, y), 0.014 * length, high, fc=VERMILLION, ec="none", zorder=6)
        drawn += [axes.add_patch(back), axes.add_patch(front)]
        words = f"{left_s[number]:.0f} s" if full_s >= 10 else f"{left_s[number]:.1f} s"
        words += f"\n{waiting} wait" if waiting else ""
        drawn.append(
            axes.text(
                x + 0.02 * length,
                y + _BAR_M * width,
                words,
                fontsize=9,
                va="top",
                zorder=6,
                linespacing=1.1,
                bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6},
            )
        )
    busy = {task.device for task in now.local}
    asking = {task.device for task in now.sending}
    for devices, colour in ((busy, ORANGE), (asking - busy, BLUE)):
        if devices:
            places = scene.devices_m[sorted(devices)]
            drawn.append(axes.scatter(*places.T, s=40, c=colour, edgecolors="white", lw=0.6, zorder=4))
    words = f"t = {time_s:.1f} s   sending {len(now.sending)}, waiting {len(now.waiting)}, "
    words += f"running {len(now.running)}, on devices {len(now.local)}"
    axes.set_title(words, fontsize=10, loc="left")
    return drawn
