"""Mode `diffusers`, end to end on tiny pipelines with random weights; what it says where it cannot work."""

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.scenario.errors import InputError
from gmel.synthesis import pipelines
from gmel.synthesis.fitting import draw_samples, fit_generator
from gmel.synthesis.generator import Means, load_generator, save_generator
from gmel.synthesis.modes import MODES, mode_named
from gmel.synthesis.photo import GOOD
from gmel.synthesis.pipelines import Diffusers, LoraPlan
from gmel.synthesis.pretrained.adaptation import Adaptation, denoising_loss
from gmel.synthesis.pretrained.folder import PipelineFolder
from gmel.synthesis.pretrained.pipeline import load_pipeline, prompt_of
from gmel.synthesis.pretrained.scenes import Canvas, Crops, Scenes
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent
from small_photos import simple_folder

EXTRA = ("torch", "diffusers", "peft", "transformers")
needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in EXTRA), reason="the extra `diffusers` is not installed"
)
PLAN = LoraPlan(Adaptation(steps=4, batch=4, rate=3e-3))
LEARNING = LoraPlan(Adaptation(steps=60, batch=16, rate=1e-2), rank=8)


def make(kind: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """A tiny pipeline, `ddpm` or `stable`."""
    import tiny_pipelines as tiny

    return (tiny.tiny_ddpm if kind == "ddpm" else tiny.tiny_stable_diffusion)(folder, seed, **more)


def shots() -> list[Any]:
    return [*pitted_plates(2), *rough_plates(2)]


def same(mine: Any, theirs: Any) -> bool:
    return all((one.image == other.image).all() for one, other in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module", params=["ddpm", "stable"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Diffusers:
    if any(find_spec(name) is None for name in EXTRA):
        pytest.skip("the extra `diffusers` is not installed")
    folder = make(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")
    return Diffusers.fit(shots(), good_plates(4), 0, Silent(), Means(pipeline=folder), PLAN)


# What a class with masks and one without look like, and where.


def test_defects_are_drawn_on_good_parts_and_nothing_else_changes(fitted: Diffusers) -> None:
    good = {photo.image.tobytes(): photo for photo in good_plates(4)}
    for index, photo in enumerate(fitted.sample("pit", 3, 1, 2)):
        assert photo.template is not None
        ground = good[photo.template.tobytes()]
        assert (photo.label, photo.name, photo.source) == ("pit", f"diffusers pit {index}", "")
        assert photo.mask is not None
        assert 0 < photo.mask.sum() < photo.mask.size / 4
        changed = photo.image != ground.image
        rows, columns = np.nonzero(photo.mask)
        reach = np.zeros_like(photo.mask)
        reach[max(rows.min() - 3, 0) : rows.max() + 4, max(columns.min() - 3, 0) : columns.max() + 4] = True
        assert changed.any()
        assert not changed[~reach].any()


def test_whole_photos_have_the_size_and_type_of_the_shots(fitted: Diffusers) -> None:
    for photo in fitted.sample("rough", 2, 1, 2):
        assert photo.image.shape == (40, 48)
        assert photo.image.dtype == np.uint8
        assert photo.mask is None
        assert fitted.scenes.sensor.low - 0.01 <= photo.pixels().min() < photo.pixels().max()
        assert photo.pixels().max() <= fitted.scenes.sensor.high + 0.01


def test_same_seed_same_photos_in_any_company_up_to_rounding(fitted: Diffusers) -> None:
    for label in fitted.labels:
        first, again = fitted.sample(label, 2, 7, 2), fitted.sample(label, 2, 7, 2)
        assert same(first, again)
        assert not same(first, fitted.sample(label, 2, 8, 2))
        alone = fitted.sample(label, 1, 7, 2)[0]
        assert np.abs(first[0].image.astype(int) - alone.image).max() <= 1


def test_steps_change_the_photos_and_are_checked(fitted: Diffusers) -> None:
    assert not same(fitted.sample("rough", 1, 0, 1), fitted.sample("rough", 1, 0, 5))
    for steps in (0, 101):
        with pytest.raises(InputError, match=f"steps is {steps}, must be from 1 to 100"):
            fitted.sample("rough", 1, 0, steps)
    with pytest.raises(InputError, match="label is 'dent', must be one of pit, rough"):
        fitted.sample("dent", 1, 0)


def test_shams_are_good_parts_drawn_like_defects(fitted: Diffusers) -> None:
    shams = fitted.sham(4, 1)
    assert [photo.label for photo in shams] == [GOOD] * 4
    assert all(photo.mask is None for photo in shams)
    assert sum(photo.template is not None for photo in shams) == 2


# What a file holds.


def test_a_file_gives_the_same_generator_and_holds_no_photo(fitted: Diffusers, tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, fitted)
    loaded = load_generator(path, {"diffusers": Diffusers})
    assert isinstance(loaded, Diffusers)
    assert same(fitted.sample("rough", 2, 3, 2), loaded.sample("rough", 2, 3, 2))
    assert same(fitted.sample("pit", 2, 3, 2), loaded.on(good_plates(4)).sample("pit", 2, 3, 2))
    drawn = loaded.sample("pit", 1, 3, 2)[0]
    assert drawn.mask is not None, "without good parts it draws the ground as well"
    assert not any(array.shape == (40, 48) for array in fitted.state()[0].values())
    weights = sum(part.stat().st_size for part in fitted.pipeline.folder.path.rglob("*.safetensors"))
    assert path.stat().st_size < weights, "the changes alone are saved"


def test_a_file_asks_for_the_pipeline_that_it_was_fitted_on(fitted: Diffusers, tmp_path: Path) -> None:
    path, kind = tmp_path / "generator.safetensors", "stable" if fitted.pipeline.folder.latent else "ddpm"
    save_generator(path, fitted)
    other = make(kind, tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"digest is .* the generator was fitted on") as caught:
        load_generator(path, {"diffusers": Diffusers}, Means(pipeline=other))
    assert "\n" not in str(caught.value)
    moved = tmp_path / "moved"
    shutil.copytree(fitted.pipeline.folder.path, moved)
    elsewhere = load_generator(path, {"diffusers": Diffusers}, Means(pipeline=moved))
    assert same(fitted.sample("rough", 1, 3, 2), elsewhere.sample("rough", 1, 3, 2))
    with pytest.raises(InputError, match="no such folder"):
        load_generator(path, {"diffusers": Diffusers}, Means(pipeline=tmp_path / "nowhere"))


def test_state_with_wrong_arrays_is_refused(fitted: Diffusers) -> None:
    arrays, facts = fitted.state()
    name = next(name for name in arrays if ".lora_A." in name)
    for wrong, words in (
        (arrays[name][..., :1], "must be float32"),
        (np.full_like(arrays[name], np.nan), "no numbers"),
    ):
        with pytest.raises(InputError, match=words):
            Diffusers.from_state({**arrays, name: wrong}, facts)
    for missing in ("labels", "rank", "guidance", "pipeline"):
        with pytest.raises(InputError, match="missing"):
            Diffusers.from_state(arrays, {key: value for key, value in facts.items() if key != missing})
    for key, wrong in (("rank", "0"), ("guidance", "nan"), ("side", "17")):
        with pytest.raises(InputError, match=f"{key} is|rank is 4 and guidance nan"):
            Diffusers.from_state(arrays, {**facts, key: wrong})


# What the training does.


@needs_extra
@pytest.mark.parametrize("kind", ["ddpm", "stable"])
def test_training_lowers_the_loss_and_changes_the_samples(kind: str, tmp_path: Path) -> None:
    folder, good = make(kind, tmp_path / "pipeline"), good_plates(4)
    found = Diffusers.fit(shots(), good, 0, Silent(), Means(pipeline=folder), LEARNING)
    assert len(found.losses) == LEARNING.adaptation.steps
    pipeline, classes = found.pipeline, found.scenes.classes
    pictures, numbers = Crops.of(shots(), good, found.scenes)(np.random.default_rng(99), 64)
    plain = replace(found, weights=pipeline.fresh(len(classes), 0))
    losses: list[float] = []
    for each in (plain, found):
        pipeline.wear(each.weights)
        loss = denoising_loss(pipeline, pictures, numbers, pipeline.conditions(classes), seed=5)
        losses.append(float(loss.detach()))
    assert losses[1] < 0.97 * losses[0]
    assert not same(plain.sample("rough", 1, 0, 3), found.sample("rough", 1, 0, 3))


@needs_extra
def test_fresh_changes_change_nothing_and_the_base_is_never_trained(tmp_path: Path) -> None:
    folder = PipelineFolder.read(make("ddpm", tmp_path / "pipeline"))
    pipeline = load_pipeline(folder, 4)
    torch = pipeline.torch
    base = {name: part.clone() for name, part in pipeline.unet.named_parameters() if "base_layer" in name}
    noisy, times = torch.ones(1, *pipeline.shape), torch.tensor([500])
    import diffusers

    plain = diffusers.UNet2DModel.from_pretrained(str(folder.path / "unet"))
    pipeline.wear(pipeline.fresh(2, 0))
    with torch.no_grad():
        mine = pipeline.predict(noisy, times, torch.tensor([1]), None)
        torch.testing.assert_close(mine, plain(noisy, times).sample)
    Diffusers.fit(shots(), [], 0, Silent(), Means(pipeline=folder.path), PLAN)
    assert base
    for name, part in pipeline.unet.named_parameters():
        if name in base:
            assert torch.equal(part, base[name])


class Impatient(Silent):
    """Presses Ctrl-C after so many updates."""

    def advance(self, done: float, total: float, text: str) -> None:
        if done == 2:
            raise KeyboardInterrupt


@needs_extra
def test_an_interrupt_is_kept_where_asked_and_goes_on_to_the_same_generator(tmp_path: Path) -> None:
    folder, good = make("ddpm", tmp_path / "pipeline"), good_plates(2)
    straight = Diffusers.fit(shots(), good, 0, Silent(), Means(pipeline=folder), PLAN)
    with pytest.raises(KeyboardInterrupt):
        Diffusers.fit(shots(), good, 0, Impatient(), Means(pipeline=folder), PLAN)
    means, reporter = Means(checkpoint=tmp_path / "generator", pipeline=folder), Impatient()
    part = Diffusers.fit(shots(), good, 0, reporter, means, PLAN)
    assert "adaptation: interrupted after 2 of 4 updates; these are kept" in reporter.notes
    with pytest.raises(InputError, match="photos is"):
        Diffusers.fit(pitted_plates(2), good, 0, Silent(), replace(means, resume=True), PLAN)
    with pytest.raises(InputError, match="seed is"):
        Diffusers.fit(shots(), good, 1, Silent(), replace(means, resume=True), PLAN)
    resumed = Diffusers.fit(shots(), good, 0, Silent(), replace(means, resume=True), PLAN)
    assert list(resumed.losses) == pytest.approx(straight.losses)
    differs = False
    for name, weight in straight.state()[0].items():
        np.testing.assert_array_equal(weight, resumed.state()[0][name])
        differs |= not np.array_equal(weight, part.state()[0][name])
    assert differs
    assert not list(tmp_path.glob("*.checkpoint"))


@needs_extra
@pytest.mark.parametrize("more", [{"in_channels": 3, "out_channels": 3}, {"num_class_embeds": 7}])
def test_colour_and_classes_of_a_pipeline_are_taken(tmp_path: Path, more: dict[str, int]) -> None:
    folder = make("ddpm", tmp_path / "pipeline", **more)
    found = Diffusers.fit(rough_plates(2), [], 0, Silent(), Means(pipeline=folder), PLAN)
    assert found.pipeline.encode(np.zeros((1, 16, 16), np.float32)).shape[1] == more.get("in_channels", 1)
    pictures = np.random.default_rng(0).uniform(size=(2, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(found.pipeline.decode(found.pipeline.encode(pictures)), pictures, atol=1e-5)
    assert found.sample("rough", 1, 0, 2)[0].image.shape == (40, 48)
    assert found.sham(2, 0) == [], "no good parts were learned"


@needs_extra
@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_other_predictions_are_trained_and_drawn(tmp_path: Path, predicts: str) -> None:
    folder = make("stable", tmp_path / "pipeline", prediction_type=predicts, rescale_betas_zero_snr=True)
    found = Diffusers.fit(rough_plates(2), [], 0, Silent(), Means(pipeline=folder), PLAN)
    assert np.isfinite(found.losses).all()
    assert found.sample("rough", 1, 0, 3)[0].image.std() > 0


@needs_extra
def test_known_parts_of_a_canvas_are_held(tmp_path: Path) -> None:
    from gmel.synthesis.pretrained.sampling import draw_canvases

    pipeline = load_pipeline(PipelineFolder.read(make("ddpm", tmp_path / "pipeline")), 2)
    pipeline.wear(pipeline.fresh(1, 0))
    known = np.random.default_rng(0).uniform(0.2, 0.8, (16, 16)).astype(np.float32)
    mask = np.zeros((16, 16), bool)
    mask[4:9, 5:11] = True
    drawn = draw_canvases(pipeline, [Canvas(known, mask, 1, 3)], None, 3, 1.0)[0]
    np.testing.assert_allclose(drawn[~mask], known[~mask], atol=1e-5)
    assert np.abs(drawn - known)[mask].max() > 0.05


# What can be checked without the extra.


def test_pictures_to_train_on_hold_the_defect_and_come_from_good_parts_too() -> None:
    scenes = Scenes.fit(shots(), good_plates(3), 16)
    pictures, numbers = Crops.of(shots(), good_plates(3), scenes)(np.random.default_rng(0), 200)
    assert pictures.shape == (200, 16, 16)
    assert scenes.classes == (GOOD, "pit", "rough")
    assert [float((numbers == number).mean()) for number in (1, 2, 3)] == pytest.approx([0.25, 0.375, 0.375], abs=0.1)
    darkest = pictures.min((1, 2))
    assert darkest[numbers == 2].max() < darkest[numbers == 1].min() + 0.1, "every picture of a pit shows it"


def test_prompts_are_made_of_class_names() -> None:
    assert prompt_of("rolled-in_scale") == "a photo of a surface with rolled in scale"
    assert prompt_of(GOOD) == "a photo of a surface without defects"


def pretend(folder: Path, weights: str = "diffusion_pytorch_model.safetensors", **index: Any) -> Path:
    """A folder that looks like a pipeline on pixels; nothing in it is ever loaded."""
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "unet" / weights).write_bytes(b"")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    usual = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **usual, **index}))
    return folder


def test_folders_that_are_refused_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            PipelineFolder.read(folder)
        assert "\n" not in str(caught.value)

    assert PipelineFolder.read(pretend(tmp_path / "fine")).components["unet"] == "UNet2DModel"
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model_index.json: cannot be read")
    refused(pretend(tmp_path / "pickled", "diffusion_pytorch_model.bin"), "pickled, which can execute what it reads")
    refused(pretend(tmp_path / "half", "model.fp16.safetensors"), "diffusion_pytorch_model.safetensors is missing")
    refused(pretend(tmp_path / "code", unet=["my_unet", "UNet2DModel"]), "component unet .my_unet.* is not supported")
    refused(pretend(tmp_path / "other", unet=["diffusers", "UNet3D"]), "not supported; of unet are known UNet2DModel")
    refused(pretend(tmp_path / "two", text_encoder_2=["transformers", "CLIPTextModel"]), "component text_encoder_2")
    refused(pretend(tmp_path / "text", unet=["diffusers", "UNet2DConditionModel"]), "vae, text_encoder, tokenizer is m")
    flow = pretend(tmp_path / "flow", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    refused(flow, "of scheduler are known DDPMScheduler")
    odd = pretend(tmp_path / "odd")
    (odd / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "score"}')
    refused(odd, "prediction_type is 'score', must be one of epsilon")
    (odd / "scheduler" / "scheduler_config.json").write_text('{"beta_end": "much"}')
    refused(odd, "could not convert")
    (odd / "model_index.json").write_text("[]")
    refused(odd, "must be a table")


def test_digest_tells_pipelines_apart_and_not_their_places(tmp_path: Path) -> None:
    folder = pretend(tmp_path / "one")
    before = PipelineFolder.read(folder).digest
    shutil.copytree(folder, tmp_path / "two")
    assert PipelineFolder.read(tmp_path / "two").digest == before
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unread")
    (folder / "README.md").write_text("unread")
    assert PipelineFolder.read(folder).digest == before
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    assert PipelineFolder.read(folder).digest != before


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXTRA:
        monkeypatch.setitem(sys.modules, name, None)
    kind = mode_named("diffusers")
    assert kind is Diffusers, "the mode is known without the extra"
    means = Means(pipeline=pretend(tmp_path / "pipeline"))
    with pytest.raises(InputError, match=r"pip install gmel\[diffusers\].*uv sync --extra diffusers") as caught:
        kind.fit(rough_plates(1), [], 0, Silent(), means)
    assert "\n" not in str(caught.value)


def test_without_a_pipeline_or_shots_the_error_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give the folder of a pretrained one \(--pipeline DIR\)"):
        Diffusers.fit(rough_plates(1), [], 0, Silent())
    with pytest.raises(InputError, match="shots: there are none"):
        Diffusers.fit([], [], 0, Silent(), Means(pipeline=pretend(tmp_path / "pipeline")))


# Weights that do not fit their description.


@needs_extra
def test_weights_that_are_damaged_or_of_another_build_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            load_pipeline(PipelineFolder.read(folder), 4)
        assert "\n" not in str(caught.value)

    folder = make("ddpm", tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(folder, "unet: cannot be loaded")
    shutil.copy(make("ddpm", tmp_path / "wide", block_out_channels=(16, 16)) / "unet" / weights.name, weights)
    refused(folder, "unet: (cannot be loaded|.* weights are missing)")
    refused(make("ddpm", tmp_path / "two", in_channels=2, out_channels=2), "unet takes 2 channels")
    stable = make("stable", tmp_path / "stable")
    shutil.copy(tmp_path / "wide" / "unet" / weights.name, stable / "vae" / weights.name)
    refused(stable, "vae: (cannot be loaded|.* weights are missing)")


# As a user types it.


@needs_extra
def test_the_command_line_fits_samples_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pipeline = simple_folder(tmp_path / "photos"), make("ddpm", tmp_path / "pipeline")
    out, drawn = tmp_path / "defects.safetensors", tmp_path / "drawn"
    monkeypatch.setattr(pipelines, "LoraPlan", lambda: PLAN)
    words = ["synthesize", "fit", str(folder), "--mode", "diffusers", "--pipeline", str(pipeline), "-o", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    words = ["synthesize", "sample", str(out), "-o", str(drawn), "--count", "2", "--steps", "2"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(list(drawn.rglob("*.png"))) == 2
    shutil.move(pipeline, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such folder"):
        draw_samples(out, tmp_path / "again", 1, "", 2, 0, None, Silent())
    draw_samples(out, tmp_path / "again", 1, "", 2, 0, None, Silent(), tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such folder"):
        fit_generator(folder, "compose", "auto", "good", None, 0, out, Silent(), pipeline=tmp_path / "nowhere")
    assert "diffusers" in MODES


class Brief(Diffusers):
    """With few steps, so that a curve over them is quick."""

    default_steps = 2


@needs_extra
def test_its_costs_are_counted_as_those_of_the_others(fitted: Diffusers) -> None:
    from gmel.synthesis.costs import OnPipeline, cost_of
    from gmel.synthesis.data.splits import Split
    from gmel.synthesis.detector.features import TextureExtractor

    assert isinstance(fitted, OnPipeline)
    brief = Brief(fitted.scenes, fitted.pipeline, fitted.weights, fitted.guidance)
    split = Split(tuple(shots()), tuple(good_plates(4)), tuple(rough_plates(8)))
    cost = cost_of(brief, split, TextureExtractor(False), 4, 0, Silent(), 1.5)
    assert (cost.windows, cost.law.gflop) == (1.0, fitted.image_gflop())
    assert cost.steps == (1, 2, 4, 6)
    assert cost.law.seconds(2, 16) + 16 * cost.photo_s > 0
    weights = sum(part.stat().st_size for part in fitted.pipeline.folder.path.rglob("*.safetensors"))
    assert cost.file_bytes > weights, "the pipeline has to be loaded too"
    counted = fitted.image_gflop()
    assert 0.001 < counted < 0.1
    assert replace(fitted, guidance=2.0).image_gflop() == pytest.approx(
        counted * (1.0 if fitted.pipeline.folder.latent else 2.0)
    )
