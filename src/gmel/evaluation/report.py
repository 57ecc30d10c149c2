"""The report of a run: one HTML file that opens offline, with the headline, the table and the figures."""

# Arrow ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import tomllib
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmel.evaluation import figures
from gmel.evaluation.figures import Drawing
from gmel.evaluation.manifest import read_manifest
from gmel.evaluation.schema import (
    Evaluation,
    Metric,
    PolicyResult,
    interval_of,
    read_evaluation,
    replace_file,
)
from gmel.evaluation.statistics import Interval, paired_t_interval, t_interval
from gmel.evaluation.table import COLUMNS, WORDS, Row, format_interval, rows, table_notes, worst_to_best
from gmel.scenario.errors import InputError

__all__ = ["HEADLINE_SEEDS", "headline", "read_evaluation", "render_report"]

HEADLINE_SEEDS = 10
"""Training seeds below which an interval is no headline claim (docs: the statistics of the ladder)."""

WEAK = {"proportional", "greedy", "local", "uniform", "random"}
"""Baselines that any sensible rule beats."""

CURVE_COLUMNS = ("seed", "decisions", "wall_s", "validation_latency_s")


@dataclass(frozen=True)
class Run:
    """What a run folder holds; parts that a run has not reached yet are None."""

    name: str
    scenario: str
    manifest: dict[str, Any]
    metrics: dict[str, list[float | None]] | None
    evaluation: Evaluation | None


def render_report(run: Path) -> Path:
    """Writes `report.html`, `figures/<name>.svg`, `figures/<name>.csv` and `figures/herding.png` into a run folder.

    Needs `scenario.toml` and `manifest.json`. `metrics.parquet` and `evaluation.json` may be missing (training not
    begun, or interrupted before the evaluation): the report then says so and shows the rest.

    Args:
        run: the run folder.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: not a run folder, or a file in it cannot be read.
    """
    content = _read_run(run)
    drawings = _drawings(content)
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for drawing in drawings:
        replace_file(folder / f"{drawing.name}.svg", drawing.svg.encode())
        replace_file(folder / f"{drawing.name}.csv", drawing.csv.encode())
        if drawing.name == "herding":
            replace_file(folder / "herding.png", drawing.png)
    target = run / "report.html"
    replace_file(target, _page(content, drawings).encode())
    return target


def headline(evaluation: Evaluation) -> str:
    """What the evaluation shows, in honest words.

    The trained policy is compared, on the same traffic, with every baseline that needs no messages; it beats one only
    where the 95 % interval of the paired difference excludes zero. With several training seeds the interval is over
    them. Fewer than `HEADLINE_SEEDS` training seeds are never called a headline claim.
    """
    policy = _subject(evaluation)
    where = f"At load {evaluation['load']:g}"
    if policy is None:
        return f"{where}, these are the policies of the ladder; no trained policy has been evaluated."
    label, seeds = policy["label"], evaluation["training_seeds"]
    over = f"over {seeds} training seeds" if seeds > 1 else f"over {evaluation['episodes']} traffic episodes"
    if policy["unstable"]:
        word = "overloaded" if evaluation["load"] >= 1.0 else "unstable"
        return f"{where}, {label} is {word}: its backlog grows without bound, so it has no mean latency. " + _caveat(
            evaluation
        )
    latency = interval_of(policy["metrics"]["mean_latency_s"])
    sentences = [
        f"{where}, {label} takes {format_interval(latency)} s on average (95 % interval {over}).",
        _verdict(evaluation, policy),
    ]
    if policy["mode"] != "decentralised":
        sentences.append(f"It uses messages ({policy['information']}), which the baselines it is compared with do not.")
    elif suspect := _suspect(evaluation, policy):
        sentences.append(
            f"It is faster than {suspect}, which sees more than any device can: suspect leaked information."
        )
    return " ".join([*sentences, _caveat(evaluation)])


def _subject(evaluation: Evaluation) -> PolicyResult | None:
    trained = [policy for policy in worst_to_best(evaluation) if policy["trained"]]
    return next((policy for policy in trained if policy["name"] == "amarl"), trained[-1] if trained else None)


def _verdict(evaluation: Evaluation, policy: PolicyResult) -> str:
    rivals = [other for other in worst_to_best(evaluation) if not other["trained"] and other["mode"] == "decentralised"]
    beaten: list[PolicyResult] = []
    level: list[PolicyResult] = []
    behind: list[PolicyResult] = []
    for other in rivals:
        saved = _saved_s(policy, other)
        (beaten if saved.low > 0.0 else behind if saved.high < 0.0 else level).append(other)
    if not rivals:
        return "There is no baseline without messages to compare it with."
    if not beaten:
        return f"It beats none of the baselines: {_listed(rivals)}."
    rest = [f"it is level with {_listed(level)} (difference not resolved)"] if level else []
    rest += [f"it is slower than {_listed(behind)}"] if behind else []
    if all(other["ladder"] == "L0" or other["name"] in WEAK for other in beaten):
        opening = f"It beats only {_listed(beaten)}, which shows nothing about learning"
        return "; ".join([opening, *rest]) + "."
    if rest:
        return "; ".join([f"It beats {_listed(beaten)}", *rest]) + "."
    return _beyond_all(policy, next((other for other in rivals if other["ladder"] == "L3"), None))


def _beyond_all(policy: PolicyResult, reference: PolicyResult | None) -> str:
    verdict = "It beats every baseline that needs no messages"
    if reference is None:
        return f"{verdict}; the tuned reference (L3) is not among them."
    gap = interval_of(policy["metrics"]["gap_closed"])
    if not math.isfinite(gap.mean):
        return f"{verdict}, {_named(reference)} included."
    limits = (
        f" (95 % interval {100 * gap.low:.0f} to {100 * gap.high:.0f} %)"
        if math.isfinite(gap.low) and math.isfinite(gap.high)
        else ""
    )
    return (
        f"{verdict} and closes {100 * gap.mean:.0f} %{limits} of the gap between {_named(reference)} "
        "and the per-slot optimum (L5)."
    )


def _saved_s(policy: PolicyResult, other: PolicyResult) -> Interval:
    """Seconds that the policy saves against another one, with the paired interval; endless against an unstable one."""
    if other["unstable"]:
        return Interval(math.inf, math.inf, math.inf)
    own, theirs = policy["metrics"]["mean_latency_s"], other["metrics"]["mean_latency_s"]
    if by_seed := own.get("by_training_seed"):
        return t_interval(_episodes(theirs).mean() - np.asarray(by_seed, dtype=np.float64).mean(axis=1))
    return paired_t_interval(_episodes(theirs), _episodes(own))


def _episodes(metric: Metric) -> figures.Floats:
    return np.asarray(metric["values"], dtype=np.float64)


def _suspect(evaluation: Evaluation, policy: PolicyResult) -> str | None:
    """The name of a stable policy with more information that a policy without messages beats, or None."""
    central = [p for p in worst_to_best(evaluation) if p["mode"] != "decentralised" and not p["trained"]]
    slower = [p for p in central if p["ladder"] == "L5" and not p["unstable"] and _saved_s(policy, p).low > 0.0]
    return _named(slower[0]) if slower else None


def _caveat(evaluation: Evaluation) -> str:
    seeds = evaluation["training_seeds"]
    if seeds == 1:
        return (
            f"One training seed: the interval is over {evaluation['episodes']} traffic episodes only. "
            f"With fewer than {HEADLINE_SEEDS} training seeds this is not a headline claim."
        )
    if seeds < HEADLINE_SEEDS:
        return f"Interval over {seeds} training seeds; with fewer than {HEADLINE_SEEDS} this is not a headline claim."
    return f"Interval over {seeds} training seeds."


def _named(policy: PolicyResult) -> str:
    return f"{policy['label']} ({policy['ladder']})" if policy["ladder"] else policy["label"]


def _listed(policies: list[PolicyResult]) -> str:
    names = [_named(policy) for policy in policies]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _read_run(run: Path) -> Run:
    if not run.is_dir():
        raise InputError(f"run {str(run)!r}: no such folder; give the folder that gmel run or gmel train has written")
    evaluation = run / "evaluation.json"
    return Run(
        # A run that is being written stands under a temporary name beside its own.
        name=run.resolve().name.removeprefix(".").removesuffix(".part"),
        scenario=_read_scenario(run / "scenario.toml"),
        manifest=read_manifest(run),
        metrics=_read_metrics(run / "metrics.parquet"),
        evaluation=read_evaluation(evaluation) if evaluation.exists() else None,
    )


def _read_scenario(path: Path) -> str:
    text = _read_text(path)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML ({error}); copy the scenario of the run there again") from error
    return text


def _read_metrics(path: Path) -> dict[str, list[float | None]] | None:
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); resume or repeat the training") from error
    for name in CURVE_COLUMNS:
        if name not in table.column_names:
            raise InputError(
                f"{path}: column {name} is missing, it has {', '.join(table.column_names)}; "
                f"it must have {', '.join(CURVE_COLUMNS)}"
            )
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise InputError(f"{path}: column {name} holds {kind}, must hold numbers; repeat the training")
    return {name: table.column(name).to_pylist() for name in CURVE_COLUMNS}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; every run folder has it, give the folder that gmel run or gmel train has written"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); it must be UTF-8 text") from error


def _drawings(run: Run) -> list[Drawing]:
    """The figures there are numbers for, in the order of the page."""
    evaluation = run.evaluation
    drawn: list[Drawing | None] = []
    if evaluation is not None:
        drawn.append(figures.herding(evaluation))
    if run.metrics is not None:
        drawn.append(figures.learning_curve(run.metrics, evaluation))
    if evaluation is not None:
        drawn += [
            figures.latency_ccdf(evaluation),
            figures.decomposition(evaluation),
            figures.completion_rate(evaluation),
        ]
    return [drawing for drawing in drawn if drawing is not None]


def _notices(run: Run, drawings: list[Drawing]) -> list[str]:
    notices: list[str] = []
    names = {drawing.name for drawing in drawings}
    if run.manifest.get("interrupted"):
        notices.append("This run was interrupted before it ended; what follows is what there is.")
    if run.evaluation is None:
        notices.append("There is no evaluation yet: no results table, and no comparison with the ladder.")
    elif "herding" not in names:
        notices.append("Server backlogs were not recorded: the herding figure is missing.")
    if run.metrics is None:
        notices.append("There are no training metrics: the learning curve is missing.")
    elif "learning" not in names:
        notices.append("Training has not reached its first validation: the learning curve is missing.")
    return notices


def _page(run: Run, drawings: list[Drawing]) -> str:
    style = (resources.files("gmel.evaluation") / "report.css").read_text(encoding="utf-8")
    notices = "".join(
        f'<p class="notice" role="note"><b>Note</b> {escape(text)}</p>' for text in _notices(run, drawings)
    )
    results = _results(run.evaluation) if run.evaluation is not None else ""
    plots = "".join(_figure(drawing) for drawing in drawings)
    gallery = f'<section><h2>Figures</h2><div class="figures">{plots}</div></section>' if plots else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}: GMEL report</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="kicker">GMEL run report</p>
<h1>{escape(run.name)}</h1>
{_facts(run.evaluation)}
</header>
<main>
{_headline_block(run.evaluation)}
{notices}
{results}
{gallery}
<div class="details">
<section><h2>Scenario</h2><pre tabindex="0" aria-label="scenario.toml">{escape(run.scenario)}</pre></section>
<section><h2>How it was made</h2>{_manifest_table(run.manifest)}</section>
</div>
</main>
<footer>The numbers of every figure lie in <code>figures/</code> beside this file, as CSV; those of the table in
<code>evaluation.json</code>.</footer>
</body>
</html>
"""


def _facts(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    facts = [
        f"scenario {evaluation['scenario']}",
        f"load {evaluation['load']:g}",
        f"slot {evaluation['slot_s']:g} s",
        f"{evaluation['episodes']} episodes of {evaluation['slots']} slots",
        f"{evaluation['training_seeds']} training seed" + ("" if evaluation["training_seeds"] == 1 else "s"),
        "deadlines differ by task" if evaluation["deadline_s"] is None else f"deadline {evaluation['deadline_s']:g} s",
    ]
    return '<ul class="facts">' + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>"


def _headline_block(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    sentence = f'<p class="headline">{escape(headline(evaluation))}</p>'
    policy = _subject(evaluation)
    if policy is None or policy["unstable"]:
        return sentence
    metrics = policy["metrics"]
    tiles = [
        ("Mean latency", interval_of(metrics["mean_latency_s"]), 1.0, " s", 2),
        ("Gap closed, L3 to L5", interval_of(metrics["gap_closed"]), 100.0, " %", 0),
        ("P99 latency", interval_of(metrics["p99_latency_s"]), 1.0, " s", 2),
        ("Completion rate", interval_of(metrics["completion_rate"]), 100.0, " %", 2),
    ]
    return sentence + '<dl class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</dl>"


def _tile(title: str, interval: Interval, scale: float, unit: str, digits: int) -> str:
    mean, low, high = (value * scale for value in (interval.mean, interval.low, interval.high))
    number = f"{mean:.{digits}f}{unit}" if math.isfinite(mean) else "not measured"
    between = (
        f"95 % interval {low:.{digits}f} to {high:.{digits}f}" if math.isfinite(low) and math.isfinite(high) else ""
    )
    return (
        f'<div><dt>{escape(title)}</dt><dd class="figure">{number}</dd>'
        + (f'<dd class="range">{between}</dd>' if between else "")
        + "</div>"
    )


def _results(evaluation: Evaluation) -> str:
    kinds = ["number" if index >= WORDS else "word" for index in range(len(COLUMNS))]
    kinds[:WORDS] = ["aside", "policy", "aside"]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, COLUMNS, strict=True)
    )
    body: list[str] = []
    for row in rows(evaluation):
        cells = "".join(
            # On a phone rung and information move under the name, so that the first number is in sight.
            f'<th scope="row" class="policy">{escape(cell)}<small>{escape(_under(row))}</small></th>'
            if kind == "policy"
            else f'<td class="{kind}">{escape(cell)}</td>'
            for kind, cell in zip(kinds, row.cells, strict=True)
        )
        body.append(f'<tr class="{row.emphasis}">{cells}</tr>')
    notes = "".join(f'<p class="small">{escape(note)}</p>' for note in table_notes(evaluation))
    return (
        '<section><h2>Results</h2><div class="scroll results" role="region" aria-label="Results table" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}</section>"
    )


def _under(row: Row) -> str:
    ladder, _, information, *_ = row.cells
    return f"{ladder}, {information}" if ladder else information


def _figure(drawing: Drawing) -> str:
    name = drawing.name
    inline = drawing.inline.replace(
        ">",
        f'><title id="{name}-title">{escape(drawing.title)}</title>'
        f'<desc id="{name}-description">{escape(drawing.description)}</desc>',
        1,
    )
    return (
        f'<figure id="figure-{name}"{" class=wide" if name == "herding" else ""}><h3>{escape(drawing.title)}</h3>'
        f'<div class="plot">{inline}</div><figcaption>{escape(drawing.caption)} '
        f'<a href="figures/{name}.csv" aria-label="numbers of the figure {escape(drawing.title)}">numbers (CSV)</a>'
        "</figcaption></figure>"
    )


def _manifest_table(manifest: dict[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{escape(_value(value))}</td></tr>'
        for key, value in manifest.items()
    )
    return f'<div class="scroll manifest"><table><tbody>{body}</tbody></table></div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in cast("dict[str, Any]", value).items())
    if isinstance(value, list):
        return ", ".join(_value(item) for item in cast("list[Any]", value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
