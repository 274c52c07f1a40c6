"""The keys that a sweep searches: which there are, what fits them, and a job that has others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from twotower.errors import UserError, did_you_mean
from twotower.sweep.config import Dimension

T = TypeVar("T")
# The sections that a training's result depends on, but for the log.
SEARCHED = ("model", "train")


def searchable(job: Any) -> dict[str, Any]:
    """Return the dotted keys that a sweep can search -> the type of each."""
    found: dict[str, Any] = {}

    def walk(section: Any, prefix: str) -> None:
        for name, hint in get_type_hints(type(section)).items():
            value = getattr(section, name)
            if is_dataclass(value):
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = hint

    for name in SEARCHED:
        walk(getattr(job, name), f"{name}.")
    return found


def check_space(job: Any) -> None:
    """Refuse a space with keys that are not there, or values that the job cannot have.

    Raises:
        UserError: naming the key.
    """
    known = searchable(job)
    for key, dimension in job.sweep.space.items():
        here = f"sweep.space.{key}"
        section = key.split(".")[0]
        if section == "data":
            raise UserError(
                f"{here}: keys below data cannot be searched, since all trials share the prepared "
                "dataset: prepare and sweep each in a run_dir of its own"
            )
        if section not in SEARCHED and hasattr(job, section):
            raise UserError(
                f"{here}: only keys below {' and '.join(SEARCHED)} can be searched: the others do "
                "not change what is trained, or change what it is judged by"
            )
        if key not in known:
            raise UserError(f"sweep.space: unknown key '{key}'{did_you_mean(key, known)}")
        for value in _ends(here, dimension, known[key]):
            try:
                getattr(with_values(job, {key: value}), section).validate()
            except UserError as error:
                # With another value of another key it may be a fit one: a trial finds out.
                others = job.sweep.space.keys() - {key}
                if not any(other in str(error) for other in others):
                    raise UserError(f"{here}: {error}") from None


def _ends(here: str, dimension: Dimension, hint: Any) -> list[Any]:
    """Return the values at the ends of a dimension, refusing what is not of the key's type."""
    if dimension.choices is not None:
        for value in dimension.choices:
            if not fits(value, hint):
                raise UserError(f"{here}.choices must be {_name(hint)}, got {value!r}")
        return dimension.choices
    if not is_number(hint):
        raise UserError(f"{here}: is {_name(hint)}, which has no range: give choices: [...]")
    ends = [dimension.low, dimension.high]
    for name, value in zip(("low", "high"), ends, strict=True):
        if not fits(value, hint):
            raise UserError(f"{here}.{name} must be {_name(hint)}, got {value!r}")
    return ends


def is_number(hint: Any) -> bool:
    """Whether a type has a range of values."""
    return any(t in (int, float) for t in (hint, *get_args(hint))) and get_origin(hint) is not list


def is_whole(hint: Any) -> bool:
    """Whether a type's numbers are whole ones."""
    return float not in (hint, *get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of the YAML is of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _name(hint: Any) -> str:
    text = " or ".join(_name(t) for t in get_args(hint)) if _is_union(hint) else ""
    if text:
        return text
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def draw(trial: Any, job: Any) -> dict[str, Any]:
    """Return the values that an Optuna trial tries; one that was begun has its own again."""
    known, values = searchable(job), {}
    for key, dimension in job.sweep.space.items():
        if dimension.choices is not None:
            labels = {_label(value): value for value in dimension.choices}
            values[key] = labels[trial.suggest_categorical(key, list(labels))]
        elif is_whole(known[key]):
            values[key] = trial.suggest_int(key, dimension.low, dimension.high, log=dimension.log)
        else:
            low, high = float(dimension.low), float(dimension.high)
            values[key] = trial.suggest_float(key, low, high, log=dimension.log)
    return values


def _label(value: Any) -> Any:
    """Return a choice as Optuna keeps it: lists as text."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def with_values(job: T, values: Mapping[str, Any]) -> T:
    """Return a configuration with other values of some dotted keys."""
    for key, value in values.items():
        job = _with_value(job, key.split("."), value)
    return job


def _with_value(section: Any, path: list[str], value: Any) -> Any:
    name, rest = path[0], path[1:]
    inner = _with_value(getattr(section, name), rest, value) if rest else value
    return replace(section, **{name: inner})
