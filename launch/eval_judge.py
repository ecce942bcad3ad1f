"""The judge of an evaluation: each sample of the policy against the base's of the same seed, in both orders.

May import: actors.{generator_fleet, modeling}, trainers.*,
launch.{eval_config, eval_fleet, eval_prepare, judging, lanes}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.generator_fleet import GeneratorFleet
from actors.modeling import load_tokenizer
from launch.eval_config import EvalConfig
from launch.eval_fleet import GENERATOR, EvalCluster, Role
from launch.eval_prepare import PreparedEval
from launch.judging import PairJudge
from launch.lanes import in_lanes
from trainers.calibration import proportion
from trainers.experience import Trajectory, TrajectoryGroup
from trainers.labellers import parse_verdict
from trainers.win_rate import Verdict, judged_outcome

PLACE: Mapping[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said of one sample of each model."""

    said: tuple[str, str] | None  # shown (policy, base), shown (base, policy); None: it was not asked
    verdicts: tuple[Verdict | None, Verdict | None]  # read from it; None: nothing to read
    why: str | None = None  # it was not asked: "identical" (a tie) or "too_long" (left out)

    @property
    def outcome(self) -> float | None:
        """1: the policy's is better in both orders; 0: the base's; 0.5: neither; None: left out."""
        return judged_outcome(*self.verdicts)


def judge_role(config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster) -> Role | None:
    """The judge's engines."""
    if config.eval.judge is None or prepared.judge is None:
        return None
    return cluster.engines("judge", prepared.judge.path, prepared.judge.max_length, config.eval.judge.generator)


async def judge_samples(
    config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster, role: Role,
    policy: Sequence[TrajectoryGroup], base: Sequence[TrajectoryGroup],
) -> list[Judgement]:
    """[N * G], in the samples' order."""  # fmt: skip
    settings, prepared_judge = config.eval.judge, prepared.judge
    assert settings is not None and prepared_judge is not None
    async with cluster.stage([role]) as workers:
        generator = GeneratorFleet(workers[GENERATOR], settings.generator.group_deadline_s)
        places = settings.generator.max_num_seqs * settings.generator.num_workers
        tokenizer = load_tokenizer(prepared_judge.path)
        return await judge_pairs(
            PairJudge(settings, generator, tokenizer, prepared_judge.max_length, "eval.judge"), policy, base, places
        )


async def judge_pairs(
    judge: PairJudge, policy: Sequence[TrajectoryGroup], base: Sequence[TrajectoryGroup], num_at_once: int
) -> list[Judgement]:
    """[N * G].  Equal texts tie without a question: no judge tells a text from itself."""
    pairs = [
        (ours, a, b)
        for ours, theirs in zip(policy, base, strict=True)
        for a, b in zip(ours.trajectories, theirs.trajectories, strict=True)
    ]

    async def one(pair: tuple[TrajectoryGroup, Trajectory, Trajectory]) -> Judgement:
        group, a, b = pair
        if a.text == b.text:
            return Judgement(None, ("tie", "tie"), "identical")
        said = await judge.ask(group.prompt, a.text, b.text, f"{group.group_id}-{a.sample_index}")
        if said is None:
            return Judgement(None, (None, None), "too_long")
        first, second = (None if v is None else PLACE[v] for v in map(parse_verdict, said))
        return Judgement(said, (first, second))

    return await in_lanes(num_at_once, pairs, one)


def judge_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How far the judge can be believed.

    ``consistency``: share of the pairs it could be read on whose verdict survives the swap; ``first_place``: share of
    its choices that fell on the answer it was shown first, 0.5 of a judge without a favourite place.
    """
    reasons = Counter(j.why for j in judgements)
    asked = [j.verdicts for j in judgements if j.said is not None]
    read = [v for v in asked if None not in v]
    same = sum(v in (("first", "second"), ("second", "first"), ("tie", "tie")) for v in read)
    chosen = [verdict for pair in read for verdict in pair if verdict != "tie"]
    return {
        "num_asked": len(asked), "num_unparsed": len(asked) - len(read),
        "num_identical": reasons["identical"], "num_too_long": reasons["too_long"],
        "consistency": proportion(same, len(read)), "first_place": proportion(chosen.count("first"), len(chosen)),
    }  # fmt: skip


def judge_rows(policy: Sequence[TrajectoryGroup], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """A row a pair of samples, for the record."""
    samples = [(g.prompt.prompt_id, t.sample_index) for g in policy for t in g.trajectories]
    return [
        {
            "prompt_id": prompt_id, "sample_index": index, "outcome": j.outcome, "why": j.why,
            "policy_first": j.said and j.said[0], "base_first": j.said and j.said[1],
        }
        for (prompt_id, index), j in zip(samples, judgements, strict=True)
    ]  # fmt: skip
