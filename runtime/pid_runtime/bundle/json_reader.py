"""JSON as values of dataclasses: every member checked, none taken on trust."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pid_runtime.errors import PidRuntimeError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""What files, graphs, ports, buffers, buckets and sections may be called: never a path."""

LARGEST_INTEGER = 2**53 - 1
"""No integer of a manifest is larger, so that any JSON reader gets it exactly."""

Special = Callable[[Any, str], Any]
"""Reads JSON that is no plain object of its type; gets it, and where it stands."""

_DESCRIPTIONS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer of at least 0",
    float: "a number",
    str: "a string",
    tuple: "a list",
    UnionType: "a name or an integer of at least 0",
}


def read_member(
    kind: Any, raw: Any, where: str, special: Mapping[Any, Special] | None = None
) -> Any:
    """JSON as a value of the type `kind`, checked; without members this version does not know.

    where: what to call the place in a message. special: readers of types that have a form of their
    own. Raises `PidRuntimeError` for JSON of another type.
    """
    special = special or {}
    if kind in special:
        return special[kind](raw, where)
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if isinstance(raw, dict):
        if kinds[-1] is type(None):  # an object that may be absent
            kind = kinds[0]
        if kind == dict[str, Any]:
            return raw
        if get_origin(kind) is dict:
            return {
                _name(name, where): read_member(get_args(kind)[1], raw[name], where, special)
                for name in raw
            }
        if is_dataclass(kind):
            return read_object(kind, raw, where, special)
    elif isinstance(raw, list):
        if get_origin(kind) is tuple:
            return tuple(read_member(get_args(kind)[0], item, where, special) for item in raw)
    elif isinstance(raw, str):
        if str in kinds:
            return raw
    elif raw is None:
        if type(None) in kinds:
            return None
    elif isinstance(raw, bool):
        if bool in kinds:
            return raw
    elif type(raw) is int and int in kinds:
        if 0 <= raw <= LARGEST_INTEGER:
            return raw
    elif type(raw) in (int, float) and float in kinds and abs(raw) <= LARGEST_INTEGER:
        return float(raw)
    raise unexpected(_DESCRIPTIONS.get(kind) or _DESCRIPTIONS.get(get_origin(kind)), raw, where)


def read_object(
    kind: Any, raw: Mapping[str, Any], where: str, special: Mapping[Any, Special] | None = None
) -> Any:
    """A JSON object as a dataclass; see `read_member`."""
    values: dict[str, Any] = {}
    types = _types(kind)
    for each in fields(kind):
        if each.name in raw:
            place = f"{where}, {each.name}"
            values[each.name] = read_member(types[each.name], raw[each.name], place, special)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise PidRuntimeError(f"expected a member {each.name!r} in {where}, but it is absent")
    return kind(**values)


def unexpected(wanted: str | None, raw: Any, where: str) -> PidRuntimeError:
    """What to raise for JSON of another type than wanted."""
    return PidRuntimeError(f"expected {wanted or 'an object'} in {where}, but got {repr(raw)[:80]}")


def require(condition: bool, wanted: str, got: object, fix: str) -> None:
    """Raise `PidRuntimeError` unless a condition holds. fix: what to do about it."""
    if not condition:
        shown = " ".join(str(got).split())[:80]
        raise PidRuntimeError(f"expected {wanted}, but the manifest has {shown}; {fix}")


def _name(name: str, where: str) -> str:
    if not NAME.fullmatch(name):
        raise PidRuntimeError(f"expected a plain name in {where}, but got {name[:80]!r}")
    return name


@cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)
