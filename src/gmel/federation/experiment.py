"""The one table of collaboration: what sites reach alone, by rounds of averaging, by one exchange, and with all photos.

Every way of working together is tried on the same draws of the shots and tested on the same photos of all classes, so
that differences from pooled photos are paired by draw.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.progress import Reporter
from gmel.evaluation.statistics import Interval, paired_t_interval, t_interval
from gmel.federation.exchange import beside, detector_of, from_all, own_and_others, receive, ship
from gmel.federation.membership import Likely, attack_auroc
from gmel.federation.moments import Moments, agreed_scaling
from gmel.federation.privacy import (
    Budget,
    PrivateSums,
    PublicSpace,
    noise_multiplier,
    private_gaussians,
    private_sums,
)
from gmel.federation.shared_generator import GeneratorPlan, train_apart, train_generator
from gmel.federation.sites import Site, sites_of
from gmel.federation.training import ALGORITHMS, Elsewhere, Plan, RoundLog, SiteRows, Trained, train_head
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.augment import augmented
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.procedural import procedural_dataset
from gmel.synthesis.data.source import Source
from gmel.synthesis.data.splits import SPLIT_SEED, Split, few_shot_split
from gmel.synthesis.data.write import check_file
from gmel.synthesis.detector.features import FeatureBook, extractor_for
from gmel.synthesis.detector.texture import texture_table
from gmel.synthesis.photo import GOOD, Floats, Photo

__all__ = ["OVER", "POOLED", "Outcome", "Settings", "federate", "lines", "run_experiment", "table"]

ALONE = "alone"
EXCHANGE_OWN = "one exchange: own real + others' synthetic"
EXCHANGE_ALL = "one exchange: synthetic of all"
SHARED_OWN = "FedAvg of one generator (a network): own real + others' synthetic"
SHARED_ALL = "FedAvg of one generator (a network): synthetic of all"
APART_OWN = "one exchange of such networks, one a site: own real + others' synthetic"
APART_ALL = "one exchange of such networks, one a site: synthetic of all"
MEANS = "one exchange of class means in public directions, no noise"
PRIVATE = "the same, private (photo left out)"
PRIVATE_OWN = "the same, own photos without noise"
PRIVATE_REPLACED = "the same, private (photo replaced)"
POOLED = "pooled photos (not allowed)"
OVER = "FedAvg of the detector, over a network"
_NAMES = {"fedavg": "FedAvg of the detector", "fedprox": "FedProx", "fedadam": "FedAdam"}

_PER_CLASS = 400
"""Synthetic rows of each class."""
_PUBLIC = {"seed": 20, "good": 24, "defects": 24, "shape": (128, 128)}
"""The built-in set that the private exchange takes its directions from; another seed than anybody's data."""
_DIMENSIONS = 12


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        sites: number of sites.
        split: how photos are dealt to them.
        alpha: of the Dirichlet split.
        shots: photos of each defect class, over all sites.
        draws: independent draws of the shots.
        epsilon: budget of the private exchange for each photo; it is left out where this is none.
        delta: of the same budget.
        test_per_class: photos of each class that are tested on; half of the groups where it is none.
        split_seed: what decides which photos are tested on.
        copies: augmented variants of each shot.
        plan: of the federated training of the detector.
        generator: of the federated training of one generator; it is left out where this is none.
    """

    sites: int = 3
    split: str = "disjoint"
    alpha: float = 0.5
    shots: int = 5
    draws: int = 10
    epsilon: float | None = 8.0
    delta: float = 1e-5
    test_per_class: int | None = None
    split_seed: int = SPLIT_SEED
    copies: int = 8
    plan: Plan = field(default_factory=Plan)
    generator: GeneratorPlan | None = field(default_factory=GeneratorPlan)

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws: {self.draws}, must be at least 1; 10 for a claim")
        if self.copies < 0:
            raise InputError(f"copies: {self.copies}, must not be negative")


Outcome = dict[str, Any]
"""Settings, sites, one entry a draw (accuracy of every way), bytes, rounds, privacy; plain JSON."""


@dataclass(frozen=True, eq=False)
class _Draw:
    """Everything of a draw that the ways have in common.

    Attributes:
        sites: with their photos.
        rows: standardised rows of each site; its photos come first.
        counts: photos by site and class.
        raw: by site, for each photo the features of it and of its variants, not standardised.
        scaling_bytes: sent to agree on the scale.
        test: standardised rows of the test photos.
        raw_test: the same, not standardised.
        truth: their classes.
    """

    sites: tuple[Site, ...]
    rows: list[SiteRows]
    counts: dict[str, dict[str, int]]
    raw: dict[str, list[Floats]]
    scaling_bytes: int
    test: Floats
    raw_test: Floats
    truth: NDArray[np.str_]


def federate(dataset: Dataset, settings: Settings, reporter: Reporter, elsewhere: Elsewhere | None = None) -> Outcome:
    """Runs the experiment.

    Args:
        dataset: photos with groups.
        settings: what is asked.
        reporter: told how it goes on.
        elsewhere: where FedAvg of the detector is run once more, beside in this process; nowhere where it is left out.

    Raises:
        InputError: the data set is too small for the split or for so many sites.
    """
    budget = None if settings.epsilon is None else Budget(settings.epsilon, settings.delta)
    split = _split(dataset, settings, 0)
    sites_of([*split.shots, *split.good], settings.split, settings.sites, settings.split_seed, settings.alpha)
    book = FeatureBook(extractor_for(dataset.photos))
    reporter.stage(f"features of {len(split.test) + len(split.good)} photos")
    fixed = [*split.test, *split.good]
    for start in range(0, len(fixed), 64):
        book(fixed[start : start + 64])
        done = min(start + 64, len(fixed))
        reporter.advance(done, len(fixed), f"features of {done} of {len(fixed)} photos")
    space = None if budget is None else _public_space(book, reporter)
    found: Outcome = {"dataset": dataset.name, "settings": asdict(settings), "draws": []}
    found["photos"] = {"test": len(split.test), "good": len(split.good), "shots": len(split.shots)}
    if budget is not None:
        found["privacy"] = {
            "epsilon": budget.epsilon,
            "delta": budget.delta,
            "noise_multiplier": noise_multiplier(budget),
            "dimensions": _DIMENSIONS,
        }
    reporter.stage("draws of the shots")
    for draw in range(settings.draws):
        made = _draw(dataset, settings, draw, book)
        ways = _ways(made, settings, draw, space, budget)
        if elsewhere is not None:
            ways[OVER] = _elsewhere(made, settings, draw, elsewhere, reporter)
        # Last in the table: what the others are measured against.
        ways[POOLED] = ways.pop(POOLED)
        found["draws"].append({"ways": ways})
        if draw == 0:
            found["sites"] = made.counts
        reporter.advance(draw + 1, settings.draws, f"draw {draw + 1} of {settings.draws}")
    return found


def run_experiment(
    source: Source,
    settings: Settings,
    out: Path | None,
    reporter: Reporter,
    elsewhere: Elsewhere | None = None,
) -> Outcome:
    """From photos to the outcome, also written to `out` where there is one.

    Raises:
        InputError: the photos, the settings or the place to write cannot be used.
    """
    if out is not None:
        check_file(out, "federation.json")
    found = federate(source.read(reporter), settings, reporter, elsewhere)
    if out is not None:
        replace_file(out, json.dumps(found, allow_nan=False, indent=1).encode())
    return found


def table(found: Outcome, confidence: float = 0.95) -> dict[str, dict[str, Any]]:
    """Of every way: accuracy and its paired difference from pooled photos (intervals over draws), bytes, rounds."""
    draws = found["draws"]
    rows: dict[str, dict[str, Any]] = {}
    for way, facts in draws[0]["ways"].items():
        own = [draw["ways"][way]["accuracy"] for draw in draws]
        base = [draw["ways"][POOLED]["accuracy"] for draw in draws]
        rows[way] = {
            "accuracy": t_interval(own, confidence),
            "against_pooled": paired_t_interval(own, base, confidence),
            "rounds": facts["rounds"],
            "bytes": float(np.mean([draw["ways"][way]["bytes"] for draw in draws])),
            "epsilon": facts.get("epsilon"),
        }
        attacks = [draw["ways"][way].get("attack") for draw in draws]
        if all(attack is not None for attack in attacks):
            rows[way]["attack"] = t_interval(attacks, confidence)
    return rows


def lines(found: Outcome) -> list[str]:
    """The table as Markdown, and what is behind it."""
    said = [
        "| way | accuracy | against pooled | rounds | kB in all | epsilon | attack AUROC |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way, row in table(found).items():
        epsilon = "-" if row["epsilon"] is None else f"{row['epsilon']:g}"
        attack = _plus_minus(row["attack"]) if "attack" in row else "-"
        kilobytes = "photos" if way == POOLED else f"{row['bytes'] / 1e3:.0f}"
        difference = "-" if way == POOLED else _plus_minus(row["against_pooled"], sign=True)
        cells = [way, _plus_minus(row["accuracy"]), difference, str(row["rounds"]), kilobytes, epsilon, attack]
        said.append(f"| {' | '.join(cells)} |")
    photos, settings = found["photos"], found["settings"]
    said += [
        "",
        f"{found['dataset']}: {len(found['sites'])} sites ({settings['split']}), {settings['shots']} shots a class, "
        f"{photos['test']} photos to test on, {len(found['draws'])} draws; accuracy: mean over classes.",
    ]
    over = [draw["ways"][OVER] for draw in found["draws"] if OVER in draw["ways"]]
    if over:
        away = [way["difference"] for way in over]
        greatest = "not the same classes" if None in away else f"{max(away):g}"
        seconds = float(np.mean([way["seconds"] for way in over]))
        said.append(
            f"Over a network: {seconds:.0f} s a draw; greatest difference of a weight from this process: {greatest}."
        )
    return said


def _plus_minus(interval: Interval, sign: bool = False) -> str:
    half = interval.high - interval.mean
    mean = f"{interval.mean:+.3f}" if sign else f"{interval.mean:.3f}"
    return mean if np.isnan(half) else f"{mean} ± {half:.3f}"


def _split(dataset: Dataset, settings: Settings, draw: int) -> Split:
    return few_shot_split(
        dataset, settings.shots, draw, test_per_class=settings.test_per_class, split_seed=settings.split_seed
    )


def _public_space(book: FeatureBook, reporter: Reporter) -> PublicSpace:
    photos = procedural_dataset(**_PUBLIC, reporter=reporter).photos  # pyright: ignore[reportArgumentType]
    reporter.stage(f"features of {len(photos)} public photos")
    wide = len(book.extractor.names)
    table = texture_table(photos)
    if wide != table.shape[1]:
        raise InputError("epsilon: the private exchange knows texture features only; leave the templates out")
    return PublicSpace.learned(table, [f"{photo.site}/{photo.label}" for photo in photos], _DIMENSIONS)


def _draw(dataset: Dataset, settings: Settings, draw: int, book: FeatureBook) -> _Draw:
    split = _split(dataset, settings, draw)
    photos = [*split.shots, *split.good]
    sites = sites_of(photos, settings.split, settings.sites, settings.split_seed + draw, settings.alpha)
    varied = {site.name: _variants(site.photos, settings.copies, draw) for site in sites}
    moments = [Moments.of(book(site.photos), [photo.label for photo in site.photos]) for site in sites]
    scaling = agreed_scaling(moments)
    counts = {site.name: said.counts for site, said in zip(sites, moments, strict=True)}
    total = _totals(counts)
    raw: dict[str, list[Floats]] = {}
    rows: list[SiteRows] = []
    for site in sites:
        real, made = list(site.photos), varied[site.name]
        labels = np.asarray([photo.label for photo in [*real, *made]], np.str_)
        # A shot and its variants count half each; a good part, which is not varied, counts whole.
        shares = [1.0 if photo.label == GOOD or not made else 0.5 for photo in real] + [
            0.5 / settings.copies for _ in made
        ]
        weights = np.asarray(shares) / np.asarray([total[label] for label in labels.tolist()])
        first, second = book(real), book.extractor(made) if made else book([])
        features = np.concatenate([first, second])
        raw[site.name] = _with_variants(first, second, [photo.label != GOOD for photo in real], settings.copies)
        rows.append(SiteRows(site.name, scaling(features), labels, weights))
    sent = sum(len(said.to_bytes()) for said in moments) + len(sites) * 4 * 2 * len(book.extractor.names)
    truth = np.asarray([photo.label for photo in split.test], np.str_)
    test = book(split.test)
    return _Draw(sites, rows, counts, raw, sent, scaling(test), test, truth)


def _with_variants(photos: Floats, variants: Floats, varied: Sequence[bool], copies: int) -> list[Floats]:
    """For each photo its row and those of its variants; these follow each other in the order of the photos."""
    each = iter(variants.reshape(-1, max(copies, 1), photos.shape[1]))
    return [
        np.vstack([row[None], next(each)]) if many and copies else row[None]
        for row, many in zip(photos, varied, strict=True)
    ]


def _variants(photos: Sequence[Photo], copies: int, draw: int) -> list[Photo]:
    return augmented([photo for photo in photos if photo.label != GOOD], copies, draw)


def _ways(
    made: _Draw, settings: Settings, draw: int, space: PublicSpace | None, budget: Budget | None
) -> dict[str, Any]:
    """Accuracy and cost of every way in one draw."""
    ways: dict[str, dict[str, Any]] = {}
    ways[ALONE] = {"accuracy": _mean([_alone(rows, made) for rows in made.rows]), "rounds": 0, "bytes": 0}
    for algorithm in ALGORITHMS:
        plan = replace(_fedavg(made, settings), algorithm=algorithm)
        trained = train_head(made.rows, plan, draw)
        ways[_NAMES[algorithm]] = {
            "accuracy": _named_right(trained, made),
            "rounds": plan.rounds,
            "bytes": trained.sent_bytes + made.scaling_bytes,
        }
        _tell(ways[_NAMES[algorithm]], trained.log)
    shipments = [ship(rows, made.counts[rows.name]) for rows in made.rows]
    generators, _ = receive(shipments)
    said = {name: made.counts[name] for name in generators}
    mixed = [
        own_and_others(rows, made.counts[rows.name], generators, said, _PER_CLASS, draw * len(made.rows) + place)
        for place, rows in enumerate(made.rows)
    ]
    shared = {
        "rounds": 1,
        # Every site sends to every other.
        "bytes": made.scaling_bytes + (len(made.rows) - 1) * sum(len(shipment.data) for shipment in shipments),
        "attack": _mean([_attack(generators[rows.name], rows, made) for rows in made.rows]),
    }
    ways[EXCHANGE_OWN] = {"accuracy": _mean([_alone(rows, made) for rows in mixed]), **shared}
    ways[EXCHANGE_ALL] = {"accuracy": _alone(from_all(generators, said, _PER_CLASS, draw), made), **shared}
    if settings.generator is not None:
        ways.update(_networks(made, draw, settings.generator))
    if space is not None and budget is not None:
        ways.update(_private(made, draw, space, budget))
    pooled = SiteRows(
        "pooled",
        np.concatenate([rows.features for rows in made.rows]),
        np.concatenate([rows.labels for rows in made.rows]),
        np.concatenate([rows.weights for rows in made.rows]),
    )
    ways[POOLED] = {"accuracy": _alone(pooled, made), "rounds": 0, "bytes": 0}
    return ways


def _fedavg(made: _Draw, settings: Settings) -> Plan:
    """The plan of the detector, with the penalty that the detector of all rows has."""
    return replace(settings.plan, algorithm="fedavg", penalty=1.0 / sum(rows.labels.size for rows in made.rows))


def _elsewhere(made: _Draw, settings: Settings, draw: int, elsewhere: Elsewhere, reporter: Reporter) -> dict[str, Any]:
    """FedAvg in other processes; how far its head is from that of this process."""
    plan = _fedavg(made, settings)
    began = time.monotonic()
    trained = elsewhere(made.rows, plan, draw, reporter)
    seconds = time.monotonic() - began
    here = train_head(made.rows, plan, draw)
    same = trained.classes == here.classes
    away = max(float(np.abs(trained.weights - here.weights).max()), float(np.abs(trained.bias - here.bias).max()))
    way = {
        "accuracy": _named_right(trained, made),
        "rounds": plan.rounds,
        "bytes": trained.sent_bytes + made.scaling_bytes,
        "seconds": seconds,
        "difference": away if same else None,
    }
    _tell(way, trained.log)
    return way


def _named_right(trained: Trained, made: _Draw) -> float:
    return _accuracy(np.asarray(trained.classes)[np.argmax(trained.logits(made.test), axis=1)], made.truth)


def _tell(way: dict[str, Any], log: Sequence[RoundLog]) -> None:
    """Rounds that did not go as planned stand in the outcome."""
    told = [asdict(entry) for entry in log if entry.absent or entry.late or entry.refusals or entry.note]
    if told:
        way["log"] = told


def _networks(made: _Draw, draw: int, plan: GeneratorPlan) -> dict[str, dict[str, Any]]:
    """One network trained in rounds; and, to tell what the averaging costs, the same network trained at each site."""
    found: dict[str, dict[str, Any]] = {}
    shared = train_generator(made.rows, plan, draw)
    total = _totals(made.counts)
    drawn = from_all({"all": shared.generator}, {"all": total}, _PER_CLASS, draw)
    mixed: list[SiteRows] = []
    for rows in made.rows:
        others = [counts for name, counts in made.counts.items() if name != rows.name]
        mixed.append(beside(rows, made.counts[rows.name], drawn, others))
    facts = {
        "rounds": plan.rounds,
        "bytes": shared.sent_bytes + made.scaling_bytes,
        "attack": _mean([_attack(shared.generator, rows, made) for rows in made.rows]),
    }
    _tell(facts, shared.log)
    found[SHARED_OWN] = {"accuracy": _mean([_alone(rows, made) for rows in mixed]), **facts}
    found[SHARED_ALL] = {"accuracy": _alone(drawn, made), **facts}
    apart = train_apart(made.rows, plan, draw)
    mixed = [
        own_and_others(rows, made.counts[rows.name], apart, made.counts, _PER_CLASS, draw * len(made.rows) + place)
        for place, rows in enumerate(made.rows)
    ]
    sent = sum(len(generator.to_bytes()) for generator in apart.values())
    facts = {
        "rounds": 1,
        "bytes": made.scaling_bytes + (len(made.rows) - 1) * sent,
        "attack": _mean([_attack(apart[rows.name], rows, made) for rows in made.rows]),
    }
    found[APART_OWN] = {"accuracy": _mean([_alone(rows, made) for rows in mixed]), **facts}
    found[APART_ALL] = {"accuracy": _alone(from_all(apart, made.counts, _PER_CLASS, draw), made), **facts}
    return found


def _private(made: _Draw, draw: int, space: PublicSpace, budget: Budget) -> dict[str, dict[str, Any]]:
    """Sums of every site in the public directions, without and with noise."""
    # A photo and its variants are one record.
    records = [np.stack([space.project(rows).mean(axis=0) for rows in made.raw[site.name]]) for site in made.sites]
    labels = [[photo.label for photo in site.photos] for site in made.sites]
    total = _totals(made.counts)
    test = space.project(made.raw_test).astype(np.float32)

    def sums(chosen: Budget | None) -> list[PrivateSums]:
        seeds = range(draw * len(made.sites), (draw + 1) * len(made.sites))
        return [
            private_sums(rows, names, space, chosen, seed)
            for rows, names, seed in zip(records, labels, seeds, strict=True)
        ]

    def accuracy(sent: list[PrivateSums]) -> float:
        """A photo is named by the class in which it is likeliest."""
        gaussians = private_gaussians(sent, total, space)
        likelihood = np.stack([gaussians.log_likelihood(label, test) for label in gaussians.labels])
        return _accuracy(np.asarray(gaussians.labels)[np.argmax(likelihood, axis=0)], made.truth)

    def attack(sent: list[PrivateSums]) -> float:
        return _mean(
            [
                attack_auroc(
                    private_gaussians([own], made.counts[site.name], space),
                    rows.astype(np.float32),
                    names,
                    test,
                    made.truth.tolist(),
                )
                for site, own, rows, names in zip(made.sites, sent, records, labels, strict=True)
            ]
        )

    exact = sums(None)
    found: dict[str, dict[str, Any]] = {}
    for way, chosen in (
        (MEANS, None),
        (PRIVATE, replace(budget, replaced=False)),
        (PRIVATE_REPLACED, replace(budget, replaced=True)),
    ):
        sent = sums(chosen)
        found[way] = {
            "accuracy": accuracy(sent),
            "rounds": 1,
            "bytes": (len(made.sites) - 1) * sum(len(own.to_bytes()) for own in sent),
            "epsilon": None if chosen is None else chosen.epsilon,
            "attack": attack(sent),
        }
        if way == PRIVATE:
            mixed = [[*sent[:place], own, *sent[place + 1 :]] for place, own in enumerate(exact)]
            found[PRIVATE_OWN] = {**found[PRIVATE], "accuracy": _mean([accuracy(each) for each in mixed])}
    return found


def _attack(generator: Likely, rows: SiteRows, made: _Draw) -> float:
    place = [site.name for site in made.sites].index(rows.name)
    photos = made.sites[place].photos
    labels = [photo.label for photo in photos]
    # The photos themselves come first among the rows of a site.
    return attack_auroc(generator, rows.features[: len(photos)], labels, made.test, made.truth.tolist())


def _alone(rows: SiteRows, made: _Draw) -> float:
    """Accuracy on all classes of a detector trained on these rows."""
    if len(set(rows.labels.tolist())) == 1:
        return _accuracy(np.full(made.truth.shape, rows.labels[0]), made.truth)
    detector = detector_of(rows)
    named = np.asarray(detector.classes)[np.argmax(detector.logits(made.test), axis=1)]
    return _accuracy(named, made.truth)


def _accuracy(named: NDArray[np.str_], truth: NDArray[np.str_]) -> float:
    """Mean over classes of the share of photos that are named right."""
    return _mean([float(np.mean(named[truth == label] == label)) for label in np.unique(truth)])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _totals(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    labels = sorted({label for site in counts.values() for label in site})
    return {label: sum(site.get(label, 0) for site in counts.values()) for label in labels}
