"""The pictures of the report: one function each, from the numbers to SVG, CSV, a caption and a text alternative.

Sizes are chosen so that the text stays readable when a figure is shrunk to the width of a phone. Colours are those of
Okabe and Ito (2008), which the common kinds of colour blindness keep apart; line styles differ as well.
"""

# Matplotlib's and SciPy's types are partial; unknown types from them are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from scipy import stats

from gmel.evaluation.schema import Evaluation, Herding, PolicyResult, interval_of
from gmel.evaluation.table import worst_to_best

__all__ = ["Drawing", "completion_rate", "decomposition", "herding", "latency_ccdf", "learning_curve"]

Floats = NDArray[np.float64]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"

# A policy looks the same in every figure of every report. Yellow is not for lines: it cannot be seen on white.
STYLES: dict[str, tuple[str, Any]] = {
    "amarl": (VERMILLION, "-"),
    "optimum": (BLACK, "-"),
    "softmax7": (BLUE, "-"),
    "softmax": (SKY, "-"),
    "led2": (GREEN, "-"),
    "greedy": (PURPLE, "-"),
    "proportional": (ORANGE, "-"),
    "coordinated": (BLACK, (0, (1, 1))),
    "nash": (BLACK, (0, (4, 2))),
    "eft": (GREY, (0, (4, 2))),
    "local": (GREY, "-"),
}
SPARE = [(colour, (0, (5, 1, 1, 1))) for colour in (GREEN, BLUE, PURPLE, ORANGE, SKY)]
SERVERS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)

PARTS = (
    ("wait_to_slot", "wait to slot", "#BBBBBB"),
    ("upload", "upload", SKY),
    ("queue", "queue", VERMILLION),
    ("switch", "model switch", YELLOW),
    ("service", "service", BLUE),
    ("download", "download", PURPLE),
)

SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "white",
    # Text as outlines looks the same everywhere and loads no font; the salt makes the file the same every time.
    "svg.fonttype": "path",
    "svg.hashsalt": "gmel",
}


@dataclass(frozen=True)
class Drawing:
    """A figure ready to be written: `svg` stands alone, `inline` goes into a page (its ids start with `name`)."""

    name: str
    title: str
    caption: str
    description: str
    svg: str
    csv: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG element without preamble and metadata, scalable, with ids that no other figure of the page has."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r'href="#', f'href="#{self.name}-', body)
        body = re.sub(r"url\(#", f"url(#{self.name}-", body)
        head, rest = body.split(">", 1)
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        return f'{head} role="img" aria-labelledby="{self.name}-title {self.name}-description">{rest}'


def learning_curve(metrics: Mapping[str, Sequence[float | None]], evaluation: Evaluation | None) -> Drawing | None:
    """Validation mean latency against decisions, a line per training seed; None if nothing was validated yet.

    Args:
        metrics: columns seed, decisions, wall_s, validation_latency_s (null on rows without validation).
        evaluation: gives the reference lines L0, L2, L3 and L5.
    """
    curves = _curves(metrics)
    if not curves:
        return None
    references = _references(evaluation)
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(5.6, 4.3)
        many = len(curves) > 1
        for curve in curves.values():
            axes.plot(curve[0], curve[2], color=VERMILLION, lw=0.8 if many else 2.2, alpha=0.5 if many else 1.0)
        centre = _mean_curve(list(curves.values())) if many else None
        if centre is not None:
            decisions, mean, half = centre
            axes.fill_between(decisions, mean - half, mean + half, color=VERMILLION, alpha=0.18, lw=0)
            axes.plot(decisions, mean, color=VERMILLION, lw=2.6)
        right = max(float(curve[0].max()) for curve in curves.values())
        left = min(float(curve[0].min()) for curve in curves.values())
        axes.set_xlim(min(left, 0.0), right if right > left else right + 1.0)
        start = _limits(axes, list(curves.values()), [value for _, value, _, _ in references])
        for _, value, colour, dashes in references:
            axes.axhline(value, color=colour, lw=1.4, ls=dashes if dashes != "-" else (0, (6, 2)))
        _right_labels(axes, [(text, value, colour) for text, value, colour, _ in references])
        axes.set_xlabel("decisions")
        axes.set_ylabel("validation mean latency (s)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        _wall_axis(axes, next(iter(curves.values())))
        svg, png = _render(figure)
    rows = [
        (f"seed {seed}", *point) for seed, curve in curves.items() for point in zip(*curve.tolist(), strict=True)
    ] + [(text, "", "", value) for text, value, _, _ in references]
    last = float(np.mean([curve[2][-1] for curve in curves.values()]))
    seeds = f"{len(curves)} training seeds" if many else "one training seed"
    lines = "; ".join(f"{text} at {value:.3g} s" for text, value, _, _ in references) or "no reference lines yet"
    band = (
        "Thin lines are training seeds, the bold line is their mean, the band its 95 % t-interval"
        if many
        else ("The line is the one training seed")
    )
    return Drawing(
        "learning",
        "Learning curve",
        f"{band}; {_reference_words(references)}{start}",
        f"Validation mean latency of {seeds} over training; it ends at {last:.3g} s. Dashed lines: {lines}.",
        svg,
        _csv(("series", "decisions", "wall_s", "mean_latency_s"), rows),
        png,
    )


def latency_ccdf(evaluation: Evaluation) -> Drawing:
    """Share of tasks slower than a given latency, log scale, a line per stable policy; the deadline is marked."""
    policies = worst_to_best(evaluation)
    shown = [p for p in policies if not p["unstable"] and p["ccdf"]["latency_s"]]
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(5.6, 5.4)
        ends: list[float] = []
        for policy in shown:
            latency, probability = np.asarray(policy["ccdf"]["latency_s"]), np.asarray(policy["ccdf"]["probability"])
            # Log scale has no zero, and below one task in 100,000 there is only chance.
            seen = probability >= 1e-5
            if not seen.any():
                continue
            colour, dashes = _style(policy, policies)
            axes.plot(
                latency[seen],
                probability[seen],
                color=colour,
                ls=dashes,
                lw=2.8 if policy["trained"] else 1.5,
                zorder=3 if policy["trained"] else 2,
                label=_short(policy),
            )
            ends.append(float(latency[seen].max()))
        axes.set_yscale("log")
        axes.set_ylim(top=1.15)
        # One policy with a long tail must not squeeze the others against the axis.
        axes.set_xlim(0.0, min(max(ends), 3.0 * float(np.median(ends))) if ends else 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.yaxis.set_minor_formatter(NullFormatter())
        deadline = evaluation["deadline_s"]
        if deadline is not None and deadline < axes.get_xlim()[1]:
            axes.axvline(deadline, color="#333333", lw=1.2, ls=(0, (2, 2)))
            axes.annotate(
                f"deadline {deadline:g} s",
                (deadline, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                fontsize=10,
                color="#333333",
            )
        axes.set_xlabel("latency (s)")
        axes.set_ylabel("share of tasks slower than this")
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.2, columnspacing=1.5)
        svg, png = _render(figure)
    rows = [
        (p["name"], latency, share)
        for p in shown
        for latency, share in zip(p["ccdf"]["latency_s"], p["ccdf"]["probability"], strict=True)
    ]
    return Drawing(
        "ccdf",
        "Latency tail",
        "The lower and further left a line, the better: where it crosses 1 % is that policy's P99."
        + _left_out(policies, "no stationary distribution"),
        "P99 latency: "
        + "; ".join(f"{p['label']} {interval_of(p['metrics']['p99_latency_s']).mean:.3g} s" for p in shown)
        + ".",
        svg,
        _csv(("policy", "latency_s", "share_slower"), rows),
        png,
    )


def completion_rate(evaluation: Evaluation) -> Drawing:
    """Share of generated tasks done in time, a bar per policy with its interval."""
    policies = worst_to_best(evaluation)
    intervals = [interval_of(p["metrics"]["completion_rate"]) for p in policies]
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(5.6, 0.9 + 0.36 * len(policies))
        places = np.arange(len(policies))[::-1]
        for place, policy, interval in zip(places, policies, intervals, strict=True):
            mean, low, high = (100.0 * value for value in (interval.mean, interval.low, interval.high))
            axes.barh(place, mean, height=0.66, color=VERMILLION if policy["trained"] else "#9FB4C4")
            if np.isfinite(low) and np.isfinite(high):
                # A share has no part above 100 % or below 0, whatever the t-interval says.
                whiskers = [[mean - max(low, 0.0)], [max(min(high, 100.0) - mean, 0.0)]]
                axes.errorbar(mean, place, xerr=whiskers, color="black", lw=1.4, capsize=3, capthick=1.2)
            axes.annotate(
                f"{mean:.2f} %" if np.isfinite(mean) else "no value",
                (102.0, place),
                va="center",
                fontsize=10,
                fontweight="bold" if policy["trained"] else "normal",
                annotation_clip=False,
            )
        _names(axes, places, policies)
        axes.set_xlim(0.0, 100.0)
        axes.grid(False, axis="y")
        axes.set_xlabel("tasks done in time (% of generated)")
        svg, png = _render(figure)
    deadline = f"within {evaluation['deadline_s']:g} s" if evaluation["deadline_s"] is not None else "at all"
    return Drawing(
        "completion",
        "Completion rate",
        f"Share of all generated tasks that were done {deadline}, with 95 % intervals; longer is better.",
        "Completion rate: "
        + "; ".join(f"{p['label']} {100 * i.mean:.2f} %" for p, i in zip(policies, intervals, strict=True))
        + ".",
        svg,
        _csv(
            ("policy", "completion_rate", "low", "high"),
            [(p["name"], i.mean, i.low, i.high) for p, i in zip(policies, intervals, strict=True)],
        ),
        png,
    )


def herding(evaluation: Evaluation) -> Drawing | None:
    """Backlog of every server over time, one panel per policy on one scale; None if it was not recorded."""
    record = evaluation["herding"]
    if record is None or not record["series"]:
        return None
    labels = {policy["name"]: policy["label"] for policy in evaluation["policies"]}
    spreads = {name: _spread(rows) for name, rows in record["series"].items()}
    # From the most to the least herding, so that the eye goes from the problem to the remedy.
    order = sorted(spreads, key=lambda name: -spreads[name])
    with mpl.rc_context(SETTINGS):
        svg, png = _render(_herding_figure(record, order, labels, spreads))
    times = np.arange(record["slots"]) * record["slot_s"]
    rows = [
        (name, float(time), server, backlog)
        for name in order
        for time, slot in zip(times, record["series"][name], strict=True)
        for server, backlog in zip(record["servers"], slot, strict=True)
    ]
    return Drawing(
        "herding",
        "Herding: the backlog of every server",
        "One line per server: lines that swing apart are devices rushing to the same server at once; "
        "lines close together are a shared load.",
        "Mean difference between the fullest and the emptiest server: "
        + "; ".join(f"{labels.get(name, name)} {spreads[name]:.3g} s" for name in order)
        + ".",
        svg,
        _csv(("policy", "time_s", "server", "backlog_s"), rows),
        png,
    )


def decomposition(evaluation: Evaluation) -> Drawing:
    """Mean latency in its parts, a stacked bar per policy with its total."""
    policies = worst_to_best(evaluation)
    parts = {p["name"]: [float(_part(p, key) or 0.0) for key, _, _ in PARTS] for p in policies}
    totals = {p["name"]: sum(parts[p["name"]]) for p in policies if not p["unstable"]}
    # A policy that is several times slower than the others is cut off, and says so.
    limit = min(max(totals.values(), default=1.0), 3.0 * float(np.median(list(totals.values()) or [1.0]))) or 1.0
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(5.6, 1.6 + 0.36 * len(policies))
        places = np.arange(len(policies))[::-1]
        for place, policy in zip(places, policies, strict=True):
            name, start = policy["name"], 0.0
            if policy["unstable"]:
                axes.annotate("unstable: no mean latency", (0.01 * limit, place), va="center", fontsize=10)
                continue
            for (_, _, colour), length in zip(PARTS, parts[name], strict=True):
                axes.barh(place, length, left=start, height=0.66, color=colour, edgecolor="white", lw=0.5)
                start += length
            cut = totals[name] > limit
            axes.annotate(
                f"{totals[name]:.2f} s" + (" (cut)" if cut else ""),
                (min(totals[name], limit), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                fontweight="bold" if policy["trained"] else "normal",
                annotation_clip=False,
            )
        _names(axes, places, policies)
        axes.set_xlim(0.0, limit)
        axes.grid(False, axis="y")
        axes.set_xlabel("mean latency (s)")
        handles = [axes.barh(0, 0, color=colour, label=text) for _, text, colour in PARTS]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, handlelength=1.2, columnspacing=1.2)
        svg, png = _render(figure)
    return Drawing(
        "decomposition",
        "Where the time goes",
        "Parts of the mean latency, in the order in which a task meets them; the label is their sum."
        + _left_out(policies, "no mean"),
        "Mean latency: "
        + "; ".join(
            f"{p['label']} {totals[p['name']]:.3g} s ("
            + ", ".join(f"{text} {value:.2g}" for (_, text, _), value in zip(PARTS, parts[p["name"]], strict=True))
            + ")"
            for p in policies
            if p["name"] in totals
        )
        + ".",
        svg,
        _csv(
            ("policy", *(f"{key}_s" for key, _, _ in PARTS), "total_s"),
            [(name, *parts[name], total) for name, total in totals.items()],
        ),
        png,
    )


def _herding_figure(record: Herding, order: list[str], labels: dict[str, str], spreads: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6.2, 0.9 + 1.7 * len(order)), layout=_layout())
    panels = figure.subplots(len(order), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    times = np.arange(record["slots"]) * record["slot_s"]
    top = max(float(np.max(rows)) for rows in record["series"].values()) or 1.0
    for axes, name in zip(panels, order, strict=True):
        backlog = np.asarray(record["series"][name], dtype=np.float64)
        axes.fill_between(times, backlog.min(axis=1), backlog.max(axis=1), color="#EDEDED", lw=0)
        for index, server in enumerate(record["servers"]):
            axes.plot(
                times,
                backlog[:, index],
                color=SERVERS[index % len(SERVERS)],
                ls="-" if index < len(SERVERS) else (0, (3, 1)),
                lw=1.9,
                label=server,
            )
        axes.set_title(labels.get(name, name), loc="left", fontweight="bold", fontsize=12)
        axes.set_title(f"servers {spreads[name]:.2g} s apart on average", loc="right", color="#444444")
        axes.set_xlim(0.0, record["slots"] * record["slot_s"])
        axes.set_ylim(0.0, 1.05 * top)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    panels[-1].set_xlabel("time (s)")
    figure.supylabel("server backlog (s of work)", fontsize=11)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), handlelength=1.5)
    return figure


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout=_layout())
    return figure, figure.add_subplot()


def _render(figure: Figure) -> tuple[str, bytes]:
    vector, raster = io.StringIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None, "Creator": None})
    FigureCanvasAgg(figure)
    figure.savefig(raster, format="png", dpi=160)
    return vector.getvalue(), raster.getvalue()


def _curves(metrics: Mapping[str, Sequence[float | None]]) -> dict[int, Floats]:
    """Per training seed: decisions, wall seconds and validation latency, shape [3, validations], in order."""
    columns = [
        np.asarray(metrics[name], dtype=np.float64) for name in ("seed", "decisions", "wall_s", "validation_latency_s")
    ]
    seeds, *rest = columns
    curves: dict[int, Floats] = {}
    for seed in np.unique(seeds):
        points = np.stack([column[seeds == seed] for column in rest])
        points = points[:, np.isfinite(points).all(axis=0)]
        if points.shape[1]:
            curves[int(seed)] = points[:, np.argsort(points[0], kind="stable")]
    return curves


def _mean_curve(curves: Sequence[Floats]) -> tuple[Floats, Floats, Floats] | None:
    """Mean over seeds and half the t-interval where all have values; seeds may be validated at other decisions."""
    start, stop = max(float(c[0, 0]) for c in curves), min(float(c[0, -1]) for c in curves)
    grid = np.unique(np.concatenate([curve[0] for curve in curves]))
    grid = grid[(grid >= start) & (grid <= stop)]
    if not grid.size:
        return None
    values = np.stack([np.interp(grid, curve[0], curve[2]) for curve in curves])
    critical = float(stats.t.ppf(0.975, len(curves) - 1))
    return grid, values.mean(axis=0), critical * values.std(axis=0, ddof=1) / len(curves) ** 0.5


def _references(evaluation: Evaluation | None) -> list[tuple[str, float, str, Any]]:
    policies = evaluation["policies"] if evaluation is not None else []
    found: list[tuple[str, float, str, Any]] = []
    for rung in ("L0", "L2", "L3", "L5"):
        for policy in policies:
            if policy["ladder"] == rung and not policy["unstable"]:
                colour, dashes = _style(policy, policies)
                found.append(
                    (f"{rung} {policy['label']}", interval_of(policy["metrics"]["mean_latency_s"]).mean, colour, dashes)
                )
    return found


def _reference_words(references: Sequence[tuple[str, float, str, Any]]) -> str:
    if not references:
        return "lower is better."
    names = ", ".join(text for text, *_ in references)
    return f"dashed lines are the ladder ({names}): below L3, the learner beats tuned rules."


def _limits(axes: Axes, curves: Sequence[Floats], references: Sequence[float]) -> str:
    """Sets the limits of the latency axis; a sentence if the beginning of training lies above the frame."""
    seen = np.concatenate([curve[2] for curve in curves])
    # The end of training against the ladder is the news; the first, bad policies would flatten it to a line.
    ends = [float(curve[2][-1]) for curve in curves]
    low, high = min([*seen, *references]), 1.2 * max([*ends, *references], default=-math.inf)
    cut = bool(references) and float(seen.max()) > high
    high = high if cut else max(float(seen.max()), *references, -math.inf)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high if cut else high + margin)
    return f" Training starts above the frame, at up to {seen.max():.3g} s." if cut else ""


def _right_labels(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Names right of the axes at their heights, pushed apart where they would overlap."""
    bottom, top = axes.transData.transform([(0, limit) for limit in axes.get_ylim()])[:, 1]
    heights = {
        text: float((axes.transData.transform((0, value))[1] - bottom) / (top - bottom)) for text, value, _ in labels
    }
    previous = -1.0
    for text, _, colour in sorted(labels, key=lambda label: label[1]):
        previous = max(heights[text], previous + 0.055)
        axes.annotate(
            text.split(" ", 1)[0],
            (1.0, previous),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour if colour != SKY else "#2B7FB0",
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )


def _wall_axis(axes: Axes, curve: Floats) -> None:
    """A second axis on top with round numbers of seconds, placed by the first seed's clock."""
    decisions, wall, _ = curve
    ticks = [t for t in MaxNLocator(5).tick_values(0.0, float(wall[-1])) if float(wall[0]) <= t <= float(wall[-1])]
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(np.interp(ticks, wall, decisions), [f"{tick:g}" for tick in ticks])
    upper.set_xlabel("wall time (s)")
    upper.spines["top"].set_visible(True)


def _style(policy: PolicyResult, policies: Sequence[PolicyResult]) -> tuple[str, Any]:
    if policy["name"] in STYLES:
        return STYLES[policy["name"]]
    others = [p["name"] for p in policies if p["name"] not in STYLES]
    return SPARE[sorted(others).index(policy["name"]) % len(SPARE)]


def _names(axes: Axes, places: NDArray[np.int64], policies: Sequence[PolicyResult]) -> None:
    axes.set_yticks(places, [_short(policy) for policy in policies])
    axes.tick_params(axis="y", length=0)
    for text, policy in zip(axes.get_yticklabels(), policies, strict=True):
        text.set_fontweight("bold" if policy["trained"] else "normal")


def _short(policy: PolicyResult) -> str:
    label = policy["label"] if len(policy["label"]) <= 24 else policy["label"][:23] + "…"
    return f"{label} ({policy['ladder']})" if policy["ladder"] else label


def _part(policy: PolicyResult, key: str) -> float | None:
    return cast("dict[str, float | None]", policy["decomposition_s"])[key]


def _left_out(policies: Sequence[PolicyResult], why: str) -> str:
    names = [policy["label"] for policy in policies if policy["unstable"]]
    return f" Left out as unstable ({why}): {', '.join(names)}." if names else ""


def _spread(rows: Sequence[Sequence[float]]) -> float:
    """Mean over time of the fullest minus the emptiest server, seconds."""
    return float(np.ptp(np.asarray(rows, dtype=np.float64), axis=1).mean())


def _percent(value: float, _: int | None = None) -> str:
    return f"{100.0 * value:g} %"


def _thousands(value: float, _: int | None = None) -> str:
    return next(
        (f"{value / size:g}{unit}" for size, unit in ((1e6, "M"), (1e3, "k")) if abs(value) >= size), f"{value:g}"
    )


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
