"""What a detector reads of a photo: one table of features, computed once for every photo."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gmel.synthesis.detector.template import difference_from_template
from gmel.synthesis.detector.texture import FEATURES, texture_features, texture_table
from gmel.synthesis.photo import Floats, Photo

__all__ = ["Extractor", "FeatureBook", "TextureExtractor", "extractor_for"]


class Extractor(Protocol):
    """Features of photos."""

    name: str
    names: tuple[str, ...]

    def __call__(self, photos: Sequence[Photo]) -> Floats:
        """[photos, features]."""
        ...


class TextureExtractor:
    """Texture features of the photo; with a template, also those of the photo's difference from it.

    Attributes:
        with_template: whether every photo has a template.
    """

    def __init__(self, with_template: bool) -> None:
        self.with_template = with_template
        self.name = "texture and template" if with_template else "texture"
        self.names = (*FEATURES, *(f"difference_{name}" for name in FEATURES)) if with_template else FEATURES

    def __call__(self, photos: Sequence[Photo]) -> Floats:
        features = texture_table(photos)
        if not self.with_template:
            return features
        differences = [texture_features(difference_from_template(photo)) for photo in photos]
        return np.concatenate([features, np.reshape(differences, features.shape)], axis=1).astype(np.float32)


def extractor_for(photos: Sequence[Photo]) -> Extractor:
    """The texture extractor, with templates where every photo has one."""
    return TextureExtractor(bool(photos) and all(photo.template is not None for photo in photos))


class FeatureBook:
    """Features of photos that come again and again (the test set, good parts): each is computed once."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self._known: dict[Photo, Floats] = {}

    def __call__(self, photos: Sequence[Photo]) -> Floats:
        """[photos, features], in the order asked."""
        new = [photo for photo in dict.fromkeys(photos) if photo not in self._known]
        if new:
            self._known.update(zip(new, self.extractor(new), strict=True))
        if not photos:
            return np.zeros((0, len(self.extractor.names)), np.float32)
        return np.stack([self._known[photo] for photo in photos])
