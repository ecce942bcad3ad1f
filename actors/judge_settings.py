"""Whom judges, critics and revisers are: a model in engines of our own, or one behind an endpoint.

May import: pydantic, actors.settings, trainers.{asking, judge_template, rubric, settings}.
"""

from __future__ import annotations

from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from actors.settings import GeneratorSettings, SamplingSettings
from trainers.asking import check_places
from trainers.judge_template import JUDGE_TEMPLATE
from trainers.rubric import RubricSettings
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]
OWN = ("model", "messages", "stream", "n")  # what a request says, and no parameter may
WINS = "wins"  # the part of a judge that compares
SAID = ("temperature", "max_tokens", "seed")  # what it says unless a parameter takes it out


class EndpointSettings(Settings):
    """An OpenAI-compatible endpoint: chat completions over HTTP."""

    base_url: str = Field(description="up to and without /chat/completions, for instance https://host/v1")
    model: str = Field(min_length=1, description="the model's name there; replies are cached under it")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key; default: none"
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="sent with every request as they are, for instance {top_p: 0.9}; null takes seed, temperature or "
        "max_tokens out, for a server that refuses it",
    )
    deadline_s: float = Field(60.0, gt=0, description="for one request")
    num_retries: int = Field(4, ge=0, description="of a question, before it is given up or the endpoint is checked")
    patience_s: float = Field(300.0, gt=0, description="how long nobody may be answered before the run ends")
    num_at_once: Positive = Field(16, description="requests in flight")
    requests_per_minute: Positive | None = Field(None, description="no 60 s see more; default: no limit")
    tokens_per_minute: Positive | None = Field(None, description="of questions and replies; default: no limit")
    num_requests: Positive | None = Field(None, description="budget of the run, resumed or not; default: no limit")
    num_tokens: Positive | None = Field(None, description="the same of tokens, as the endpoint counts them")
    cache: str | None = Field(
        None, description="folder of replies that runs may share; default: the folder replies of the run"
    )

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url: is no address of a server; give for instance https://host/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("base_url: a key does not belong into it; name a variable in api_key_env")
        if parts.query or parts.fragment or parts.path.endswith("/chat/completions"):
            raise ValueError("base_url: must end before /chat/completions, without ? and #; cut it there")
        taken = {name for name in SAID if self.parameters.get(name) is not None} | {*OWN} & self.parameters.keys()
        if taken:
            raise ValueError(f"parameters: {', '.join(sorted(taken))} is set by what is asked; leave it out")
        return self

    @property
    def url(self) -> str:
        """Where questions go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


class LanguageModelSettings(Settings):
    """A language model that is asked something."""

    path: str | None = Field(None, description="its folder, for engines of our own; default: the policy itself")
    endpoint: EndpointSettings | None = Field(None, description="instead of path: it is served by others")
    system: str | None = Field(None, description="system message before each question")
    chat: bool = Field(True, description="apply its chat template; an endpoint always does")
    max_length: Positive | None = Field(None, description="question + reply, tokens; default: the model's own")
    generator: GeneratorSettings = Field(GeneratorSettings(), description="its engines, where path is given")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.endpoint is None:
            return self
        if self.path is not None:
            raise ValueError(f"path={self.path}: an endpoint is given too; keep one of them")
        for name in ("chat", "max_length", "generator"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: is the server's affair with an endpoint; leave it out")
        return self


class JudgeRewardSettings(LanguageModelSettings):
    """A language model that marks every sample by a rubric, or compares the samples of a prompt."""

    name: str = Field("judge", pattern=r"^[^/<>]+$", description="parts are NAME_AXIS, in metrics and errors")
    weight: float = Field(
        1.0, allow_inf_nan=False, description="of the mean over axes, or of the share of comparisons won, in the sum "
        "of all rewards"
    )  # fmt: skip
    rubric: RubricSettings = Field(RubricSettings(), description="what is marked; each axis is a part of the reward")
    pairwise: bool = Field(
        False, description="compare a prompt's samples in twos and both orders instead: the part NAME_wins is the "
        "share of the others that a sample beats"
    )  # fmt: skip
    template: str = Field(JUDGE_TEMPLATE, description="with pairwise: {prompt}, {a} and {b} are replaced")
    max_tokens: Positive = Field(64, description="longest reply; it is decoded greedily")
    gpus_per_worker: float | None = Field(None, ge=0, description="of an engine; default: as its generator says")
    deadline_s: float = Field(900.0, gt=0, description="for one group at a worker, waiting for rate limits included")

    @model_validator(mode="after")
    def _whose_engines(self) -> Self:
        if self.path is None and self.endpoint is None:
            raise ValueError("path: nobody marks himself; give path or endpoint")
        check_places(self.template, ("{a}", "{b}"), ("{principle}",))
        if self.pairwise and self.rubric != RubricSettings():
            raise ValueError("rubric: with pairwise samples are compared and not marked; leave one of them out")
        if not self.pairwise and self.template != JUDGE_TEMPLATE:
            raise ValueError("template: it is for pairs, and marks are asked for as rubric.template says; set "
                             "pairwise, or leave it out")  # fmt: skip
        if self.endpoint is not None and self.endpoint.patience_s >= self.deadline_s:
            raise ValueError(
                f"deadline_s={self.deadline_s:g}: must be above endpoint.patience_s={self.endpoint.patience_s:g}, or a "
                "worker is taken for dead while it waits; raise it"
            )
        if not self.pairwise and (paced := self.paced_s(self.room)) >= self.deadline_s:
            raise ValueError(
                f"deadline_s={self.deadline_s:g}: {self.room} questions wait at a worker at a time, which endpoint."
                f"requests_per_minute={self.endpoint.requests_per_minute} stretches over {paced:.0f} s; raise it or "  # type: ignore[union-attr]
                "lower endpoint.num_at_once"
            )
        return self

    @property
    def room(self) -> int:
        """Samples that a worker has at a time: one half is asked about, one half keeps it from waiting for more."""
        places = self.generator.max_num_seqs if self.endpoint is None else self.endpoint.num_at_once
        return places if self.pairwise else 2 * places  # of pairs each sample is asked about more than once

    def paced_s(self, num_samples: int, group_size: int = 2) -> float:
        """How long our own limit of requests stretches the questions about so many samples."""
        per_minute = None if self.endpoint is None else self.endpoint.requests_per_minute
        num_questions = num_samples * (group_size - 1 if self.pairwise else 1)
        return 0.0 if per_minute is None else 60.0 * num_questions / per_minute

    @property
    def part_names(self) -> list[str]:
        """Parts of the reward, in order."""
        if self.pairwise:
            return [f"{self.name}_{WINS}"]
        return [f"{self.name}_{axis.name}" for axis in self.rubric.axes]


def refuse_pairwise(judges: tuple[JudgeRewardSettings, ...], where: str, remedy: str) -> None:
    """ValueError where a judge compares: its shares are of one prompt's samples, with mean 1/2 of any policy."""
    for index, judge in enumerate(judges):
        if judge.pairwise:
            raise ValueError(f"judges.{index}.pairwise: the share of the other samples that a sample beats says "
                             f"nothing across policies, and {where} is about these; {remedy}")  # fmt: skip


def check_judges(judges: tuple[JudgeRewardSettings, ...], group_size: int) -> None:
    """ValueError where a judge's engines are told to sample (marks are decoded greedily), or a group takes too long.

    Args:
        group_size: samples of a prompt.
    """
    for index, judge in enumerate(judges):
        if judge.pairwise and group_size < 2:
            raise ValueError(f"judges.{index}.pairwise: a prompt has one sample, and nothing to compare it with; leave "
                             "it out, or sample more")  # fmt: skip
        at_once = max(judge.room, group_size) if judge.pairwise else group_size
        if (paced := judge.paced_s(at_once, group_size)) >= judge.deadline_s:
            raise ValueError(
                f"judges.{index}.deadline_s={judge.deadline_s:g}: endpoint.requests_per_minute stretches the questions "
                f"about {at_once} samples over {paced:.0f} s; raise one of them"
            )
        if judge.generator.sampling != SamplingSettings():
            name = f"judges.{index}.generator.sampling"
            raise ValueError(f"{name}: marks are decoded greedily, up to judges.{index}.max_tokens; leave it out")
