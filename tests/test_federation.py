"""Sites, rounds of averaging, the exchange, privacy, and the experiment from end to end."""

import builtins
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.federation import experiment
from gmel.federation.average import Rule, Update
from gmel.federation.exchange import Shipment, from_all, own_and_others, receive, ship
from gmel.federation.experiment import POOLED, Settings, federate, lines, table
from gmel.federation.membership import attack_auroc
from gmel.federation.moments import Moments, agreed_scaling
from gmel.federation.privacy import (
    Budget,
    PublicSpace,
    accounted_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier,
    private_gaussians,
    private_sums,
)
from gmel.federation.shared_generator import GeneratorPlan
from gmel.federation.sites import sites_of
from gmel.federation.training import Plan, train_head
from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.detector.linear import Scaling
from gmel.synthesis.feature_space import GaussianFeatures
from gmel.synthesis.photo import GOOD, Photo
from reporters import Silent
from site_rows import SITES, site_rows
from small_photos import pixels, simple_folder


def photos(counts: dict[str, int], site: str = "") -> list[Photo]:
    return [
        Photo(pixels(n), label, name=f"{label}/{n:03d}", site=site)
        for label, count in counts.items()
        for n in range(count)
    ]


# Sites


def held(sites: Sequence[Any]) -> list[list[str]]:
    return [[photo.name for photo in site.photos] for site in sites]


def test_disjoint_sites_share_no_defect_and_all_good_parts() -> None:
    deal = photos({GOOD: 9, "a": 3, "b": 3, "c": 3, "d": 3})
    sites = sites_of(deal, "disjoint", 3, 0)
    owners = {label: [s.name for s in sites if any(p.label == label for p in s.photos)] for label in "abcd"}
    assert all(len(names) == 1 for names in owners.values())
    assert [sum(p.label == GOOD for p in site.photos) for site in sites] == [3, 3, 3]
    assert sorted(name for names in held(sites) for name in names) == sorted(photo.name for photo in deal)


@pytest.mark.parametrize("split", ["disjoint", "dirichlet"])
def test_sites_do_not_depend_on_the_order_of_photos(split: str) -> None:
    deal = photos({GOOD: 9, "a": 8, "b": 8, "c": 8})
    assert held(sites_of(deal, split, 3, 5)) == held(sites_of(deal[::-1], split, 3, 5))


def test_dirichlet_is_even_for_large_alpha_and_uneven_for_small() -> None:
    deal = photos({"a": 60, "b": 60, "c": 60})

    def spread(alpha: float) -> float:
        sites = sites_of(deal, "dirichlet", 3, 1, alpha)
        assert sum(len(site.photos) for site in sites) == 180
        assert all(site.photos for site in sites)
        return float(np.std([[sum(p.label == label for p in site.photos) for label in "abc"] for site in sites]))

    assert spread(1e4) < 2
    assert spread(0.05) > 15


def test_sites_named_by_the_photos() -> None:
    sites = sites_of([*photos({"a": 2}, "south"), *photos({"b": 2}, "north")], "site", 7, 0)
    assert [site.name for site in sites] == ["north", "south"]


@pytest.mark.parametrize(
    ("split", "count", "alpha", "said"),
    [
        ("random", 3, 1.0, "split: 'random', must be one of disjoint, dirichlet, site"),
        ("disjoint", 1, 1.0, "sites: 1, must be 2 to"),
        ("disjoint", 3, 1.0, "2 classes of defects; take fewer"),
        ("dirichlet", 2, 0.0, "alpha: 0.0"),
        ("site", 2, 1.0, "fewer than two sites"),
    ],
)
def test_sites_that_cannot_be(split: str, count: int, alpha: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        sites_of(photos({GOOD: 3, "a": 3, "b": 3}), split, count, 0, alpha)


# What sites agree on


def test_sums_give_the_scaling_of_all_rows_together() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(50.0, 3.0, (n, 5)).astype(np.float32) for n in (4, 1, 9)]
    moments = [Moments.of(part, ["a"] * len(part)) for part in parts]
    together, agreed = Scaling.fit(np.concatenate(parts)), agreed_scaling(moments)
    np.testing.assert_allclose(agreed.mean, together.mean, rtol=1e-6)
    np.testing.assert_allclose(agreed.deviation, together.deviation, rtol=1e-4)
    assert len(moments[0].to_bytes()) < 2 * 5 * 8 + 250
    with pytest.raises(InputError, match="not finite"):
        agreed_scaling([replace(moments[0], total=np.full(5, np.nan))])
    with pytest.raises(InputError, match="no photos"):
        agreed_scaling([])


# Rounds of averaging


def test_many_rounds_reach_the_optimum_of_the_pooled_rows() -> None:
    """An independent solver on the pooled rows: the same weights."""
    x = np.concatenate([site.features for site in SITES])
    y = np.concatenate([site.labels for site in SITES])
    penalty = 0.2
    model = LogisticRegression(C=1.0 / (penalty * len(y)), tol=1e-9, max_iter=5000).fit(x, y)
    trained = train_head(SITES, Plan(rounds=300, local_steps=1, rate=0.4, penalty=penalty), 0)
    order = [sorted(trained.classes).index(name) for name in trained.classes]
    np.testing.assert_allclose(trained.weights, model.coef_[order], atol=2e-3)
    assert trained.classes[0] == GOOD


def test_the_first_round_is_the_weighted_mean_of_gradient_steps() -> None:
    """By hand in NumPy: softmax regression from zero, one step at each site."""
    plan = Plan(rounds=1, local_steps=1, rate=0.1, penalty=0.3)
    trained = train_head(SITES, plan, 0)
    expected = np.zeros_like(trained.weights, np.float64)
    mass = np.asarray([site.weights.sum() for site in SITES])
    for site, share in zip(SITES, mass / mass.sum(), strict=True):
        hit = np.asarray([[label == name for name in trained.classes] for label in site.labels], np.float64)
        slope = ((1.0 / 6.0 - hit) * (site.weights / site.weights.sum())[:, None]).T @ site.features
        expected -= share * 0.1 * slope
    np.testing.assert_allclose(trained.weights, expected, atol=1e-6)


def accuracy(trained: Any) -> float:
    x, y = np.concatenate([s.features for s in SITES]), np.concatenate([s.labels for s in SITES])
    return float(np.mean(np.asarray(trained.classes)[np.argmax(trained.logits(x), axis=1)] == y))


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "fedadam"])
def test_drop_outs_and_stragglers_are_logged_and_survived(algorithm: str) -> None:
    plan = Plan(algorithm, rounds=30, drop_out=0.4, straggler=0.5)
    trained = train_head(SITES, plan, 11)
    assert accuracy(trained) > 0.85
    names = {site.name for site in SITES}
    assert all(set(entry.used) | set(entry.absent) == names for entry in trained.log)
    assert all(0 < steps < plan.local_steps for entry in trained.log for steps in entry.late.values())
    absences = sum(len(entry.absent) for entry in trained.log)
    assert 0.2 < absences / (30 * 3) < 0.6
    assert any(entry.late for entry in trained.log)
    assert trained.log == train_head(SITES, plan, 11).log
    whole = train_head(SITES, Plan(algorithm, rounds=30), 11)
    assert trained.sent_bytes == whole.sent_bytes * (90 - absences) // 90
    assert whole.sent_bytes > 2 * 30 * 3 * 4 * (6 * 6 + 6)


def spoiled(kind: str) -> Any:
    def deliver(updates: list[Update]) -> list[Update]:
        first, *rest = updates
        tree = {
            key: value * -30 if kind == "scaled" else np.full_like(value, np.nan) for key, value in first.tree.items()
        }
        stale = first.round - 1 if kind == "stale" else first.round
        return [replace(first, tree=first.tree if kind == "stale" else tree, round=stale), *rest]

    return deliver


def test_garbage_is_refused_and_lies_are_bounded() -> None:
    # Every site has all classes: without one of three the others still know everything.
    same = site_rows({name: ["a", "b", "c"] for name in ("east", "north", "west")})

    def right(rule: Rule | None, kind: str | None) -> tuple[float, Any]:
        trained = train_head(same, Plan(rounds=19), 0, rule, None if kind is None else spoiled(kind))
        rows = np.concatenate([s.features for s in same])
        truth = np.concatenate([s.labels for s in same])
        named = np.asarray(trained.classes)[np.argmax(trained.logits(rows), axis=1)]
        return float(np.mean(named == truth)), trained.log

    clean, _ = right(None, None)
    for kind, said in (("nan", "not finite"), ("stale", "now is round")):
        reached, log = right(None, kind)
        assert reached > clean - 0.05
        assert all(said in entry.refusals[0].reason for entry in log)
    assert right(None, "scaled")[0] < clean - 0.2
    for rule in (Rule("median"), Rule("trimmed")):
        assert right(rule, "scaled")[0] > clean - 0.05


def test_a_lost_round_keeps_the_work_so_far() -> None:
    def deliver(updates: list[Update]) -> list[Update]:
        return updates if updates[0].round <= 5 else []

    part = train_head(SITES, Plan(rounds=8), 0, deliver=deliver)
    assert np.array_equal(part.weights, train_head(SITES, Plan(rounds=5), 0).weights)
    assert all("no update" in entry.note for entry in part.log[5:])


def test_sites_and_plans_that_cannot_be_trained() -> None:
    with pytest.raises(InputError, match="two classes"):
        train_head(site_rows({"east": ["a"]}), Plan(), 0)
    with pytest.raises(InputError, match="a name of its own"):
        train_head([SITES[0], SITES[0]], Plan(), 0)
    wrong: list[dict[str, Any]] = [
        {"algorithm": "x"},
        {"rounds": 0},
        {"rate": 0.0},
        {"penalty": -1.0},
        {"drop_out": 1.0},
    ]
    for kind in wrong:
        with pytest.raises(InputError, match=f"^{next(iter(kind))}: "):
            Plan(**kind)


# The exchange


def test_receivers_learn_classes_that_they_have_never_seen() -> None:
    shipments = [ship(site, dict.fromkeys(set(site.labels.tolist()), 12)) for site in SITES]
    generators, refused = receive(shipments)
    assert not refused
    counts = {shipment.site: shipment.counts for shipment in shipments}
    drawn = from_all(generators, counts, 40, 1)
    assert {label: int(np.sum(drawn.labels == label)) for label in "abcde"} == dict.fromkeys("abcde", 40)
    mixed = own_and_others(SITES[0], counts["east"], generators, counts, 40, 1)
    assert np.array_equal(mixed.features[: len(SITES[0].labels)], SITES[0].features)
    assert not set(mixed.labels[len(SITES[0].labels) :].tolist()) & {"a", "b"}
    for label in np.unique(mixed.labels):
        assert mixed.weights[mixed.labels == label].sum() == pytest.approx(1.0)


def test_a_class_of_several_sites_counts_by_its_photos() -> None:
    sites = site_rows({"east": ["a", "b"], "west": ["a"]})
    counts = {"east": {"a": 3, "b": 4}, "west": {"a": 9}}
    generators, _ = receive([ship(site, counts[site.name]) for site in sites])
    mixed = own_and_others(sites[0], counts["east"], generators, counts, 40, 0)
    own = np.arange(mixed.labels.size) < sites[0].labels.size
    assert mixed.weights[own & (mixed.labels == "a")].sum() == pytest.approx(0.25)
    assert mixed.weights[~own & (mixed.labels == "a")].sum() == pytest.approx(0.75)
    assert mixed.weights[mixed.labels == "b"].sum() == pytest.approx(1.0)


def test_shipments_that_are_garbage_are_refused_by_site() -> None:
    good = [ship(site, {}) for site in SITES[:2]]
    narrow = ship(replace(SITES[2], features=SITES[2].features[:, :4]), {})
    usable, refused = receive([*good, narrow, Shipment("mars", {}, b"garbage")])
    assert sorted(usable) == ["east", "north"]
    assert "agreed are 6" in refused["west"]
    assert "corrupt" in refused["mars"]


# Privacy


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_noise_is_the_least_that_the_accountant_allows(epsilon: float) -> None:
    noise = noise_multiplier(Budget(epsilon))
    assert gaussian_delta(epsilon, noise) == pytest.approx(1e-5, rel=1e-3)
    assert gaussian_epsilon(noise, 1e-5) == pytest.approx(epsilon, rel=1e-5)
    pytest.importorskip("dp_accounting")
    assert accounted_epsilon(noise, 1e-5) == pytest.approx(epsilon, rel=2e-3)


def test_delta_is_the_integral_of_the_privacy_loss() -> None:
    """Its definition by quadrature: the mass of one law above e^epsilon times the other."""
    from scipy import integrate, stats

    for epsilon, noise in ((0.5, 2.0), (2.0, 1.0), (8.0, 0.6)):
        first: Any = stats.norm(1.0, noise)
        second: Any = stats.norm(0.0, noise)
        excess = integrate.quad(
            lambda x, a=first, b=second, e=epsilon: max(a.pdf(x) - np.exp(e) * b.pdf(x), 0.0), -10, 15, limit=400
        )[0]
        assert gaussian_delta(epsilon, noise) == pytest.approx(excess, rel=1e-3)


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return known(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"gmel\[privacy\]"):
        accounted_epsilon(1.0, 1e-5)


@pytest.fixture(scope="module")
def space() -> PublicSpace:
    random = np.random.default_rng(8)
    means = 2.0 * random.standard_normal((6, 10))
    rows = np.concatenate([mean + random.standard_normal((40, 10)) for mean in means]).astype(np.float32)
    return PublicSpace.learned(rows, [f"kind {n // 40}" for n in range(240)], 4)


def test_a_photo_moves_the_sums_by_the_norm_at_most(space: PublicSpace) -> None:
    """The sensitivity that the noise is set for, tried on photos of any size."""
    random = np.random.default_rng(1)
    labels = ["a"] * 5 + ["b"] * 5
    for scale in (0.1, 1.0, 100.0):
        records = scale * space.norm * random.standard_normal((10, 4))
        before = private_sums(records, labels, space, None, 0).sums
        for place in range(10):
            gone = records.copy()
            gone[place] = 0.0
            assert np.linalg.norm(before - private_sums(gone, labels, space, None, 0).sums) <= space.norm * (1 + 1e-5)
            gone[place] = -100 * records[place]
            moved = np.linalg.norm(before - private_sums(gone, labels, space, None, 0).sums)
            assert moved <= 2 * space.norm * (1 + 1e-5)


def test_noise_has_the_size_that_the_budget_asks(space: PublicSpace) -> None:
    records = np.zeros((4, 4))
    for budget in (Budget(8.0), Budget(8.0, replaced=True), Budget(1.0)):
        drawn = np.stack([private_sums(records, list("aabb"), space, budget, seed).sums for seed in range(400)])
        factor = 2.0 if budget.replaced else 1.0
        assert drawn.std() == pytest.approx(factor * noise_multiplier(budget) * space.norm, rel=0.05)


def test_gaussians_of_private_sums_know_their_noise(space: PublicSpace) -> None:
    records = space.cut(np.random.default_rng(2).standard_normal((6, 4)))
    exact = private_sums(records, list("aaabbb"), space, None, 0)
    noisy = private_sums(records[:3], list("aaa"), space, Budget(8.0), 1)
    means = private_gaussians([exact], {"a": 3, "b": 3}, space)
    np.testing.assert_allclose(means.means[0], records[:3].mean(axis=0), rtol=1e-5)
    both = private_gaussians([exact, noisy], {"a": 6, "b": 3}, space)
    more = both.covariances[0] - space.within * (1 + 1 / 6)
    np.testing.assert_allclose(more, np.eye(4) * (noisy.noise / 6) ** 2, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="not all are finite"):
        private_sums(np.full((1, 4), np.nan), ["a"], space, None, 0)


def test_the_attack_sees_members_and_is_blind_without_them() -> None:
    random = np.random.default_rng(4)
    inside, outside = (random.standard_normal((n, 30)).astype(np.float32) for n in (5, 300))
    fitted = GaussianFeatures.fit(inside, ["a"] * 5)
    assert attack_auroc(fitted, inside, ["a"] * 5, outside, ["a"] * 300) > 0.95
    fresh = random.standard_normal((300, 30)).astype(np.float32)
    assert attack_auroc(fitted, fresh, ["a"] * 300, outside, ["a"] * 300) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("kind", "said"), [({"epsilon": -1.0}, "epsilon: -1"), ({"delta": 1.0}, "delta: 1")])
def test_budgets_that_cannot_be(kind: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Budget(**kind)


# The whole


def textures(count: int, seed: int) -> Dataset:
    """Four kinds of stripes, easy to tell apart; as many photos of each."""
    made: list[Photo] = []
    for place, label in enumerate("abcd"):
        for number in range(count):
            random = np.random.default_rng([seed, place, number])
            phase = 2 * np.pi * random.random()
            wave = np.sin(np.arange(48) * 2 * np.pi / (3 + 3 * place) + phase)
            image = 128 + 40 * wave[:, None] + 12 * random.standard_normal((48, 48))
            name = f"{label}/{number:02d}.png"
            made.append(Photo(np.clip(image, 0, 255).astype(np.uint8), label, group=name, name=name))
    return Dataset("stripes", tuple(made))


def test_the_experiment_from_photos_to_the_table() -> None:
    settings = Settings(sites=2, shots=3, draws=2, epsilon=None, copies=2, generator=None)
    found = federate(textures(10, 0), settings, Silent())
    rows = table(found)
    assert rows["alone"]["accuracy"].mean <= 0.5
    for way, row in rows.items():
        if way != "alone":
            assert row["accuracy"].mean > 0.9, way
    assert rows[POOLED]["against_pooled"].mean == 0.0
    assert not any("log" in way for way in found["draws"][0]["ways"].values())
    assert rows["alone"]["bytes"] == 0 < rows["FedAvg of the detector"]["bytes"]
    assert json.loads(json.dumps(found, allow_nan=False))["draws"] == found["draws"]
    assert found["draws"] == federate(textures(10, 0), settings, Silent())["draws"]
    assert len([line for line in lines(found) if line.startswith("| ")]) == len(rows) + 1


@pytest.mark.slow
def test_one_generator_in_rounds_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_PER_CLASS", 60)
    small = GeneratorPlan(rounds=6, local_steps=60, hidden=24)
    found = federate(textures(10, 0), Settings(2, shots=3, draws=1, epsilon=None, copies=2, generator=small), Silent())
    rows = table(found)
    for way in (experiment.SHARED_OWN, experiment.SHARED_ALL, experiment.APART_OWN, experiment.APART_ALL):
        assert rows[way]["accuracy"].mean > 0.9, way
        assert 0.0 < rows[way]["attack"].mean <= 1.0
    assert [rows[way]["rounds"] for way in (experiment.SHARED_ALL, experiment.APART_ALL)] == [6, 1]
    # Down and up in each round, against once to the only other site.
    weights = rows[experiment.APART_ALL]["bytes"] / 2
    assert rows[experiment.SHARED_ALL]["bytes"] > 0.8 * 2 * 2 * 6 * weights


def test_drop_outs_are_told_in_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_PER_CLASS", 20)
    settings = Settings(
        sites=2,
        shots=2,
        draws=1,
        epsilon=None,
        copies=0,
        plan=Plan(rounds=12, drop_out=0.5),
        generator=GeneratorPlan(rounds=12, local_steps=1, hidden=4, drop_out=0.5),
    )
    found = federate(textures(6, 0), settings, Silent())
    for way in ("FedAvg of the detector", experiment.SHARED_ALL):
        told = found["draws"][0]["ways"][way]["log"]
        assert {name for entry in told for name in entry["absent"]} == {"site 1", "site 2"}
    assert json.dumps(found, allow_nan=False)


def test_private_ways_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_PUBLIC", {"seed": 20, "good": 4, "defects": 4, "shape": (64, 64)})
    settings = Settings(sites=2, shots=4, draws=2, epsilon=1e4, copies=1, generator=None)
    found = federate(textures(10, 0), settings, Silent())
    rows = table(found)
    assert [row["epsilon"] for row in rows.values() if row["epsilon"] is not None] == [1e4] * 3
    # So much budget is next to no noise.
    for way in (experiment.MEANS, experiment.PRIVATE, experiment.PRIVATE_OWN):
        assert rows[way]["accuracy"].mean > 0.85
        assert 0.0 < rows[way]["attack"].mean <= 1.0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = simple_folder(tmp_path / "parts", ("a", "b", "c"), 4)
    out = tmp_path / "found.json"
    asked = [
        "federate",
        str(folder),
        "--sites",
        "3",
        "--shots",
        "2",
        "--draws",
        "1",
        "--epsilon",
        "0",
        "--generator-rounds",
        "0",
        "--out",
        str(out),
    ]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    assert "pooled" in ran.output
    assert json.loads(out.read_text("utf-8"))["settings"]["sites"] == 3
    for extra, said in (
        (["--shots", "9"], "take at most"),
        (["--sites", "4"], "3 classes of defects; take fewer"),
        (["--split", "even"], "must be one of disjoint, dirichlet, site"),
        (["--builtin"], "one of the two"),
        (["--epsilon", "-2"], "epsilon: -2"),
        (["--draws", "0"], "draws: 0"),
        (["--generator-rounds", "-1"], "generator rounds: -1"),
        (["--over", "mars"], "over: 'mars', must be one of process, flower"),
        (["--out", str(tmp_path / "no" / "x.json")], "a folder that exists"),
    ):
        failed = CliRunner().invoke(app, [*asked, *extra])
        assert isinstance(failed.exception, InputError), failed.output
        assert said in str(failed.exception)
