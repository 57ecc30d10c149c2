"""What synthesis is worth by the number of samples and by their denoising steps.

Both are what a task of generation is paid for: the curves say where further samples or steps stop helping the detector,
which fidelity to real photos alone does not say.
"""

from typing import Any, cast

from gmel.evaluation.statistics import Interval, paired_t_interval
from gmel.scenario.errors import InputError
from gmel.synthesis.generator import steps_around
from gmel.synthesis.lesson import Lesson
from gmel.synthesis.recipes import SHARE, Referee
from gmel.synthesis.rows import Choice

__all__ = ["COUNTS", "by_samples_and_steps", "curve"]

COUNTS = (1, 2, 4, 8, 16, 32)
"""Samples for each shot that are tried; the share of their weight stays the same."""


def by_samples_and_steps(lesson: Lesson, referee: Referee) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of real + classic + each mode, by samples for each shot and by steps.

    Steps that a mode does not allow are left out.

    Returns:
        By mode, then "samples" or "steps", then the number (in words, as JSON has it).
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for mode, samples in lesson.samples.items():
        choice = Choice(mode, SHARE)
        found[mode] = {
            "samples": {str(count): referee.of_choice(choice, {mode: samples.again(count, None)}) for count in COUNTS},
            "steps": {},
        }
        for steps in steps_around(samples.mode.default_steps):
            try:
                rows = samples.again(samples.per_shot, steps)
            except InputError:
                continue
            found[mode]["steps"][str(steps)] = referee.of_choice(choice, {mode: rows})
    return found


def curve(draws: list[dict[str, Any]], mode: str, axis: str, metric: str, base: str) -> dict[int, Interval]:
    """Gain over a recipe along one axis, paired by draw; nothing where the test cannot tell.

    Args:
        draws: of the experiment.
        mode: the mode.
        axis: "samples" or "steps".
        metric: name of the metric.
        base: the recipe that is compared with.

    Returns:
        By number: the mean gain with its 95 % interval.
    """
    reference = [draw["scores"][base][metric] for draw in draws]
    out: dict[int, Interval] = {}
    for number in cast("dict[str, Any]", draws[0]["curves"][mode][axis]):
        own = [draw["curves"][mode][axis][number][metric] for draw in draws]
        if not any(value is None for value in (*own, *reference)):
            out[int(number)] = paired_t_interval(own, reference)
    return out
