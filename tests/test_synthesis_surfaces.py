"""The built-in photos, data sets on disk, and the command that shows them."""

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from gmel.cli.main import main
from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.defects import DEFECTS
from gmel.synthesis.data.procedural import draw_photo, procedural_dataset
from gmel.synthesis.data.sheet import contact_sheet, rows_by_class, write_sheet
from gmel.synthesis.data.surfaces import SURFACES, Camera, noise, photographed
from gmel.synthesis.data.write import write_dataset
from gmel.synthesis.photo import GOOD, Photo
from small_photos import pixels, simple_folder


def names_and_pixels(dataset: Dataset) -> dict[str, bytes]:
    return {photo.name: photo.image.tobytes() for photo in dataset.photos}


@pytest.fixture(scope="module")
def drawn() -> Dataset:
    return procedural_dataset(good=5, defects=3, shape=(96, 80))


def test_a_photo_depends_on_its_own_name_alone(drawn: Dataset) -> None:
    fewer = procedural_dataset(good=2, defects=1, shape=(96, 80), sites=["woven"], classes=["pit"])
    assert names_and_pixels(fewer).items() <= names_and_pixels(drawn).items()
    assert names_and_pixels(fewer) != names_and_pixels(
        procedural_dataset(1, good=2, defects=1, shape=(96, 80), sites=["woven"], classes=["pit"])
    )


def test_what_the_set_holds(drawn: Dataset) -> None:
    assert drawn.classes == (GOOD, *sorted(DEFECTS))
    assert drawn.sites == tuple(sorted(SURFACES))
    assert len({photo.group for photo in drawn.photos}) == len(drawn.photos) == 4 * (5 + 5 * 3), "no twins"
    for photo in drawn.photos:
        assert photo.image.shape == (96, 80)
        assert photo.image.dtype == np.uint8
        assert 10 < photo.image.std() < 80
        assert (photo.mask is None) == (photo.label == GOOD)
        assert photo.mask is None or 4 <= photo.mask.sum() < 0.6 * photo.mask.size


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("label", DEFECTS)
def test_masks_are_where_the_defect_is(surface: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same photo with the defect at almost no strength: what differs lies in the mask."""
    changed = [draw_photo(surface, label, number).pixels() for number in range(6)]
    masks = [draw_photo(surface, label, number).mask for number in range(6)]
    unmarked = DEFECTS[label]

    def without(shape: tuple[int, int], rng: np.random.Generator) -> object:
        mark = unmarked(shape, rng)
        return replace(mark, change=0 * mark.change, keeps=np.ones(shape))

    monkeypatch.setitem(DEFECTS, label, without)  # pyright: ignore[reportArgumentType]
    inside, outside = [], []
    for number, (pixels_with, mask) in enumerate(zip(changed, masks, strict=True)):
        assert mask is not None
        difference = np.abs(pixels_with - draw_photo(surface, label, number).pixels())
        inside.append(difference[mask].mean())
        outside.append(difference[~mask].mean())
    assert np.mean(inside) > 12 * np.mean(outside)


def test_texture_detectors_are_neither_perfect_nor_at_chance() -> None:
    """A few contrasts of grey and gradient, told from half of the photos: the sets must leave room above and below."""
    photos = procedural_dataset(good=40, defects=8, shape=(96, 96), sites=["brushed", "rolled"]).photos
    rows = []
    for photo in photos:
        image = photo.pixels()
        steps = np.abs(np.diff(image, 2, axis=0)[:, 1:-1]) + np.abs(np.diff(image, 2, axis=1)[1:-1])
        rows.append(
            np.concatenate([np.quantile(image - image.mean(), [0, 0.01, 0.99, 1]), np.quantile(steps, [0.5, 0.99, 1])])
        )
    features = np.array(rows) / np.std(rows, axis=0)
    defect = np.array([photo.label != GOOD for photo in photos])
    model = LogisticRegression(class_weight="balanced").fit(features[::2], defect[::2])
    score = roc_auc_score(defect[1::2], model.decision_function(features[1::2]))
    assert 0.65 < score < 0.98


def test_noise_is_as_wide_as_it_says() -> None:
    """Gaussian smoothing by s: correlation exp(-d^2 / 4 s^2) at distance d."""
    fields = [noise((128, 128), np.random.default_rng(seed), 4, 2) for seed in range(30)]
    for axis, width in ((0, 4), (1, 2)):
        ahead, behind = (np.take(fields, range(*ends), axis=axis + 1) for ends in ((3, 128), (0, 125)))
        assert np.corrcoef(ahead.ravel(), behind.ravel())[0, 1] == pytest.approx(np.exp(-9 / (4 * width**2)), abs=0.03)


def test_the_sensor_adds_the_noise_that_its_camera_says() -> None:
    plain = Camera(exposure=0, slope=0, vignette=0, photon_noise=0.03, read_noise=0.004, blur=0.5)
    for grey in (0.1, 0.6):
        seen = photographed(np.full((200, 200), grey), plain, np.random.default_rng(1))
        assert seen.mean() == pytest.approx(grey, abs=1e-3)
        assert seen.std() == pytest.approx(np.sqrt(0.03**2 * grey + 0.004**2), rel=0.03)
    dim = photographed(np.full((200, 200), 0.6), replace(plain, vignette=0.4), np.random.default_rng(1))
    assert dim[90:110, 90:110].mean() > dim[:20, :20].mean() + 0.1


def test_wrong_names_and_sizes() -> None:
    for call, told in (
        (lambda: draw_photo("wood", GOOD, 0), "surface: 'wood', must be one of brushed, cast, woven, rolled"),
        (lambda: draw_photo("cast", "rust", 0), "class: 'rust', must be good or one of crack"),
        (lambda: draw_photo("cast", "pit", 0, shape=(20, 90)), "must be at least 48 a side"),
        (lambda: procedural_dataset(good=0, defects=0), "must not be negative, and not both 0"),
    ):
        with pytest.raises(InputError, match=told):
            call()


def test_what_is_written_is_read_again(tmp_path: Path, drawn: Dataset) -> None:
    templated = [replace(photo, template=photo.image // 2) for photo in drawn.photos[:3]]
    deep = Photo(pixels(3, (96, 80), np.uint16), "pit", site="cast", name="deep")
    whole = Dataset("x", (*templated, *drawn.photos[3:], deep))
    write_dataset(whole, tmp_path / "out")
    back = read_dataset(tmp_path / "out")
    assert [problem.kind for problem in back.problems] == ["depths"]

    def facts(photo: Photo) -> tuple[object, ...]:
        arrays = (photo.image, photo.mask, photo.template)
        return (photo.label, photo.site, photo.image.dtype.name, *(a if a is None else a.tobytes() for a in arrays))

    assert sorted(map(facts, back.photos), key=str) == sorted(map(facts, whole.photos), key=str)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "nothing is left beside it"


def test_names_become_safe(tmp_path: Path) -> None:
    labels = ["../../up", "/root", "CON", "mask", "a b", "a*b", "Good", "", "é", "x" * 300]
    photos = [
        Photo(pixels(10 * row + copy), label, name=name)
        for row, label in enumerate([GOOD, *labels])
        for copy, name in enumerate(["../../x.png", "..\\x", "b_mask.png", "b.png", "B.png", ".hidden"])
    ]
    write_dataset(Dataset("x", tuple(photos)), tmp_path / "deep" / "out")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(photos)
    assert len({str(path).lower() for path in files}) == len(photos), "also where capitals do not count"
    assert all(path.is_relative_to(tmp_path / "deep" / "out") for path in files)
    back = read_dataset(tmp_path / "deep" / "out")
    assert len(back.classes) == len(labels) + 1
    assert {photo.image.tobytes() for photo in back.of_class(GOOD)} == {pixels(copy).tobytes() for copy in range(6)}


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(
    tmp_path: Path, drawn: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("keep")
    with pytest.raises(InputError, match="exists and is not an empty folder; choose another place"):
        write_dataset(drawn, tmp_path / "mine")
    saved: list[str] = []
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        saved.append(str(path))
        if len(saved) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\); make room"):
        write_dataset(drawn, tmp_path / "out")
    assert len(saved) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_contact_sheet(tmp_path: Path, drawn: Dataset) -> None:
    photos = drawn.of_site("cast").photos
    rows = rows_by_class(photos)
    assert list(rows) == ["cast good", "cast crack", "cast inclusion", "cast pit", "cast scratch", "cast stain"]
    sheet = contact_sheet(rows, columns=4, side=80)
    assert sheet.size == (4 + 4 * 84, 4 + 6 * 98)
    shown = np.asarray(contact_sheet(rows, columns=4, side=96, outlines=False))[18 : 18 + 96, 4 + 8 : 4 + 88, 0]
    assert np.array_equal(shown, photos[0].image), "a photo that fits is shown as it is"
    write_sheet(tmp_path / "a.jpg", sheet)
    assert Image.open(tmp_path / "a.jpg").size == sheet.size
    with pytest.raises(InputError, match=r"must end with \.png, \.jpg, \.jpeg"):
        write_sheet(tmp_path / "a.pdf", sheet)


def gmel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["gmel", "synthesize", "data", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    simple_folder(tmp_path / "parts", ("ok", "pit", "crack"), 6)
    (tmp_path / "parts" / "pit" / "5.png").write_bytes(b"no")
    words = (tmp_path / "parts", "--good", "ok", "--sheet", tmp_path / "sheet.png", "--out", tmp_path / "copy")
    code, out, err = gmel(capsys, monkeypatch, *words, "--shots", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "parts: 17 photos in 17 groups"
    assert lines[2].split() == [
        *("class", "photos", "groups", "masks", "templates", "width", "height", "bits", "learn", "test")
    ]
    assert [line.split() for line in lines[3:6]] == [
        ["good", "6", "6", "0", "0", "20", "24", "8", "3", "3"],
        ["crack", "6", "6", "0", "0", "20", "24", "8", "2", "3"],
        ["pit", "5", "5", "0", "0", "20", "24", "8", "2", "3"],
    ]
    assert lines[-1].startswith("problem: photos that cannot be read, of 18: 1 (pit/5.png); the first: ")
    assert "contact sheet in" in err
    assert Image.open(tmp_path / "sheet.png").width > 100
    code, out, _ = gmel(capsys, monkeypatch, tmp_path / "copy", "--shots", 9, "--json")
    facts = json.loads(out)
    assert (code, facts["photos"], facts["split"]) == (0, 17, None)
    assert [problem["kind"] for problem in facts["problems"]] == ["tiny-class", "tiny-class"]


def test_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for words, told in (
        ((), "give a folder with photos, or --builtin"),
        ((tmp_path, "--builtin"), "one of the two"),
        ((tmp_path / "none",), "there is no such folder"),
        ((tmp_path / "empty",), "no photos in folders of classes"),
        (("--builtin", "--sheet", "a.pdf"), "must end with .png"),
        (("--builtin", "--out", tmp_path.parent), "exists and is not an empty folder"),
        (("--builtin", "--seed", -1), "seed"),
        ((simple_folder(tmp_path / "parts"), "--shots", 0), "shots: 0, must be at least 1"),
    ):
        code, out, err = gmel(capsys, monkeypatch, *words)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("gmel: error: ")
        assert told in err.splitlines()[-1]
