"""`manifest.json` of a run folder: which format it has, and with what it was made."""

import json
from pathlib import Path
from typing import Any, cast

from gmel.scenario.errors import InputError

__all__ = ["RUN_FORMAT", "read_manifest"]

RUN_FORMAT = 1


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        InputError: it is not there, cannot be read, or belongs to a run of another format.
    """
    path = run / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; give the folder of a run, every one has this file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); the run has to be repeated") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: holds {type(manifest).__name__}, must be a JSON object; the run has to be repeated")
    found = cast("dict[str, Any]", manifest)
    version = found.get("run_format")
    if version != RUN_FORMAT:
        raise InputError(f"{path}: run_format is {version!r}, this gmel reads {RUN_FORMAT}; start a new run")
    return found
