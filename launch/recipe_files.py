"""Recipe files: where they are, what ships with Burnish, and the YAML they are written in.

A recipe is a path to a YAML file or the name of one in ``launch/recipes``.
May import: yaml, trainers.errors.
"""

from __future__ import annotations

import difflib
import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trainers.errors import InputError


class RecipeLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]  # without stubs it is Any
    """Safe YAML without its three traps: ``1e-5`` is a number, dates stay text, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep))


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of one YAML text; raises yaml.YAMLError."""
    return yaml.load(text, Loader=RecipeLoader)  # noqa: S506  (a SafeLoader)


def list_recipes() -> list[str]:
    """Names of the recipes that ship with Burnish, sorted."""
    folder = resources.files("launch").joinpath("recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def describe_recipe(name: str) -> str:
    """The first sentence of the comment that a shipped recipe begins with: what it is for."""
    paragraph = itertools.takewhile(lambda line: line.startswith("# "), read_recipe(name).splitlines())
    return " ".join(line[2:].strip() for line in paragraph).split(". ")[0].rstrip(".")


def read_recipe(name: str) -> str:
    """The text of a shipped recipe; raises InputError that names the nearest one."""
    bare = name.removesuffix(".yaml")
    names = list_recipes()
    if bare not in names:
        near = difflib.get_close_matches(bare, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise InputError("recipe", name, "is neither a file nor the name of a shipped recipe", hint)
    return resources.files("launch").joinpath("recipes", f"{bare}.yaml").read_text(encoding="utf-8")


def locate_recipe(recipe: str) -> tuple[str, str]:
    """``(label, text)`` of a recipe given as a path or a shipped name.  The label appears in origins."""
    path = Path(recipe).expanduser()
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("recipe", recipe, f"cannot be read ({error})", "give a readable UTF-8 file") from error
    if path.is_dir():
        raise InputError("recipe", recipe, "is a folder", "give the YAML file in it")
    if "/" in recipe or "\\" in recipe:
        raise InputError("recipe", recipe, "there is no such file", "give an existing file or a shipped recipe's name")
    return f"{recipe.removesuffix('.yaml')}.yaml", read_recipe(recipe)


def copy_recipe(name: str, dest: str | Path) -> Path:
    """Copy a shipped recipe to the file or into the folder ``dest``; never overwrites.  Returns the new file."""
    text = read_recipe(name)
    target = Path(dest).expanduser()
    if target.is_dir():
        target = target / f"{name.removesuffix('.yaml')}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError("destination", str(target), "exists already", "name another file or remove it") from error
    except OSError as error:
        raise InputError("destination", str(target), f"cannot be written ({error.strerror})", "name another") from error
    return target
