"""Photos that tasks are drawn on, at a server: fetched from the gateway by their name, a few of them kept."""

import hashlib
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import httpx

from gmel.edge.task import MOST_INPUT_BYTES, MOST_INPUT_PIXELS, Task
from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    from gmel.synthesis.data.reading import Grey  # it brings NumPy and Pillow; a server that sleeps does without
    from gmel.synthesis.generator import Generator

__all__ = ["AwayError", "GatewayPhotos", "GivenPhotos", "Photos", "drawn_on"]

_KEPT_BYTES = 128 * 2**20
"""Of unpacked photos; the newest one stays however large it is."""
_WHOLE_S = 60.0
_TIMEOUT = httpx.Timeout(10.0, connect=2.0)
_MOST_PIXELS = 100_000_000
"""Of all photos of one task: a few bytes each are in memory until it is done, and the result has to be sent."""


class AwayError(Exception):
    """An input could not be fetched now. The task is to run elsewhere, or later."""


class Photos(Protocol):
    """Where inputs come from. Called in the thread that works on the task."""

    def photo(self, name: str) -> "Grey":
        """The photo of a name: [height, width], uint8 or uint16.

        Raises:
            AwayError: it cannot be fetched now.
            InputError: it is not there, or no photo.
        """
        ...


class _Kept:
    """The last few photos."""

    def __init__(self) -> None:
        self._photos: OrderedDict[str, Grey] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: str) -> "Grey | None":
        with self._lock:
            if name in self._photos:
                self._photos.move_to_end(name)
            return self._photos.get(name)

    def keep(self, name: str, data: bytes) -> "Grey":
        """Reads the photo in `data`, if that is what the name says."""
        from gmel.synthesis.data.reading import grey_of  # noqa: PLC0415

        if hashlib.sha256(data).hexdigest() != name:
            raise InputError(f"input {name}: came with other bytes than its name says")
        photo = grey_of(data, f"input {name}", MOST_INPUT_PIXELS)
        with self._lock:
            self._photos[name] = photo
            while len(self._photos) > 1 and sum(each.nbytes for each in self._photos.values()) > _KEPT_BYTES:
                self._photos.popitem(last=False)
        return photo


class GivenPhotos:
    """Photos that came together with their tasks."""

    def __init__(self) -> None:
        self._kept = _Kept()

    def give(self, name: str, data: bytes) -> None:
        """Takes a photo.

        Raises:
            InputError: no photo, or not of this name.
        """
        self._kept.keep(name, data)

    def photo(self, name: str) -> "Grey":
        """As :meth:`Photos.photo`."""
        found = self._kept.find(name)
        if found is None:  # so many others came since that it had to go
            raise AwayError(f"input {name}: not here any more")
        return found


class GatewayPhotos:
    """Photos of a gateway.

    Args:
        gateway: its address.
        key: what it is shown.
        verify: false, or a file of certificates.
        transport: in place of the network, for tests.
    """

    def __init__(
        self,
        gateway: str,
        key: str | None = None,
        verify: bool | str = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(
            base_url=gateway, headers=headers, timeout=_TIMEOUT, verify=verify, trust_env=False, transport=transport
        )
        self._kept = _Kept()

    def photo(self, name: str) -> "Grey":
        """As :meth:`Photos.photo`."""
        found = self._kept.find(name)
        return self._kept.keep(name, self._fetched(name)) if found is None else found

    def _fetched(self, name: str) -> bytes:
        until, data = time.monotonic() + _WHOLE_S, bytearray()
        try:
            with self._client.stream("GET", f"/v1/inputs/{name}") as answer:
                if answer.status_code == 404:
                    raise InputError(f"input {name}: is not at the gateway any more; upload it again")
                if answer.status_code != 200:
                    raise AwayError(f"input {name}: the gateway answers {answer.status_code}")
                for chunk in answer.iter_bytes():
                    data += chunk
                    if len(data) > MOST_INPUT_BYTES:
                        raise InputError(f"input {name}: longer than {MOST_INPUT_BYTES:,} bytes")
                    if time.monotonic() > until:
                        raise AwayError(f"input {name}: not here after {_WHOLE_S:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AwayError(f"input {name}: {type(error).__name__} {error}".strip()) from error
        return bytes(data)


def drawn_on(generator: "Generator", label: str, task: Task, photos: Photos | None) -> "Generator":
    """The generator, drawing on the input of a task.

    Args:
        generator: of the model.
        label: class to draw.
        task: names an input.
        photos: where it comes from.

    Raises:
        AwayError: the input cannot be fetched now.
        InputError: the model draws whole photos, the input is none, or so many of its size are too much.
    """
    from gmel.synthesis.generator import OnGood  # noqa: PLC0415
    from gmel.synthesis.photo import GOOD, Photo  # noqa: PLC0415

    if photos is None:
        raise InputError("input: this server has no gateway to fetch it from; send the task without one")
    if label in generator.labels and not (isinstance(generator, OnGood) and generator.draws_on_good(label)):
        raise InputError(
            f"input: {task.model} ({generator.mode}) draws whole photos of the class {label!r}, not on a given one; "
            "leave it out"
        )
    photo = photos.photo(task.input)
    if photo.size * task.images > _MOST_PIXELS:
        height, width = photo.shape
        raise InputError(
            f"images: {task.images} of {width} x {height} pixels are more than {_MOST_PIXELS:,} together; ask for fewer"
        )
    return (
        generator.on([Photo(photo, GOOD, name=f"input {task.input}")]) if isinstance(generator, OnGood) else generator
    )
