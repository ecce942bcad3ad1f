"""One row an algorithm: what it reached, what that cost, and how its runs ended.

May import: launch.*, trainers.*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launch.compare_answers import Answers, Measures, against_itself, best_of, measure, read_answers
from launch.compare_config import CompareConfig
from launch.compare_folder import DONE, Folder
from launch.compare_labels import read_labelled
from launch.compare_methods import Method
from launch.compare_plan import BASE, BEST, Plan, run_name
from launch.compare_recipes import label_name
from launch.journal import read_rows
from trainers.calibration import Estimate
from trainers.kl_from_base import best_of_n_kl

SAMPLES = "samples.parquet"
OF_A_STEP = ("per_prompt", "updates", "warmup")  # settings that the costs are counted with
OK = "ok"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run, of several the mean; of best-of-n for each answer that is given."""

    num_labelled: float  # answers sampled from the policy in training, and labelled
    num_sampled_tokens: float | None  # of those answers
    num_trained_tokens: float | None  # prompts and answers, each as often as it was gone over
    num_updates: float  # optimizer steps of the policy
    seconds: float  # wall time of training, start-up and the sampling of labels included; evaluation is not


FREE = Cost(0.0, 0.0, 0.0, 0.0, 0.0)  # nothing is trained, and an answer is one answer


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm."""

    name: str
    title: str
    kind: str  # base, offline, online or search
    status: str  # ok, or what went wrong
    seeds: tuple[int, ...] = ()  # that were evaluated
    measures: Measures | None = None
    kl: Estimate | None = None
    kl_bound: float | None = None  # of best-of-n, whatever the rewards
    cost: Cost | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_drawn(self) -> bool:
        return self.measures is not None and self.kl is not None


Known = dict[Any, Measures]  # what was measured of evaluations that have ended: they do not change any more


def make_rows(config: CompareConfig, plan: Plan, folder: Folder, known: Known | None = None) -> list[Row]:
    """The base model, then the algorithms in their order; best-of-n has a row for each n."""
    known = {} if known is None else known
    rows = [_base(config, folder, known)]
    for method in config.methods:
        if method.kind == "search":
            rows += _best_of(config, folder, known)
        else:
            rows.append(_trained(method, config, plan, folder, known))
    return rows


def _measured(known: Known, key: Any, answers: Callable[[], Sequence[Answers]]) -> Measures:
    if key not in known:
        known[key] = measure(answers())
    return known[key]


def _base(config: CompareConfig, folder: Folder, known: Known) -> Row:
    if not folder.is_done(BASE):
        return Row(BASE, "base model", "base", _why(folder, BASE))
    name, num = BASE, config.compare.eval_samples
    if folder.is_done(BEST):  # all that are read against it deserve a base that is known better
        name, num = BEST, _num_for_best(config)
    path = folder.path / name / SAMPLES
    found = _measured(known, (BASE, name), lambda: [against_itself(read_answers(path, num, config.compare.gold))])
    return Row(BASE, "base model", "base", OK, measures=found, kl=found.kl, cost=FREE, settings={"per_prompt": num})


def _num_for_best(config: CompareConfig) -> int:
    """Answers to one prompt that were drawn for best-of-n."""
    return config.compare.eval_samples * (1 + max(config.compare.best_of))


def _best_of(config: CompareConfig, folder: Folder, known: Known) -> list[Row]:
    """No run: answers of the base model, of which the reward picks one."""
    rows, path, num = list[Row](), folder.path / BEST / SAMPLES, config.compare.eval_samples
    per_prompt, drawn = _num_for_best(config), Cost(*[0.0] * 5)
    if folder.is_done(BEST):
        drawn = _of_one(path, folder.ended[BEST].seconds)
    for n in sorted(config.compare.best_of):
        name, title = f"best_of_{n}", f"best of {n}"
        if not folder.is_done(BEST):
            rows.append(Row(name, title, "search", _why(folder, BEST), settings={"per_answer": n}))
            continue
        found = _measured(known, name, partial(_best, path, per_prompt, num, n, config.compare.gold))
        rows.append(
            Row(name, title, "search", OK, measures=found, kl=found.kl, kl_bound=best_of_n_kl(n),
                cost=Cost(*(n * value for value in astuple(drawn))), settings={"per_answer": n})
        )  # fmt: skip
    return rows


def _of_one(samples: Path, seconds: float) -> Cost:
    """Of one answer of the evaluation that drew those of best-of-n, whose start-up all of them share."""
    lengths = read_answers(samples, 1).length
    return Cost(1.0, float(lengths.mean()), 0.0, 0.0, seconds / lengths.size)


def _best(path: Path, per_prompt: int, num_answers: int, n: int, gold: str | None) -> list[Answers]:
    return [best_of(read_answers(path, per_prompt, gold), num_answers, n)]


def _trained(method: Method, config: CompareConfig, plan: Plan, folder: Folder, known: Known) -> Row:
    seeds, files, costs, wrong = list[int](), list[Path](), list[Cost](), list[str]()
    for seed in config.compare.seeds:
        name = run_name(method, seed)
        evaluation = f"{name}-eval"
        if not folder.is_done(evaluation):
            wrong.append(f"seed {seed}: {_why(folder, name, evaluation)}")
            continue
        files.append(folder.path / evaluation / SAMPLES)
        costs.append(_cost(method, seed, plan, folder))
        seeds.append(seed)
    settings = {key: value for key, value in plan.settings[method.name].items() if key not in OF_A_STEP}
    if seeds and method.kind == "offline" and not method.is_labelled:
        settings["length"] += f"; {_ranked(folder, seeds)} prompts had a preference"
    status = OK if not wrong else f"{len(wrong)} of {len(config.compare.seeds)} runs missing: {'; '.join(wrong)}"
    if not files:
        return Row(method.name, method.title, method.kind, status, settings=settings)
    num, gold = config.compare.eval_samples, config.compare.gold
    found = _measured(known, (method.name, tuple(seeds)), lambda: [read_answers(file, num, gold) for file in files])
    return Row(
        method.name, method.title, method.kind, status, tuple(seeds), found, found.kl, cost=_mean(costs),
        settings=settings,
    )  # fmt: skip


def _why(folder: Folder, *stages: str) -> str:
    """What became of the first of ``stages`` that is not done."""
    name = next(stage for stage in stages if not folder.is_done(stage))
    ended = folder.ended.get(name)
    return f"{name} has not run yet" if ended is None else f"{name} {ended.status}: {ended.why}".removesuffix(": ")


# --- what it cost -------------------------------------------------------------------------------


def _cost(method: Method, seed: int, plan: Plan, folder: Folder) -> Cost:
    name = run_name(method, seed)
    seconds, settings = folder.ended[name].seconds, plan.settings[method.name]
    rows = [row for row in read_rows(folder.path / name / "metrics.jsonl") if row.get("step", 0) > 0]
    trained = float(rows[-1]["num_tokens"]) if rows and rows[-1].get("num_tokens") is not None else None
    if method.kind == "offline":
        label = label_name(seed)
        if folder.ended.get(label) is not None and folder.ended[label].status == DONE:
            seconds += folder.ended[label].seconds
        drawn = read_labelled(folder.path / label)
        return Cost(float(drawn.num_sampled), float(drawn.num_tokens), trained, float(len(rows)), seconds)
    return Cost(
        num_labelled=sum(float(row.get("groups/num_generated") or 0.0) for row in rows) * settings["per_prompt"],
        num_sampled_tokens=_sampled_tokens(rows),
        num_trained_tokens=None if trained is None else trained * settings["passes"],
        num_updates=float(max(0, len(rows) - settings["warmup"]) * settings["updates"]),
        seconds=seconds,
    )


def _sampled_tokens(rows: Sequence[dict[str, Any]]) -> float | None:
    """Of all completions, dropped and greedy ones included; None where a step does not say."""
    total = 0.0
    for row in rows:
        rate, took = row.get("throughput/generate_tokens_per_s"), row.get("time/generate_s")
        if rate is None or took is None:
            return None
        total += float(rate) * float(took)
    return total


def _mean(costs: Sequence[Cost]) -> Cost:
    def of(name: str) -> float | None:
        values = [getattr(cost, name) for cost in costs]
        return None if None in values else sum(values) / len(values)

    return Cost(
        of("num_labelled") or 0.0, of("num_sampled_tokens"), of("num_trained_tokens"), of("num_updates") or 0.0,
        of("seconds") or 0.0,
    )  # fmt: skip


def _ranked(folder: Folder, seeds: Sequence[int]) -> str:
    """Of how many prompts an answer was preferred to another; over several seeds together."""
    counts = [read_labelled(folder.path / label_name(seed)) for seed in seeds]
    return f"{sum(c.num_ranked for c in counts)} of {sum(c.num_prompts for c in counts)}"
