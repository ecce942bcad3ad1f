"""Constitutions: files of principles, one of which comes with Burnish.

May import: pydantic, yaml, trainers.{constitution, errors}, launch.{config_keys, recipe_files}.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from launch.config_keys import explain
from launch.recipe_files import parse_yaml
from trainers.constitution import Constitution
from trainers.errors import InputError

DEFAULT = "default"


def load_constitution(name: str, field: str) -> Constitution:
    """The principles of a YAML or JSON file, or of ``default``.

    Raises:
        InputError: the file cannot be read, or what is in it is no constitution; names ``field`` and the key.
    """
    path = Path(str(resources.files("launch") / "constitutions" / f"{DEFAULT}.yaml"))
    if name != DEFAULT:
        path = Path(name).expanduser()
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise InputError(field, name, f"{path} cannot be read ({reason})", f"name a file, or {DEFAULT}") from error
    except yaml.YAMLError as error:
        raise InputError(field, name, f"is not valid YAML: {error}", "mend the line that is named") from error
    if not isinstance(raw, dict):
        raise InputError(field, name, "is not a mapping with the key principles", f"start from {DEFAULT}")
    try:
        return Constitution.model_validate(raw)
    except ValidationError as error:
        found = explain(Constitution, error, str(path), raw)
        raise InputError(f"{field} ({path}): {found.field}", found.value, found.reason, found.remedy) from error
