"""The one results table: in the terminal, in Markdown, and as rows for the report."""

import math
import textwrap
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from gmel.evaluation.schema import Evaluation, Metric, PolicyResult, interval_of
from gmel.evaluation.statistics import Interval

__all__ = [
    "COLUMNS",
    "Row",
    "best_decentralised",
    "format_interval",
    "markdown_table",
    "overload_words",
    "print_table",
    "rich_table",
    "rows",
    "table_notes",
    "worst_to_best",
]

COLUMNS = (
    "ladder",
    "policy",
    "information",
    "mean latency s",
    "P95 s",
    "P99 s",
    "completion %",
    "energy J/task",
    "gap closed %",
)
"""Headings of `Row.cells`; the first three columns are words, the others numbers."""

WORDS = 3
MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One policy: a text per entry of `COLUMNS`, and how to set it off."""

    name: str
    cells: tuple[str, ...]
    emphasis: Literal["best", "trained", "baseline"]


def worst_to_best(evaluation: Evaluation) -> list[PolicyResult]:
    """Policies by falling mean latency, the unstable ones first: read downwards, the table is the ladder."""
    return sorted(
        evaluation["policies"],
        key=lambda policy: -math.inf if policy["unstable"] else -(policy["metrics"]["mean_latency_s"]["mean"] or 0.0),
    )


def best_decentralised(evaluation: Evaluation) -> PolicyResult | None:
    """The stable policy without messages that has the lowest mean latency; None if there is none."""
    candidates = [p for p in worst_to_best(evaluation) if p["mode"] == "decentralised" and not p["unstable"]]
    return candidates[-1] if candidates else None


def rows(evaluation: Evaluation) -> list[Row]:
    """The table as text, worst policy first."""
    best = best_decentralised(evaluation)
    result: list[Row] = []
    for policy in worst_to_best(evaluation):
        metrics = policy["metrics"]
        latencies = (
            (overload_words(evaluation["load"]), MISSING, MISSING)
            if policy["unstable"]
            else (
                format_interval(interval_of(metrics["mean_latency_s"])),
                _plain(metrics["p95_latency_s"], 2),
                _plain(metrics["p99_latency_s"], 2),
            )
        )
        gap = None if policy["unstable"] else metrics["gap_closed"]
        cells = (
            policy["ladder"] or "",
            policy["label"],
            policy["information"],
            *latencies,
            _plain(metrics["completion_rate"], 2, 100.0),
            _plain(metrics["energy_j"], None),
            format_interval(interval_of(gap), 0, 100.0),
        )
        kind = "best" if best is not None and policy["name"] == best["name"] else None
        result.append(Row(policy["name"], cells, kind or ("trained" if policy["trained"] else "baseline")))
    return result


def table_notes(evaluation: Evaluation) -> list[str]:
    """What one must know to read the table: interval, traffic, deadline, and the words in it."""
    seeds, episodes = evaluation["training_seeds"], evaluation["episodes"]
    over = (
        f"{_count(episodes, 'traffic episode')}; for trained policies over {seeds} training seeds"
        if seeds > 1
        else f"{_count(episodes, 'traffic episode')}"
    )
    deadline = (
        "deadlines differ by task"
        if evaluation["deadline_s"] is None
        else f"deadline {evaluation['deadline_s']:g} s ({evaluation['deadline']})"
    )
    notes = [
        f"{evaluation['scenario']} at load {evaluation['load']:g}, slots of {evaluation['slot_s']:g} s; the same "
        f"traffic for every policy: {_count(episodes, 'episode')} of {evaluation['slots']} slots, the first "
        f"{evaluation['warmup_slots']} left out; latency from the moment a task is {evaluation['latency_from']}; "
        f"{deadline}.",
        f"± and brackets: 95 % interval over {over}. Completion: done in time, as a share of "
        "generated tasks. "
        "Gap closed: 0 % is L3, 100 % is L5. Bold: best without messages.",
    ]
    qualities = [(p["label"], p["metrics"].get("quality")) for p in worst_to_best(evaluation)]
    if any(quality is not None for _, quality in qualities):
        each = [f"{label} {format_interval(interval_of(quality), 3)}" for label, quality in qualities if quality]
        notes.append(f"Mean quality of what is done in time: {'; '.join(each)}.")
    if any(policy["unstable"] for policy in evaluation["policies"]):
        word = overload_words(evaluation["load"]).partition(":")[0].capitalize()
        notes.append(f"{word}: the backlog grows without bound, so the policy has no mean latency at this load.")
    return notes


def overload_words(load: float) -> str:
    """What stands in place of a mean latency that depends on the horizon alone.

    At a load of 1 and more the plant itself is overloaded; below it, the policy makes it so.
    """
    return f"{'overloaded' if load >= 1.0 else 'unstable'}: load {load:.2f}"


def rich_table(evaluation: Evaluation) -> Table:
    """The table for a terminal of 100 columns and more."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for index, column in enumerate(COLUMNS):
        table.add_column(
            textwrap.fill(column, 9, break_long_words=False),
            justify="right" if index >= WORDS else "left",
            vertical="top",
            # Numbers and names never wrap, for a broken number misleads: the information gives way.
            no_wrap=column != "information",
            min_width=10 if column == "information" else None,
        )
    styles = {"best": "bold", "trained": "", "baseline": "dim"}
    for row in rows(evaluation):
        # In two lines, so that 100 columns are enough.
        cells = [cell.replace(": load ", ":\nload ") for cell in row.cells]
        table.add_row(*cells, style=styles[row.emphasis])
    return table


def print_table(evaluation: Evaluation, console: Console | None = None) -> None:
    """Prints the table and what one must know to read it."""
    target = console or Console()
    if console is None and not target.is_terminal:
        # A file or a pipe has no width of its own; the table needs this much to be whole.
        target = Console(width=120)
    target.print(rich_table(evaluation))
    for note in table_notes(evaluation):
        target.print(note, style="dim", highlight=False)


def markdown_table(evaluation: Evaluation) -> str:
    """The table in GitHub's Markdown, with its notes below; ends in a newline."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" if index < WORDS else "---:" for index in range(len(COLUMNS))) + " |",
    ]
    for row in rows(evaluation):
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row.cells]
        if row.emphasis == "best":
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", " ".join(table_notes(evaluation)), ""])


def format_interval(interval: Interval, digits: int | None = None, scale: float = 1.0) -> str:
    """ "1.442 ± 0.010", or "12 [3, 40]" where the limits are far from symmetric; a dash for nothing.

    Args:
        interval: in any unit; NaN or infinite limits are left out.
        digits: after the point; None gives three below 10, two below 100, one above.
        scale: factor on all three numbers, 100 for per cent.
    """
    mean, low, high = (value * scale for value in (interval.mean, interval.low, interval.high))
    if not math.isfinite(mean):
        return MISSING
    places = _places(mean) if digits is None else digits
    if not (math.isfinite(low) and math.isfinite(high)):
        return _fixed(mean, places)
    if abs((high - mean) - (mean - low)) > 0.2 * (high - low) / 2.0:
        return f"{_fixed(mean, places)} [{_fixed(low, places)}, {_fixed(high, places)}]"
    return f"{_fixed(mean, places)} ± {_fixed((high - low) / 2.0, places)}"


def _plain(metric: Metric | None, digits: int | None, scale: float = 1.0) -> str:
    mean = interval_of(metric).mean * scale
    if not math.isfinite(mean):
        return MISSING
    return _fixed(mean, _places(mean) if digits is None else digits)


def _places(value: float) -> int:
    return next((places for limit, places in ((10.0, 3), (100.0, 2)) if abs(value) < limit), 1)


def _fixed(value: float, places: int) -> str:
    text = f"{value:.{places}f}"
    # "-0" and "-0.000" are rounding, not findings.
    return text.lstrip("-") if float(text) == 0.0 else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
