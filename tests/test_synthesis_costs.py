"""What modes cost: the fits against known laws, the counts against the compiler, the file against the scenario."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from gmel.scenario.load import load_scenario, tables_to_toml, to_toml
from gmel.synthesis.costs import Profile, cost_of, fit_times, quality_law, write_profile
from gmel.synthesis.data.splits import Split
from gmel.synthesis.detector.features import TextureExtractor
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNetSize, flops
from gmel.synthesis.generate import Generate, Plan
from plates import good_plates, pitted_plates
from reporters import Silent

TINY = UNetSize(channels=(8, 16), embedding=16)
SHORT = Training(steps=4, batch=4, probe_every=0)


def test_times_of_a_law_give_the_law_back() -> None:
    wanted = (0.02, 0.003, 0.0015)
    tasks = [(s, n, n * wanted[0] + s * (wanted[1] + wanted[2] * n)) for s in (3, 12) for n in (1, 4, 16)]
    assert fit_times(tasks) == pytest.approx(wanted, rel=1e-6)
    assert fit_times([(0, n, 0.02 * n) for n in (1, 4, 16)]) == pytest.approx((0.02, 0.0, 0.0))
    falling = [(s, n, max(0.01 * n - 1e-4 * s, 1e-3)) for s in (3, 12) for n in (1, 4, 16)]
    assert min(fit_times(falling)) >= 0.0


def test_qualities_of_a_power_law_give_the_law_back() -> None:
    steps = (2, 4, 8, 16, 32)
    law, error = quality_law(steps, [0.9 - 0.7 * s**-1.3 for s in steps])
    found = [law.limit - law.factor * s**-law.exponent for s in steps]
    np.testing.assert_allclose(found, [0.9 - 0.7 * s**-1.3 for s in steps], atol=0.005)
    assert error < 0.005
    flat, error = quality_law((0,), (0.4,))
    assert (flat.limit, flat.factor, error) == (0.4, 0.0, 0.0)
    worse, _ = quality_law(steps, [0.5, 0.4, 0.3, 0.2, 0.1])
    assert (worse.limit, worse.factor) == (pytest.approx(0.3), 0.0)
    near_one, _ = quality_law(steps, [0.5, 0.9, 0.99, 1.0, 1.0])
    assert near_one.limit <= 1.0


@pytest.mark.slow
def test_a_mode_is_measured_and_its_models_stand_in_a_scenario(tmp_path: Path) -> None:
    plan = Plan(prior=SHORT, adaptation=SHORT, size=TINY)
    shots, good = pitted_plates(2), good_plates(8)
    generator = Generate.fit(shots, good, 0, Silent(), plan=plan)
    split = Split(tuple(shots), tuple(good), tuple(pitted_plates(8)))
    reporter = Silent()
    cost = cost_of(generator, split, TextureExtractor(False), 4, 0, reporter, 1.5)
    assert reporter.steps[-1] == 1.0
    # Pits are smaller than a window: each takes one. The compiler counts norms and activations too.
    assert cost.windows == 1.0
    assert 0.5 < flops(TINY, 32) / 1e9 / cost.law.gflop <= 1.0
    assert cost.steps == (3, 6, 12, 24, 36)
    assert all(np.isfinite(cost.kid))
    assert cost.law.seconds(12, 16) + 16 * cost.photo_s > 0
    assert cost.photo_bits == 8 * 40 * 48
    found = Profile("plates", 2, "here", 1, "processor", (cost,), {"compose": "no masks"})
    write_profile(tmp_path / "costs.toml", found)
    tables = tomllib.loads((tmp_path / "costs.toml").read_text("utf-8"))
    assert tables["modes"][0]["kid"] == list(cost.kid)
    plant = tomllib.loads(to_toml(load_scenario("factory")))
    del plant["models"]
    written = (tmp_path / "costs.toml").read_text("utf-8")
    pasted = tables_to_toml(plant) + "\n" + written[written.index("\n[[models]]") :]
    (tmp_path / "plant.toml").write_text(pasted, "utf-8")
    scenario = load_scenario(str(tmp_path / "plant.toml"))
    model = scenario.models[0]
    assert [each.name for each in scenario.models] == ["generate"]
    # Work of a request of 16 images at the usual steps is the time that the law gives for it.
    assert model.mean_work() == pytest.approx(cost.law.seconds(12, 16) + 16 * cost.photo_s, rel=1e-6)
    checked = subprocess.run(
        [sys.executable, "-m", "gmel.cli.main", "scenario", "check", str(tmp_path / "plant.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert "valid" in checked.stdout


def test_the_command_profiles_compose(tmp_path: Path) -> None:
    from gmel.synthesis.data.dataset import Dataset
    from gmel.synthesis.data.write import write_dataset

    photos = (*pitted_plates(12), *good_plates(6))
    write_dataset(Dataset("plates", photos), tmp_path / "plates", Silent())
    command = [sys.executable, "-m", "gmel.cli.main", "synthesize", "profile", str(tmp_path / "plates")]
    command += ["--modes", "compose", "--shots", "2", "--samples", "4", "--json", "-o", str(tmp_path / "costs.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modes"][0]["steps"] == [0]
    assert found["models"][0]["fixed_work"] > 0
    assert "step_work" not in found["models"][0]
    assert (tmp_path / "costs.toml").is_file()
    wrong = subprocess.run(
        [*command[:-1], str(tmp_path / "no" / "c.toml")], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
