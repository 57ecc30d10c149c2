"""A data set in figures, for a person and for a program."""

from collections.abc import Sequence
from typing import Any

from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.paths import printable
from gmel.synthesis.data.problem import Problem
from gmel.synthesis.data.splits import few_shot_split, shortages
from gmel.synthesis.photo import GOOD, Photo

__all__ = ["summary", "summary_lines"]


def summary(dataset: Dataset, shots: int) -> dict[str, Any]:
    """What is in a data set, what is wrong, and what a split with so many shots would hold."""
    short = shortages(dataset, shots)
    split = None
    if not short:
        try:
            split = few_shot_split(dataset, shots)
        except InputError as error:  # classes that share their groups take them from each other
            short = (Problem("tiny-class", str(error)),)
    return {
        "name": dataset.name,
        "photos": len(dataset.photos),
        "groups": len({photo.group for photo in dataset.photos}),
        "sites": list(dataset.sites),
        "classes": [_class(label, dataset.of_class(label)) for label in dataset.classes],
        "problems": [
            {"kind": problem.kind, "text": problem.text, "names": list(problem.names)}
            for problem in (*dataset.problems, *short)
        ],
        "split": None
        if split is None
        else {
            "shots": shots,
            "learn": {label: _count(split.good if label == GOOD else split.shots, label) for label in dataset.classes},
            "test": {label: _count(split.test, label) for label in dataset.classes},
        },
    }


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """A summary as a table and lines below it."""
    head = ("class", "photos", "groups", "masks", "templates", "width", "height", "bits")
    rows = [head] + [
        (
            each["class"],
            *(f"{each[key]:,}" for key in head[1:5]),
            *("-".join(str(end) for end in dict.fromkeys(each[key])) for key in head[5:7]),
            " and ".join(map(str, each["bits"])),
        )
        for each in facts["classes"]
    ]
    if facts["split"]:
        learn, test = facts["split"]["learn"], facts["split"]["test"]
        more = [("learn", "test"), *((str(learn[row[0]]), str(test[row[0]])) for row in rows[1:])]
        rows = [(*row, *ends) for row, ends in zip(rows, more, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    named = [site for site in facts["sites"] if site]
    sites = f", {len(named)} sites ({', '.join(named)})" if named else ""
    first = f"{facts['name']}: {facts['photos']:,} photos in {facts['groups']:,} groups{sites}"
    if facts["split"]:
        shots = facts["split"]["shots"]
        last = f"learn, test: a split with {shots} shots a class (draw 0); good parts to learn from are one a group"
    else:
        last = "no split: see the classes that are too small"
    problems = (f"problem: {each['text']}" for each in facts["problems"])
    return [printable(line) for line in (first, "", *table, "", last, *problems)]


def _class(label: str, photos: Sequence[Photo]) -> dict[str, Any]:
    heights, widths = ([photo.image.shape[axis] for photo in photos] for axis in (0, 1))
    return {
        "class": label,
        "photos": len(photos),
        "groups": len({photo.group for photo in photos}),
        "masks": sum(photo.mask is not None for photo in photos),
        "templates": sum(photo.template is not None for photo in photos),
        "width": [min(widths), max(widths)],
        "height": [min(heights), max(heights)],
        "bits": sorted({photo.image.dtype.itemsize * 8 for photo in photos}),
    }


def _count(photos: Sequence[Photo], label: str) -> int:
    return sum(photo.label == label for photo in photos)
