"""Results by their content: whole or not at all, and never outside of the folder."""

import io
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmel.edge.gateway.tasks import first_photo
from gmel.edge.store import FolderStore, name_of


def test_what_is_put_is_got(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "r")
    for data in (b"", b"x", b"y" * 100_000):
        name = store.put(data)
        assert name == name_of(data) == store.put(data)
        assert store.get(name) == data
    assert store.get("0" * 64) is None


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a" * 63, "A" * 64, "a" * 65, "a" * 64 + "\n"])
def test_a_name_never_leads_out(tmp_path: Path, name: str) -> None:
    store = FolderStore(tmp_path / "r")
    (tmp_path / "x").write_bytes(b"secret")
    assert store.get(name) is None


@given(st.text(max_size=80))
def test_any_name_is_nothing(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    assert FolderStore(tmp_path_factory.getbasetemp() / "r").get(name) is None


def test_content_that_has_changed_is_not_served_and_heals(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "r")
    name = store.put(b"good data")
    path = tmp_path / "r" / name[:2] / name
    for bad in (b"evil data", b"short", b""):
        path.write_bytes(bad)
        assert store.get(name) is None
        assert store.put(b"good data") == name
        assert store.get(name) == b"good data", "the task was done again"


def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "r")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.put(b"x" * 1000)
    assert [path for path in (tmp_path / "r").rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    assert store.get(store.put(b"x" * 1000)) == b"x" * 1000


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "r")
    name = store.put(b"x")
    part = tmp_path / "r" / name[:2] / f".{name}.123.part"
    part.write_bytes(b"half")
    again = FolderStore(tmp_path / "r")
    assert not part.exists()
    assert again.get(name) == b"x"


def test_two_tasks_that_made_the_same_do_not_spoil_it(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "r")
    errors: list[BaseException] = []
    together = threading.Barrier(4)

    def put(data: bytes) -> None:
        try:
            together.wait(20)
            store.put(data)
        except BaseException as error:
            errors.append(error)

    for number in range(30):
        data = bytes([number]) * 300_000
        threads = [threading.Thread(target=put, args=(data,)) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert store.get(name_of(data)) == data
    assert not errors


def test_a_damaged_result_has_no_first_photo() -> None:
    """Whichever byte a server has spoilt, it is the photo or none, and never an error of the gateway."""
    photo, file = bytes(range(256)) * 8, io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("000.png", photo)
    whole = file.getvalue()
    assert first_photo(whole) == photo
    assert first_photo(b"") is None
    assert {first_photo(whole[:length]) for length in range(0, len(whole), 7)} <= {photo, None}
    unreadable = 0
    for place in range(len(whole)):
        for spoilt in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= spoilt
            unreadable += first_photo(bytes(damaged)) is None
    assert unreadable > len(whole)
