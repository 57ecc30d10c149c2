"""Mode `compose`: real defects, cut out, warped and blended onto good parts. No network, no denoising steps.

What a site has plenty of (good parts) is combined with what it lacks (defects): the same defect on many surfaces, at
many places. Masks say what a defect is; boxes do where nobody drew one.
"""

# The types of SciPy's `ndimage` are unknown; that is not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.augment import dihedral
from gmel.synthesis.generator import NO_MEANS, Arrays, Means
from gmel.synthesis.photo import GOOD, Floats, Photo, labels_of

__all__ = ["Compose", "Cut", "cut_out"]

_MARGIN = 6
"""Pixels around a mask that come with it: there the blend fades."""
_FEATHER = 2.0
"""Width of the blend, in pixels (standard deviation)."""
_GAIN = (0.7, 1.4)
"""Contrast of a surface may differ from the one a defect was cut from; beyond this it is another material."""
_ZOOM = (0.8, 1.25)
_TURN_DEGREES = 15.0
_JITTER = 0.08
"""Spread of the place around the one where the defect was, in sides of the photo."""
_ANYWHERE = 0.5
"""Share of defects that land anywhere. The others stay near their place: breaks lie at edges."""


@dataclass(frozen=True)
class Cut:
    """A defect, cut out with its margin.

    Attributes:
        pixels: [height, width], 0 to 1.
        mask: [height, width], true on the defect.
        centre: row and column of its middle, in sides of the photo (0 to 1).
        label: its class.
        source: name of the photo.
        site: of the photo: its surface is not that of other sites.
    """

    pixels: Floats
    mask: NDArray[np.bool_]
    centre: tuple[float, float]
    label: str
    source: str
    site: str = ""


def cut_out(photo: Photo) -> Cut:
    """The defect of a photo with its margin.

    Raises:
        InputError: the photo has no mask, or an empty one.
    """
    if photo.mask is None or not photo.mask.any():
        raise InputError(f"{photo.name or photo.label}: no mask; compose cuts defects out along masks or boxes")
    height, width = photo.mask.shape
    (top, bottom), (left, right) = (
        (max(0, int(where[0]) - _MARGIN), min(side, int(where[-1]) + 1 + _MARGIN))
        for where, side in (
            (np.flatnonzero(photo.mask.any(axis=1)), height),
            (np.flatnonzero(photo.mask.any(axis=0)), width),
        )
    )
    centre = ((top + bottom) / 2 / height, (left + right) / 2 / width)
    return Cut(
        photo.pixels()[top:bottom, left:right],
        photo.mask[top:bottom, left:right],
        centre,
        photo.label,
        photo.name,
        photo.site,
    )


class Compose:
    """Defects of the shots on good parts (see the module).

    Attributes:
        shots: photos of defects with their masks.
        good: photos of good parts.
    """

    mode: ClassVar[str] = "compose"
    default_steps: ClassVar[int] = 0
    shares_photos: ClassVar[bool] = True

    def __init__(self, shots: Sequence[Photo], good: Sequence[Photo]) -> None:
        self.shots, self.good = tuple(shots), tuple(good)
        self._cuts = [cut_out(photo) for photo in self.shots]
        self._grounds: dict[str, list[Photo]] = {}
        for photo in self.good:
            self._grounds.setdefault(photo.site, []).append(photo)

    @classmethod
    def fit(
        cls, shots: Sequence[Photo], good: Sequence[Photo], seed: int, reporter: Reporter, means: Means = NO_MEANS
    ) -> Self:
        """Keeps the shots that have a mask, and the good parts.

        Raises:
            InputError: no good parts, or no masks.
        """
        del seed, reporter, means
        masked = [photo for photo in shots if photo.label != GOOD and photo.mask is not None and photo.mask.any()]
        if not good:
            raise InputError("compose: no good parts; put photos without a defect into the folder `good/`")
        if not masked:
            raise InputError("compose: no shot has a mask; draw masks or boxes, or use the mode `generate`")
        return cls(masked, good)

    @property
    def labels(self) -> tuple[str, ...]:
        return labels_of(self.shots)

    def on(self, good: Sequence[Photo]) -> Self:
        """The generator with these good parts to draw on in place of its own."""
        return type(self)(self.shots, good)

    def draws_on_good(self, label: str) -> bool:
        """Always: this is what it does."""
        return label in self.labels

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` good parts, each with a defect of the class; of the site that it comes from, where that has some.

        Raises:
            InputError: no shot of the class, or steps other than 0.
        """
        if steps:
            raise InputError(f"steps is {steps}; compose has none: leave it out")
        cuts = [cut for cut in self._cuts if cut.label == label]
        if not cuts:
            raise InputError(f"class {label!r}: no shot with a mask; known are {', '.join(self.labels)}")
        place = self.labels.index(label)
        return [self._one(cuts, label, np.random.default_rng((seed, place, number)), number) for number in range(count)]

    def sham(self, count: int, seed: int) -> list[Photo]:
        """`count` good parts with a piece of *another good part* blended in where a defect would be.

        Beside composed defects a detector could learn the blend instead of the defect; these are blends without one.
        """
        return [replace(photo, mask=None) for photo in self._shams(count, seed)]

    def _shams(self, count: int, seed: int) -> list[Photo]:
        """With the masks of the pieces."""
        made: list[Photo] = []
        for number in range(count):
            random = np.random.default_rng((seed, number))
            cut = self._cuts[int(random.integers(len(self._cuts)))]
            grounds = self._grounds.get(cut.site, self.good)
            source = grounds[int(random.integers(len(grounds)))].pixels()
            height, width = (min(a, b) for a, b in zip(cut.pixels.shape, source.shape, strict=True))
            top, left = (
                int(random.integers(side - cut_side + 1))
                for side, cut_side in zip(source.shape, (height, width), strict=True)
            )
            pixels = source[top : top + height, left : left + width]
            piece = Cut(pixels, cut.mask[:height, :width], cut.centre, GOOD, "", cut.site)
            made.append(self._one([piece], GOOD, random, number))
        return made

    def _one(self, cuts: list[Cut], label: str, random: np.random.Generator, number: int) -> Photo:
        cut = warped(cuts[int(random.integers(len(cuts)))], random)
        grounds = self._grounds.get(cut.site, self.good)
        target = grounds[int(random.integers(len(grounds)))]
        pixels, mask = blended(target.pixels(), cut, random)
        return target.having(
            pixels,
            label=label,
            mask=mask,
            template=target.image if target.template is None else target.template,
            group="",
            name=f"{self.mode} {label} {number}",
            source=cut.source,
        )

    def state(self) -> tuple[Arrays, dict[str, str]]:
        arrays: Arrays = {}
        facts = {"shots": str(len(self.shots)), "good": str(len(self.good))}
        for kind, photos in (("shot", self.shots), ("good", self.good)):
            for number, photo in enumerate(photos):
                arrays[f"{kind}.{number}.image"] = photo.image
                if photo.mask is not None:
                    arrays[f"{kind}.{number}.mask"] = photo.mask
                if photo.template is not None:
                    arrays[f"{kind}.{number}.template"] = photo.template
                facts[f"{kind}.{number}.label"] = photo.label
                facts[f"{kind}.{number}.name"] = photo.name
                facts[f"{kind}.{number}.site"] = photo.site
        return arrays, facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        def photos(kind: str, count: str) -> list[Photo]:
            return [
                Photo(
                    arrays[f"{kind}.{number}.image"],
                    facts[f"{kind}.{number}.label"],
                    arrays.get(f"{kind}.{number}.mask"),
                    name=facts[f"{kind}.{number}.name"],
                    site=facts[f"{kind}.{number}.site"],
                )
                for number in range(int(count))
            ]

        try:
            found = {"shot": photos("shot", facts["shots"]), "good": photos("good", facts["good"])}
        except (KeyError, ValueError) as error:
            raise InputError(f"compose: the file lacks {error}; fit the generator anew") from error
        shots, good = (
            [_whole(photo, arrays.get(f"{kind}.{number}.template")) for number, photo in enumerate(own)]
            for kind, own in found.items()
        )
        if not shots or not good:
            raise InputError("compose: the file holds no shots or no good parts; fit the generator anew")
        return cls(shots, good)


def _whole(photo: Photo, template: NDArray[Any] | None) -> Photo:
    """The photo of a file with its template, each array of it checked."""
    shape, grey = photo.image.shape, (np.dtype(np.uint8), np.dtype(np.uint16))
    for name, array, kinds in (
        ("image", photo.image, grey),
        ("mask", photo.mask, (np.dtype(np.bool_),)),
        ("template", template, grey),
    ):
        if array is not None and (
            array.ndim != 2 or array.shape != shape or not array.size or array.dtype not in kinds
        ):
            what = f"{array.dtype} {list(array.shape)}"
            raise InputError(f"compose: {photo.name}: {name} is {what}, a grey photo was expected; fit it anew")
    return replace(photo, template=template)


def warped(cut: Cut, random: np.random.Generator) -> Cut:
    """The cut turned, flipped, zoomed and slightly rotated; what comes from outside repeats its border."""
    which = int(random.integers(8))
    pixels, mask = dihedral(cut.pixels, which), dihedral(cut.mask.astype(np.float32), which)
    zoom = float(np.exp(random.uniform(*np.log(_ZOOM))))
    angle = np.deg2rad(random.uniform(-_TURN_DEGREES, _TURN_DEGREES))
    height, width = pixels.shape
    size = (max(3, round(height * zoom)), max(3, round(width * zoom)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    offset = (np.array([height, width]) - 1) / 2 - turn @ ((np.array(size) - 1) / 2)
    move = {"matrix": turn, "offset": offset, "output_shape": size, "order": 1}
    moved = np.asarray(ndimage.affine_transform(pixels, **move, mode="nearest"), np.float32)
    mask_now = np.asarray(ndimage.affine_transform(mask, **move, mode="constant"), np.float32) > 0.5
    if not mask_now.any():
        return replace(cut, pixels=pixels, mask=mask > 0.5)
    return replace(cut, pixels=moved, mask=mask_now)


def _fitting(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a cut that fit into a photo of the shape and hold some of the defect."""
    kept = [min(side, room) for side, room in zip(mask.shape, shape, strict=True)]

    def around(centre: Sequence[int]) -> tuple[slice, slice]:
        top, left = (
            max(0, min(at - own // 2, side - own)) for at, own, side in zip(centre, kept, mask.shape, strict=True)
        )
        return slice(top, top + kept[0]), slice(left, left + kept[1])

    middle = [side // 2 for side in mask.shape]
    keep = around(middle)
    if mask[keep].any() or not mask.any():
        return keep
    places = np.argwhere(mask)
    return around(places[np.argmin(np.abs(places - middle).max(axis=1))].tolist())


def blended(target: Floats, cut: Cut, random: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """The target with the cut on it, and the mask of the defect there.

    Brightness and contrast of the cut are those of the surface around it: mean and deviation on the ring of its margin.
    A cut larger than the target is cropped around its middle, or, where no defect is there, around the nearest of it.
    """
    keep = _fitting(cut.mask, target.shape)
    pixels, mask = cut.pixels[keep], cut.mask[keep]
    height, width = pixels.shape
    rooms = (target.shape[0] - height, target.shape[1] - width)
    if random.uniform() < _ANYWHERE:
        top, left = (int(random.integers(room + 1)) for room in rooms)
    else:
        top, left = (
            int(np.clip(round((centre + _JITTER * random.standard_normal()) * side - cut_side / 2), 0, room))
            for centre, side, cut_side, room in zip(cut.centre, target.shape, (height, width), rooms, strict=True)
        )
    place = (slice(top, top + height), slice(left, left + width))
    ground = target[place]
    ring = ~np.asarray(ndimage.binary_dilation(mask, iterations=1), np.bool_)
    if ring.any():
        own, other = pixels[ring], ground[ring]
        gain = float(np.clip((other.std() + 1e-3) / (own.std() + 1e-3), *_GAIN))
        pixels = (pixels - float(own.mean())) * gain + float(other.mean())
    # The blend fades outside the mask: inside, the defect stays what it is.
    distance = np.asarray(ndimage.distance_transform_edt(~mask), np.float32)
    alpha = np.exp(-0.5 * (distance / _FEATHER) ** 2).astype(np.float32)
    made = target.copy()
    made[place] = ground * (1.0 - alpha) + pixels * alpha
    where = np.zeros(target.shape, np.bool_)
    where[place] = mask
    return made, where
