"""From a recipe and ``dotted.key=value`` overrides to a checked configuration that knows where each value came from.

    recipe file -> raw mapping -> overrides applied -> RunConfig, TuningConfig, SelectConfig, LabelConfig, EvalConfig,
                                                   |   ReviseConfig, CompareConfig
                                                   \\-> origins: default | preset NAME | recipe FILE | command line

What ``algorithm.name`` brings along (trainers/presets.py) has the origin ``preset NAME``.

A recipe with a section ``select`` samples and chooses, one with ``label`` labels, with ``eval`` evaluates, with
``revise`` revises, with ``compare`` compares; else ``algorithm.name`` says which it is: runs that sample (the default)
have other sections than those that learn from files.
Whatever is wrong leaves as one InputError that names the key, the value, the reason and the remedy.
May import: pydantic, yaml, rich, trainers.errors, launch.{config, redaction} and the other configuration files of
this room.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.text import Text

from launch.compare_config import CompareConfig
from launch.config import RunConfig
from launch.config_keys import Key, choices, dotted, expected, explain, slot_at, takes_only_text, unknown_key
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.preset_values import with_preset
from launch.recipe_files import locate_recipe, parse_yaml
from launch.redaction import REDACTED, find_secret
from launch.revise_config import ReviseConfig
from launch.select_config import SelectConfig
from launch.tuning_config import TUNING, TuningConfig
from trainers.errors import InputError

# A recipe that has this section is of this kind, the first of them if it has several.
SECTION_KINDS: dict[str, type[BaseModel]] = {
    "select": SelectConfig, "label": LabelConfig, "eval": EvalConfig, "revise": ReviseConfig, "compare": CompareConfig,
}  # fmt: skip
DEFAULT, PRESET, COMMAND_LINE = "default", "preset", "command line"
COMMENT_COLUMN = 56  # where the origin starts in a listing, unless the value is longer


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration, the origin of each of its leaves, and the recipe's text as it was read."""

    config: Any  # RunConfig, TuningConfig, or one of SECTION_KINDS
    origins: Mapping[str, str] = field(default_factory=dict)  # dotted key of a leaf -> where it came from
    source_text: str = ""


def load_config(recipe: str, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read ``recipe`` (a path or a shipped name), apply ``overrides`` in order and check the result.

    Raises InputError for the first thing that is wrong and says how many more there are.
    """
    label, text, raw = read_sections(recipe)
    return resolve(raw, overrides, label, text)


def read_sections(recipe: str) -> tuple[str, str, dict[Any, Any]]:
    """(label, text, sections) of a path or a shipped name.  InputError where there is none, or no sections in it."""
    label, text = locate_recipe(recipe)
    try:
        raw = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError("recipe", label, f"is not valid YAML: {error}", "mend the line that is named") from error
    if not isinstance(raw, dict):
        raise InputError("recipe", label, "is not a mapping of sections", "start from one of `burnish recipes ls`")
    return label, text, raw


def expect_command(config: object, command: str, recipe: str) -> None:
    """InputError for a recipe that another command than ``burnish COMMAND`` runs.  ``config``: checked or raw."""
    raw = config if isinstance(config, dict) else {}
    kinds = ((name, name in raw or isinstance(config, kind)) for name, kind in SECTION_KINDS.items())
    own = next((name for name, is_own in kinds if is_own), "train")
    if own != command and (own, command) not in (("select", "answer"), ("select", "serve")):
        what = {"label": "labels", "eval": "evaluates", "revise": "revises", "select": "selects",
                "compare": "compares", "train": "trains"}  # fmt: skip
        raise InputError("recipe", recipe, f"{what[own]}, and `burnish {command}` does not", f"use `burnish {own}`")


def resolve(raw: dict[Any, Any], overrides: Sequence[str], label: str, text: str = "") -> ResolvedConfig:
    """The configuration of the sections ``raw``, in which ``overrides`` are set; ``label`` names them in origins.

    Raises InputError for the first thing that is wrong and says how many more there are.
    """
    model = _model_of(raw, overrides)
    touched: list[Key] = []
    for override in overrides:
        touched.append(_apply(model, raw, override))
    try:
        config = model.model_validate(raw)
    except ValidationError as error:
        raise explain(model, error, label, raw) from error
    if (name := find_secret(config.model_dump())) is not None:
        reason = "is a secret, and a run writes its configuration down"
        raise InputError(name, REDACTED, reason, "put it into an environment variable, and read that where it is used")
    origins = {dotted(key): _origin(raw, key, touched, f"recipe {label}") for key, _ in leaves(config)}
    if isinstance(config, RunConfig):
        given, source = with_preset(raw), f"{PRESET} {config.algorithm.name}"
        for key, _ in leaves(config):
            if origins[dotted(key)] == DEFAULT:
                origins[dotted(key)] = _origin(given, key, (), source)
    return ResolvedConfig(config, origins, text)


def _model_of(raw: Mapping[Any, Any], overrides: Sequence[str]) -> type[BaseModel]:
    """The configuration that a section of ``SECTION_KINDS``, or else ``algorithm.name``, asks for."""
    for own, kind in SECTION_KINDS.items():
        if own in raw:
            return kind
    section = raw.get("algorithm")
    name = section.get("name") if isinstance(section, dict) else None
    for key, _, value in (override.partition("=") for override in overrides):
        name = value.strip() if key.strip() == "algorithm.name" else name
    known = [*choices(RunConfig, ("algorithm", "name")), *TUNING]
    if isinstance(name, str) and name not in known:
        raise InputError("algorithm.name", name, "there is no such algorithm", f"use one of {', '.join(known)}")
    return TuningConfig if name in TUNING else RunConfig


def _apply(model: type[BaseModel], raw: dict[Any, Any], override: str) -> Key:
    """Set one ``dotted.key=value`` in ``raw``; returns the key."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise InputError("override", override, "is not of the form dotted.key=value", "write for instance run.seed=1")
    parts = name.strip().split(".")
    key: Key = tuple(int(part) if part.isdigit() else part for part in parts)
    slot = slot_at(model, key)
    if slot is None or "" in parts:
        raise unknown_key(model, key, text)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        if not takes_only_text(slot):
            raise InputError(dotted(key), text, "is not valid YAML", f"give {expected(slot)}") from error
        value = text
    if takes_only_text(slot) and value is not None and not isinstance(value, str):
        value = text  # run.name=007 and prompts.template="Q: {prompt}" are meant as written
    _put(model, raw, key, value)
    return key


def _put(model: type[BaseModel], raw: dict[Any, Any], key: Key, value: Any) -> None:
    """Set ``raw[key] = value``; a section or list that the recipe leaves out starts from the default."""
    below: Any = raw
    for depth, part in enumerate(key):
        here = dotted(key[:depth])
        if isinstance(below, list):
            if not isinstance(part, int) or part > len(below):
                reason = f"{here} has {len(below)} items, counted from 0"
                remedy = f"give an index from 0 to {len(below)} (the last one adds)"
                raise InputError(dotted(key), value, reason, remedy)
            if part == len(below):
                below.append(None)
        elif isinstance(below, dict):
            # A key below a free mapping may look like a number; only lists are indexed by one.
            part = str(part) if isinstance(part, int) and part not in below else part
            below.setdefault(part, None)
        else:
            raise InputError(dotted(key), value, f"{here} is {below!r}, which has no keys", f"set {here} as a whole")
        if depth == len(key) - 1:
            below[part] = value
        elif below[part] is None:
            slot = slot_at(model, key[: depth + 1])
            default = slot.default if slot is not None else None
            below[part] = list(default) if isinstance(default, (tuple, list)) else {}
        below = below[part]


def leaves(model: BaseModel) -> Iterator[tuple[Key, Any]]:
    """Every leaf ``(key, value)`` of a configuration, in the order of its fields."""
    yield from _leaves((), model)


def _leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves((*key, name), getattr(value, name))
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves((*key, name), item)
    elif isinstance(value, (tuple, list)) and any(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from _leaves((*key, index), item)
    else:
        yield key, value


def _origin(raw: Mapping[Any, Any], key: Key, touched: Sequence[Key], label: str) -> str:
    """``label`` where ``raw`` has ``key``, unless one of the keys that were ``touched`` holds it or lies in it."""
    below: Any = raw
    for depth, part in enumerate(key):
        present = (isinstance(below, dict) and part in below) or (
            isinstance(below, list) and isinstance(part, int) and part < len(below)
        )
        if not present:
            return DEFAULT
        below = below[part]
        if depth == len(key) - 1:
            break
    names = [tuple(str(part) for part in known) for known in touched]
    own = tuple(str(part) for part in key)
    if any(own[: len(name)] == name or name[: len(own)] == own for name in names):
        return COMMAND_LINE
    return label


def _scalar(value: Any) -> str:
    """One value as YAML on one line."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(name)}: {_scalar(item)}" for name, item in value.items()) + "}"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_./][\w./-]*", value, re.ASCII) and parse_yaml(value) == value:
            return value
        return str(yaml.safe_dump(value, default_style='"', width=10**9)).strip()
    return str(yaml.safe_dump(value, width=10**9)).removesuffix("\n").removesuffix("\n...")


def _lines(value: Any, key: Key, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """``(text, origin)`` of each line; section headings have no origin."""
    indent = "  " * (len(key) - 1)
    last = key[-1] if key else ""
    name = "-" if isinstance(last, int) else f"{_scalar(last)}:"
    children: list[tuple[Key, Any]]
    if isinstance(value, BaseModel):
        children = [((*key, child), getattr(value, child)) for child in type(value).model_fields]
    elif isinstance(value, dict) and value:
        children = [((*key, child), item) for child, item in value.items()]
    elif isinstance(value, (tuple, list)) and any(isinstance(item, BaseModel) for item in value):
        children = [((*key, index), item) for index, item in enumerate(value)]
    else:
        yield f"{indent}{name} {_scalar(value)}", origins.get(dotted(key), DEFAULT)
        return
    if key:
        yield f"{indent}{name}", ""
    for child, item in children:
        yield from _lines(item, child, origins)


def dump_yaml(resolved: ResolvedConfig) -> str:
    """The whole configuration as YAML, one origin comment a value.  Loading it gives an equal configuration."""
    text = "# Resolved configuration. The comment says where each value came from.\n"
    for line, origin in _lines(resolved.config, (), resolved.origins):
        text += f"{line:<{COMMENT_COLUMN}}  # {origin}\n" if origin else f"{line}\n"
    return text


def print_config(resolved: ResolvedConfig, console: Console | None = None) -> None:
    """List every value with its origin; values that are not defaults stand out."""
    console = console or Console()
    for line, origin in _lines(resolved.config, (), resolved.origins):
        text = Text(line.ljust(COMMENT_COLUMN) if origin else line, style="dim" if origin == DEFAULT else "")
        if origin:
            text.append(f"  # {origin}", style="dim" if origin == DEFAULT else "cyan")
        else:
            text.stylize("bold")
        console.print(text, soft_wrap=True, highlight=False)
