"""LabelConfig: what ``burnish label`` samples, who labels it, and what is written.

May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from actors.judge_settings import LanguageModelSettings
from actors.settings import (
    GeneratorSettings,
    ModelSettings,
    RewardModelSettings,
    RewardWorkerSettings,
    SamplingSettings,
)
from cluster.settings import ClusterSettings
from launch.config import PromptSettings
from trainers.asking import check_places
from trainers.judge_template import JUDGE_TEMPLATE, JUDGED
from trainers.rewards import RewardSettings
from trainers.rubric import RubricSettings
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]
PRINCIPLE_TEMPLATE = JUDGE_TEMPLATE.replace(JUDGED, f"{{principle}} {JUDGED}")


class LabelRunSettings(Settings):
    """Name, place, length and seed of a labelling run."""

    name: str = Field(description="the run's folder below directory")
    directory: str = Field("runs", description="where run folders are made")
    seed: int = Field(0, ge=0, lt=2**31, description="of prompts' order, sampling streams and drawn pairs")
    num_prompts: Positive | None = Field(
        None, description="prompts to sample; beyond the dataset's size they come again, with new samples; default: all"
    )

    @model_validator(mode="after")
    def _plain_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError("name is a folder name: letters, digits, '.', '_' and '-', at most 64 of them")
        return self


class CandidateSettings(Settings):
    """How the candidates of one prompt are sampled."""

    num_candidates: Annotated[int, Field(ge=2)] = Field(2, description="K: completions of one prompt")
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1.0,), min_length=1, description="candidate i is sampled at temperature i, from the start again after the last"
    )
    max_tokens: Positive = Field(256, description="longest completion")
    stop: tuple[str, ...] = Field((), description="strings that end a completion, besides EOS")


class JudgeSettings(LanguageModelSettings):
    """A language model that is asked which of two answers is better, in both orders."""

    template: str = Field(JUDGE_TEMPLATE, description="its prompt; {prompt}, {a} and {b} are replaced")
    max_tokens: Positive = Field(32, description="longest verdict; it is decoded greedily")

    @model_validator(mode="after")
    def _shows_both_answers(self) -> Self:
        check_places(self.template, ("{a}", "{b}"))
        return self


class LabelJudgeSettings(JudgeSettings):
    """A judge of pairs, by a principle if it is given some; or of single answers, by a rubric."""

    constitution: str | None = Field(
        None, description="judge each prompt's pairs by a principle of this file (or default), put in for {principle}"
    )
    rubric: RubricSettings | None = Field(
        None, description="mark answers one by one instead; the higher weighted mean is preferred"
    )

    @model_validator(mode="after")
    def _one_way_to_judge(self) -> Self:
        if self.rubric is not None and (self.constitution is not None or self.template != JUDGE_TEMPLATE):
            raise ValueError(
                "rubric: with it single answers are marked, and constitution and template are for pairs; "
                "leave one of them out"
            )
        places = ("{principle}",)
        if self.constitution is not None:
            check_places(self.pair_template, places)
        else:
            check_places(self.template, (), places)
        return self

    @property
    def pair_template(self) -> str:
        """Its own template for principles, where there are some and no other one is given."""
        if self.constitution is not None and self.template == JUDGE_TEMPLATE:
            return PRINCIPLE_TEMPLATE
        return self.template


class LabellerSettings(Settings):
    """Who prefers."""

    source: Literal["function", "reward_model", "judge"] = Field(description="whose preferences are written")
    rewards: tuple[RewardSettings, ...] = Field(
        (), description="with source function: reward functions; the higher weighted sum is preferred"
    )
    pair: RewardSettings | None = Field(
        None,
        description="with source function, instead of rewards: a function that compares (trainers/pair_function.py)",
    )
    reward_model: RewardModelSettings | None = Field(None, description="with source reward_model")
    judge: LabelJudgeSettings | None = Field(None, description="with source judge")

    @model_validator(mode="after")
    def _one_labeller(self) -> Self:
        given = {name for name in ("rewards", "pair", "reward_model", "judge") if getattr(self, name)}
        allowed = ({"rewards"}, {"pair"}) if self.source == "function" else ({self.source},)
        if given not in allowed:
            wanted = " or ".join(next(iter(names)) for names in allowed)
            found = f", and {', '.join(sorted(given))} is given" if given else ""
            raise ValueError(f"source={self.source}: needs {wanted} and nothing else{found}; give label.{wanted}")
        names = [r.name for r in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: names must differ, got {names}; give each a name")
        return self


class KeepSettings(Settings):
    """Which preferences are written."""

    pairs: Literal["best_worst", "all", "random"] = Field(
        "best_worst", description="of K candidates: the best with the worst, every pair, or one drawn beforehand"
    )
    drop_ties: bool = Field(True, description="else a tie is written in an order drawn by chance, marked is_tie")
    drop_identical: bool = Field(True, description="leave pairs of equal texts out, before they are labelled")

    @model_validator(mode="after")
    def _best_is_no_tie(self) -> Self:
        if self.pairs == "best_worst" and not (self.drop_ties and self.drop_identical):
            raise ValueError("pairs=best_worst: a tie has no best; use all or random to keep ties or identical texts")
        return self


class OutputSettings(Settings):
    """What is written, in TRL's columns."""

    path: str | None = Field(None, description="default: preferences.FORMAT in the run folder")
    format: Literal["parquet", "jsonl"] = Field("parquet", description="of the file")
    rows: Literal["pairs", "rankings"] = Field(
        "pairs", description="prompt, chosen, rejected; or prompt, completions, ranks with all candidates of a prompt"
    )


class LabelTelemetrySettings(Settings):
    """What is shown."""

    progress: bool | None = Field(None, description="live progress; default: when the output is a terminal")


class LabellingSections(Settings):
    """What every run has that samples candidates and has them judged."""

    run: LabelRunSettings
    model: ModelSettings
    prompts: PromptSettings
    label: LabellerSettings
    generator: GeneratorSettings = GeneratorSettings()
    reward_workers: RewardWorkerSettings = RewardWorkerSettings()
    telemetry: LabelTelemetrySettings = LabelTelemetrySettings()
    cluster: ClusterSettings = ClusterSettings()


class LabelConfig(LabellingSections):
    """A complete labelling run; a recipe is one when it has the key ``label``."""

    sampling: CandidateSettings = CandidateSettings()
    keep: KeepSettings = KeepSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.prompts.eval is not None:
            raise ValueError("prompts.eval: nothing is evaluated here; leave it out")
        engines = {"generator": self.generator}
        if self.label.judge is not None:
            engines["label.judge.generator"] = self.label.judge.generator
        for name, engine in engines.items():
            if engine.sampling != SamplingSettings():
                own = "sampling" if name == "generator" else "label.judge"
                raise ValueError(f"{name}.sampling: candidates and verdicts are sampled as {own} says; use {own}")
        if self.output.rows == "rankings" and self.keep.pairs == "random":
            raise ValueError("output.rows=rankings: a random pair is no ranking; use output.rows=pairs")
        judge = self.label.judge
        if judge is not None and judge.path is None and judge.endpoint is None and self.sampling.stop:
            raise ValueError(
                "label.judge.path: the policy as its own judge would stop at sampling.stop too; give the judge a path"
            )
        longest = self.model.max_length
        if longest is not None and self.sampling.max_tokens >= longest:
            raise ValueError(
                f"sampling.max_tokens={self.sampling.max_tokens}: leaves no room for a prompt in "
                f"model.max_length={longest}; use less"
            )
        return self

    @property
    def candidate_generator(self) -> GeneratorSettings:
        """The generator's settings with the stop strings of the candidates."""
        return self.generator.model_copy(update={"sampling": SamplingSettings(stop=self.sampling.stop)})
