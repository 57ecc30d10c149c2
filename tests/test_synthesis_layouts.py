"""Layouts of data sets: which photo is of which class, and where its mask and template lie."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gmel.scenario.errors import InputError
from gmel.synthesis.data import dataset as datasets
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.splits import few_shot_split
from gmel.synthesis.data.summary import summary, summary_lines
from gmel.synthesis.photo import GOOD
from small_photos import pixels, real, save, simple_folder, spot


def kinds(dataset: Dataset) -> dict[str, list[str]]:
    """Names of the findings' kinds with what they are about."""
    return {problem.kind: list(problem.names) for problem in dataset.problems}


def masked(dataset: Dataset) -> dict[str, bool]:
    return {photo.name: photo.mask is not None for photo in dataset.photos}


def test_class_folders(tmp_path: Path) -> None:
    found = read_dataset(simple_folder(tmp_path / "parts", (GOOD, "pit", "crack")))
    assert found.name == "parts"
    assert found.classes == (GOOD, "crack", "pit")
    assert [photo.name for photo in found.of_class("pit")] == ["pit/0.png", "pit/1.png", "pit/2.png"]
    assert np.array_equal(found.of_class("pit")[1].image, pixels(101))
    assert found.sites == ("",)
    assert not found.problems


@pytest.mark.parametrize(
    "place",
    ["pit/mask/a.png", "pit/masks/a_mask.png", "masks/pit/a.png", "ground_truth/pit/a_mask.png", "pit/a_mask.png"],
)
@pytest.mark.parametrize("photo", ["pit/a.png", "pit/img/a.jpg", "pit/Imgs/a.png"])
def test_masks_are_found_wherever_they_usually_lie(tmp_path: Path, place: str, photo: str) -> None:
    if place == "pit/a_mask.png":
        place = str(Path(photo).with_name("a_mask.png"))
    simple_folder(tmp_path, (GOOD,))
    save(tmp_path / photo, pixels(1))
    save(tmp_path / place, spot())
    found = read_dataset(tmp_path)
    (pit,) = found.of_class("pit")
    assert pit.name == photo
    assert pit.mask is not None
    assert np.array_equal(pit.mask, spot() > 0)
    assert len(found.photos) == 4, "a mask is not a photo"


def test_a_png_beside_a_jpeg_is_its_mask(tmp_path: Path) -> None:
    save(tmp_path / "pit" / "a.jpg", pixels(1))
    save(tmp_path / "pit" / "a.png", spot())
    save(tmp_path / "pit" / "b.png", pixels(2))
    assert masked(read_dataset(tmp_path)) == {"pit/a.jpg": True, "pit/b.png": False}


def test_templates_and_images_folder(tmp_path: Path) -> None:
    simple_folder(tmp_path / "images", (GOOD, "pit"), 2)
    save(tmp_path / "templates" / "pit" / "1.png", pixels(50))
    save(tmp_path / "images" / "pit" / "template" / "0.png", pixels(51))
    found = {photo.name: photo.template for photo in read_dataset(tmp_path).photos}
    assert np.array_equal(found["images/pit/1.png"], pixels(50))  # pyright: ignore[reportArgumentType]
    assert np.array_equal(found["images/pit/0.png"], pixels(51))  # pyright: ignore[reportArgumentType]
    assert found["images/good/0.png"] is None


def test_one_template_for_all_and_one_that_does_not_fit(tmp_path: Path) -> None:
    simple_folder(tmp_path)
    save(tmp_path / "templates" / "board.png", pixels(50))
    save(tmp_path / "pit" / "large.png", pixels(9, (30, 30)))
    found = read_dataset(tmp_path)
    assert [photo.template is not None for photo in found.photos] == [True] * 6 + [False]
    assert kinds(found)["template"] == ["pit/large.png"]
    save(tmp_path / "templates" / "board.png", pixels(50, dtype=np.uint16))
    assert len(kinds(read_dataset(tmp_path))["template"]) == 7, "another depth cannot be compared"


def test_sites(tmp_path: Path) -> None:
    simple_folder(tmp_path / "north", (GOOD, "pit"))
    simple_folder(tmp_path / "south" / "images", (GOOD, "crack"))
    (tmp_path / "notes").mkdir()
    found = read_dataset(tmp_path)
    assert found.sites == ("north", "south")
    assert found.of_site("south").classes == (GOOD, "crack")
    assert kinds(found)["layout"] == ["notes"]
    with pytest.raises(InputError, match=r"site 'east': not in .*, must be one of north, south"):
        found.of_site("east")


def test_parts_of_a_split_are_no_sites(tmp_path: Path) -> None:
    for row, part in enumerate(("train", "test")):
        for label in (GOOD, "pit"):
            save(tmp_path / part / label / "1.png", pixels(10 * row + len(label)))
    found = read_dataset(tmp_path)
    assert found.sites == ("",)
    assert [photo.name for photo in found.of_class("pit")] == ["test/pit/1.png", "train/pit/1.png"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Old archives have names in other encodings, and names may hold line breaks."""
    for number, name in enumerate((b"caf\xe9", b"a\nb", b"good")):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)  # noqa: PTH102
        for copy in range(4):
            save(Path(os.fsdecode(folder)) / f"{copy}.png", pixels(10 * number + copy))
    found = read_dataset(tmp_path)
    assert found.classes == (GOOD, "a?b", "caf?")
    few_shot_split(found, 2)
    lines = summary_lines(summary(found, 2))
    assert "\n".join(lines).encode().count(b"\n") == len(lines) - 1


def test_good_by_another_name(tmp_path: Path) -> None:
    simple_folder(tmp_path, ("free", "pit"))
    without = read_dataset(tmp_path)
    assert without.classes == ("free", "pit")
    assert next(p.text for p in without.problems if p.kind == "no-good").endswith("--good free")
    assert read_dataset(tmp_path, good="free").classes == (GOOD, "pit")
    save(tmp_path / "good" / "a.png", pixels(77))
    with pytest.raises(InputError, match="is called like good parts, but --good names `free`; rename it"):
        read_dataset(tmp_path, good="free")


def test_no_photos_or_none_in_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no photos in folders of classes; put the photos into one folder for each"):
        read_dataset(tmp_path)
    save(tmp_path / "a.png", pixels(1))
    with pytest.raises(InputError, match="1 photos without a class; put the photos into one folder for each class"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="there is no such folder"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(InputError, match="layout: 'coco', must be one of auto, folder, voc, deeppcb, mvtec"):
        read_dataset(tmp_path, layout="coco")


def test_a_corrupt_file_among_many_is_skipped_and_listed(tmp_path: Path) -> None:
    simple_folder(tmp_path, count=10)
    (tmp_path / "pit" / "3.png").write_bytes((tmp_path / "pit" / "3.png").read_bytes()[:100])
    (tmp_path / "pit" / ".hidden.png").write_bytes(b"")
    found = read_dataset(tmp_path)
    assert len(found.photos) == 19
    assert kinds(found) == {"unreadable": ["pit/3.png"]}
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(InputError, match=r"none of 20 photos can be read; the first: .*0\.png: not an image"):
        read_dataset(tmp_path)


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "LARGEST_BYTES", 2000)
    with pytest.raises(InputError, match="GiB of photos; cut windows"):
        read_dataset(simple_folder(tmp_path))


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    simple_folder(tmp_path, count=4)
    save(tmp_path / "pit" / "mask" / "0.png", spot((30, 30)))
    save(tmp_path / "pit" / "mask" / "1.png", np.zeros((24, 20), np.uint8))
    (tmp_path / "pit" / "mask" / "2.png").write_bytes(b"no")
    save(tmp_path / "good" / "mask" / "0.png", np.zeros((24, 20), np.uint8))
    save(tmp_path / "good" / "mask" / "1.png", spot())
    found = read_dataset(tmp_path)
    assert not any(masked(found).values())
    told = sorted(name for problem in found.problems if problem.kind == "mask" for name in problem.names)
    assert told == ["good/1.png", "pit/0.png", "pit/1.png", "pit/2.png"], "an empty mask of a good part is no problem"


def test_mvtec(tmp_path: Path) -> None:
    for product in ("bolt", "nut"):
        root = tmp_path / product
        for number in range(3):
            save(root / "train" / "good" / f"{number:03}.png", pixels(number, (24, 24)))
            save(root / "test" / "good" / f"{number:03}.png", pixels(10 + number, (24, 24)))
            save(root / "test" / "bent" / f"{number:03}.png", pixels(20 + number, (24, 24)))
            save(root / "ground_truth" / "bent" / f"{number:03}_mask.png", spot((24, 24)))
    one = read_dataset(tmp_path / "bolt")
    assert Counter(photo.label for photo in one.photos) == {GOOD: 6, "bent": 3}
    assert all(photo.mask is not None and photo.mask.sum() == 24 for photo in one.of_class("bent"))
    assert read_dataset(tmp_path, layout="mvtec").sites == ("bolt", "nut")
    assert len(read_dataset(tmp_path).photos) == 18
    with pytest.raises(InputError, match="is this the layout of MVTec AD"):
        read_dataset(simple_folder(tmp_path / "other"), layout="mvtec")


XML = """<annotation><folder>x</folder><filename>{file}</filename><path>/home/me/{file}</path>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>
</bndbox></object>"""


def annotate(root: Path, stem: str, objects: str, file: str | None = None) -> Path:
    path = root / "Annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format(file=file or f"{stem}.png", objects=objects))
    return path


def voc(root: Path) -> Path:
    for number, stem in enumerate(("a", "b", "c")):
        save(root / "JPEGImages" / f"{stem}.png", pixels(number, (60, 80)))
    annotate(root, "a", OBJECT.format(10, 20, 14, 26, name="pit") + OBJECT.format(30, 2, 60, 50, name="stain"))
    annotate(root, "b", "", file="b")
    annotate(root, "c", OBJECT.format(-5, 40, 9, 999, name="pit"))
    return root


def test_voc_boxes_become_masks(tmp_path: Path) -> None:
    found = read_dataset(voc(tmp_path))
    assert {photo.name: photo.label for photo in found.photos} == {
        "JPEGImages/a.png": "stain",
        "JPEGImages/b.png": GOOD,
        "JPEGImages/c.png": "pit",
    }
    stain, pit = found.of_class("stain")[0].mask, found.of_class("pit")[0].mask
    expected = np.zeros((60, 80), np.bool_)
    expected[2:50, 30:60] = True
    assert np.array_equal(stain, expected)  # pyright: ignore[reportArgumentType]
    assert pit is not None
    assert pit.sum() == 20 * 9, "a box is cut off at the edge of its photo"
    assert kinds(found)["layout"] == ["Annotations/a.xml"], "two classes in one photo"


def test_voc_windows(tmp_path: Path) -> None:
    found = read_dataset(voc(tmp_path), crop=32)
    windows = {photo.name.removeprefix("JPEGImages/"): photo for photo in found.photos}
    assert set(windows) == {"a.png#1", "a.png#2", "b.png#good", "c.png#1", "c.png#good"}, "a has no room for a good one"
    assert all(photo.image.shape == (32, 32) for photo in found.photos)
    pit = windows["a.png#1"]
    assert pit.mask is not None
    assert np.array_equal(pit.image, pixels(0, (60, 80))[7:39, 0:32])
    assert np.argwhere(pit.mask).min(axis=0).tolist() == [13, 10]
    assert pit.group == windows["a.png#2"].group != windows["c.png#1"].group, "windows of a photo stay together"
    with pytest.raises(InputError, match="crop: 5 pixels, must be at least 16"):
        read_dataset(tmp_path, crop=5)
    with pytest.raises(InputError, match="no boxes to cut windows around; only voc and deeppcb have"):
        read_dataset(simple_folder(tmp_path / "other"), crop=32)


def test_voc_photos_may_lie_in_class_folders(tmp_path: Path) -> None:
    for label in ("crazing", "patches"):
        save(tmp_path / "images" / label / f"{label}_1.png", pixels(len(label), (60, 80)))
        annotate(tmp_path, f"{label}_1", OBJECT.format(1, 2, 30, 40, name=label))
    found = read_dataset(tmp_path)
    assert [(photo.name, photo.label) for photo in found.photos] == [
        ("images/crazing/crazing_1.png", "crazing"),
        ("images/patches/patches_1.png", "patches"),
    ]


def test_voc_files_that_are_wrong(tmp_path: Path) -> None:
    voc(tmp_path)
    annotate(tmp_path, "lost", "")
    save(tmp_path / "JPEGImages" / "bare.png", pixels(9, (60, 80)))
    (tmp_path / "Annotations" / "broken.xml").write_text("<annotation>")
    annotate(tmp_path, "b", OBJECT.format(9, 9, 9, 9, name="pit"))
    found = read_dataset(tmp_path)
    told = {name for problem in found.problems for name in problem.names if problem.kind in {"layout", "unreadable"}}
    expected = {"lost.xml", "broken.xml", "a.xml", "b.xml"}
    assert told == {f"Annotations/{name}" for name in expected} | {"bare.png", "b.png"}
    assert GOOD not in found.classes, "a defect without a usable box is not a good part"


@pytest.mark.parametrize("file", ["../../secret.png", "/etc/secret.png", "C:\\secret.png"])
def test_voc_never_leaves_its_folder(tmp_path: Path, file: str) -> None:
    save(tmp_path / "secret.png", pixels(1))
    root = voc(tmp_path / "deep" / "set")
    annotate(root, "d", "", file=file)
    with pytest.raises(InputError, match=r"d\.xml: names the file .*not a path inside the data set"):
        read_dataset(root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_voc_entities_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "secret").write_text("password")
    voc(tmp_path / "set")
    text = (
        f'<!DOCTYPE a [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]><annotation><filename>&e;</filename></annotation>'
    )
    path = tmp_path / "set" / "Annotations" / "d.xml"
    path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding))
    with pytest.raises(InputError, match=r"d\.xml: declares a document type or entities"):
        read_dataset(tmp_path / "set")
    path.write_text('<!DOCTYPE annotation SYSTEM "http://localhost/a.dtd"><annotation/>')
    with pytest.raises(InputError, match=r"d\.xml: declares a document type or entities"):
        read_dataset(tmp_path / "set")


def deeppcb(root: Path) -> Path:
    """Four boards of two groups, as the data set names its files."""
    lines: list[str] = []
    for number, (group, board) in enumerate((g, b) for g in ("41", "92") for b in (0, 1)):
        stem = f"000{group}00{board}"
        folder = root / "PCBData" / f"group000{group}" / f"000{group}"
        save(folder / f"{stem}_test.jpg", pixels(number, (128, 128)))
        save(folder / f"{stem}_temp.jpg", pixels(90 + number, (128, 128)))
        table = folder.with_name(f"000{group}_not") / f"{stem}.txt"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("10 10 30 30 1\n60 70 80 84 3\n")
        lines.append(f"group000{group}/000{group}/{stem}.jpg group000{group}/000{group}_not/{stem}.txt\n")
    (root / "PCBData" / "trainval.txt").write_text("".join(lines[:3]))
    (root / "PCBData" / "test.txt").write_text(lines[3])
    return root


def test_deeppcb(tmp_path: Path) -> None:
    found = read_dataset(deeppcb(tmp_path))
    assert Counter(photo.label for photo in found.photos) == {"open": 4, "mousebite": 4, GOOD: 4}
    assert found.sites == ("group00041", "group00092")
    assert len({photo.group for photo in found.photos}) == 4, "windows of a board stay together"
    for photo in found.photos:
        assert photo.image.shape == (64, 64)
        assert photo.template is not None
        assert photo.template.shape == (64, 64)
        assert (photo.mask is None) == (photo.label == GOOD)
    bite = found.of_class("mousebite")[0]
    assert bite.mask is not None
    assert bite.mask.sum() == 20 * 14
    (tmp_path / "PCBData" / "group00041" / "00041" / "00041000_test.jpg").unlink()
    (tmp_path / "PCBData" / "group00041" / "00041_not" / "00041001.txt").write_text("1 2 3")
    less = read_dataset(tmp_path)
    assert len({photo.group for photo in less.photos}) == 2
    assert sum(problem.kind == "unreadable" for problem in less.problems) == 2


@pytest.mark.parametrize("line", ["../../x.jpg a.txt", "/etc/passwd a.txt", "a.jpg ../../a.txt"])
def test_deeppcb_never_leaves_its_folder(tmp_path: Path, line: str) -> None:
    deeppcb(tmp_path)
    (tmp_path / "PCBData" / "test.txt").write_text(line)
    with pytest.raises(InputError, match=r"test\.txt, line 1: names the file"):
        read_dataset(tmp_path)
    (tmp_path / "PCBData" / "test.txt").write_text("only-one-word")
    with pytest.raises(InputError, match=r"test\.txt: line 1 must be a photo and a table"):
        read_dataset(tmp_path)


def test_real_tiles() -> None:
    """Counts of reference data: classes, masks, twins (thumbnails as its design measured them, by another decoder)."""
    found = read_dataset(real("magnetic_tile"), good="free")
    sizes = {label: len(found.of_class(label)) for label in found.classes}
    assert sizes == {GOOD: 952, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert sum(photo.mask is not None for photo in found.photos) == 388, "4 of 392 masks are empty"
    assert abs(len({photo.group for photo in found.photos}) - 877) <= 5
    assert {len({p.group for p in found.of_class(label)}) for label in ("blowhole", "fray")} == {76, 25}
    split = few_shot_split(found, 5)
    assert not {p.group for p in split.test} & {p.group for p in (*split.shots, *split.good)}
    assert len(split.shots) == 25


def test_real_steel() -> None:
    found = read_dataset(real("neu_cls"))
    assert {len(found.of_class(label)) for label in found.classes} == {300}
    assert len(found.classes) == 6
    assert kinds(found)["duplicates"] == ["images/patches/patches_101.jpg = images/patches/patches_105.jpg"]
    assert {photo.image.shape for photo in found.photos} == {(200, 200)}
    assert "no-good" in kinds(found)
    split = few_shot_split(found, 10, test_per_class=200)
    assert (len(split.shots), len(split.test)) == (60, 1200)
