"""The command `gmel`: one file per verb, no logic here."""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from gmel import __version__
from gmel.cli import (
    benchmark,
    calibrate,
    export,
    federate,
    gateway,
    live,
    report,
    run,
    scenario,
    simulate,
    synthesize,
    validate,
)
from gmel.scenario.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="gmel",
    help="Where a factory's generation tasks run: learned, measured beside an honest ladder, explained in a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("simulate")(simulate.simulate)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("federate")(federate.federate)
app.command("gateway")(gateway.gateway)
app.command("server")(gateway.server)
app.command("device")(live.device)
app.command("submit")(live.submit)
app.command("live")(live.live)
app.command("calibrate")(calibrate.calibrate)
app.command("validate")(validate.validate)
app.add_typer(gateway.key_app, name="key")
app.add_typer(scenario.app, name="scenario")
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(synthesize.app, name="synthesize")


# Typer has the exception since it no longer rests on click; older versions raise click's, which has the same method.
_BAD_USAGE: Any = getattr(typer, "TyperException", None) or import_module("click").ClickException
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}
"""Failures of the place that was chosen, not of ours: full, over quota, read-only, not permitted."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gmel {__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the verb."""
    del version


def main() -> None:
    """Entry point: bad input is one line and exit code 2; anything else that fails is a defect and shows itself."""
    _cache_compilations()
    try:
        # In this mode Typer returns the code of `typer.Exit`.
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _BAD_USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a page, not a mistake
            typer.echo(error.format_message())
            sys.exit(0)
        _fail(error.format_message())
    except KeyboardInterrupt:
        typer.echo("gmel: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        place = error.filename or "standard output"
        _fail(f"{place}: {error.strerror}; make room there, or choose another place")


def _fail(message: str) -> None:
    typer.echo(f"gmel: error: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _cache_compilations() -> None:
    """Compiled programs are kept between runs, unless the user has set JAX's cache otherwise.

    By environment variables, before JAX is imported: `gmel --help` must not import it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(home) / "gmel" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    main()
