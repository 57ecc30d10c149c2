"""Files of photos: every kind of pixel, every kind of damage, and names that would lead out of the data set."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gmel.scenario.errors import InputError
from gmel.synthesis.data import reading
from gmel.synthesis.data.paths import inside
from gmel.synthesis.data.reading import read_grey, read_mask
from small_photos import pixels, save

GREY = pixels(1)


def luma(colour: Any) -> Any:
    """ITU-R 601 in whole numbers, as the JPEG standard rounds it."""
    red, green, blue = (colour[..., channel].astype(np.int64) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def test_eight_and_sixteen_bits_come_as_they_are(tmp_path: Path) -> None:
    deep = pixels(2, dtype=np.uint16)
    for name, image in (("a.png", GREY), ("a.bmp", GREY), ("a.tif", GREY), ("d.png", deep), ("d.tif", deep)):
        found = read_grey(save(tmp_path / name, image))
        assert found.dtype == image.dtype
        assert np.array_equal(found, image)


def test_colour_becomes_luma_and_alpha_is_dropped(tmp_path: Path) -> None:
    colour = np.random.default_rng(3).integers(0, 256, (24, 20, 4), np.uint8)
    assert np.array_equal(read_grey(save(tmp_path / "rgb.png", colour[..., :3].copy())), luma(colour))
    assert np.array_equal(read_grey(save(tmp_path / "rgba.png", colour)), luma(colour)), "not blended with anything"
    with_alpha = np.stack([GREY, colour[..., 3]], axis=-1)
    assert np.array_equal(read_grey(save(tmp_path / "la.png", Image.fromarray(with_alpha, "LA"))), GREY)
    as_colour = np.repeat(GREY[..., None], 3, axis=-1)
    assert np.array_equal(read_grey(save(tmp_path / "grey.png", as_colour)), GREY), "grey stored as colour stays exact"


def test_palettes_and_two_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY // 64)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 200, 200, 200])
    expected = np.array([0, 76, 150, 200], np.uint8)[GREY // 64]
    assert np.array_equal(read_grey(save(tmp_path / "p.png", palette)), expected)
    two = read_grey(save(tmp_path / "1.png", Image.fromarray(GREY > 127)))
    assert np.array_equal(two, np.where(GREY > 127, 255, 0))


def test_whole_numbers_of_32_bits_must_fit_into_16(tmp_path: Path) -> None:
    values = pixels(4, dtype=np.uint16).astype(np.int32)
    assert np.array_equal(read_grey(save(tmp_path / "i.tif", values)), values)
    for wrong in (-1, 65536):
        values[0, 0] = wrong
        with pytest.raises(InputError, match=r"i\.tif: grey values outside 0 to 65535; save it"):
            read_grey(save(tmp_path / "i.tif", values))


def test_floating_point_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f.tif", GREY.astype(np.float32))
    with pytest.raises(InputError, match=r"f\.tif: floating-point values cannot be read; save it as grey"):
        read_grey(path)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is on the right
    path = save(tmp_path / "turned.png", GREY, exif=exif)
    assert np.array_equal(read_grey(path), np.rot90(GREY, -1))


def test_huge_claims_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"bomb\.png: .*pixels.*cut the photo into parts"):
        read_grey(path)
    monkeypatch.setattr(reading, "LARGEST_PIXELS", GREY.size - 1)
    with pytest.raises(InputError, match="more than 479 pixels"):
        read_grey(save(tmp_path / "a.png", GREY))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not an image that can be read; save it again"),
        (b"GIF, or so they say", "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
    ],
)
def test_what_is_no_image(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=told) as stop:
        read_grey(path)
    assert "\n" not in str(stop.value)


def test_missing_tiny_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_grey(tmp_path / "none.png")
    with pytest.raises(InputError, match="there is no such file"):
        read_grey(tmp_path)
    with pytest.raises(InputError, match="5 x 9 pixels, at least 8 a side"):
        read_grey(save(tmp_path / "tiny.png", pixels(1, (9, 5))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels(5, (64, 64))).save(data, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    with pytest.raises(InputError, match=r"cut\.img: (truncated or corrupt|not an image).*; (copy|save) it again"):
        read_grey(path)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_bytes_give_a_photo_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: list[tuple[float, int]]
) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels(6, (32, 32))).save(data, kind)
    broken = bytearray(data.getvalue())
    for place, value in damage:
        broken[int(place * (len(broken) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.img"
    path.write_bytes(broken)
    try:
        found = read_grey(path)
    except InputError as error:
        assert "damaged.img: " in str(error)
    else:
        assert found.ndim == 2
        assert found.dtype in (np.uint8, np.uint16)


def test_masks(tmp_path: Path) -> None:
    mask = np.zeros((24, 20), np.uint8)
    mask[3:9, 4:12] = 1
    assert np.array_equal(read_mask(save(tmp_path / "numbers.png", mask)), mask > 0), "also of class numbers"
    assert np.array_equal(read_mask(save(tmp_path / "m.jpg", mask * 255, quality=60)), mask > 0), "rings are not defect"


@pytest.mark.parametrize(
    "named",
    ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "C:\\a.jpg", "C:a.jpg", "\\\\host\\a", "..\\a", "", "a\0b", "a\nb"],
)
def test_names_that_lead_out_are_refused(named: str) -> None:
    with pytest.raises(InputError, match=r"list\.txt: names the file .*; write it relative"):
        inside(Path("/data"), named, "list.txt")


@given(st.text(max_size=40))
def test_a_name_never_leaves_its_folder(named: str) -> None:
    root = Path("/data/set")
    try:
        path = inside(root, named, "list.txt")
    except InputError:
        return
    assert ".." not in path.parts
    assert path.is_relative_to(root)
    assert path != root


def test_names_with_either_slash_are_the_same() -> None:
    assert inside(Path("a"), "b\\c.jpg", "") == inside(Path("a"), "b/c.jpg", "") == Path("a/b/c.jpg")
