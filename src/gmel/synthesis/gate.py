"""The no-harm gate: synthetic photos are used where shots that were held out say that they help, and nowhere else.

Each shot is left out once, with everything that was made from it; detectors are trained on the rest, one for each
candidate (nothing, classic augmentation, a mode of synthesis at a share), and judged on the shot and on good parts that
no training saw, neither as good parts nor as grounds of synthetic photos. A candidate replaces classic augmentation
only where its gain is greater than 1.64 standard errors; finding defects and naming their types are
decided apart, and so is each class. With five photos a class the shots say little, so the gate is slow to believe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.detector.linear import Doubles, fit_temperature, two_ways
from gmel.synthesis.photo import GOOD
from gmel.synthesis.rows import (
    CLASSIC,
    NONE,
    Choice,
    Heads,
    Learner,
    Mixture,
    Rows,
    fit_head,
    fit_heads,
    linear_learner,
)

__all__ = ["SHARES", "Decision", "Evidence", "decide", "taught"]

SHARES = (0.05, 0.15, 0.35)
"""Shares of synthetic rows that are tried; above a third synthesis has only ever harmed (docs/synthesis.md)."""

_DOUBT = 1.64
"""Standard errors by which a gain has to exceed zero."""
_CLASS_DOUBT = 2.0
"""The same for a single class, whose best candidate is the best of many on a handful of photos."""
_LEAST_CHANCE = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What held-out photos say of one candidate.

    Attributes:
        candidate: its name.
        gain: mean gain over classic augmentation, in nats; each class weighs the same.
        error: standard error of the gain.
    """

    candidate: str
    gain: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the gain can be believed."""
        return self.gain > _DOUBT * self.error and self.gain > 0.0


@dataclass(frozen=True)
class Decision:
    """What the detector learns from.

    Attributes:
        detection, typing: the mixture for each part of the detector.
        evidence: of every candidate, by part ("detection", "typing").
        heads: trained on the mixtures, with temperatures from the held-out shots.
    """

    detection: Mixture
    typing: Mixture
    heads: Heads
    evidence: dict[str, list[Evidence]] = field(default_factory=dict[str, list[Evidence]])


Made = Callable[[frozenset[str]], dict[str, Rows]]
"""Rows of every mode, made without the given shots."""


def decide(
    real: Rows,
    classic: Rows,
    made: Made,
    judges: Rows,
    folds: int = 5,
    shares: Sequence[float] = SHARES,
) -> Decision:
    """Chooses the mixtures and trains the detector.

    Args:
        real: shots (with their names as sources) and good parts to learn from.
        classic: augmented variants of them.
        made: synthetic rows by mode, made without the shots named.
        judges: good parts that nothing else sees; may be none.
        folds: rounds; in each about 1 / folds of the shots of every class are held out (all are, once).
        shares: of synthetic rows, to be tried.
    """
    classes = tuple(sorted(set(real.labels.tolist())))
    trials = [_Trial(real, classic, made, judges, held) for held in _folds(real, folds)]
    candidates = {NONE: _uniform(classes, Choice(NONE)), CLASSIC: _uniform(classes, Choice(CLASSIC))}
    if not trials:  # nothing can be held out, nothing can be told: classic, uncalibrated
        base = candidates[CLASSIC]
        return Decision(base, base, fit_heads(real, classic, {}, base, base).alarming(judges.features))
    modes = sorted({mode for trial in trials for mode, rows in trial.made.items() if len(rows)})
    for mode in modes:
        for share in shares:
            candidates[f"{mode} {share:g}"] = _uniform(classes, Choice(mode, share))
    parts = (["detection"] if GOOD in classes and len(judges) else []) + (
        ["typing"] if len(_kinds(classes)) > 1 else []
    )
    chosen: dict[str, Mixture] = {}
    evidence: dict[str, list[Evidence]] = {}
    for part in parts:
        chosen[part], evidence[part] = _choose(part, candidates, trials, classes)
    detection = chosen.get("detection", candidates[CLASSIC])
    typing = chosen.get("typing", candidates[CLASSIC])
    heads = fit_heads(real, classic, made(frozenset()), detection, typing)
    heads = _calibrated(heads, trials, detection, typing).alarming(judges.features)
    return Decision(detection, typing, heads, evidence)


def taught(
    real: Rows,
    classic: Rows,
    made: Made,
    judges: Rows,
    detection: Mixture,
    typing: Mixture,
    learner: Learner,
    folds: int = 3,
) -> Heads:
    """A detector of another kind on mixtures that are chosen, with temperatures from shots that were held out.

    For detectors that are too slow to be trained once for every candidate and shot.

    Args:
        real, classic, made, judges: as for :func:`decide`, in the features that the learner reads.
        detection, typing: the mixtures.
        learner: trains each part.
        folds: rounds; in each about 1 / folds of the shots of every class are held out.
    """
    heads = fit_heads(real, classic, made(frozenset()), detection, typing, learner)
    trials = [_Trial(real, classic, made, judges, held, learner) for held in _folds(real, folds)]
    if trials:
        heads = _calibrated(heads, trials, detection, typing)
    return heads.alarming(judges.features)


class _Trial:
    """One fold: what is left to learn from, and what is held out."""

    def __init__(
        self,
        real: Rows,
        classic: Rows,
        made: Made,
        judges: Rows,
        held: frozenset[str],
        learner: Learner = linear_learner,
    ) -> None:
        self._learner = learner
        shots = np.isin(real.sources, list(held)) & (real.labels != GOOD)
        self.real, self.classic = real.where(~shots), classic.without(held)
        self.made = made(held)
        self.held = real.where(shots)
        self.judges = judges
        self._logits: dict[tuple[tuple[str, Choice], ...], tuple[Doubles, Doubles]] = {}

    def logits(self, mixture: Mixture) -> tuple[Doubles, Doubles]:
        """Logits of a detector trained on the mixture: of the held-out shots, and of the judges."""
        key = tuple(sorted(mixture.items()))
        if key not in self._logits:
            head = fit_head(self.real, self.classic, self.made, mixture, self._learner)
            self._logits[key] = head.logits(self.held.features), head.logits(self.judges.features)
        return self._logits[key]


def _folds(real: Rows, folds: int) -> list[frozenset[str]]:
    """Names of the shots that each fold holds out: of every class the n-th, counted modulo the number of folds.

    The only shot of a class is never held out: without it there is no detector of the class to be judged.
    """
    held: list[set[str]] = [set() for _ in range(folds)]
    for label in np.unique(real.labels[real.labels != GOOD]):
        names = real.sources[real.labels == label]
        for place, name in enumerate(names if names.size > 1 else ()):
            held[place % folds].add(str(name))
    return [frozenset(names) for names in held if names]


def _uniform(classes: Sequence[str], choice: Choice) -> Mixture:
    return dict.fromkeys(classes, choice)


def _kinds(classes: Sequence[str]) -> list[str]:
    return [name for name in classes if name != GOOD]


@dataclass(frozen=True, eq=False)
class _Judged:
    """Scores of a candidate: one for each held-out shot, and the class of each."""

    scores: Doubles
    labels: NDArray[np.str_]


def _choose(
    part: str, candidates: dict[str, Mixture], trials: list[_Trial], classes: Sequence[str]
) -> tuple[Mixture, list[Evidence]]:
    """The mixture for one part of the detector, and what speaks for each candidate."""
    judged = {name: _judge(part, mixture, trials, classes) for name, mixture in candidates.items()}
    base = judged[CLASSIC]
    evidence = [_evidence(name, found, base) for name, found in judged.items() if name != CLASSIC]
    # Class by class: what helps one type may harm another.
    mixed = dict(candidates[CLASSIC])
    for label in sorted(set(base.labels.tolist())):
        best = max(
            (_evidence(name, found, base, label) for name, found in judged.items() if name != CLASSIC), key=_lower
        )
        if best.gain > _CLASS_DOUBT * best.error:
            mixed[label] = candidates[best.candidate][label]
    used = [choice for label, choice in mixed.items() if label != GOOD and choice.mode not in (NONE, CLASSIC)]
    if used:
        mixed[GOOD] = max(used, key=lambda choice: choice.share)
    options = {name: candidates[name] for name in judged}
    if len({*mixed.values()}) > 1:
        options["class by class"] = mixed
        evidence.append(_evidence("class by class", _judge(part, mixed, trials, classes), base))
    believed = [found for found in evidence if found.holds]
    if not believed:
        return candidates[CLASSIC], evidence
    return options[max(believed, key=_lower).candidate], evidence


def _lower(found: Evidence) -> float:
    return found.gain - _DOUBT * found.error


def _judge(part: str, mixture: Mixture, trials: list[_Trial], classes: Sequence[str]) -> _Judged:
    """Scores of a mixture on the shots that were held out: how far each stands out from good parts that nothing has
    seen, or the log probability of its type after one temperature for all."""
    labels = np.concatenate([trial.held.labels for trial in trials])
    order = (*((GOOD,) if GOOD in classes else ()), *_kinds(classes))
    pairs = [trial.logits(mixture) for trial in trials]
    if part == "detection":
        return _Judged(np.concatenate([_rank_scores(two_ways(held), two_ways(seen)) for held, seen in pairs]), labels)
    kinds = [place for place, name in enumerate(order) if name != GOOD]
    logits = np.concatenate([held for held, _ in pairs])[:, kinds]
    return _Judged(_log_chance(logits, [_kinds(order).index(name) for name in labels]), labels)


def _rank_scores(held: Doubles, judges: Doubles) -> Doubles:
    """Minus the logarithm of the share of good parts that are as suspect as each defect.

    It knows of no threshold and no calibration; where it gains, AUROC and the rate found at few false alarms gain.
    """
    suspicion, good = held[:, 1] - held[:, 0], judges[:, 1] - judges[:, 0]
    above = np.sum(good[None, :] >= suspicion[:, None], axis=1)
    return -np.log((above + 1.0) / (good.size + 1.0))


def _log_chance(logits: Doubles, truth: Sequence[int]) -> Doubles:
    """Log probability of the truth, at the temperature that suits these logits best."""
    tempered = logits / fit_temperature(logits, truth)
    tempered = tempered - tempered.max(axis=1, keepdims=True)
    chance = np.exp(tempered) / np.exp(tempered).sum(axis=1, keepdims=True)
    return np.log(np.maximum(chance[np.arange(len(truth)), list(truth)], _LEAST_CHANCE))


def _evidence(name: str, found: _Judged, base: _Judged, label: str | None = None) -> Evidence:
    """Gain of a candidate over the base on the same shots: of one class, or of all with equal weight."""
    gains = found.scores - base.scores
    groups = [label] if label is not None else sorted(set(base.labels.tolist()))
    gain = variance = 0.0
    for group in groups:
        own = gains[base.labels == group]
        gain += float(own.mean()) / len(groups)
        variance += (float(own.var(ddof=1)) / own.size if own.size > 1 else float("inf")) / len(groups) ** 2
    return Evidence(name, gain, float(np.sqrt(variance)))


def _calibrated(heads: Heads, trials: list[_Trial], detection: Mixture, typing: Mixture) -> Heads:
    """The heads with temperatures from the held-out shots (and judges)."""
    labels = np.concatenate([trial.held.labels for trial in trials])
    kinds = [name for name in heads.classes if name != GOOD]
    first, second = heads.detection, heads.typing
    if first is not None and len(trials[0].judges):
        pairs = [trial.logits(detection) for trial in trials]
        # Each judge was seen by every fold: its logits are averaged.
        seen = np.mean([two_ways(judged) for _, judged in pairs], axis=0)
        rows = np.concatenate([*(two_ways(held) for held, _ in pairs), seen])
        first = first.tempered(fit_temperature(rows, [1] * labels.size + [0] * len(seen)))
    if second is not None:
        rows = np.concatenate([trial.logits(typing)[0] for trial in trials])
        rows = rows[:, [second.classes.index(kind) for kind in kinds]]
        second = second.tempered(fit_temperature(rows, [kinds.index(name) for name in labels]))
    return replace(heads, detection=first, typing=second)
