"""What an edge server can run: generators of `gmel.synthesis`, and one that only takes its time.

A task gives the same photos on whatever server it runs: they are drawn in fixed portions, each with a seed of its own
from that of the task. Between denoising steps a task can be cancelled, and tells how far it is.
"""

import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gmel.edge.plant import Plant
from gmel.edge.server.inputs import Photos, drawn_on
from gmel.edge.task import Task, check_name
from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    from gmel.synthesis.generator import Generator, Request
    from gmel.synthesis.photo import Photo

__all__ = ["CancelledError", "Loaded", "NoModels", "Product", "Several", "Sleeping", "Source", "Synthesis", "Tell"]

PORTION = 4
"""Photos that share a seed."""

Tell = Callable[[float], None]
"""Is told the share that is done."""


class CancelledError(Exception):
    """Nobody wants the task any more."""


@dataclass(frozen=True)
class Product:
    """A result: its bytes and their media type."""

    data: bytes
    kind: str


class Loaded(Protocol):
    """A model in memory."""

    @property
    def memory_gb(self) -> float:
        """What it takes there."""
        ...

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        """Does a task, in a thread of its own.

        Raises:
            CancelledError: `stop` was set.
            InputError: the task cannot be done by this model.
        """
        ...


@runtime_checkable
class Several(Protocol):
    """A model that does several tasks of the same number of steps in one go."""

    def run_several(
        self, tasks: Sequence[Task], tells: Sequence[Tell], stops: Sequence[threading.Event]
    ) -> list[Product]:
        """Does tasks, in a thread of its own; each product is that of :meth:`Loaded.run`, up to rounding.

        Raises:
            CancelledError: all of `stops` were set.
            InputError: one of the tasks cannot be done by this model.
        """
        ...


class Source(Protocol):
    """Where models come from."""

    def names(self) -> tuple[str, ...] | None:
        """Models that there are; None for any."""
        ...

    def load(self, name: str) -> Loaded:
        """Reads a model, in a thread of its own.

        Raises:
            InputError: no such model, or one that cannot be read.
        """
        ...


class Synthesis:
    """Generators in a folder, files of `gmel synthesize fit`: `NAME.safetensors` is the model NAME.

    Args:
        folder: the folder.
        photo_s: seconds that a photo takes at least; to show unlike servers on one machine.
        photos: where inputs of tasks come from; none: tasks with one cannot be done here.
    """

    def __init__(self, folder: Path, photo_s: float = 0.0, photos: Photos | None = None) -> None:
        self._folder, self._photo_s, self._photos = folder, photo_s, photos

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(path.stem for path in self._folder.glob("*.safetensors")))

    def load(self, name: str) -> Loaded:
        from gmel.synthesis.generator import load_generator  # noqa: PLC0415
        from gmel.synthesis.modes import EVERY_MODE  # noqa: PLC0415

        check_name(name, "model")
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            raise InputError(f"model {name!r}: not here; there are {', '.join(self.names()) or 'none'}")
        generator = load_generator(path, EVERY_MODE)
        return _Generator(generator, path.stat().st_size / 1e9, self._photo_s, self._photos)


class _Generator:
    def __init__(self, generator: "Generator", memory_gb: float, photo_s: float, photos: Photos | None = None) -> None:
        self._generator, self._photo_s, self._photos = generator, photo_s, photos
        self.memory_gb = memory_gb

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        from gmel.synthesis.diffusion.watching import watching  # noqa: PLC0415

        generator = self._drawing(task)
        photos: list[Photo] = []
        pace = _Pace(self._photo_s * task.images, [stop])
        for request in self._requests(task):
            first = len(photos)

            def watch(step: int, steps: int, first: int = first, count: int = request.count) -> None:
                share = (first + count * step / steps) / task.images
                pace.keep(share)
                tell(share)

            with watching(watch):
                photos += generator.sample(request.label, request.count, request.seed, task.steps)
            if len(photos) < task.images:
                pace.keep(len(photos) / task.images)
                tell(len(photos) / task.images)
        product = Product(packed(photos, task), "application/zip")
        pace.keep(1.0)
        tell(1.0)
        return product

    def run_several(
        self, tasks: Sequence[Task], tells: Sequence[Tell], stops: Sequence[threading.Event]
    ) -> list[Product]:
        from gmel.synthesis.diffusion.watching import watching  # noqa: PLC0415
        from gmel.synthesis.generator import sample_several  # noqa: PLC0415

        pace = _Pace(self._photo_s * sum(task.images for task in tasks), stops)

        def watch(step: int, steps: int) -> None:
            pace.keep(step / steps)
            for tell in tells:
                tell(step / steps)

        orders = [self._requests(task) for task in tasks]
        with watching(watch):
            every = [request for requests in orders for request in requests]
            made = sample_several(self._drawing(*tasks), every, tasks[0].steps)
        products: list[Product] = []
        for task, requests in zip(tasks, orders, strict=True):
            own, made = made[: len(requests)], made[len(requests) :]
            photos = [photo for portion in own for photo in portion]
            products.append(Product(packed(photos, task), "application/zip"))
        pace.keep(1.0)
        for tell in tells:
            tell(1.0)
        return products

    def _drawing(self, *tasks: Task) -> "Generator":
        """The generator for tasks of the same input, if they have one."""
        generator = self._generator
        if tasks[0].input:
            for task in tasks:
                generator = drawn_on(generator, self._label(task), task, self._photos)
        return generator

    def _label(self, task: Task) -> str:
        return task.label or self._generator.labels[0]

    def _requests(self, task: Task) -> "list[Request]":
        """The portions of a task."""
        from gmel.synthesis.generator import Request  # noqa: PLC0415

        label = self._label(task)
        return [
            Request(label, min(PORTION, task.images - first), _seed(task.seed, portion))
            for portion, first in enumerate(range(0, task.images, PORTION))
        ]


class _Pace:
    """Lets work take no less than its time, and ends it once nobody wants any of it.

    Args:
        least_s: seconds that all of it takes at least.
        stops: of the tasks that are worked on.
    """

    def __init__(self, least_s: float, stops: "Sequence[threading.Event]") -> None:
        self._least_s, self._stops = least_s, stops
        self._began = time.perf_counter()

    def keep(self, share: float) -> None:
        """Waits until so much of the work may be done.

        Raises:
            CancelledError: all stops are set.
        """
        ends = self._began + share * self._least_s
        for stop in self._stops:
            if not stop.wait(max(ends - time.perf_counter(), 0.0)):
                return
        raise CancelledError


class NoModels:
    """Nothing to run: a server for federated rounds alone."""

    def names(self) -> tuple[str, ...]:
        return ()

    def load(self, name: str) -> Loaded:
        raise InputError(f"model {name!r}: not here; this server has none")


class Sleeping:
    """Takes the time that a task would take, and makes nothing: for loads and tests without a generator.

    Args:
        plant: what tasks cost.
        speed: of this server, work units per second.
        loads: whether it also takes the time to load a model.
        data: the result.
    """

    def __init__(self, plant: Plant, speed: float, loads: bool = True, data: bytes = b"slept\n") -> None:
        self._plant, self._speed, self._loads, self._data = plant, speed, loads, data

    def names(self) -> tuple[str, ...] | None:
        return tuple(self._plant.models)

    def load(self, name: str) -> Loaded:
        model = self._plant.models.get(name)
        if model is None:
            raise InputError(f"model {name!r}: not in the plant; there are {', '.join(self._plant.models)}")
        if self._loads:
            time.sleep(model.load_s)
        return _Sleeper(self._plant, model.memory_gb, self._speed, self._data)


@dataclass(frozen=True)
class _Sleeper:
    plant: Plant
    memory_gb: float
    speed: float
    data: bytes

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        lasts_s = self.plant.models[task.model].work(task.images, task.steps, task.size_bit) / self.speed
        ends = time.monotonic() + lasts_s
        while (left_s := ends - time.monotonic()) > 0:
            if stop.wait(min(left_s, max(lasts_s / 10, 0.05))):
                raise CancelledError
            tell(min(1.0 - (ends - time.monotonic()) / lasts_s, 1.0))
        return Product(self.data, "text/plain")


def packed(photos: "Sequence[Photo]", task: Task) -> bytes:
    """Photos, their masks and the task as a ZIP of PNG files; the same photos give the same bytes."""
    from gmel.synthesis.data.write import png_bytes  # noqa: PLC0415

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for number, photo in enumerate(photos):
            _add(archive, f"{number:03d}.png", png_bytes(photo.image))
            if photo.mask is not None:
                _add(archive, f"{number:03d}.mask.png", png_bytes(photo.mask))
        said = {"model": task.model, "label": task.label, "seed": task.seed, "steps": task.steps, "images": task.images}
        said |= {"input": task.input} if task.input else {}
        _add(archive, "task.json", json.dumps(said).encode())
    return stream.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data)  # without the time of day, which would change the bytes


def _seed(seed: int, portion: int) -> int:
    return (seed * 1_000_003 + portion) % 2**63
