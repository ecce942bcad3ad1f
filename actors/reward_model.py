"""RewardModel: a learned reward in a process of its own.

It scores the very tokens that were sampled.  A model with another tokenizer may only score on the explicit wish to
read the text again (``retokenize``): the same ids would mean other words to it.
May import: numpy, torch, actors.*, trainers.{errors, experience, prompt_format}, cluster.transport.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.adapter_files import CONFIG
from actors.end_scores import end_scores
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.scalar_model import load_scalar
from actors.settings import RewardModelSettings
from cluster.transport import fetch
from trainers.errors import InputError
from trainers.experience import GroupRewards, RewardFailure, Trajectory, TrajectoryGroup, decode_group
from trainers.prompt_format import PromptFormat, close

STATS = "reward_stats.json"


class RewardStats(NamedTuple):
    """Of the scores of ``num`` texts, which ``reference`` names."""

    mean: float
    std: float
    num: int
    reference: str


def check_reward_model(settings: RewardModelSettings, policy_tokenizer: Any, max_length: int | None = None) -> None:
    """Everything about a reward model that can be refused from its folder alone, before anything is allocated.

    Args:
        max_length: longest prompt with its completion that the policy can produce, in tokens.

    Raises:
        InputError: no reward model, more than one score, another tokenizer without ``retokenize``, texts longer
            than it can read, or no statistics to normalise by.  Of an ensemble: the first member's.
    """
    from transformers import AutoConfig

    if settings.ensemble is not None:
        for member in settings.members:
            check_reward_model(member.model_copy(update={"name": settings.name}), policy_tokenizer, max_length)
        return
    field = f"reward_models.{settings.name}"
    given = settings.paths[0]
    path = resolve_model(given)
    if (Path(path) / CONFIG).is_file():  # transformers would load the adapter, and the base that it names
        raise InputError(f"{field}.path", given, f"is an adapter, or has {CONFIG} beside a whole model",
                         "merge it into its base with `burnish merge` and give that folder")  # fmt: skip
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{field}.path", given, "has no config.json", "give the folder of a reward model")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        raise InputError(
            f"{field}.path", given, f"is no reward model but {', '.join(config.architectures or ['unknown'])}",
            "give a sequence classifier with one label, such as the export of a run with algorithm.name=reward",
        )  # fmt: skip
    if config.num_labels != 1:
        raise InputError(f"{field}.path", given, f"its head gives {config.num_labels} numbers",
                         "use a reward model with one score per text")  # fmt: skip
    if settings.normalize:
        load_stats(path, f"{field}.normalize")
    own = load_tokenizer(path)
    if settings.retokenize:
        if policy_tokenizer.chat_template and not own.chat_template:
            raise InputError(f"{field}.retokenize", True, "the reward model's tokenizer has no chat template",
                             "add one to its folder, or use a reward model that has it")  # fmt: skip
    elif own.get_vocab() != policy_tokenizer.get_vocab():
        raise InputError(f"{field}.path", given, "its tokenizer is not the policy's",
                         f"set {field}.retokenize=true to read every sample again as text, or use a reward model "
                         "of the policy's family")  # fmt: skip
    elif own.eos_token_id != policy_tokenizer.eos_token_id:
        raise InputError(
            f"{field}.path", given,
            f"its texts end with {own.eos_token}, the policy's with {policy_tokenizer.eos_token}",
            f"set {field}.retokenize=true, or use a reward model of the policy's family",
        )  # fmt: skip
    if max_length is None or settings.retokenize:
        return
    if settings.token_budget < max_length:
        raise InputError(f"{field}.token_budget", settings.token_budget, f"a sample may have {max_length} tokens",
                         f"use at least {max_length}")  # fmt: skip
    if config.max_position_embeddings < max_length:
        raise InputError(
            f"{field}.path", given,
            f"it was built for {config.max_position_embeddings} tokens and a sample may have {max_length}",
            f"set model.max_length={config.max_position_embeddings}",
        )  # fmt: skip


def load_stats(path: str, field: str) -> RewardStats:
    """The statistics stored with a reward model; InputError when there are none, or no deviation to divide by."""
    file = Path(path) / STATS
    remedy = f"put {STATS} with mean, std, num and reference into the folder, or leave normalize out"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        stats = RewardStats(float(found["mean"]), float(found["std"]), int(found["num"]), str(found["reference"]))
    except FileNotFoundError as error:
        raise InputError(field, True, f"{file} is missing", remedy) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(field, True, f"{file} cannot be read ({error!r})", remedy) from error
    if not (math.isfinite(stats.mean) and math.isfinite(stats.std) and stats.std > 0):
        raise InputError(field, True, f"{file} has mean {stats.mean} and deviation {stats.std}", remedy)
    return stats


class RewardModel:
    """Scores groups, packed together up to its token budget.

    Args:
        policy_path: folder whose tokenizer the samples' ids belong to.
        form: how the policy's prompts were made of their source; needed with ``retokenize`` only.
    """

    def __init__(
        self,
        settings: RewardModelSettings,
        policy_path: str,
        dtype: str,
        device: str,
        form: PromptFormat | None = None,
    ) -> None:
        policy_tokenizer = load_tokenizer(policy_path)
        check_reward_model(settings, policy_tokenizer)
        self.settings, self.form = settings, form or PromptFormat()
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        path, field = resolve_model(settings.paths[0]), f"reward_models.{settings.name}"
        self._stats = load_stats(path, f"{field}.normalize") if settings.normalize else None
        self._tokenizer = load_tokenizer(path) if settings.retokenize else None
        self._policy_eos = policy_tokenizer.eos_token_id
        self._model = load_scalar(path, f"{field}.path", getattr(torch, dtype)).to(self.device).eval()
        config: Any = self._model.hf_model.config
        self._limit = min(int(config.max_position_embeddings), settings.token_budget)

    def score(self, payloads: list[Any], deadline_s: float) -> list[GroupRewards]:
        """Rewards of each group in ``payloads``: one part, under this model's name; failures are values in it."""
        return self.score_groups([decode_group(fetch(payload, deadline_s)) for payload in payloads])

    def score_groups(self, groups: Sequence[TrajectoryGroup]) -> list[GroupRewards]:
        """See :meth:`score`.  ``score_s`` is each group's part of the time by samples: they were scored together."""
        started = time.perf_counter()
        failures: list[dict[int, RewardFailure]] = [{} for _ in groups]
        chosen: list[tuple[int, int]] = []  # (group, sample) of every text that can be scored
        prompts, texts = [], []
        for g, group in enumerate(groups):
            prompt, own_texts = self._read(group)
            for i, (trajectory, text) in enumerate(zip(group.trajectories, own_texts, strict=True)):
                if why := self._unscorable(trajectory, prompt, text):
                    failures[g][i] = RewardFailure(self.settings.name, "not_a_number", why)
                else:
                    chosen.append((g, i))
                    prompts.append(prompt)
                    texts.append(text)
        found = end_scores(
            self._model, prompts, texts, [g for g, _ in chosen], self.settings.token_budget,
            self.device.type != "cuda", self.device,
        )  # fmt: skip
        parts = [np.full(len(group.trajectories), np.nan) for group in groups]
        for place, (g, i) in enumerate(chosen):
            if math.isfinite(found[place]):
                parts[g][i] = self._shaped(float(found[place]))
            else:
                failures[g][i] = RewardFailure(self.settings.name, "nan", f"the model's score is {found[place]}")
        per_sample_s = (time.perf_counter() - started) / max(sum(part.size for part in parts), 1)
        return [
            GroupRewards(
                group_id=group.group_id,
                totals=self.settings.weight * part,
                parts={self.settings.name: part},
                failures=tuple(sorted(failed.items())),
                score_s=per_sample_s * part.size,
                measured=() if self.settings.weight else (self.settings.name,),
            )
            for group, part, failed in zip(groups, parts, failures, strict=True)
        ]

    def _read(self, group: TrajectoryGroup) -> tuple[np.ndarray, list[np.ndarray]]:
        """(prompt ids, ids of each completion), as this model reads them."""
        if self._tokenizer is None:
            return group.prompt.token_ids, [t.completion_ids for t in group.trajectories]
        own, source = self._tokenizer, group.prompt.source
        if source is None:  # made without a dataset: all there is is the rendered text
            prompt = np.array(own.encode(group.prompt.text), dtype=np.int32)
        else:
            prompt = self.form.render(source, own, f"prompt {group.prompt.prompt_id}")[1]
        # It ends for this model where it ended for the policy; a text that was cut off does not.
        ended = [t.num_tokens > 0 and t.completion_ids[-1] == self._policy_eos for t in group.trajectories]
        return prompt, [close(t.text, own, bool(end)) for t, end in zip(group.trajectories, ended, strict=True)]

    def _unscorable(self, trajectory: Trajectory, prompt: np.ndarray, text: np.ndarray) -> str | None:
        if trajectory.finish_reason == "abort":
            return "the sample was aborted"
        if text.shape[0] == 0:
            return "an empty completion has no score"
        if (length := prompt.shape[0] + text.shape[0]) > self._limit:
            return f"{length} tokens, and the reward model reads {self._limit}"
        return None

    def _shaped(self, score: float) -> float:
        if self._stats is not None:
            score = (score - self._stats.mean) / self._stats.std
        clip = self.settings.clip
        return score if clip is None else min(max(score, -clip), clip)
