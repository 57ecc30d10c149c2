"""Drawing step by step: the same photos as in one loop, told after each step, stopped between steps."""

import contextlib
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.edge_plants import task

from gmel.edge.server.work import CancelledError, _Generator
from gmel.synthesis.diffusion import stitching
from gmel.synthesis.diffusion.edm import Denoiser
from gmel.synthesis.diffusion.samplers import SOLVERS, Solver, advanced, karras_sigmas, levels_of_steps, solve
from gmel.synthesis.diffusion.stitching import Field, draw_fields
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNet, UNetSize
from gmel.synthesis.diffusion.watching import part, watched, watching
from gmel.synthesis.generate import Generate, Plan
from gmel.synthesis.generator import Means
from gmel.synthesis.harmonise import Harmonise
from gmel.synthesis.langevin import ContrastiveLoss, Langevin, LangevinPlan
from gmel.synthesis.photo import Photo
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent

TINY = UNetSize(channels=(8, 16), embedding=16)
SHORT = Training(steps=6, batch=4, probe=4, probe_every=3)
PLAN = Plan(prior=SHORT, adaptation=SHORT, scratch=SHORT, size=TINY)


class Told:
    """A watcher that keeps what it is told, and stops after so many calls."""

    def __init__(self, most: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.most = most

    def __call__(self, step: int, steps: int) -> None:
        self.calls.append((step, steps))
        if len(self.calls) == self.most:
            raise CancelledError


@pytest.fixture(scope="module")
def generators() -> dict[str, Any]:
    shots = [*pitted_plates(2), *rough_plates(2)]
    chain = LangevinPlan(Training(steps=4, batch=4, probe_every=0), ContrastiveLoss(steps=3), widths=(8, 16))
    return {
        "generate": Generate.fit(shots, good_plates(8), 0, Silent(), plan=PLAN),
        "harmonise": Harmonise.fit(pitted_plates(3), good_plates(3), 0, Silent(), plan=PLAN),
        "langevin": Langevin.fit(shots, good_plates(4), 0, Silent(), plan=chain),
    }


def some_fields(count: int = 3) -> list[Field]:
    rng = np.random.default_rng(0)
    fields: list[Field] = []
    for number in range(count):
        shape = (33 + 9 * number, 40)
        known, noise = (rng.standard_normal(shape, np.float32) for _ in range(2))
        mask = (rng.random(shape) < 0.7).astype(np.float32)
        fields.append(Field(known * (1 - mask), known, mask, noise, np.zeros((*shape, 2), np.float32), 1, number))
    return fields


def untrained() -> Denoiser:
    return Denoiser(UNet(TINY, 2, jax.random.key(3)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_single_steps_give_what_the_loop_gives(solver: Solver, guidance: float) -> None:
    denoiser, told = untrained(), Told()
    sigmas = karras_sigmas(6, 0.02, 30.0)
    whole = draw_fields(denoiser, some_fields(), sigmas, solver, guidance)
    with watching(told):
        stepped = draw_fields(denoiser, some_fields(), sigmas, solver, guidance)
    assert told.calls == [(step, 6) for step in range(1, 7)]
    for one, other in zip(whole, stepped, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())
        assert np.abs(one).max() > 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_is_that_of_solve(solver: Solver) -> None:
    """Against the solver itself, without windows."""

    def ideal(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return (2.0 * x + sigma**2 * 0.5) / (2.0 + sigma**2)

    sigmas, x = karras_sigmas(9, 0.05, 20.0), jnp.linspace(-40.0, 40.0, 9)
    carry = (x, jnp.zeros_like(x))
    for levels in zip(*levels_of_steps(sigmas), strict=True):
        carry = advanced(ideal, carry, levels, solver)
    np.testing.assert_allclose(np.asarray(carry[0]), np.asarray(solve(ideal, x, sigmas, solver)), rtol=1e-5, atol=1e-5)


def test_another_number_of_steps_needs_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = 0

    def counting(*given: Any) -> Any:
        nonlocal traces
        traces += 1
        return advanced(*given)

    monkeypatch.setattr(stitching, "advanced", counting)
    denoiser = untrained()
    found: list[int] = []
    for steps in (3, 5, 9):
        with watching(Told()):
            draw_fields(denoiser, some_fields(), karras_sigmas(steps, 0.02, 30.0), "dpm++", 1.23456)
        found.append(traces)
    assert found == [1, 1, 1]


def close(mine: Sequence[Photo], theirs: Sequence[Photo]) -> bool:
    """The same photos but for rounding: a grey value in a thousand may be off by one."""
    apart = [np.abs(one.image.astype(int) - other.image) for one, other in zip(mine, theirs, strict=True)]
    return all(each.max() <= 1 and (each > 0).mean() < 1e-3 for each in apart)


@pytest.mark.parametrize("mode", ["generate", "harmonise", "langevin"])
def test_each_mode_tells_its_steps_and_draws_the_same(generators: dict[str, Any], mode: str) -> None:
    told = Told()
    with watching(told):
        photos = generators[mode].sample("pit", 3, 1, 7)
    steps = [step for step, _ in told.calls]
    if mode == "langevin":
        assert told.calls == [(5, 7), (7, 7)], "every five steps, and at the end"
    else:
        assert told.calls == [(step, 7) for step in range(1, 8)]
    assert steps == sorted(steps)
    assert close(photos, generators[mode].sample("pit", 3, 1, 7))
    assert watched() is None


def test_what_is_drawn_on_top_of_something_counts_as_two_parts(generators: dict[str, Any]) -> None:
    told = Told()
    with watching(told):
        generators["generate"].on(()).sample("pit", 2, 1, 4)
    assert told.calls == [(step, 8) for step in range(1, 9)], "the good part, then the defect on it"


def test_parts_within_parts() -> None:
    told = Told()
    with watching(told):
        for outer in range(2):
            with part(outer, 2):
                for inner in range(3):
                    with part(inner, 3):
                        watch = watched()
                        assert watch is not None
                        watch(1, 1)
    assert told.calls == [(step, 6) for step in range(1, 7)]
    with part(0, 2):
        assert watched() is None, "nobody watches"


@pytest.mark.parametrize(("mode", "most"), [("generate", 2), ("harmonise", 2), ("langevin", 1)])
def test_it_stops_after_the_present_step(generators: dict[str, Any], mode: str, most: int) -> None:
    told = Told(most)
    with pytest.raises(CancelledError), watching(told):
        generators[mode].sample("pit", 2, 1, 10)
    assert len(told.calls) == most
    assert watched() is None


def test_a_task_tells_every_step_and_ends_at_one(generators: dict[str, Any]) -> None:
    shares: list[float] = []
    model = _Generator(generators["generate"], 0.1, 1.0)
    product = model.run(task(label="pit", images=6, steps=5), shares.append, threading.Event())
    assert product.kind == "application/zip"
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    wanted = [4 * step / 5 / 6 for step in range(1, 6)] + [(4 + 2 * step / 5) / 6 for step in range(1, 6)]
    np.testing.assert_allclose(sorted(set(shares)), wanted)


@pytest.mark.parametrize("mode", ["generate", "harmonise", "langevin"])
def test_a_cancelled_task_ends_between_steps(generators: dict[str, Any], mode: str) -> None:
    stop, shares = threading.Event(), list[float]()

    def tell(share: float) -> None:
        shares.append(share)
        stop.set()

    with pytest.raises(CancelledError):
        _Generator(generators[mode], 0.1, 1.0).run(task(label="pit", images=8, steps=20), tell, stop)
    assert len(shares) == 1
    assert shares[0] <= 0.5 * (5 / 20) + 1e-9, "told after the first step (or block), and then no more"


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "diffusers", "peft", "transformers")),
    reason="the extra `diffusers` is not installed",
)
def test_a_pipeline_tells_its_steps_and_stops(tmp_path: Path) -> None:
    from gmel.synthesis.pipelines import Diffusers, LoraPlan
    from gmel.synthesis.pretrained.adaptation import Adaptation
    from tiny_pipelines import tiny_ddpm

    plan = LoraPlan(Adaptation(steps=1, batch=2))
    made = Diffusers.fit(rough_plates(2), [], 0, Silent(), Means(pipeline=tiny_ddpm(tmp_path / "p")), plan)
    told = Told()
    with watching(told):
        photos = made.sample("rough", 9, 0, 3)
    assert told.calls == [(step, 6) for step in range(1, 7)], "nine pictures are two batches"
    for mine, theirs in zip(photos, made.sample("rough", 9, 0, 3), strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)
    told = Told(2)
    with contextlib.suppress(CancelledError), watching(told):
        made.sample("rough", 9, 0, 3)
    assert told.calls == [(1, 6), (2, 6)]
