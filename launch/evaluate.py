"""``burnish eval``: one policy against its base, by every instrument there is.

    prompts + suites -> policy's engines -> base's engines -> rewards -> judge -> log-probs by both -> report
                                                              pairs  -> reward models              ->

Everything that can be refused is refused before Ray starts; models follow each other, so each has the memory alone.
May import: everything.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actors.generator_fleet import GeneratorFleet
from actors.mixed_scorer import MixedScorer
from actors.scorer_pools import ReferencePool, RewardModelPool, RewardPool
from cluster.transport import fetch
from launch.eval_config import EvalConfig
from launch.eval_files import write_results
from launch.eval_fleet import FUNCTIONS, GENERATOR, LOGPROBS, EvalCluster, Role
from launch.eval_judge import judge_pairs, judge_role, open_judge
from launch.eval_pairs import SCORED_AT_ONCE, as_payload, judge_reward_models, mark_labelled
from launch.eval_prepare import REPORT, PreparedEval, check_eval_folder, prepare_eval
from launch.eval_report import BASE, POLICY, POOL, Answers, Measured, build_report
from launch.judge_agreement import judge_labelled
from launch.lanes import in_lanes
from trainers.errors import InputError
from trainers.experience import Prompt, TrajectoryGroup, decode_group, decode_logprobs
from trainers.protocols import GroupRequest
from trainers.sampling_seeds import sample_seed
from trainers.verdicts import Judgement

PAYLOAD_DEADLINE_S = 120.0
OVERSUPPLY = 2  # groups in flight for each place: no worker runs dry, and none waits out a deadline in a queue
HELD_OUT = -1  # the turn of a held-out prompt, as in trainers/evaluation.py: training never draws these streams


def evaluate_models(config: EvalConfig, console: Console) -> Path:
    """Sample, score and compare.  Returns the report; the page and the samples stand beside it.

    Raises:
        InputError: something in the configuration, the models, the data or a suite cannot be used.
    """
    folder = check_eval_folder(config)
    prepared = prepare_eval(config)
    num_questions = sum(len(suite.prompts) for suite in prepared.suites)
    _say(console, f"{config.run.name}: {len(prepared.prompts)} prompts of {prepared.stream}, "
                  f"{config.eval.num_samples} samples each, {num_questions} questions in suites")  # fmt: skip
    measured = asyncio.run(_measure(config, prepared, console))
    write_results(folder, config, prepared, measured, build_report(config, prepared, measured), console)
    return folder / REPORT


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


async def _measure(config: EvalConfig, prepared: PreparedEval, console: Console) -> Measured:
    paths = {POLICY: prepared.model_path} | ({} if prepared.base_path is None else {BASE: prepared.base_path})
    cluster = EvalCluster(config)
    try:
        engines = {who: cluster.engines(who, path, prepared.max_length) for who, path in paths.items()}
        scorers, judged = cluster.scorers(prepared.model_path), cluster.judged_models(prepared.model_path)
        judge = judge_role(config, prepared, cluster)
        first = [engines[POLICY]], scorers, [cluster.logprobs(prepared.model_path)], [] if judge is None else [judge]
        for stage in first:
            cluster.layout(stage)  # a shortfall is said now, not after an hour of sampling
        answers: dict[str, Answers] = {}
        for who, role in engines.items():
            answers |= await _sample(config, prepared, cluster, role, who, console)
        if scorers:
            answers = await _score(config, cluster, scorers, answers, console)
        judgements: list[Judgement] = []
        of_people: list[Judgement] = []
        if prepared.judge is not None:
            started = time.perf_counter()
            async with open_judge(config, prepared, cluster, judge) as (asked, num_at_once):
                sides = answers[POLICY].groups, answers[BASE].groups
                judgements = await judge_pairs(asked, *sides, num_at_once)
                of_people = await judge_labelled(asked, prepared.labelled, num_at_once)
            _say(console, f"judge: {time.perf_counter() - started:.1f} s")
        logprobs = None
        if BASE in paths:
            groups = answers[POLICY].groups
            ours, theirs = [await _logprobs(cluster, path, config, groups) for path in paths.values()]
            logprobs = ours, theirs
        pair_scores = {}
        if prepared.pairs:
            pair_scores = await judge_reward_models(config, prepared, cluster, judged, console)
        marked = {}
        if prepared.labelled:
            rubric_judges = [role for role in scorers if role.name.startswith("judges.")]
            marked = await mark_labelled(config, prepared, cluster, rubric_judges)
    finally:
        cluster.close()
    return Measured(
        answers[POLICY], answers.get(BASE), logprobs, pair_scores, judgements, answers.get(POOL), of_people, marked
    )


async def _sample(
    config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster, role: Role, who: str, console: Console
) -> dict[str, Answers]:
    """One model's completions of every prompt, and its greedy answers to the suites; of the policy its pool besides."""
    num_samples, settings, asked = config.eval.num_samples, config.generator, config.eval.best_of_n
    requests = _requests(config, prepared.prompts, "eval", range(num_samples))
    # Streams of its own: no opponent of the best is among those that it is taken of.
    pool = range(num_samples, num_samples + max(asked.n)) if who == POLICY and asked is not None else range(0)
    drawn = _requests(config, prepared.prompts, POOL, pool) if pool else []
    questions = [
        GroupRequest(f"{suite.name}-{i}", prompt, 1, (0,), 1.0, config.eval.suite_max_tokens, greedy=True)
        for suite in prepared.suites
        for i, prompt in enumerate(suite.prompts)
    ]
    places = settings.max_num_seqs * settings.num_workers
    started = time.perf_counter()
    async with cluster.stage([role]) as workers:
        ready = time.perf_counter()
        generator = GeneratorFleet(workers[GENERATOR], settings.group_deadline_s)

        async def answer(request: GroupRequest) -> TrajectoryGroup:
            generated = await generator.generate(request)
            return decode_group(fetch(generated.payload, PAYLOAD_DEADLINE_S))

        found = await in_lanes(-(-OVERSUPPLY * places // num_samples), [*requests, *questions], answer)
        pooled = await in_lanes(-(-OVERSUPPLY * places // len(pool)), drawn, answer) if drawn else []
    took = time.perf_counter() - ready
    num_tokens = sum(t.num_tokens for group in [*found, *pooled] for t in group.trajectories)
    _say(console, f"{who}: {num_tokens} tokens in {took:.1f} s ({num_tokens / took:.0f}/s), "
                  f"engines ready in {ready - started:.1f} s")  # fmt: skip
    texts = iter(group.trajectories[0].text for group in found[len(requests) :])
    suites = {suite.name: [next(texts) for _ in suite.items] for suite in prepared.suites}
    return {who: Answers(found[: len(requests)], suites)} | ({POOL: Answers(pooled, {})} if pooled else {})


def _requests(config: EvalConfig, prompts: Sequence[Prompt], name: str, streams: range) -> list[GroupRequest]:
    """One group a prompt, a sample for each of the random ``streams``."""
    sampling = config.generator.sampling
    return [
        GroupRequest(
            group_id=f"{name}-{i}", prompt=prompt, num_samples=len(streams),
            seeds=tuple(sample_seed(config.run.seed, prompt.prompt_id, s, HELD_OUT) for s in streams),
            temperature=sampling.temperature, max_tokens=sampling.max_tokens,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


async def _score(
    config: EvalConfig, cluster: EvalCluster, roles: Sequence[Role], answers: dict[str, Answers], console: Console
) -> dict[str, Answers]:
    """The same answers with their rewards."""
    workers = config.reward_workers
    # Every try of a function, and as long again for the groups before it.
    deadline_s = 2 * workers.timeout_s * (workers.num_retries + 1) + 60.0
    models = {f"reward_models.{i}": model for i, model in enumerate(config.reward_models)}
    judges = {f"judges.{i}": judge for i, judge in enumerate(config.judges)}
    started = time.perf_counter()
    async with cluster.stage(roles) as groups:
        scorer = MixedScorer(
            [
                RewardPool(group, judges[name].deadline_s, room=judges[name].room)
                if name in judges
                else RewardPool(group, deadline_s)
                if name == FUNCTIONS
                else RewardModelPool(group, models[name].deadline_s, models[name].token_budget)
                for name, group in groups.items()
            ]
        )
        num_lanes = SCORED_AT_ONCE * max(len(role.kwargs) for role in roles)
        found = {}
        for who, side in answers.items():
            rewards = await in_lanes(num_lanes, [as_payload(g) for g in side.groups], scorer.score)
            found[who] = Answers(side.groups, side.suites, rewards)
    num_failed = sum(
        len({(i, f.reward) for i, f in r.failures if f.kind != "abstained"})
        for side in found.values() for r in side.rewards
    )  # fmt: skip
    failed = f", {num_failed} rewards failed" if num_failed else ""
    _say(console, f"rewards: {time.perf_counter() - started:.1f} s{failed}")
    return found


async def _logprobs(
    cluster: EvalCluster, path: str, config: EvalConfig, answered: Sequence[TrajectoryGroup]
) -> list[np.ndarray]:
    """float32 [T] of every sample under the model in ``path``, at the sampling temperature."""
    async with cluster.stage([cluster.logprobs(path)]) as workers:
        pool = ReferencePool(workers[LOGPROBS], config.base.deadline_s, config.base.token_budget)

        async def score(group: TrajectoryGroup) -> list[np.ndarray]:
            return decode_logprobs(fetch(await pool.logprobs(as_payload(group)), PAYLOAD_DEADLINE_S))

        rows = await in_lanes(SCORED_AT_ONCE * config.base.num_workers, answered, score)
    return [row for group in rows for row in group]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m launch.evaluate RECIPE [key=value ...]``."""
    from launch.overrides import load_config

    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    config: Any = load_config(arguments.recipe, arguments.overrides).config
    if not isinstance(config, EvalConfig):
        raise InputError("recipe", arguments.recipe, "is no evaluation's recipe", "give it a section eval")
    evaluate_models(config, Console())
    return 0


if __name__ == "__main__":
    main()
