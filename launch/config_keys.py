"""Every key a configuration model has, what belongs there, and the nearest one to a misspelling.

Keys are tuples such as ``("rewards", 0, "weight")``, written ``rewards.0.weight``.
May import: pydantic, trainers.errors, launch.redaction.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.redaction import redact
from trainers.errors import InputError

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """What one key of the configuration may hold.  ``free``: below a mapping that takes any key."""

    annotation: Any = Any
    metadata: tuple[Any, ...] = ()
    description: str = ""
    default: Any = None
    free: bool = False


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _alternatives(annotation: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The members of a union (or the annotation alone), each with its ``Annotated`` metadata."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return [(a, (*m, *metadata)) for a, m in _alternatives(inner)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [pair for member in get_args(annotation) for pair in _alternatives(member)]
    return [(annotation, ())]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation; several where a section has kinds (``algorithm`` by its ``name``)."""
    return [m for m, _ in _alternatives(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def _item(annotation: Any) -> Any:
    """The item type of a tuple or list annotation, or None."""
    for member, _ in _alternatives(annotation):
        if get_origin(member) in (tuple, list):
            return get_args(member)[0]
    return None


def slot_at(model: type[BaseModel], key: Key) -> Slot | None:
    """What belongs at ``key``, or None when there is no such key."""
    slot = Slot(annotation=model)
    for part in key:
        if slot.free:
            continue
        item = _item(slot.annotation)
        fields = [m.model_fields[str(part)] for m in models_of(slot.annotation) if str(part) in m.model_fields]
        if fields:
            slot = _slot(fields)
        elif item is not None and str(part).isdigit():
            slot = Slot(annotation=item, description=slot.description)
        elif any(get_origin(a) is dict or a in (dict, Any) for a, _ in _alternatives(slot.annotation)):
            slot = Slot(free=True)
        else:
            return None
    return slot


def _slot(fields: Sequence[FieldInfo]) -> Slot:
    """The slot of a field, or of the fields of one name in the kinds of a section."""
    info = fields[0]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    default = None if default is PydanticUndefined else default
    annotation = Union[tuple(field.annotation for field in fields)] if len(fields) > 1 else info.annotation  # noqa: UP007
    return Slot(annotation, tuple(info.metadata), info.description or "", default)


def choices(model: type[BaseModel], key: Key) -> list[str]:
    """The words that may stand at ``key``, where only certain words may."""
    slot = slot_at(model, key)
    found = [] if slot is None else [a for a, _ in _alternatives(slot.annotation) if get_origin(a) is Literal]
    return list(dict.fromkeys(str(word) for literal in found for word in get_args(literal)))


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included; items of lists appear under index 0."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in models_of(info.annotation):
            yield from all_keys(section, f"{prefix}{name}.")
        for section in models_of(_item(info.annotation)):
            yield f"{prefix}{name}.0"
            yield from all_keys(section, f"{prefix}{name}.0.")


def nearest_key(model: type[BaseModel], key: Key) -> str:
    """The existing key most like ``key``: likeness of the whole plus likeness of the last part.

    Where ``key`` names no section like the found one, the first section with such a key is meant: ``lr`` is the
    learner's and not the critic's.
    """
    wanted = dotted(tuple("0" if str(part).isdigit() else part for part in key))

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        last = difflib.SequenceMatcher(None, wanted.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]).ratio()
        return whole + last

    known = list(all_keys(model))
    nearest = max(known, key=likeness)
    section, _, below = nearest.partition(".")
    if below and not difflib.get_close_matches(wanted.split(".")[0], [section]):
        nearest = next(candidate for candidate in known if candidate.partition(".")[2] == below)
    best = nearest.split(".")
    indices = [str(part) for part in key if str(part).isdigit()]
    return ".".join(indices.pop(0) if part == "0" and indices else part for part in best)


def takes_only_text(slot: Slot) -> bool:
    """True for text and optional text: such values are taken as written on the command line."""
    return {member for member, _ in _alternatives(slot.annotation)} <= {str, type(None)}


_BOUNDS = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def expected(slot: Slot) -> str:
    """What belongs in a slot, in words: ``a whole number, at least 1, or null``."""
    words = []
    for member, metadata in _alternatives(slot.annotation):
        if get_origin(member) is Literal:
            text = "one of " + ", ".join(str(choice) for choice in get_args(member))
        elif get_origin(member) in (tuple, list):
            items = [a for a in get_args(member) if a is not Ellipsis]
            count = f"{len(items)} items" if Ellipsis not in get_args(member) and len(items) > 1 else "items"
            text = f"a list of {count}, each {expected(Slot(items[0]))}"
        elif get_origin(member) is dict or models_of(member):
            text = "a mapping of keys to values"
        else:
            text = _PLAIN.get(member, "a value")
        for kind, attribute, phrase in _BOUNDS:
            for bound in (*metadata, *slot.metadata):
                if isinstance(bound, kind) and member in (int, float):
                    text += f", {phrase} {getattr(bound, attribute):g}"
        words.append(text)
    return ", or ".join(dict.fromkeys(words))


def unknown_key(model: type[BaseModel], key: Key, value: object) -> InputError:
    return InputError(dotted(key), value, "there is no such key", f"the nearest one is {nearest_key(model, key)}")


def _without_kinds(model: type[BaseModel], key: Key) -> Key:
    """``key`` without the words that pydantic puts behind a section to say which of its kinds was checked."""
    kept: Key = ()
    for part in key:
        slot = slot_at(model, kept)
        kinds = models_of(slot.annotation) if slot is not None else []
        words = {word for m in kinds[1:] and kinds for name in m.model_fields for word in choices(m, (name,))}
        if part not in words or any(str(part) in m.model_fields for m in kinds):
            kept = (*kept, part)
    return kept


def explain(model: type[BaseModel], error: ValidationError, source: str, raw: Mapping[str, Any]) -> InputError:
    """The first of pydantic's errors in one line, with the number of further ones."""
    errors = error.errors(include_url=False)
    # A misspelt required key is two errors; the misspelling is the one to mend.
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    key: Key = _without_kinds(model, tuple(first["loc"]))
    while key and slot_at(model, key) is None and first["type"] != "extra_forbidden":
        key = key[:-1]  # pydantic appends the names of union members
    slot = slot_at(model, key) or Slot()
    note = f" ({slot.description})" if slot.description else ""
    field, value = dotted(key) or "recipe", first["input"] if key else source
    if first["type"] == "extra_forbidden":
        made = unknown_key(model, key, value)
        reason, remedy = made.reason, made.remedy
    elif first["type"] == "missing":
        value, reason = None, "is missing"
        remedy = f"add it to {source} or give {field}=VALUE: {expected(slot)}{note}"
    elif first["type"] == "value_error":
        field, value, reason, remedy = _cross_field(model, first["msg"], key, field, value, raw)
    else:
        reason = first["msg"].replace("Input should", "it should", 1)
        remedy = f"give {expected(slot)}{note}"
    if len(errors) > 1:
        remedy += f" ({len(errors) - 1} further error{'s' * (len(errors) > 2)})"
    # A key that stands where the name of its variable belongs is not shown.
    return InputError(field, redact(value, "key" if field.endswith("api_key_env") else ""), reason, remedy)


def _cross_field(
    model: type[BaseModel], message: str, key: Key, field: str, value: object, raw: Mapping[str, Any]
) -> tuple[str, object, str, str]:
    """Field, value, reason and remedy of a validator's ``name=value: reason; remedy`` message."""
    message = " ".join(message.removeprefix("Value error, ").split())
    name = message.split("=", 1)[0] if "=" in message else message.split(":", 1)[0]
    for candidate in (tuple(name.split(".")), (*key, *name.split("."))):
        found = slot_at(model, candidate)
        if name and " " not in name and found is not None and not found.free:
            field, value = dotted(candidate), found.default
            below: Any = raw
            for part in candidate:
                within = isinstance(below, list) and isinstance(part, int) and part < len(below)
                below = below[part] if within else below.get(part) if isinstance(below, Mapping) else None
            value = found.default if below is None else below
            break
    # "name=value: reason; remedy" repeats what the error's own field and value say
    reason, _, remedy = re.sub(rf"^{re.escape(name)}=\S+: ", "", message).rpartition("; ")
    return field, value, reason or remedy, remedy if reason else f"change {field}"
