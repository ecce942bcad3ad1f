"""Laws of reward functions: loading, probing, scoring, and the built-in verifiers."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym as gym
from pydantic import ValidationError

from trainers import math_verifier, rewards, verifiers
from trainers.errors import InputError
from trainers.experience import GroupRewards, Prompt, Trajectory, TrajectoryGroup
from trainers.reward_calls import LoadedReward
from trainers.rewards import RewardSettings, load_reward, probe_rewards, score_group


def prompt_of(source: Any = "1 + 1 =", **columns: Any) -> Prompt:
    return Prompt("id", np.array([5, 6, 7], np.int32), "1 + 1 =", source, columns)


def group_of(*texts: str, source: Any = "1 + 1 =", **columns: Any) -> TrajectoryGroup:
    def sample(i: int, text: str) -> Trajectory:
        return Trajectory(i, i, np.arange(i + 1, dtype=np.int32), np.zeros(i + 1, np.float32), text, "stop", ())

    return TrajectoryGroup("0", prompt_of(source, **columns), tuple(sample(i, t) for i, t in enumerate(texts)))


def reward_of(tmp_path: Path, body: str, weight: float = 1.0, name: str = "fn", **args: Any) -> LoadedReward:
    path = tmp_path / f"{name}_module.py"
    path.write_text(f"import asyncio, threading, time\nimport numpy as np\n{body}\n")
    return load_reward(RewardSettings(name=name, function=f"{path}:fn", weight=weight, args=args))


def score(
    loaded: list[LoadedReward] | LoadedReward, group: TrajectoryGroup, timeout_s: float = 20.0, num_retries: int = 0
) -> GroupRewards:
    loaded = [loaded] if isinstance(loaded, LoadedReward) else loaded
    return asyncio.run(score_group(loaded, group, timeout_s, num_retries))


def kinds(result: GroupRewards) -> dict[int, str]:
    return {i: f.kind for i, f in result.failures}


# --- names and loading ---


@pytest.mark.parametrize(
    ("function", "name"),
    [("exact", "exact"), ("my.pack:score", "score"), ("a/b/file.py:check", "check"), ("pack.mod:Cls.fn", "fn")],
)
def test_a_reward_is_named_after_the_last_part_of_its_function(function: str, name: str) -> None:
    assert RewardSettings(function=function).name == name
    assert RewardSettings(function=function, name="mine").name == "mine"


def test_an_unknown_key_or_an_infinite_weight_is_refused() -> None:
    with pytest.raises(ValidationError):
        RewardSettings(function="exact", wieght=2.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        RewardSettings(function="exact", weight=math.inf)


def test_a_function_is_found_by_builtin_name_module_path_file_and_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of("2", "3", answer="2")
    entry = EntryPoint("mine", "trainers.verifiers:exact", rewards.ENTRY_POINTS)
    monkeypatch.setattr(rewards, "entry_points", lambda group: EntryPoints([entry]))
    for function in ("exact", "trainers.verifiers:exact", "mine"):
        assert score(load_reward(RewardSettings(function=function)), group).totals.tolist() == [1.0, 0.0]
    in_file = reward_of(tmp_path, "def fn(completions, answer): return [c == a for c, a in zip(completions, answer)]")
    assert score(in_file, group).totals.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("exakt", "use exact"),
        ("no.such.module:fn", "No module named"),
        ("trainers.verifiers:nothing", "nothing"),
        ("nowhere/file.py:fn", "No such file"),
        ("trainers.verifiers:NUMBER", "not a function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_input_error(function: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_reward(RewardSettings(name="r", function=function))
    assert caught.value.field == "rewards.r.function"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["raise KeyError('x')", "def fn(:", "import sys; sys.exit(3)"])
def test_a_module_that_fails_while_it_is_imported_is_an_input_error(tmp_path: Path, body: str) -> None:
    with pytest.raises(InputError, match="does not import"):
        reward_of(tmp_path, body)


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        ("exact", {"nonsense": 1}, "nonsense"),
        ("exact", {"extract": "first"}, "last_number"),
        ("regex", {}, "pattern"),
        ("regex", {"pattern": "(("}, "no regular expression"),
        ("reasoning_gym", {"dataset": "chain_sums"}, "chain_sum"),
        ("reasoning_gym", {"dataset": "chain_sum", "extract": "first"}, "last_number"),
        ("length", {"max_tokens": 8, "buffer_tokens": 9}, "buffer_tokens"),
        ("length", {"max_tokens": 8, "buffer_tokens": 0}, "buffer_tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_load(function: str, args: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_reward(RewardSettings(function=function, args=args))
    assert caught.value.field == f"rewards.{function}.args"


# --- the protocol ---


def test_a_function_gets_exactly_the_lists_it_has_parameters_for(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    body = "def fn(completions, answer, **kwargs): SEEN.append(dict(kwargs, answer=answer)); return [1.0, 2.0]"
    loaded = reward_of(tmp_path, body)
    loaded.function.func.__globals__["SEEN"] = seen
    score(loaded, group_of("a", "b", answer="2", level=3))
    assert seen == [
        {"prompts": ["1 + 1 ="] * 2, "completion_ids": [[0], [0, 1]], "answer": ["2", "2"], "level": [3, 3]}
    ]
    narrow = reward_of(tmp_path, "def fn(level): return level", name="narrow")
    assert score(narrow, group_of("a", "b", answer="2", level=3)).totals.tolist() == [3.0, 3.0]


def test_completions_are_messages_where_the_prompt_is_messages(tmp_path: Path) -> None:
    body = (
        "MESSAGES = [{'role': 'assistant', 'content': 'x'}]\n"
        "def fn(prompts, completions): return [(type(prompts[0]) is list) + (completions[0] == MESSAGES)]"
    )
    source = [{"role": "user", "content": "1 + 1 ="}]
    assert score(reward_of(tmp_path, body), group_of("x", source=source)).totals.tolist() == [2.0]
    assert score(reward_of(tmp_path, body), group_of("x")).totals.tolist() == [0.0]


def test_a_bound_argument_is_not_overridden_by_a_column_of_its_name(tmp_path: Path) -> None:
    loaded = reward_of(tmp_path, "def fn(completions, level): return [level]", level=7)
    assert score(loaded, group_of("a", level=3)).totals.tolist() == [7.0]


def test_what_a_function_does_to_its_arguments_is_seen_by_nobody(tmp_path: Path) -> None:
    body = "def fn(entry, completions): [e.pop('a') for e in entry]; completions.clear(); return [1.0, 1.0]"
    group = group_of("x", "y", entry={"a": 1})
    loaded = reward_of(tmp_path, body)
    assert score([loaded, reward_of(tmp_path, body, name="twin")], group).failures == ()
    assert group.prompt.columns["entry"] == {"a": 1}


def test_sync_async_callable_objects_tensors_and_generators_all_score(tmp_path: Path) -> None:
    bodies = [
        "def fn(completions): return [1, True]",
        "async def fn(completions):\n    await asyncio.sleep(0)\n    return [1.0, 1.0]",
        "class C:\n    async def __call__(self, completions): return (1.0, 1.0)\nfn = C()",
        "class C:\n    def __call__(self, completions): return np.ones(2, np.float32)\nfn = C()",
        "def fn(completions): return (np.float32(1) for _ in completions)",
        "async def inner(): return [1.0, 1.0]\ndef fn(completions): return inner()",
        "import torch\ndef fn(completions): return torch.ones(2, dtype=torch.bfloat16)",
        "import torch\ndef fn(completions): return [torch.tensor(1.0), torch.tensor(1)]",
    ]
    for i, body in enumerate(bodies):
        result = score(reward_of(tmp_path, body, name=f"fn{i}"), group_of("a", "b"))
        assert (result.totals.tolist(), result.failures) == ([1.0, 1.0], ()), body


def test_functions_run_at_the_same_time(tmp_path: Path) -> None:
    body = "def fn(barrier): barrier[0].wait(10); return [1.0]"
    barrier = threading.Barrier(2)
    pair = [reward_of(tmp_path, body.replace("barrier[0]", "B"), name=n) for n in ("a", "b")]
    for loaded in pair:
        loaded.function.func.__globals__["B"] = barrier
    assert score(pair, group_of("x", barrier=0)).failures == ()


# --- failures ---


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("raise ValueError('no')", "raised"),
        ("raise SystemExit(1)", "raised"),
        ("raise StopIteration", "raised"),
        ("raise TimeoutError('theirs')", "raised"),
        ("threading.Event().wait(60)", "timeout"),
        ("return [1.0]", "wrong_count"),
        ("return None", "wrong_count"),
        ("return 1.0", "wrong_count"),
        ("return [float('nan'), float('inf')]", "nan"),
        ("return [10 ** 400, np.float64('-inf')]", "nan"),
        ("return ['1', 1j]", "not_a_number"),
        ("return [None, None]", "abstained"),
    ],
)
def test_a_failure_masks_its_samples_and_is_never_zero(tmp_path: Path, body: str, kind: str) -> None:
    failing = reward_of(tmp_path, f"def fn(completions): {body}")
    sound = reward_of(tmp_path, "def fn(completions): return [1.0, 2.0]", name="sound")
    limit_s = 1.0 if kind == "timeout" else 20.0
    alone = score(failing, group_of("a", "b"), timeout_s=limit_s)
    assert kinds(alone) == {0: kind, 1: kind}
    assert np.isnan(alone.totals).all() and np.isnan(alone.parts["fn"]).all() and not alone.valid.any()
    both = score([failing, sound], group_of("a", "b"), timeout_s=limit_s)
    assert both.parts["sound"].tolist() == [1.0, 2.0]
    if kind == "abstained":
        assert both.totals.tolist() == [1.0, 2.0]
    else:
        assert np.isnan(both.totals).all()


def test_an_async_function_that_raises_or_hangs_is_a_failure_too(tmp_path: Path) -> None:
    raising = reward_of(tmp_path, "async def fn(completions): raise ValueError('no')", name="raising")
    hanging = reward_of(tmp_path, "async def fn(completions): await asyncio.Event().wait()", name="hanging")
    assert kinds(score(raising, group_of("a"))) == {0: "raised"}
    assert kinds(score(hanging, group_of("a"), timeout_s=0.1)) == {0: "timeout"}


def test_one_bad_value_masks_one_sample(tmp_path: Path) -> None:
    result = score(
        reward_of(tmp_path, "def fn(completions): return [1.0, float('nan'), None, 0.0]"), group_of(*"abcd")
    )
    assert kinds(result) == {1: "nan", 2: "abstained"}
    assert result.valid.tolist() == [True, False, False, True]
    assert result.totals[[0, 3]].tolist() == [1.0, 0.0]


def test_the_total_is_the_weighted_sum_of_the_parts_that_apply(tmp_path: Path) -> None:
    a = reward_of(tmp_path, "def fn(completions): return [1.0, None, 3.0]", weight=2.0, name="a")
    b = reward_of(tmp_path, "def fn(completions): return [10.0, 20.0, None]", weight=-0.5, name="b")
    assert score([a, b], group_of(*"xyz")).totals.tolist() == [-3.0, -10.0, 6.0]


def test_an_exception_is_retried_and_a_wrong_value_is_not(tmp_path: Path) -> None:
    flaky = "N = []\ndef fn(completions):\n    N.append(0)\n    if len(N) < 3: raise OSError('down')\n    return [1.0]"
    assert score(reward_of(tmp_path, flaky), group_of("a"), num_retries=2).totals.tolist() == [1.0]
    assert kinds(score(reward_of(tmp_path, flaky), group_of("a"), num_retries=1)) == {0: "raised"}
    wrong = reward_of(tmp_path, "N = []\ndef fn(completions):\n    N.append(0)\n    return []", name="wrong")
    score(wrong, group_of("a"), num_retries=5)
    assert len(wrong.function.func.__globals__["N"]) == 1


def test_hung_calls_do_not_keep_later_ones_from_running(tmp_path: Path) -> None:
    hung = reward_of(tmp_path, "def fn(completions): threading.Event().wait(60)", name="hung")
    sound = reward_of(tmp_path, "def fn(completions): return [1.0]", name="sound")

    async def many() -> GroupRewards:
        await asyncio.gather(*(score_group([hung], group_of("a"), 0.05, 0) for _ in range(80)))
        return await score_group([sound], group_of("a"), 10.0, 0)

    assert asyncio.run(many()).totals.tolist() == [1.0]


# --- the probe ---


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def fn(completions): return [1 / len(c) for c in completions]", "ZeroDivisionError"),
        ("def fn(completions): return [1.0]", "wrong_count"),
        ("def fn(completions): return [float('nan')] * 2", "nan"),
        ("def fn(completions): return ['good'] * 2", "not_a_number"),
        ("def fn(completions): threading.Event().wait(60)", "timeout"),
        ("def fn(completions, solution): return [1.0] * 2", "solution.*further columns: answer"),
    ],
)
def test_the_probe_refuses_a_function_before_anything_starts(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        probe_rewards([reward_of(tmp_path, body)], [prompt_of(answer="2")], 0.5)
    assert caught.value.field == "rewards.fn.function" and caught.value.value == "fn"


def test_the_probe_accepts_every_builtin_and_one_that_abstains(tmp_path: Path) -> None:
    entry = gym.create_dataset("chain_sum", size=1, seed=1)[0]
    args: dict[str, dict[str, Any]] = {
        "reasoning_gym": {"dataset": "chain_sum"},
        "regex": {"pattern": "4"},
        "length": {"max_tokens": 8, "buffer_tokens": 4},
    }
    loaded = [load_reward(RewardSettings(function=n, args=args.get(n, {}))) for n in verifiers.BUILTINS]
    loaded.append(reward_of(tmp_path, "def fn(completions): return [None] * 2"))
    probe_rewards(loaded, [prompt_of(answer="2", entry=entry)] * 3, 60.0)
    assert verifiers.BUILTINS.keys() == verifiers.CHECKS.keys()


# --- built-in verifiers ---


@pytest.mark.parametrize("dataset", ["chain_sum", "basic_arithmetic", "letter_counting", "leg_counting"])
def test_reasoning_gym_gives_its_own_answer_full_score(dataset: str) -> None:
    for entry in gym.create_dataset(dataset, size=5, seed=3):
        entry = json.loads(json.dumps(entry))
        texts = [f" {entry['answer']}\n", "no idea", f"so <answer>{entry['answer']}</answer>"]
        assert verifiers.reasoning_gym(texts, [entry] * 3, dataset)[0] == 1.0
        tagged = verifiers.reasoning_gym(texts, [json.dumps(entry)] * 3, dataset, extract="answer_tag")
        assert tagged[2] == 1.0 and tagged[0] < 1.0
        last = verifiers.reasoning_gym([f"1 + 2 is {entry['answer']}."], [entry], dataset, extract="last_number")
        assert last == [1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("4 - 1 = 3.", "3"), ("5-3", "3"), ("it is -7", "-7"), ("1,234 or 1, 2.50", "2.50"), ("1,234", "1234"),
     ("x = +6", "6"), ("none", None)],
)  # fmt: skip
def test_the_last_number_is_found(text: str, number: str | None) -> None:
    assert verifiers.extract_answer(text, "last_number") == number


def test_math_verify_knows_equal_answers_and_abstains_on_an_unreadable_one() -> None:
    texts = ["The answer is $\\frac{1}{2}$", "0.5", "$0.25$", ""]
    assert verifiers.math_verify(texts, ["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert verifiers.math_verify(["\\boxed{x^2+2x+1}"], ["(x+1)^2"]) == [1.0]
    assert verifiers.math_verify(["4"], [""]) == [None]
    assert verifiers.math_verify([[{"role": "assistant", "content": "4"}]], [4]) == [1.0]


def test_an_endless_computation_abstains_and_does_not_freeze_the_process() -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.05):
            ticks.append(time.monotonic())

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        assert verifiers.math_verify(["$9^{9^{9}}$", "4"], ["4", "4"]) == [None, 1.0]
    finally:
        done.set()
        clock.join()
    assert max(np.diff(ticks)) < math_verifier.PAIR_LIMIT_S / 2  # other threads went on


def test_a_dead_math_process_is_replaced() -> None:
    assert verifiers.math_verify(["4"], ["4"]) == [1.0]
    child = math_verifier._child
    assert child is not None
    child.kill()
    child.wait()
    assert verifiers.math_verify(["4"], ["4"]) == [1.0]


def test_a_math_process_that_ignores_its_alarm_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verifiers.math_verify(["4"], ["4"]) == [1.0]
    with monkeypatch.context() as patched:
        patched.setattr(math_verifier, "START_LIMIT_S", 0.1)
        patched.setattr(math_verifier, "PAIR_LIMIT_S", 0.1)  # the child keeps its own, longer one
        with pytest.raises(RuntimeError, match="limit 0.2 s"):
            verifiers.math_verify(["$9^{9^{9}}$"], ["4"])
    assert verifiers.math_verify(["4"], ["4"]) == [1.0]


def test_regex_bare_number_and_exact_are_one_or_zero() -> None:
    assert verifiers.regex(["ab", "b"], "^a") == [1.0, 0.0]
    assert verifiers.bare_number(["4", " -12\n", "4.", "four", "", "1 2"]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert verifiers.exact([" 4\n", "4.0"], [4, 4]) == [1.0, 0.0]
    said = ["3 + 4 = 7", "it is 17.", "none", "-3"]
    assert verifiers.exact(said, [7, 7, 7, 3], extract="last_number") == [1.0, 0.0, 0.0, 0.0]


def test_the_length_penalty_is_equation_13_of_dapo() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 500]
    penalties = verifiers.length([[0] * n for n in lengths], max_tokens=100, buffer_tokens=20)
    assert penalties == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
