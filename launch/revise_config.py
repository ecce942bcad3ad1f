"""ReviseConfig: which answers ``burnish revise`` has criticised and revised, by whom, and what is written.

May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from actors.judge_settings import LanguageModelSettings
from actors.settings import GeneratorSettings, ModelSettings, SamplingSettings
from cluster.settings import ClusterSettings
from launch.config import PromptSettings
from launch.label_config import PRINCIPLE_TEMPLATE, JudgeSettings, LabelRunSettings, LabelTelemetrySettings, Positive
from trainers.constitution import WritingSettings
from trainers.settings import Settings


class AnswerSettings(Settings):
    """How the answers that are revised are sampled."""

    temperature: float = Field(1.0, ge=0, description="of the policy's answers; 0: greedy")
    max_tokens: Positive = Field(256, description="longest completion")
    stop: tuple[str, ...] = Field((), description="strings that end a completion, besides EOS")


class RevisionJudgeSettings(JudgeSettings):
    """Who says whether a revised answer is better than the original; {principle} are those it was revised by."""

    template: str = Field(
        PRINCIPLE_TEMPLATE, description="its prompt; {prompt}, {a} and {b} are replaced, {principle} too if it is there"
    )


class ReviseSettings(WritingSettings):
    """Critique and revision by a constitution."""

    constitution: str = Field("default", description="YAML or JSON file of principles, or the one that comes with it")
    answer_column: str | None = Field(
        None, description="column of prompts.train that holds the answers to revise; default: the policy is sampled"
    )
    writer: LanguageModelSettings = Field(
        LanguageModelSettings(), description="who criticises and revises; default: the policy itself"
    )
    judge: RevisionJudgeSettings | None = Field(None, description="compares revision and original, in both orders")
    keep: Literal["all", "wins"] = Field(
        "all", description="which revisions are SFT rows: all, or those that the judge prefers in both orders"
    )

    @model_validator(mode="after")
    def _wins_are_judged(self) -> Self:
        if self.keep == "wins" and self.judge is None:
            raise ValueError("keep=wins: nobody says which revision wins; give judge, or keep=all")
        return self


class RevisedSettings(Settings):
    """What is written."""

    format: Literal["parquet", "jsonl"] = Field("parquet", description="of sft.FORMAT and preferences.FORMAT")


class ReviseConfig(Settings):
    """A complete run of critiques and revisions; a recipe is one when it has the key ``revise``."""

    run: LabelRunSettings
    model: ModelSettings
    prompts: PromptSettings
    sampling: AnswerSettings = AnswerSettings()
    revise: ReviseSettings = ReviseSettings()
    output: RevisedSettings = RevisedSettings()
    generator: GeneratorSettings = GeneratorSettings()
    telemetry: LabelTelemetrySettings = LabelTelemetrySettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.prompts.eval is not None:
            raise ValueError("prompts.eval: nothing is evaluated here; leave it out")
        engines = {"generator": self.generator, "revise.writer.generator": self.revise.writer.generator}
        if self.revise.judge is not None:
            engines["revise.judge.generator"] = self.revise.judge.generator
        for name, engine in engines.items():
            if engine.sampling != SamplingSettings():
                raise ValueError(f"{name}.sampling: answers are sampled as sampling says, critiques and revisions as "
                                 "revise says; leave it out")  # fmt: skip
        if self.revise.answer_column is not None and self.sampling != AnswerSettings():
            raise ValueError("sampling: answers come from revise.answer_column, so none is sampled; leave it out")
        if self.sampling.stop and "generator" in self.asked:
            raise ValueError("sampling.stop: the policy would stop there as writer or judge too; leave it out, or give "
                             "revise.writer and revise.judge a path or an endpoint")  # fmt: skip
        return self

    @property
    def asked(self) -> dict[str, LanguageModelSettings]:
        """Writer and judge by the role that serves them: ``generator`` where one of them is the policy."""
        found: dict[str, LanguageModelSettings] = {}
        for name, model in (("writer", self.revise.writer), ("judge", self.revise.judge)):
            if model is not None and model.endpoint is None:
                found["generator" if model.path is None else name] = model
        return found

    @property
    def engines(self) -> dict[str, GeneratorSettings]:
        """The engines that are needed, by role; none where answers, writer and judge all come from elsewhere."""
        found = {role: model.generator for role, model in self.asked.items() if role != "generator"}
        if self.revise.answer_column is None or "generator" in self.asked:
            sampling = SamplingSettings(stop=self.sampling.stop)
            found["generator"] = self.generator.model_copy(update={"sampling": sampling})
        return found
