"""Everything ``burnish eval`` can refuse before anything is allocated: models, prompts, rewards, suites, pairs.

May import: actors.{model_folders, modeling, reward_model, settings}, trainers.*, launch.*.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from actors.model_folders import resolve_model
from actors.reward_model import check_reward_model
from actors.settings import RewardModelSettings
from launch.bad_rows import read_rows
from launch.datasets import Row
from launch.eval_config import EvalConfig
from launch.judge_agreement import LabelledPair, labelled_pairs
from launch.judging import REPLIES, PreparedJudge, prepare_judge, prepare_judges
from launch.model_facts import check_model_folder
from launch.prepare import PROBE_TIMEOUT_S
from launch.prompts import build_prompts, load_prompts
from launch.row_settings import HeldOutSettings
from launch.run_folder import is_taken
from launch.tuning_data import load_located_rows
from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.experience import Prompt
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat
from trainers.rewards import load_reward, probe_rewards
from trainers.suites import SuiteItem, load_suite

REPORT, PAGE, SAMPLES, VERDICTS = "eval.json", "eval.html", "samples.parquet", "verdicts.jsonl"


@dataclass(frozen=True, slots=True)
class Suite:
    """A behaviour suite with its prompts, in order."""

    name: str
    items: list[SuiteItem]
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class PreparedEval:
    """Checked inputs of an evaluation."""

    model_path: str
    base_path: str | None
    max_length: int
    stream: str  # which dataset the prompts are of
    prompts: list[Prompt]
    suites: list[Suite]
    pairs: Mapping[str, list[Comparison]]  # of each reward model, in the tokens that it reads
    judge: PreparedJudge | None = None
    labelled: Sequence[LabelledPair] = ()  # what judges are compared with people on


def check_eval_folder(config: EvalConfig) -> Path:
    """The run's folder, absent or empty but for what judges replied before an evaluation of this name broke off.

    InputError otherwise, or where it cannot be made.
    """
    folder, name = Path(config.run.directory) / config.run.name, config.run.name
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError("run.directory", config.run.directory, f"no folder can be made in {there}",
                         "choose a folder you may write to")  # fmt: skip
    if is_taken(folder, but=[REPLIES]):
        raise InputError("run.name", name, f"the run folder {folder} exists already", "choose another run.name")
    return folder


def prepare_eval(config: EvalConfig) -> PreparedEval:
    """Check models, prompts, rewards, suites and pairs.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.modeling import load_tokenizer

    path = resolve_model(config.model.path)
    longest = check_model_folder(path).max_length
    tokenizer = load_tokenizer(path)
    base = None
    if config.base.path is not None:
        base = resolve_model(config.base.path)
        longest = min(longest, check_model_folder(base, "base.path").max_length)
        _same_tokenizer(tokenizer, load_tokenizer(base), config.base.path)
    if config.model.max_length is not None and config.model.max_length > longest:
        raise InputError("model.max_length", config.model.max_length, f"model and base were built for {longest} tokens",
                         f"use at most {longest}")  # fmt: skip
    max_length = config.model.max_length or longest
    max_tokens = config.generator.sampling.max_tokens
    budget = max_length if base is None else min(max_length, config.base.token_budget)
    if max_tokens >= budget:
        field = "generator.sampling.max_tokens"
        raise InputError(
            field, max_tokens, f"leaves no room for a prompt in {budget} tokens", f"use less than {budget}"
        )
    suites = [_suite(name, config, tokenizer, max_length) for name in config.eval.suites]
    if len({suite.name for suite in suites}) < len(suites):
        raise InputError("eval.suites", [s.name for s in suites], "two have the same name", "rename a file")
    for model in config.reward_models:
        check_reward_model(model, tokenizer, budget)
    prepare_judges(config.judges, path)
    rewards = [load_reward(reward) for reward in config.rewards]
    prompts, stream = _prompts(config, tokenizer, budget - max_tokens)
    probe_rewards(rewards, prompts, PROBE_TIMEOUT_S)
    judge = None
    if config.eval.judge is not None:
        asked = config.eval.judge
        judge = prepare_judge(asked, "eval.judge", path, max_length, asked.max_tokens, asked.template)
    pairs = {} if config.eval.preferences is None else _pairs(config, tokenizer)
    labelled = []
    if config.eval.preferences is not None and (config.eval.judge is not None or config.judges):
        labelled = labelled_pairs(_preference_rows(config))
    return PreparedEval(path, base, max_length, stream, prompts, suites, pairs, judge, labelled)


def _same_tokenizer(ours: Any, theirs: Any, path: str) -> None:
    if theirs.get_vocab() != ours.get_vocab():
        raise InputError("base.path", path, "its tokenizer is not that of model.path",
                         "use the model that training began with")  # fmt: skip
    if theirs.eos_token_id != ours.eos_token_id:
        raise InputError("base.path", path, f"its texts end with {theirs.eos_token}, the others with {ours.eos_token}",
                         "use the model that training began with")  # fmt: skip


def _prompts(config: EvalConfig, tokenizer: Any, max_prompt_tokens: int) -> tuple[list[Prompt], str]:
    """(distinct prompts, dataset): prompts.eval as training held it out, or prompts.train where there is no eval."""
    train, held_out, _ = load_prompts(config.prompts, tokenizer, max_prompt_tokens, config.run.seed)
    stream = "prompts.train" if config.prompts.eval is None else "prompts.eval"
    distinct = list({p.prompt_id: p for p in reversed(held_out or train)}.values())[::-1]
    wanted = config.eval.num_prompts
    if wanted is not None and wanted > len(distinct):
        raise InputError("eval.num_prompts", wanted, f"{stream} has {len(distinct)} distinct prompts",
                         "use fewer, or leave it out")  # fmt: skip
    return distinct[:wanted], stream


def shipped_suites() -> dict[str, Path]:
    """Files of the suites that come with Burnish, by name."""
    folder = Path(str(resources.files("launch") / "suites"))
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def _suite(name: str, config: EvalConfig, tokenizer: Any, max_length: int) -> Suite:
    shipped, path = shipped_suites(), Path(name).expanduser()
    if name not in shipped and path.suffix != ".jsonl":
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError("eval.suites", name, "is neither a shipped suite nor a JSONL file",
                         f"{hint}shipped are {', '.join(shipped)}")  # fmt: skip
    path = shipped.get(name, path)
    items = load_suite(path)
    room = max_length - config.eval.suite_max_tokens
    if room < 1:
        raise InputError("eval.suite_max_tokens", config.eval.suite_max_tokens,
                         f"leaves no room for a question in {max_length} tokens", "use less")  # fmt: skip
    # A suite's question stands alone: the recipe's template belongs to its own task.
    plain = config.prompts.model_copy(update={"template": "{prompt}"})
    rows = [{"prompt": item.prompt} for item in items]
    return Suite(path.stem, items, build_prompts(rows, plain, tokenizer, room, f"suite {path.stem}"))


def _judged_tokenizer(model: RewardModelSettings) -> str:
    """The folder whose tokenizer the held-out pairs are read with: every member has to know its tokens."""
    from actors.modeling import load_tokenizer

    first, *others = (resolve_model(path) for path in model.paths)
    vocabulary = load_tokenizer(first).get_vocab() if others else {}
    for path in others:
        if load_tokenizer(path).get_vocab() != vocabulary:
            raise InputError(f"reward_models.{model.name}.path", path, "its tokenizer is not that of the first member",
                             "leave eval.preferences out, or judge the members one by one")  # fmt: skip
    return first


def _pairs(config: EvalConfig, policy_tokenizer: Any) -> dict[str, list[Comparison]]:
    """The held-out comparisons of every reward model: the policy's tokens, or its own where it reads text again."""
    from actors.modeling import load_tokenizer

    rows, prompts = _preference_rows(config), config.prompts
    form = PromptFormat(system=prompts.system, template=prompts.template, chat=prompts.chat)
    shared: list[Comparison] | None = None
    found: dict[str, list[Comparison]] = {}
    for model in config.reward_models:
        if model.retokenize:
            own = load_tokenizer(_judged_tokenizer(model))
            found[model.name] = _comparisons(rows, own, form)
        else:
            shared = shared or _comparisons(rows, policy_tokenizer, form)
            found[model.name] = shared
    return found


def _comparisons(rows: list[tuple[str, Row]], tokenizer: Any, form: PromptFormat) -> list[Comparison]:
    """Of every row; InputError tells all bad ones at once."""

    def read(where: str, row: Row) -> Comparison:
        return read_comparison(row, where, tokenizer, form)

    return read_rows(rows, read, "eval.preferences")[0]


def _preference_rows(config: EvalConfig) -> list[tuple[str, Row]]:
    settings = HeldOutSettings.model_validate({"path": config.eval.preferences})
    try:
        return load_located_rows(settings, "eval.preferences")
    except InputError as error:
        field = error.field.replace("eval.preferences.path", "eval.preferences")
        raise InputError(field, error.value, error.reason, error.remedy) from error
