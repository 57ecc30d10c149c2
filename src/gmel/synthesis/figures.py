"""Figures of the page of an experiment, as SVG."""

# Matplotlib's types are partial; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import math
from collections.abc import Mapping
from typing import cast

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gmel.evaluation.figures import SETTINGS
from gmel.evaluation.statistics import Interval

__all__ = ["Rows", "curves_figure", "gains_figure"]

Rows = dict[str, dict[str, dict[str, Interval | float]]]
"""By recipe and metric, as `table` of `evaluate.py` gives them."""

_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00")
_GATE = "#D55E00"


def gains_figure(rows: Rows, metrics: Mapping[str, str]) -> str:
    """Paired differences from the recipe that all are compared with, with their intervals, a panel for each metric.

    Args:
        rows: the table without the recipe compared with.
        metrics: titles of the panels, by metric.
    """
    names = list(rows)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2.6 * len(metrics) + 1.6, 0.42 * len(names) + 1.1), layout="constrained")
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
            axes.axvline(0.0, color="#555555", linewidth=1.0)
            for place, name in enumerate(names):
                gain = cast("Interval", rows[name][metric]["gain"])
                colour = _GATE if name == "gate" else _COLOURS[0]
                if not math.isnan(gain.low):
                    axes.plot([100 * gain.low, 100 * gain.high], [place, place], color=colour, linewidth=2.0)
                axes.plot([100 * gain.mean], [place], "o", color=colour, markersize=6)
            axes.set_title(title)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlabel("points")
        return _svg(figure)


def curves_figure(
    curves: Mapping[str, Mapping[str, Mapping[int, Interval]]], metrics: Mapping[str, str], axis: str
) -> str:
    """Gains along one axis, a panel for each metric, a line with its interval for each mode.

    Args:
        curves: gains by mode, metric and number.
        metrics: titles of the panels, by metric.
        axis: what is counted.
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2.6 * len(metrics) + 0.8, 2.9), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
            axes.axhline(0.0, color="#555555", linewidth=1.0)
            ticks: set[int] = set()
            for colour, (mode, gains) in zip(_COLOURS, curves.items(), strict=False):
                along = sorted(gains[metric])
                found = [gains[metric][number] for number in along]
                ticks |= set(along)
                if not any(math.isnan(gain.low) for gain in found):
                    low, high = [100 * gain.low for gain in found], [100 * gain.high for gain in found]
                    axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0.0)
                axes.plot(along, [100 * gain.mean for gain in found], "o-", color=colour, markersize=4, label=mode)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(ticks), [str(number) for number in sorted(ticks)])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel(axis)
        panels[0].set_ylabel("points")
        panels[0].legend(frameon=False)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
