"""The documentation is run: commands parse, keys, links, targets and tests exist, examples work."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from launch.cli import _parser
from launch.compare_config import CompareConfig
from launch.config import RunConfig
from launch.config_keys import slot_at
from launch.config_reference import BEGIN, END, KINDS, PAGE, entries, renewed
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.overrides import SECTION_KINDS
from launch.recipe_files import list_recipes, parse_yaml, read_recipe
from launch.revise_config import ReviseConfig
from launch.select_config import SelectConfig
from launch.tuning_config import TUNING, TuningConfig
from trainers.examples import encode_example
from trainers.experience import Prompt
from trainers.labelled_answers import read_preference
from trainers.pair_function import load_pair_function, probe_pair_function
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat
from trainers.rewards import RewardSettings, load_reward, probe_rewards
from trainers.suites import load_suite

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<mark><!-- recipe -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = "|".join(dict.fromkeys(name for kind in KINDS for name in kind.model_fields))
KEY = re.compile(rf"`((?:{SECTIONS})(?:\.(?!(?:jsonl?|html|parquet|safetensors)`)[a-z0-9_]+)+)(?:[:=] ?([^`]*))?`")
OWN_FILE = ".yaml"  # a recipe argument that is a path of the reader's own


class Fenced(NamedTuple):
    page: str
    language: str
    body: str
    is_recipe: bool


def fenced(*languages: str) -> list[Fenced]:
    found = [
        Fenced(page.name, m["language"], m["body"], m["mark"] is not None)
        for page in PAGES
        for m in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands() -> list[str]:
    """Every burnish command line that a reader may copy: in shell blocks and between backticks."""
    lines = [line.split(" #")[0].strip() for block in fenced("bash") for line in block.body.splitlines()]
    inline = [m[1] for page in PAGES for m in re.finditer(r"`([^`\n]+)`", prose(page))]
    words = (line.removeprefix(".venv/bin/") for line in [*lines, *inline])
    return sorted({line for line in words if line.startswith("burnish ")})


def cluster_commands() -> list[str]:
    """Arguments that the Slurm script passes to `burnish train`."""
    lines = [line for block in fenced("bash") for line in block.body.splitlines() if line.startswith("sbatch ")]
    return [f"burnish train {line.split('burnish.sbatch ')[1]} cluster.num_nodes=4" for line in lines]


def page_and_text(pattern: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for match in re.finditer(pattern, page.read_text(encoding="utf-8")):
            yield page, match[1]


def check_override(override: str) -> None:
    key = override.partition("=")[0]
    parts = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    assert any(slot_at(model, parts) is not None for model in KINDS), f"there is no key {key}"


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [*commands(), *cluster_commands()])
def test_every_command_line_parses_and_names_keys_and_recipes_that_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    if len(words) == 1:
        words += ["--help"]  # the bare name of a command, in a sentence
    try:
        arguments = _parser().parse_args(words)
    except SystemExit as end:
        assert end.code == 0, f"{line!r} does not parse"  # --help and --version
        return
    recipe = getattr(arguments, "recipe", None) or getattr(arguments, "name", None)
    if recipe is not None and not recipe.endswith(OWN_FILE):
        assert recipe in list_recipes()
    for override in getattr(arguments, "overrides", []):
        check_override(override)


def test_the_readme_and_the_guides_show_commands() -> None:
    assert len(commands()) >= 10
    assert len(cluster_commands()) >= 2


def test_every_make_target_that_is_mentioned_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    mentioned = {name for _, name in page_and_text(r"`make ([a-z-]+)`")}
    mentioned |= {m for block in fenced("bash") for m in re.findall(r"^make ([a-z-]+)", block.body, re.MULTILINE)}
    assert {"demo", "test"} <= mentioned <= targets


# --- configuration ----------------------------------------------------------------------------


def test_the_reference_table_is_the_generated_one() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == renewed(page), "run: python -m launch.config_reference"


def test_every_key_of_the_configuration_has_one_row() -> None:
    table = (ROOT / PAGE).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert rows == [entry.key for entry in entries()]
    assert len(rows) == len(set(rows)) > 100
    for key in rows:
        check_override(key)


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        renewed("# Configuration\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_key_that_is_mentioned_exists(page: Path) -> None:
    for match in KEY.finditer(prose(page)):
        for name in [match[1], *re.findall(r" ([a-z_0-9.]+)=", match[0])]:
            check_override(name)


EXAMPLES = {TuningConfig: "cpu-sft", LabelConfig: "cpu-pipeline-label", EvalConfig: "cpu-eval"}
EXAMPLES |= {ReviseConfig: "cpu-revise", SelectConfig: "cpu-rejection", CompareConfig: "cpu-compare"}


def kind_of(block: dict[str, Any]) -> type[Any]:
    """Whose configuration a block is a part of."""
    for section, kind in SECTION_KINDS.items():
        if section in block:
            return kind
    is_tuning = "data" in block or block.get("algorithm", {}).get("name") in TUNING
    return TuningConfig if is_tuning else RunConfig


@pytest.mark.parametrize("block", fenced("yaml"), ids=lambda block: block.page)
def test_every_yaml_block_is_a_recipe_or_a_part_of_one(block: Fenced) -> None:
    value = parse_yaml(block.body)
    if (kind := kind_of(value)) is not RunConfig:
        kind.model_validate({**parse_yaml(read_recipe(EXAMPLES[kind])), "model": {"path": "any"}, **value})
        return
    whole = {} if block.is_recipe else {**recipe_blocks()[0], "evaluation": {"every": 0}}
    config = RunConfig.model_validate({**whole, **value})
    for reward in config.rewards:
        if ":" not in reward.function:
            load_reward(reward)  # its arguments are checked


def recipe_blocks() -> list[dict[str, Any]]:
    return [parse_yaml(block.body) for block in fenced("yaml") if block.is_recipe]


def test_there_is_a_complete_recipe_to_read() -> None:
    assert recipe_blocks()


# --- examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", fenced("python"), ids=lambda block: block.page)
def test_every_function_that_is_shown_loads_and_scores_or_compares(block: Fenced, tmp_path: Path) -> None:
    path = tmp_path / "shown.py"
    path.write_text(block.body, encoding="utf-8")
    names = re.findall(r"^(?:async )?def (\w+)|^([a-z]\w*) = ", block.body, re.MULTILINE)
    attribute = (names[-1][0] or names[-1][1]) if names else ""
    prompt = Prompt("id", np.arange(5, dtype=np.int32), "2 + 2 =", "2 + 2 =", {"answer": "4", "unit": "m"})
    settings = RewardSettings(function=f"{path}:{attribute}")
    if "completions_a" in block.body:
        probe_pair_function(load_pair_function(settings, "label.pair"), [prompt, prompt], "label.pair", timeout_s=20)
    else:
        probe_rewards([load_reward(settings)], [prompt, prompt], timeout_s=20)


def test_the_readme_and_the_guide_show_the_same_first_reward() -> None:
    first = [next(b.body for b in fenced("python") if b.page == page) for page in ("README.md", "rewards.md")]
    assert first[0].removeprefix("# my_rewards.py\n") == first[1]


def test_the_first_reward_does_what_its_docstring_says() -> None:
    names: dict[str, Any] = {}
    exec(next(b.body for b in fenced("python") if b.page == "rewards.md"), names)
    assert names["near"](completions=["4", "4.05", "four", ""], answer=["4"] * 4, tolerance=0.1) == [1, 1, 0, 0]


# --- what the pages point to ------------------------------------------------------------------


def test_every_relative_link_leads_somewhere() -> None:
    links = list(page_and_text(r"\]\(([^)]+)\)"))
    relative = [(page, link.partition("#")[0]) for page, link in links if "://" not in link and link[0] != "#"]
    assert len(relative) > 20
    assert not [f"{page.name}: {link}" for page, link in relative if not (page.parent / link).exists()]


def test_every_file_of_the_project_that_is_named_exists() -> None:
    named = page_and_text(r"`((?:actors|cluster|launch|trainers|tests|docs|docker|scripts|benchmarks)/[\w./-]+)`")
    assert not [f"{page.name}: {name}" for page, name in named if not (ROOT / name).exists()]


def test_every_test_that_is_pointed_to_exists() -> None:
    named = {name for _, name in page_and_text(r"`(test_\w+)`")}
    written = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    laws = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Laws")[2]
    assert len(re.findall(r"`(test_\w+)`", laws)) >= 10
    assert sorted(named - written) == []


@pytest.mark.parametrize("block", fenced("json"), ids=lambda block: block.page)
def test_every_row_that_is_shown_is_one_that_is_read(block: Fenced, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in block.body.splitlines()]
    if "suite" in rows[0]:
        (tmp_path / "suite.jsonl").write_text(block.body, encoding="utf-8")
        assert len(load_suite(tmp_path / "suite.jsonl")) == len(rows)
        return
    tokenizer = load_tokenizer(resolve_model("builtin:tiny-llama"))
    for row in rows:
        if "chosen" in row or "completions" in row:
            assert read_comparison(row, "row", tokenizer, PromptFormat(chat=False)).pairs
        elif "label" in row:
            assert read_preference(row, "row", tokenizer, PromptFormat(chat=False), "kto").label is row["label"]
        else:
            assert encode_example(row, tokenizer, 512, form=PromptFormat(chat=False)).mask.any()


def test_the_hooks_before_a_commit_are_local() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "license = Apache-2.0" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
