"""Everything ``burnish label`` can refuse before anything is allocated, and what names a labelling.

May import: actors.{model_folders, modeling, reward_model}, trainers.*, launch.*.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.model_folders import resolve_model
from actors.reward_model import check_reward_model
from actors.settings import RewardModelSettings
from launch.constitution_files import load_constitution
from launch.judging import PreparedJudge, longest, prepare_judge
from launch.label_config import LabelConfig
from launch.model_facts import ModelFacts, check_model_folder
from launch.prompts import PromptStream, load_prompts
from launch.run_folder import LOCK, WRITTEN, check_replaceable, is_taken
from launch.run_identity import RunIdentity
from trainers.constitution import Principle
from trainers.errors import InputError
from trainers.experience import Prompt
from trainers.pair_function import load_pair_function, probe_pair_function, source_of
from trainers.rewards import load_reward, probe_rewards

MANIFEST, RECORDS, CONFIG, SUMMARY = "label.json", "labelled.jsonl", "config.yaml", "summary.json"
PAIR_FIELD = "label.pair.function"
OF_RUNNING = ("token_budget", "num_workers", "gpus_per_worker", "deadline_s")  # of a reward model: they decide nothing
PROBE_TIMEOUT_S = 60.0  # for one call of a function at start, imports included
HASHED_BYTES = 2**22  # read at a time


@dataclass(frozen=True, slots=True)
class PreparedLabel:
    """Checked inputs of a labelling run."""

    model_path: str
    facts: ModelFacts
    max_length: int
    prompts: list[Prompt]
    judge: PreparedJudge | None
    principles: tuple[Principle, ...]  # that a judge prefers by
    identity: RunIdentity  # what must be the same for a run to be continued


def output_path(config: LabelConfig) -> Path:
    """Where the preferences go."""
    if config.output.path is not None:
        return Path(config.output.path).expanduser()
    return Path(config.run.directory) / config.run.name / f"preferences.{config.output.format}"


def label_folder(config: LabelConfig) -> Path:
    """The run's folder."""
    return Path(config.run.directory) / config.run.name


def check_label_folder(config: LabelConfig, resume: bool) -> None:
    """The run's folder has to be absent (or empty) for a new run, a labelling run's for a resumed one.

    Raises:
        InputError: it is otherwise, or where the output belongs is something that this run did not write.
    """
    folder, name = label_folder(config), config.run.name
    if folder.exists() and not folder.is_dir():
        raise InputError("run.name", name, f"{folder} is a file", "choose another run.name")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError("run.directory", config.run.directory, f"no folder can be made in {there}",
                         "choose a folder you may write to")  # fmt: skip
    if resume:
        if not (folder / MANIFEST).exists():
            reason = f"there is no labelling run to resume in {folder}"
            raise InputError("run.name", name, reason, "start it without --resume")
    elif is_taken(folder):
        raise InputError("run.name", name, f"the run folder {folder} exists already",
                         "add --resume to continue it, or choose another run.name")  # fmt: skip
    target = output_path(config).absolute()
    if target in {folder.absolute() / own for own in (MANIFEST, RECORDS, CONFIG, SUMMARY, WRITTEN, LOCK)}:
        raise InputError("output.path", str(target), "is a file of the run itself", "name another file")
    check_replaceable(folder, target)


def prepare_label(config: LabelConfig) -> PreparedLabel:
    """Check model, prompts and labeller.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.modeling import load_tokenizer

    path = resolve_model(config.model.path)
    facts = check_model_folder(path)
    max_length = longest(config.model.max_length, facts, "model.max_length")
    max_tokens = config.sampling.max_tokens
    if max_tokens >= max_length:
        raise InputError("sampling.max_tokens", max_tokens, f"leaves no room for a prompt in {max_length} tokens",
                         f"use less than {max_length}")  # fmt: skip
    tokenizer = load_tokenizer(path)
    prompts, _, _ = load_prompts(config.prompts, tokenizer, max_length - max_tokens, config.run.seed)
    if len({isinstance(prompt.source, str) for prompt in prompts}) > 1:
        raise InputError("prompts.train", config.prompts.train.path, "some prompts are text and some are messages",
                         "give all of them in one form: a preference file has one")  # fmt: skip
    labeller = _labeller_source(config, prompts)
    if config.label.reward_model is not None:
        labeller = _reward_model_digest(config.label.reward_model, tokenizer, max_length)
    judge, principles = None, tuple[Principle, ...]()
    if config.label.judge is not None:
        asked = config.label.judge
        if asked.constitution is not None:
            principles = load_constitution(asked.constitution, "label.judge.constitution").principles
        judge = prepare_judge(asked, "label.judge", path, max_length, asked.max_tokens, asked.pair_template)
        labeller = digest_of([principle.model_dump() for principle in principles]) if principles else ""
        if asked.path is not None:
            labeller += folder_digest(judge.path)
    sampling, (decides, files) = config.sampling.model_dump(mode="json"), label_settings(config)
    compared = "random" if config.keep.pairs == "random" else "all"  # which pairs are
    digests = {
        "run.seed": str(config.run.seed),
        "model.path": folder_digest(path),
        "model.dtype": config.model.dtype,
        "prompts": str(PromptStream(prompts, config.run.seed, config.prompts.shuffle).identity()["digest"]),
        "sampling": digest_of(sampling),
        "label": digest_of([decides, labeller]),
        "keep.drop_identical": str(config.keep.drop_identical),
        "keep.pairs": compared,
    }
    settings = {
        "run.seed": config.run.seed, "model.path": config.model.path, "model.dtype": config.model.dtype,
        "prompts": config.prompts.model_dump(mode="json"), "sampling": sampling, "label": {**decides, **files},
        "keep.drop_identical": config.keep.drop_identical, "keep.pairs": compared,
    }  # fmt: skip
    return PreparedLabel(path, facts, max_length, prompts, judge, principles, RunIdentity(digests, settings))


def label_settings(config: LabelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what decides about labels, the files behind it, which count by their content).

    Of a model neither where it is, on what it runs nor how fast decides; of an endpoint neither how it is reached nor
    how much may be spent.
    """
    found = config.label.model_dump(mode="json")
    files: dict[str, Any] = {}
    for labeller, running in (("reward_model", OF_RUNNING), ("judge", ("generator",))):
        if found[labeller] is None:
            continue
        for name in ("path", "constitution"):
            if (file := found[labeller].pop(name, None)) is not None:
                files[f"{labeller}.{name}"] = file
        for name in running:
            del found[labeller][name]
    if found["judge"] is not None and found["judge"]["endpoint"] is not None:
        endpoint = found["judge"]["endpoint"]
        found["judge"]["endpoint"] = {name: endpoint[name] for name in ("model", "parameters")}
    return found, files


def _labeller_source(config: LabelConfig, prompts: list[Prompt]) -> str:
    """Load and probe the functions; the source texts they come from, "" without functions."""
    label = config.label
    if label.pair is not None:
        function = load_pair_function(label.pair, PAIR_FIELD)
        probe_pair_function(function, prompts, PAIR_FIELD, PROBE_TIMEOUT_S)
        return source_of(function)
    rewards = [load_reward(reward) for reward in label.rewards]
    probe_rewards(rewards, prompts, PROBE_TIMEOUT_S)
    return "\n".join(source_of(reward) for reward in rewards)


def _reward_model_digest(settings: RewardModelSettings, tokenizer: Any, max_length: int) -> str:
    try:
        check_reward_model(settings, tokenizer, max_length)
    except InputError as error:
        theirs, ours = f"reward_models.{settings.name}", "label.reward_model"
        field, remedy = error.field.replace(theirs, ours), error.remedy.replace(theirs, ours)
        raise InputError(field, error.value, error.reason, remedy) from error
    return " ".join(folder_digest(resolve_model(path)) for path in settings.paths)


def folder_digest(path: str) -> str:
    """Digest of a model folder's configuration and weights: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([Path(path) / "config.json", *Path(path).glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(HASHED_BYTES):
                digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """16 hexadecimal digits of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
