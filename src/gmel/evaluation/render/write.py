"""Pictures by the suffix of a file: GIF, HTML or PNG."""

from pathlib import Path

from gmel.evaluation.progress import Reporter
from gmel.evaluation.render.gantt import gantt_png
from gmel.evaluation.render.hall import hall_gif
from gmel.evaluation.render.html import scene_html
from gmel.evaluation.render.scene import film
from gmel.evaluation.simulate import Simulation
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["RENDER_SUFFIXES", "check_render_path", "render"]

RENDER_SUFFIXES = (".html", ".gif", ".png")


def check_render_path(path: Path) -> None:
    """Refuses a path for a picture before anything is run.

    Raises:
        InputError: another suffix, a folder, or no folder to write into.
    """
    if path.suffix.lower() not in RENDER_SUFFIXES:
        raise InputError(f"--render {path}: the suffix must be .html, .gif, or .png (Gantt chart alone)")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--render {path}: give a file in a folder that exists")


def render(simulation: Simulation, path: Path, report: Reporter) -> None:
    """Writes the picture of a simulation's first episode; the file appears complete or not at all.

    Raises:
        InputError: see `check_render_path` and `film`; or the file cannot be written.
    """
    check_render_path(path)
    report.stage(f"drawing {path.name}")
    scene, suffix = film(simulation), path.suffix.lower()
    if suffix == ".html":
        data = scene_html(scene).encode()
    elif suffix == ".gif":
        data = hall_gif(scene, progress=lambda done, total: report.advance(done, total, f"drawing {path.name}"))
    else:
        data = gantt_png(scene)
    try:
        replace_file(path, data)
    except OSError as error:
        raise InputError(f"--render {path}: cannot be written ({error.strerror}); choose another place") from error
