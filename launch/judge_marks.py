"""A judge that marks by a rubric, on pairs that people have labelled: does it mark higher what they prefer?

May import: numpy, actors.judge_settings, launch.judge_agreement, trainers.*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.judge_settings import JudgeRewardSettings
from launch.judge_agreement import LabelledPair
from trainers.agreement import agreement
from trainers.experience import GroupRewards, Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion
from trainers.rubric import weighted_mean
from trainers.verdicts import WIN

MEAN = "mean"  # over the axes, by their weights


def as_group(pair: LabelledPair, group_id: str) -> TrajectoryGroup:
    """Both answers, the preferred one first, in the form that judges mark: each by itself, in words."""
    span = (VersionSpan(WeightVersion(0, 0), 1),)
    ids, logps = np.zeros(1, np.int32), np.zeros(1, np.float32)
    answers = (pair.better, pair.worse)
    trajectories = tuple(Trajectory(i, 0, ids, logps, text, "stop", span) for i, text in enumerate(answers))
    prompt = Prompt(pair.prompt.prompt_id, np.zeros(1, np.int32), pair.prompt.text, pair.prompt.source)
    return TrajectoryGroup(group_id, prompt, trajectories)


def marks_report(
    judge: JudgeRewardSettings, pairs: Sequence[LabelledPair], rewards: Sequence[GroupRewards], seed: int
) -> dict[str, dict[str, Any]]:
    """Axis, and the mean over all -> agreement with people and Cohen's kappa, with intervals over prompts.

    Equal marks are the judge's ties; a pair of which one answer could not be marked is left out and counted.
    """
    axes = judge.rubric.axes
    marks = {
        axis.name: np.array([reward.parts[part] for reward in rewards])
        for axis, part in zip(axes, judge.part_names, strict=True)
    }
    found = {}
    for name, values in {MEAN: _means(marks, judge), **marks}.items():
        said = [_higher(row) for row in values.reshape(-1, 2)]
        people = agreement(said, [WIN] * len(pairs), [pair.prompt.prompt_id for pair in pairs], seed=seed)
        found[name] = {"rate": people.rate, "kappa": people.kappa, "num_pairs": len(pairs),
                       "num_left_out": people.num_left_out}  # fmt: skip
    return found


def _means(marks: Mapping[str, np.ndarray], judge: JudgeRewardSettings) -> np.ndarray:
    """[pairs, 2]"""
    num_pairs = len(next(iter(marks.values())))
    rows = [[weighted_mean({name: m[i, k] for name, m in marks.items()}, judge.rubric.axes) for k in (0, 1)]
            for i in range(num_pairs)]  # fmt: skip
    return np.array(rows)


def _higher(marks: np.ndarray) -> float | None:
    if not np.isfinite(marks).all():
        return None
    return WIN if marks[0] > marks[1] else 1.0 - WIN if marks[0] < marks[1] else 0.5
