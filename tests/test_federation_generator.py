"""One generator trained in rounds over sites: what it learns, what averaging does, what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gmel.federation.average import Update
from gmel.federation.exchange import beside, from_all
from gmel.federation.membership import attack_auroc
from gmel.federation.shared_generator import GeneratorPlan, NeuralFeatures, train_apart, train_generator
from gmel.federation.training import SiteRows
from gmel.scenario.errors import InputError
from site_rows import SITES, site_rows

PLAN = GeneratorPlan(rounds=12, local_steps=60, hidden=48)


def centre(rows: SiteRows, label: str) -> Any:
    return rows.features[rows.labels == label].mean(axis=0)


def distances(generator: NeuralFeatures, label: str) -> tuple[float, float]:
    """Of the mean of drawn rows from the mean of their class, and from the nearest other class."""
    drawn = generator.sample(label, 300, 1).mean(axis=0)
    means = {str(name): centre(site, str(name)) for site in SITES for name in np.unique(site.labels)}
    away = {name: float(np.linalg.norm(drawn - mean)) for name, mean in means.items()}
    return away[label], min(value for name, value in away.items() if name != label)


@pytest.fixture(scope="module")
def shared() -> Any:
    return train_generator(SITES, PLAN, 0)


def test_the_average_draws_classes_of_every_site(shared: Any) -> None:
    for label in shared.generator.labels:
        own, other = distances(shared.generator, label)
        assert own < other, label
        assert own < 2.0, label
    assert len(shared.log) == PLAN.rounds
    assert all(entry.used == ("east", "north", "west") for entry in shared.log)
    assert shared.sent_bytes == 2 * PLAN.rounds * 3 * len(shared.generator.to_bytes())


def test_drawn_rows_spread_as_their_class(shared: Any) -> None:
    drawn = shared.generator.sample("a", 400, 0)
    assert drawn.shape == (400, 6)
    assert 0.5 < float(drawn.std(axis=0).mean()) < 1.6


def test_the_same_seed_gives_the_same_generator_and_rows(shared: Any) -> None:
    again = train_generator(SITES, PLAN, 0)
    assert again.generator.to_bytes() == shared.generator.to_bytes()
    assert np.array_equal(again.generator.sample("c", 9, 4), shared.generator.sample("c", 9, 4))
    assert not np.array_equal(shared.generator.sample("c", 9, 5), shared.generator.sample("c", 9, 4))


def test_apart_each_site_knows_its_own_classes_only() -> None:
    apart = train_apart(SITES, PLAN, 0)
    assert {name: generator.labels for name, generator in apart.items()} == {
        site.name: tuple(sorted(set(site.labels.tolist()))) for site in SITES
    }
    for generator in apart.values():
        for label in generator.labels:
            own, other = distances(generator, label)
            assert own < other
    with pytest.raises(InputError, match="class 'c': not learned"):
        apart["east"].sample("c", 1, 0)


def test_one_round_is_the_mean_by_weight_of_the_sites() -> None:
    """By the networks that the sites would have alone: the same first weights, batches and noise."""
    plan = replace(PLAN, rounds=1, local_steps=3)
    average, apart = train_generator(SITES, plan, 7).generator, train_apart(SITES, plan, 7)
    mass = np.asarray([site.weights.sum() for site in SITES])
    for layer in ("first", "second", "last"):
        each = np.stack([np.asarray(getattr(apart[site.name].denoiser, layer).weight) for site in SITES])
        expected = np.tensordot(mass / mass.sum(), each, axes=1)
        np.testing.assert_allclose(np.asarray(getattr(average.denoiser, layer).weight), expected, atol=1e-6)


def test_the_likelihood_tells_members_and_classes(shared: Any) -> None:
    random = np.random.default_rng(9)
    site = SITES[0]
    other = (centre(site, "a") + random.standard_normal((200, 6))).astype(np.float32)
    assert shared.generator.log_likelihood("a", other).mean() > shared.generator.log_likelihood("d", other).mean() + 1
    overfit = train_generator([site], GeneratorPlan(rounds=20, local_steps=100, batch=24, hidden=96), 0).generator
    members = site.features[site.labels == "a"]
    assert attack_auroc(overfit, members, ["a"] * len(members), other, ["a"] * len(other)) > 0.9


def test_drop_outs_stragglers_and_garbage_are_logged_and_survived() -> None:
    def deliver(updates: list[Update]) -> list[Update]:
        if updates and updates[0].round == 2:
            tree = {key: np.full_like(value, np.nan) for key, value in updates[0].tree.items()}
            return [replace(updates[0], tree=tree), *updates[1:]]
        return [] if updates and updates[0].round == 3 else updates

    plan = replace(PLAN, rounds=8, local_steps=4, drop_out=0.3, straggler=0.5)
    trained = train_generator(SITES, plan, 5, deliver=deliver)
    assert any(entry.absent for entry in trained.log)
    assert any(entry.late for entry in trained.log)
    assert any("not finite" in refusal.reason for refusal in trained.log[1].refusals)
    assert "no update" in trained.log[2].note
    assert np.isfinite(trained.generator.sample("a", 5, 0)).all()


def test_drawn_rows_of_classes_that_only_the_site_has_are_left_out(shared: Any) -> None:
    own = site_rows({"east": ["a", "b"], "west": ["b", "c"]})[0]
    drawn = from_all({"all": shared.generator}, {"all": {"a": 12, "b": 36, "c": 12}}, 40, 0)
    known = np.isin(drawn.labels, ["a", "b", "c"])
    drawn = SiteRows("all", drawn.features[known], drawn.labels[known], drawn.weights[known])
    mixed = beside(own, {"a": 12, "b": 12}, drawn, [{"b": 36, "c": 12}])
    made = np.arange(mixed.labels.size) >= own.labels.size
    assert set(mixed.labels[made].tolist()) == {"b", "c"}
    assert mixed.weights[made & (mixed.labels == "b")].sum() == pytest.approx(0.75)
    assert mixed.weights[~made & (mixed.labels == "b")].sum() == pytest.approx(0.25)


def test_plans_and_sites_that_cannot_be() -> None:
    wrong: list[dict[str, Any]] = [{"rounds": 0}, {"hidden": 0}, {"rate": float("nan")}, {"drop_out": 1.0}]
    for kind in wrong:
        with pytest.raises(InputError, match=next(iter(kind))):
            GeneratorPlan(**kind)
    with pytest.raises(InputError, match="a name of its own"):
        train_generator([SITES[0], SITES[0]], PLAN, 0)
    with pytest.raises(InputError, match="count is -1"):
        train_generator(SITES, replace(PLAN, rounds=1, local_steps=1), 0).generator.sample("a", -1, 0)
