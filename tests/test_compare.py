"""Laws of a comparison: one task and one budget for all, what differs is said, and what has ended is not run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from compare_stub import Machine, config_of, prompts

from launch.cli import main
from launch.compare_config import CompareConfig
from launch.compare_methods import BEST_OF_N, DEFAULTS, METHODS
from launch.compare_page import BEGIN, END, JSON, MARKDOWN, PAGE, PLOT, renewed
from launch.compare_plan import Plan, make_plan
from launch.compare_prepare import check_rankings
from launch.compare_recipes import drawn_per_step
from launch.compare_rows import OK
from launch.config import RunConfig
from launch.overrides import resolve
from launch.tuning_config import TuningConfig
from trainers.errors import InputError
from trainers.kl_from_base import best_of_n_kl
from trainers.presets import PRESETS

PLACE = Path("/somewhere/compare")
ALL = f"compare.algorithms=[{', '.join(METHODS)}]"


def plan(*overrides: str) -> tuple[CompareConfig, Plan]:
    config = config_of(*overrides)
    return config, make_plan(config, PLACE)


def configs(made: Plan) -> dict[str, Any]:
    """Stage -> its whole configuration."""
    copied = json.loads(json.dumps(dict(made.recipes)))
    return {s.name: resolve(json.loads(json.dumps(copied[s.recipe])), s.overrides, s.name).config for s in made.stages}


def refused(*overrides: str, of_plan: bool = False) -> InputError:
    with pytest.raises(InputError) as caught:
        if of_plan:
            plan(*overrides)
        else:
            config_of(*overrides)
    assert "\n" not in str(caught.value)
    return caught.value


# --- one task, one budget -------------------------------------------------------------------------


def test_every_run_draws_the_same_number_of_answers_at_most() -> None:
    config, made = plan(ALL, "compare.seeds=[0, 3]")
    for name, found in configs(made).items():
        if isinstance(found, RunConfig):
            assert found.run.num_steps * drawn_per_step(found) == config.compare.budget, name
        elif name.startswith("label"):
            assert found.run.num_prompts * found.sampling.num_candidates == config.compare.budget


def test_what_an_algorithm_draws_besides_comes_out_of_its_budget() -> None:
    found = configs(plan(ALL)[1])
    remax, dapo, grpo = (found[f"{name}-seed-0"] for name in ("remax", "dapo", "grpo"))
    assert remax.run.samples_per_prompt == grpo.run.samples_per_prompt - 1
    assert remax.run.num_steps == dapo.run.num_steps == grpo.run.num_steps == 4
    assert dapo.run.groups_per_step * 2 == grpo.run.groups_per_step and dapo.filtering.max_refills == 1
    assert [(r.name, r.weight) for r in dapo.rewards] == [("letter", 1.0), ("overlong", 0.0)], "one reward for all"


def test_all_runs_have_the_task_in_common() -> None:
    config, made = plan(ALL, "compare.seeds=[0, 3]")
    found = configs(made)
    online = [c for c in found.values() if isinstance(c, RunConfig)]
    assert {c.algorithm.name for c in online} == set(PRESETS)
    for run in online:
        first = online[0]
        assert (run.model, run.prompts, run.rewards[0], run.generator) == (
            first.model, first.prompts, first.rewards[0], first.generator,
        )  # fmt: skip
        assert run.prompts.train.path == str(PLACE / "data/train.jsonl") and run.prompts.eval is None
        assert not run.evaluation.every
    label, judged = found["label-seed-3"], found["grpo-seed-3-eval"]
    assert label.prompts == online[0].prompts and label.run.seed == 3
    assert label.label.rewards == judged.rewards == config.rewards
    assert label.sampling.temperatures == (config.generator.sampling.temperature,)
    assert judged.base.path == label.model.path == config.model.path
    assert judged.prompts.train.path == str(PLACE / "data/held-out.jsonl")
    evaluations = [c for name, c in found.items() if name.endswith("-eval")]
    assert len({(c.run.seed, c.eval.num_samples) for c in evaluations}) == 1, "one sampling stream for all"


def test_offline_methods_of_a_seed_learn_from_one_labelling() -> None:
    found = configs(plan(ALL, "compare.seeds=[0, 3]")[1])
    for seed in (0, 3):
        offline = {n: c for n, c in found.items() if isinstance(c, TuningConfig) and n.endswith(f"-seed-{seed}")}
        assert len(offline) == 7
        paths = {c.data.train[0].path for n, c in offline.items() if not n.startswith("kto")}
        assert paths == {str(PLACE / f"label-seed-{seed}/preferences.parquet")}
        kto = offline[f"kto-seed-{seed}"]
        assert kto.data.train[0].path == str(PLACE / f"data/labelled-seed-{seed}.jsonl")
        assert kto.run.batch_size == 4 * offline[f"dpo-seed-{seed}"].run.batch_size, "as many answers, not prompts"
        assert all((c.reference is None) == (c.algorithm.loss in ("orpo", "simpo")) for c in offline.values())


def test_the_default_names_are_those_of_the_issue_and_other_spellings_are_understood() -> None:
    assert {"dpo", "ipo", "kto", "orpo", "simpo", "grpo", "rloo", "reinforce_plus_plus", "dapo", "gspo", "cispo",
            "ppo", "best_of_n"} == set(DEFAULTS)  # fmt: skip
    asked = "compare.algorithms=[REINFORCE++, reinforce++-baseline, best-of-n, dr-grpo]"
    assert config_of(asked).compare.algorithms == (
        "reinforce_plus_plus", "reinforce_plus_plus_baseline", "best_of_n", "dr_grpo",
    )  # fmt: skip


def test_an_algorithms_own_keys_win_over_those_of_its_kind_and_are_stated() -> None:
    keys = ("compare.overrides.online.learner.optimizer.lr=1e-4", "compare.overrides.gspo.learner.optimizer.lr=2e-4",
            "compare.overrides.dpo={run.num_epochs: 3, algorithm: {beta: 0.3}}")  # fmt: skip
    _, made = plan(ALL, *keys)
    found = configs(made)
    rates = {name: found[f"{name}-seed-0"].learner.optimizer.lr for name in ("grpo", "gspo", "ipo")}
    assert rates == {"grpo": 1e-4, "gspo": 2e-4, "ipo": 1e-2}
    assert (found["dpo-seed-0"].run.num_epochs, found["dpo-seed-0"].algorithm.beta) == (3, 0.3)
    assert made.settings["dpo"]["besides"] == {"run.num_epochs": 3, "algorithm.beta": 0.3}
    assert made.settings["gspo"]["lr"] == 2e-4 and made.settings["dpo"]["strength"] == "beta 0.3"


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("compare.algorithms=[dpo, grbo]", "compare.algorithms", "did you mean grpo? known are dpo"),
        ("compare.algorithms=[dpo, DPO]", "compare.algorithms", "named twice"),
        ("compare.algorithms=[]", "compare.algorithms", ""),
        ("compare.seeds=[1, 1]", "compare.seeds", "twice"),
        ("compare.budget=8", "compare.budget", "one step of 4 prompts x 4 answers is 16"),
        ("compare.budget=40", "compare.budget", "use 32 or 48"),
        ("compare.overrides.ppl={}", "compare.overrides", "did you mean ppo?"),
        ("compare.overrides.best_of_n={run.seed: 1}", "compare.overrides", "set best_of"),
        ("compare.overrides.dpo={run.seed: 1}", "compare.overrides", "dpo.run.seed would change run.seed"),
        ("compare.overrides.grpo={generator: {sampling: {temperature: 2}}}", "compare.overrides", "generator.sampling"),
        ("compare.overrides.grpo={generator: {}}", "compare.overrides", "generator.sampling"),
        ("compare.overrides.rloo={algorithm: {}}", "compare.overrides", "algorithm.name"),
        ("prompts.eval=null", "prompts.eval", "held-out prompts"),
        ("rewards=[]", "rewards", "nothing is rewarded"),
        ("rewards.0.weight=0", "rewards", "nothing is rewarded"),
        ("compare.gold=gould", "compare.gold", "none of the rewards ['letter']"),
        ("reward_models=[{name: m, path: /m}]", "reward_models.0.weight", "rewards and reward_models.0 all weigh"),
        ("judges=[{path: /j, weight: -1}]", "judges.0.weight", "all weigh"),
        ("reference.path=/models/other", "reference.path", "model.path"),
    ],
)
def test_what_makes_no_comparison_is_refused_in_one_line(override: str, field: str, words: str) -> None:
    error = refused(override)
    assert error.field == field and words in str(error)


def test_what_only_one_algorithm_cannot_do_is_refused_with_its_name() -> None:
    error = refused("compare.overrides.ipo={learner.optmizer.lr: 1}", ALL, of_plan=True)
    assert error.field == "learner.optmizer.lr" and "recipe of ipo" in str(error) and "optimizer.lr" in str(error)
    error = refused("compare.overrides.simpo={algorithm.label_smoothing: 0.1}", ALL, of_plan=True)
    assert "recipe of simpo" in str(error)
    error = refused("compare.overrides.dapo={filtering.max_refills: 2}", ALL, of_plan=True)
    assert error.field == "compare.budget" and "24" in str(error) and "compare.overrides.dapo" in str(error)


def test_a_budget_that_does_not_come_out_even_for_one_algorithm_is_refused() -> None:
    refused("compare.overrides.grpo={run.groups_per_step: 3}", ALL, of_plan=True)


# --- running --------------------------------------------------------------------------------------


def test_answers_that_may_not_fit_one_comparison_are_refused_before_anything_is_sampled() -> None:
    def refusal(longest_prompt: int, *overrides: str) -> InputError | None:
        config = config_of("learner.token_budget=64", "cluster.device=cpu", *overrides)
        assert (config.compare.samples_per_prompt, config.generator.sampling.max_tokens) == (4, 8)
        try:
            check_rankings(config, longest_prompt)
        except InputError as error:
            return error
        return None

    assert refusal(64 - 4 * 8) is None, "a CPU computes the prompt once"
    found = refusal(65 - 4 * 8)
    assert found is not None and found.field == "learner.token_budget"
    assert "4 answers may have 65 tokens" in found.reason and found.remedy == "use 65 or more"
    assert refusal(65 - 4 * 8, "compare.algorithms=[kto, grpo]") is None, "they compare nothing"
    assert refusal(64 // 4 - 8, "learner.share_prompts=false") is None
    assert refusal(64 // 4 - 7, "learner.share_prompts=false") is not None
    assert refusal(65 - 4 * 8, "compare.overrides.offline={learner.token_budget: 65}") is None


def test_every_algorithm_gets_a_row_a_mark_and_its_settings(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    rows = machine.compare(ALL, "compare.seeds=[0, 1]")
    names = ["base", *(n for n in METHODS if n != BEST_OF_N), "best_of_2", "best_of_3"]
    assert [row.name for row in rows] == names and {row.status for row in rows} == {OK}
    by_name = {row.name: row for row in rows}
    assert by_name["base"].kl is not None and by_name["base"].kl.value == 0
    drawn = pq.read_table(machine.folder / "best-of-n" / "samples.parquet")
    base = drawn["reward"].to_numpy()
    assert by_name["base"].measures is not None
    assert by_name["base"].measures.reward.value == pytest.approx(base.mean()), "by all answers there are"
    for n in (2, 3):
        row = by_name[f"best_of_{n}"]
        assert row.kl_bound == pytest.approx(best_of_n_kl(n))
        assert row.kl is not None and 0 < row.kl.low <= row.kl.value < row.kl_bound, "half of the rewards tie"
        lengths = [len(ids) for ids in drawn["completion_ids"].to_pylist()]
        assert row.cost is not None and row.cost.num_labelled == n
        assert row.cost.num_sampled_tokens == pytest.approx(n * sum(lengths) / len(lengths))
        assert row.cost.seconds == pytest.approx(n * machine.seconds / len(lengths))
    for name in ("grpo", "dpo"):
        row = by_name[name]
        assert row.seeds == (0, 1) and row.cost is not None and row.cost.num_labelled == 64
        assert row.measures is not None and row.measures.reward.n == 2 * len(prompts()[1])
        assert row.measures.win_rate.low >= 0 and row.measures.kl.value == pytest.approx(machine.kl)
    assert by_name["remax"].cost is not None and by_name["remax"].cost.num_labelled == 64
    updates = {name: row.cost.num_updates for name, row in by_name.items() if row.cost is not None}
    assert updates["dpo"] == 8 and updates["grpo"] == 4 and updates["base"] == 0
    ranked = {n for n, row in by_name.items() if "32 of 32 prompts had a preference" in row.settings.get("length", "")}
    assert ranked == {n for n, m in METHODS.items() if m.kind == "offline" and n != "kto"}
    offline, online = by_name["ipo"].cost, by_name["gspo"].cost
    assert offline is not None and online is not None
    assert offline.seconds == 2 * machine.seconds and online.seconds == machine.seconds, "labels are not free"
    text, page = ((machine.folder / name).read_text() for name in (MARKDOWN, PAGE))
    for title in ("KTO", "REINFORCE++", "best of 3", "| 3 for each given |", "for each given | \N{EN DASH} | ",
                  "(at most 0.193)", "4 steps of 4 x 3 and a greedy one"):  # fmt: skip
        assert title in text
    assert "KTO" in page and "data:image/svg+xml" in page
    written = json.loads((machine.folder / JSON).read_text())
    assert [row["name"] for row in written["rows"]] == names
    assert written["rows"][1]["measures"]["pairs"]["length_controlled"]["n"] > 0


MODEL = "reward_models=[{name: proxy, path: /models/proxy, normalize: true}]"
TRUTH = "rewards=[{name: letter, function: regex, args: {pattern: '[a-k]'}, weight: 0}]"


def test_all_learn_from_a_reward_model_where_it_is_what_weighs() -> None:
    config, made = plan(ALL, MODEL, TRUTH, "compare.gold=letter")
    runs = configs(made)
    assert {run.reward_names[-1] for run in runs.values() if isinstance(run, RunConfig)} == {"proxy"}
    label = runs["label-seed-0"].label
    assert label.source == "reward_model" and label.reward_model.path == "/models/proxy" and not label.rewards
    assert runs["grpo-seed-0-eval"].reward_names == ["letter", "proxy"]
    assert config.reward_names == ["letter", "proxy"]


def test_all_learn_from_a_judge_by_its_rubric_where_it_is_what_weighs() -> None:
    judge = "judges=[{path: /models/judge, max_tokens: 9, rubric: {axes: [{name: kind, question: '?'}]}}]"
    _, made = plan("compare.algorithms=[dpo, grpo]", judge, "rewards=[]")
    runs = configs(made)
    label = runs["label-seed-0"].label
    assert label.source == "judge" and label.judge.max_tokens == 9 and label.judge.rubric.axes[0].name == "kind"
    assert runs["grpo-seed-0"].reward_names == runs["grpo-seed-0-eval"].reward_names == ["judge_kind"]


def test_with_an_adapter_all_train_one_and_are_judged_merged() -> None:
    _, made = plan(ALL, "model.lora={rank: 4}", "compare.overrides.ppo.critic.lora={rank: 2}")
    runs = configs(made)
    trained = {name: run for name, run in runs.items() if isinstance(run, RunConfig | TuningConfig)}
    assert len(trained) == len(METHODS) - 1
    for run in trained.values():
        assert run.model.lora.rank == 4 and run.checkpoint.export_merged
        assert not (isinstance(run, RunConfig) and run.has_reference_workers)
    assert not hasattr(runs["base"].model, "lora") and not hasattr(runs["label-seed-0"].model, "lora")


def test_what_stands_for_the_truth_has_a_column_and_is_what_is_drawn(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    model = MODEL.replace("/models/proxy", "builtin:tiny-llama")
    rows = machine.compare("compare.algorithms=[dpo, grpo, best_of_n]", model, TRUTH, "compare.gold=letter")
    for row in rows:
        found = row.measures
        assert found is not None and found.gold is not None and 0 < found.gold.value < 0.5 < found.reward.value + 0.5
    (header,) = [line for line in (machine.folder / MARKDOWN).read_text().splitlines() if "| reward |" in line]
    assert "| gold |" in header and "letter, held out" in (machine.folder / PLOT).read_text()
    plain = Machine(tmp_path / "plain")
    assert plain.compare("compare.algorithms=[dpo]")[1].measures.gold is None  # type: ignore[union-attr]
    assert "| gold |" not in (plain.folder / MARKDOWN).read_text()


def test_updates_of_the_policy_are_counted_without_those_of_the_critic_alone(tmp_path: Path) -> None:
    several = "compare.overrides.online={algorithm.num_epochs: 2, algorithm.num_minibatches: 2}"
    warm = "compare.overrides.ppo.algorithm.ppo.value_warmup_steps=1"
    rows = Machine(tmp_path).compare("compare.algorithms=[grpo, ppo]", several, warm)
    costs = {row.name: row.cost for row in rows if row.cost is not None}
    assert costs["grpo"].num_updates == 4 * 4 and costs["ppo"].num_updates == 3 * 4


def test_prompts_whose_answers_are_all_alike_are_no_preference_and_the_table_says_how_many(tmp_path: Path) -> None:
    machine = Machine(tmp_path, score=lambda i: float(i < 4 and i % 2))  # only the first prompt's answers differ
    rows = machine.compare("compare.algorithms=[dpo]")
    assert "; 1 of 16 prompts had a preference" in rows[-1].settings["length"]


def test_a_page_says_what_one_seed_cannot_and_what_its_author_wants_said(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo, best_of_n]", "compare.note=Nothing was tuned.")
    text = (machine.folder / MARKDOWN).read_text()
    for words in ("Recipe cmp, seeds 0", "the same 6 held-out prompts", "the base model by 8 answers to each",
                  "the rows are no ranking", "Nothing was tuned."):  # fmt: skip
        assert words in text, words
    machine.compare("compare.algorithms=[dpo]", "compare.seeds=[0, 1]")
    assert "no ranking" not in (machine.folder / MARKDOWN).read_text()


def test_the_same_runs_give_the_same_picture(tmp_path: Path) -> None:
    pictures = []
    for name in ("a", "b"):
        machine = Machine(tmp_path / name)
        machine.compare("compare.algorithms=[dpo, grpo, best_of_n]")
        pictures.append((machine.folder / PLOT).read_bytes())
        assert pictures[-1].startswith(b"<?xml")
    assert pictures[0] == pictures[1]


# --- the page and the command ---------------------------------------------------------------------


def test_the_section_of_a_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    machine = Machine(tmp_path / "runs")
    machine.compare("compare.algorithms=[grpo]", page=page)
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith("\n\nafter\n") and "old" not in text and "| GRPO |" in text
    assert (tmp_path / "figures" / PLOT).exists() and f"(figures/{PLOT})" in text
    with pytest.raises(ValueError, match="in this order"):
        renewed(f"{END}{BEGIN}", "")


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    machine = Machine(tmp_path / "runs")
    with pytest.raises(InputError, match="--page"):
        machine.compare("compare.algorithms=[grpo]", page=page)
    assert not machine.ran


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[CompareConfig]]:
    """The exit code of the command, and the configurations that it would have compared."""
    found: list[CompareConfig] = []

    def record(config: CompareConfig, *_: Any) -> Sequence[Any]:
        found.append(config)
        return []

    monkeypatch.setattr("launch.compare.compare", record)
    return main(["compare", "cpu-compare", *arguments]), found


def test_the_options_stand_for_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, (config,) = called(
        monkeypatch, "--algorithms", "dpo,ipo", "reinforce++", "run.seed=4", "--seeds", "1,2", "--budget", "128",
        "--directory", str(tmp_path / "here"),
    )  # fmt: skip
    assert code == 0 and config.run.seed == 4
    assert config.compare.algorithms == ("dpo", "ipo", "reinforce_plus_plus")
    assert config.compare.seeds == (1, 2) and config.compare.budget == 128
    assert (config.run.directory, config.run.name) == (str(tmp_path), "here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--algorithms", "grbo"), "compare.algorithms"),
        (("--budget", "10"), "compare.budget"),
        (("--seeds", "x"), "compare.seeds"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    arguments: Sequence[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = called(monkeypatch, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and not found and words in line


def test_a_comparison_is_not_trained_and_a_run_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cpu-compare"]) == 2 and "burnish compare" in capsys.readouterr().err
    assert main(["compare", "cpu-demo"]) == 2 and "burnish train" in capsys.readouterr().err
