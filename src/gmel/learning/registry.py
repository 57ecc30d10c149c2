"""Algorithms by name, made from settings that a user gave."""

import dataclasses
import difflib
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gmel.learning.algorithm import Algorithm
from gmel.learning.amarl import Amarl
from gmel.learning.amarl_soft import AmarlSoft
from gmel.learning.idqn import Idqn
from gmel.learning.maddpg import Maddpg
from gmel.learning.mappo import Mappo
from gmel.scenario.errors import InputError

__all__ = ["ALGORITHMS", "make_algorithm"]

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {
    algorithm.name: algorithm for algorithm in (Amarl, AmarlSoft, Mappo, Idqn, Maddpg)
}
"""All learners, the default first."""


def make_algorithm(name: str, /, **settings: object) -> Algorithm[Any]:
    """The algorithm `name` with some of its hyper-parameters set.

    Raises:
        InputError: no algorithm of that name; it has no such setting; a value of another type.
    """
    if name not in ALGORITHMS:
        raise InputError(f"algorithm {name!r} is unknown{_near(name, list(ALGORITHMS))}")
    algorithm = ALGORITHMS[name]
    hints = get_type_hints(algorithm)
    known = [field.name for field in dataclasses.fields(algorithm) if field.init]
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"{name} has no setting {key!r}{_near(key, known)}")
        if not _fits(value, hints[key]):
            raise InputError(f"{name}: {key} = {value!r} must be {_in_words(hints[key])}")
    # What arrives as 1 where a number is wanted is 1.0: hyper-parameters are static, 1 and 1.0 would compile twice.
    typed: dict[str, Any] = dict(settings)
    typed |= {key: float(typed[key]) for key in settings if _real(typed[key], hints[key])}
    return algorithm(**typed)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(known)}"


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types, or the literal values, that a hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType, Literal) else (hint,)


def _real(value: object, hint: Any) -> bool:
    """Whether it is a whole number where a real one is wanted."""
    return isinstance(value, int) and not isinstance(value, bool) and int not in _choices(hint)


def _fits(value: object, hint: Any) -> bool:
    choices = _choices(hint)
    if isinstance(value, str):
        return value in choices
    if value is None or isinstance(value, bool):
        return type(value) in choices
    if isinstance(value, float):
        return float in choices and math.isfinite(value)
    return isinstance(value, int) and (int in choices or float in choices)


def _in_words(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "nothing (None)"}
    return " or ".join(words.get(choice, repr(choice)) for choice in _choices(hint))
