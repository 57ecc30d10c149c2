"""Running the checks, and what is shown of them."""

import dataclasses
import difflib
import json
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from gmel import __version__

# Imported for their checks, which register themselves.
from gmel.evaluation.progress import Reporter
from gmel.evaluation.validation import disciplines as _disciplines
from gmel.evaluation.validation import losses as _losses
from gmel.evaluation.validation import paths as _paths
from gmel.evaluation.validation import queues as _queues
from gmel.evaluation.validation import radio as _radio
from gmel.evaluation.validation.check import CHECKS, Check, Result, Run, Shared, judge
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["Validation", "chosen_checks", "markdown_table", "print_table", "validate", "write_validation"]

THOROUGH_BATCHES = 8
WORKERS = 2

del _disciplines, _losses, _paths, _queues, _radio


class Validation(TypedDict):
    """All verdicts with what is needed to repeat them."""

    format: int
    gmel: str
    jax: str
    numpy: str
    python: str
    device: str
    date: str
    seed: int
    thorough: bool
    seconds: float
    passed: bool
    results: list[dict[str, Any]]


def chosen_checks(only: Sequence[str] = ()) -> list[Check]:
    """The checks of these names or groups, all if there are none.

    Raises:
        InputError: a name that no check and no group has.
    """
    groups = {entry.group for entry in CHECKS.values()}
    for name in only:
        if name not in CHECKS and name not in groups:
            near = difflib.get_close_matches(name, [*groups, *CHECKS], 1, 0.0)[0]
            raise InputError(
                f"--only {name}: no such check or group, the nearest is {near!r}; groups: {', '.join(sorted(groups))}; "
                f"checks: {', '.join(CHECKS)}"
            )
    return [entry for entry in CHECKS.values() if not only or entry.name in only or entry.group in only]


def validate(
    only: Sequence[str] = (), *, seed: int = 0, thorough: bool = False, reporter: Reporter | None = None
) -> Validation:
    """Runs the checks, two at a time: the exact ones in a row, since they share their runs, beside the others.

    Verdicts do not depend on that: every check has its own random numbers.

    Raises:
        InputError: an unknown name in `only`, or a seed below 0.
    """
    if seed < 0:
        raise InputError(f"--seed {seed}: must not be negative")
    entries = chosen_checks(only)
    # Counted over all checks, chosen or not, so that a verdict does not depend on the choice.
    comparisons = sum(entry.statistical for entry in CHECKS.values())
    shared = Shared()
    done: list[str] = []

    def run_in_a_row(entries: Sequence[Check]) -> list[Result]:
        results: list[Result] = []
        for entry in entries:
            run = Run(seed, entry.name, batches=THOROUGH_BATCHES if thorough else 1, shared=shared)
            start = time.monotonic()
            found = entry.function(run)
            results.append(judge(entry, found, comparisons, time.monotonic() - start))
            done.append(entry.name)
        return results

    exact = [entry for entry in entries if not entry.statistical]
    rows = [exact] * bool(exact) + [[entry] for entry in entries if entry.statistical]
    began = time.monotonic()
    pool = ThreadPoolExecutor(WORKERS)
    found: dict[str, Result] = {}
    if reporter is not None:
        reporter.advance(0, len(entries), f"{len(entries)} checks")
    try:
        for job in as_completed([pool.submit(run_in_a_row, row) for row in rows]):
            found |= {result.name: result for result in job.result()}
            if reporter is not None:
                reporter.advance(len(done), len(entries), done[-1])
    finally:
        pool.shutdown(cancel_futures=True)
    results = [found[entry.name] for entry in entries]
    return Validation(
        format=1,
        gmel=__version__,
        jax=jax.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        device=str(jax.devices()[0].platform),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        seed=seed,
        thorough=thorough,
        seconds=round(time.monotonic() - began, 1),
        passed=all(result.passed for result in results),
        results=[_to_json(result) for result in results],
    )


def write_validation(validation: Validation, path: Path) -> None:
    """Writes the verdicts as JSON, never half of them.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    try:
        replace_file(path, (json.dumps(validation, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({error.strerror}); name a file in an existing folder"
        ) from error


def markdown_table(validation: Validation) -> str:
    """The verdicts as a table in GitHub's Markdown, with what was run below; ends in a newline."""
    lines = [
        "| check | law | expected | measured | score | limit | finds errors of | n | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in map(_from_json, validation["results"]):
        cells = [f"`{result.name}`", f"{result.law} ({result.source})", *_figures(result), _verdict(result)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", " ".join(_notes(validation)), ""])


def print_table(validation: Validation, console: Console | None = None) -> None:
    """Prints one line per check and what one must know to read it."""
    target = console or Console()
    if console is None and not target.is_terminal:
        # A file or a pipe has no width of its own; the table needs this much to be whole.
        target = Console(width=140)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("check", "expected", "measured", "score", "limit", "finds errors of", "n", "verdict", "s"):
        table.add_column(column, justify="left" if column in ("check", "verdict") else "right", no_wrap=True)
    for result in map(_from_json, validation["results"]):
        cells = [result.name, *_figures(result), _verdict(result), f"{result.seconds:.1f}"]
        table.add_row(*cells, style="" if result.passed else "bold red")
    target.print(table)
    for result in map(_from_json, validation["results"]):
        if not result.passed:
            target.print(f"FAILED {result.name}: {result.law}. Source: {result.source}", highlight=False, markup=False)
    for note in _notes(validation):
        target.print(note, style="dim", highlight=False, markup=False)


def _to_json(result: Result) -> dict[str, Any]:
    """Fields of a verdict; JSON has no infinity and no NaN, they become null."""
    fields = dataclasses.asdict(result)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def _from_json(fields: dict[str, Any]) -> Result:
    return Result(**fields)


def _verdict(result: Result) -> str:
    return "ok" if result.passed else "FAILED"


def _figures(result: Result) -> list[str]:
    """Expected, measured, score, limit, what it finds, count."""
    if not result.statistical:
        found = "any" if result.limit == 0 else f"{result.limit:.0e}"
        return ["0", _number(result.error), "-", f"{result.limit:.0e}", found, f"{result.count}"]
    finds = "-" if result.detects is None else f"{100 * result.detects:.1f} %"
    measured = f"{_number(result.measured, '.5g')} ± {_number(result.error, '.1g')}"
    return [
        _number(result.expected, ".5g"),
        measured,
        _number(result.score, ".2f"),
        f"{result.limit:.2f}",
        finds,
        f"{result.count}",
    ]


def _number(value: float | None, form: str = ".0e") -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else format(value, form)


def _notes(validation: Validation) -> list[str]:
    results = validation["results"]
    failed = sum(not result["passed"] for result in results)
    return [
        f"{len(results) - failed} of {len(results)} checks passed in {validation['seconds']:.0f} s.",
        f"{validation['date']}, gmel {validation['gmel']}, JAX {validation['jax']}, NumPy {validation['numpy']}, "
        f"Python {validation['python']}, {validation['device']}, seed {validation['seed']}"
        f"{', thorough' if validation['thorough'] else ''}.",
        "Statistical checks: measured ± standard error, score = difference in standard errors, fails beyond the limit; "
        "errors of the given size are found with 95 % probability. Exact checks: largest error beside its tolerance.",
    ]
