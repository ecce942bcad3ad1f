"""EvalConfig: which models ``burnish eval`` judges, on which prompts, by which instruments.

May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

import difflib
from typing import Annotated, Self

from pydantic import Field, model_validator

from actors.judge_settings import JudgeRewardSettings, check_judges, refuse_pairwise
from actors.settings import (
    GeneratorSettings,
    ModelSettings,
    ReferenceSettings,
    RewardModelSettings,
    RewardWorkerSettings,
)
from cluster.settings import ClusterSettings
from launch.config import PromptSettings, TelemetrySettings
from launch.label_config import JudgeSettings
from trainers.rewards import RewardSettings
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]
TOTAL = "total"  # the weighted sum, beside the parts
JUDGE = "judge"  # its verdicts, among the rewards' names


class EvalRunSettings(Settings):
    """Name, place and seed of an evaluation."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="the run's folder below directory, its name in W&B"
    )
    directory: str = Field("runs", description="where run folders are made")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of procedural prompts, sampling streams and resampling; the training run's "
        "seed gives its held-out prompts"
    )  # fmt: skip


class BaseSettings(ReferenceSettings):
    """What the policy is compared with, and how log-probs are taken for the KL."""

    path: str | None = Field(
        None, description="the model before training, with the policy's tokenizer; default: no comparison"
    )
    logprob_chunk: Positive = Field(1024, description="response positions scored at once")


class BestOfNSettings(Settings):
    """Best-of-n of the policy, from samples of their own."""

    n: tuple[Positive, ...] = Field(
        min_length=1, description="how many samples the best is taken of; the largest is how many are sampled a prompt"
    )
    scorer: str | None = Field(
        None, description="the reward that chooses the best: a reward's name or total; default: eval.win_by, or total"
    )

    @model_validator(mode="after")
    def _sizes_differ(self) -> Self:
        if len(set(self.n)) != len(self.n):
            raise ValueError(f"n: each size once, got {list(self.n)}; leave the repetition out")
        return self


class EvalSettings(Settings):
    """The instruments."""

    num_samples: Positive = Field(1, description="completions of each prompt by each model, under the same seeds")
    num_prompts: Positive | None = Field(None, description="use the first prompts only; default: all")
    win_by: str | None = Field(
        None, description="decides who wins: a reward's name, total or judge; default: total, without rewards judge"
    )
    gold: str | None = Field(
        None, description="the reward that stands for the truth: its win rate is shown beside that of win_by"
    )
    judge: JudgeSettings | None = Field(
        None, description="a language model that compares each sample of the policy with the base's, in both orders"
    )
    correct: str | None = Field(
        None, description="the reward that says, from 0 to 1, whether an answer is right; calibrates the policy"
    )
    best_of_n: BestOfNSettings | None = Field(
        None, description="choose the best of n samples of the policy by one reward, and measure it by all of them"
    )
    suites: tuple[str, ...] = Field((), description="capability, refusal, over_refusal, sycophancy, red_team; or JSONL")
    suite_max_tokens: Positive = Field(128, description="longest answer to a suite's question; decoded greedily")
    preferences: str | None = Field(
        None, description="held-out preference pairs (docs/data.md) on which reward models and judges are judged"
    )
    num_page_samples: int = Field(12, ge=0, description="prompts shown with both answers on the page")

    @model_validator(mode="after")
    def _judge_is_another_model(self) -> Self:
        if self.judge is None:
            return self
        if self.judge.path is None and self.judge.endpoint is None:
            raise ValueError("judge: nobody judges himself; give judge.path, the folder of another model, or endpoint")
        if "{principle}" in self.judge.template:
            raise ValueError("judge.template: nothing is put in the place of {principle} here; take it out")
        return self

    @model_validator(mode="after")
    def _suites_differ(self) -> Self:
        if len(set(self.suites)) != len(self.suites):
            raise ValueError(f"suites: each once, got {list(self.suites)}; leave the repetition out")
        return self


class EvalConfig(Settings):
    """A complete evaluation; a recipe is one when it has the key ``eval``."""

    run: EvalRunSettings
    model: ModelSettings
    base: BaseSettings = BaseSettings()
    prompts: PromptSettings
    eval: EvalSettings
    rewards: tuple[RewardSettings, ...] = ()
    reward_models: tuple[RewardModelSettings, ...] = ()
    judges: tuple[JudgeRewardSettings, ...] = ()
    generator: GeneratorSettings = GeneratorSettings()
    reward_workers: RewardWorkerSettings = RewardWorkerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        names = self.reward_names
        check_judges(self.judges, self.eval.num_samples)
        refuse_pairwise(self.judges, "an evaluation", "use eval.judge, which compares the policy with its base")
        parts = [*(r.name for r in self.rewards), *(part for m in self.reward_models for part in m.part_names),
                 *(part for j in self.judges for part in j.part_names)]  # fmt: skip
        if len({*parts, TOTAL, JUDGE}) != len(parts) + 2:
            raise ValueError(f"rewards: names must differ and none may be {TOTAL} or {JUDGE}, got {parts}; rename one")
        if not self.winners and self.base.path is not None:
            raise ValueError("rewards: empty, and no reward_models or eval.judge: nothing decides who wins; give one")
        if self.eval.judge is not None and self.base.path is None:
            raise ValueError("eval.judge: there is nothing to compare the policy with; give base.path or leave it out")
        for key in ("win_by", "gold", "correct"):
            value = getattr(self.eval, key)
            known = self.winners if key == "win_by" else names
            if value is not None and value not in known:
                near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)
                hint = f"did you mean {near[0]}?" if near else "give rewards"
                raise ValueError(f"eval.{key}={value!r}: is none of the rewards {known}; {hint}")
        self._check_best_of_n(names)
        if self.eval.preferences is not None and not (self.reward_models or self.judges) and self.eval.judge is None:
            raise ValueError(
                "eval.preferences: there is no reward model and no judge to be judged; give reward_models, judges or "
                "eval.judge, or leave it out"
            )
        longest, max_tokens = self.model.max_length, self.generator.sampling.max_tokens
        if longest is not None and max(max_tokens, self.eval.suite_max_tokens if self.eval.suites else 0) >= longest:
            raise ValueError(
                f"generator.sampling.max_tokens={max_tokens}: it or eval.suite_max_tokens="
                f"{self.eval.suite_max_tokens} leaves no room for a prompt in model.max_length={longest}; use less"
            )
        return self

    def _check_best_of_n(self, names: list[str]) -> None:
        asked = self.eval.best_of_n
        if asked is None:
            return
        if not names:
            raise ValueError("eval.best_of_n: nothing says which sample is best; give rewards, reward_models or judges")
        if asked.scorer is not None and asked.scorer not in (*names, TOTAL):
            near = difflib.get_close_matches(asked.scorer, [*names, TOTAL], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"eval.best_of_n.scorer={asked.scorer!r}: is none of the rewards {[*names, TOTAL]}; did you mean "
                f"{near}?"
            )

    @property
    def best_of_n_scorer(self) -> str:
        """The reward that chooses the best of n."""
        asked = self.eval.best_of_n
        own = None if asked is None else asked.scorer
        return own or (TOTAL if self.eval.win_by in (None, JUDGE) else str(self.eval.win_by))

    @property
    def winners(self) -> list[str]:
        """What can decide who wins."""
        rewards = [*self.reward_names, TOTAL] if self.reward_names else []
        return [*rewards, JUDGE] if self.eval.judge is not None else rewards

    @property
    def win_by(self) -> str:
        """What decides who wins."""
        return self.eval.win_by or (TOTAL if self.reward_names else JUDGE)

    def says_right(self, name: str) -> bool:
        """Whether reward ``name`` is known to say from 0 to 1 if an answer is right."""
        return name in (self.eval.correct, "accuracy")

    @property
    def reward_names(self) -> list[str]:
        """Parts of the reward: the functions', then the models', then the judges' axes."""
        marks = [part for judge in self.judges for part in judge.part_names]
        return [*(r.name for r in self.rewards), *(m.name for m in self.reward_models), *marks]
