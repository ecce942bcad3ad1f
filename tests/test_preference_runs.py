"""Whole runs of offline preference learning: refused in one line, stopped by their alarm, resumed, on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_kit import NUM_STEPS, OVERRIDES, RUN_S, TINY, hf_model, rows_of, run, weights

from actors.state_saving import SaveBegun, SaveOutcome
from launch.cli import main
from launch.preference_task import PreferenceTask
from trainers.preference_training import LOSSES, LossName
from trainers.reference_logps import reference_rows

pytestmark = pytest.mark.usefixtures("one_thread")

# --- refused before anything is allocated ---------------------------------------------------------


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main(list(words)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("burnish: ") and "; " in lines[0], lines
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("algorithm.loss=orpo", "reference.num_workers=2"),
         ("reference = ", "algorithm.loss=orpo has no reference", "leave the section out")),
        (("algorithm.loss=simpo", "reference.path=builtin:tiny-llama"), ("algorithm.loss=simpo has no reference",)),
        (("algorithm.loss=ipo", "algorithm.label_smoothing=0.1"),
         ("algorithm.label_smoothing = 0.1", "loss=ipo has no label smoothing, only sigmoid and robust have")),
        (("algorithm.gamma=0.3",), ("algorithm.gamma = 0.3", "loss=sigmoid has no gamma, only simpo has")),
        (("algorithm.loss=dpo",), ("algorithm.loss = 'dpo'", "sigmoid", "robust", "ipo", "kto", "orpo", "simpo")),
        (("algorithm.loss=robust",), ("algorithm.label_smoothing", "give that share, or use loss=sigmoid")),
        (("alarms.action=roll_back",), ("alarms.action = 'roll_back'", "only a run that samples goes back")),
        (("algorithm.loss=kto", f"model.path={TINY}"), ("data.train.0 row 1", "give prompt, completion, label")),
        ((*OVERRIDES["kto"], f"model.path={TINY}"), ("data.train.0 row 1", "pairs are needed", "algorithm.loss=kto")),
        (("reference.token_budget=64", f"model.path={TINY}"), ("reference.token_budget = 64", "raise it")),
        (("reference.path=nowhere", f"model.path={TINY}"), ("reference.path = 'nowhere'",)),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_one_line(
    overrides: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capfd, "train", "cpu-dpo", f"run.directory={tmp_path / 'runs'}", *overrides)
    for words in expected:
        assert words in line, line
    assert not (tmp_path / "runs").exists()


def test_a_reference_beside_another_algorithm_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, "train", "cpu-sft", "reference.num_workers=2")
    assert "algorithm.name=sft has no reference" in line


# --- the driver, with a rank that only tells a story ------------------------------------------------


class Falling:
    """Both kinds of answers become less likely under it, and the margin grows."""

    def __init__(self, **kwargs: Any) -> None:
        assert kwargs["reference"].keys() == {"train", "held_out"} and kwargs["algorithm"].loss == "sigmoid"
        assert all(len(reference_rows(Path(file))) for file in kwargs["reference"].values())
        self.num_updates = 0

    def update(self, indices: list[int], step: int) -> dict[str, float]:
        self.num_updates = step + 1
        return {"loss": 0.6, "num_tokens": 10.0 * len(indices)}

    def evaluate(self) -> dict[str, float]:
        worse = float(self.num_updates)
        return {"loss": 0.6, "rewards/chosen": -worse, "rewards/rejected": -3 * worse, "rewards/margins": 2 * worse}

    def begin_save(self, directory: str) -> SaveBegun:
        Path(directory).mkdir()
        (Path(directory) / "state").write_text(str(self.num_updates))
        return SaveBegun(0.0, 0)

    def save_outcome(self) -> SaveOutcome:
        return SaveOutcome({}, 0.0)

    def load(self, directory: str) -> None:
        self.num_updates = int((Path(directory) / "state").read_text())

    def export(self, directory: str) -> None:
        Path(directory).mkdir(parents=True)


def test_the_alarm_of_falling_likelihood_stops_a_run_with_a_checkpoint_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreferenceTask, "rank_class", Falling)
    command = [
        "train", "cpu-dpo", f"run.directory={tmp_path}", "run.name=run", f"model.path={TINY}", "model.dtype=float32",
        "run.num_steps=8", "run.batch_size=4", "data.train.0.args.num=12", "data.eval.args.num=4", "evaluation.every=1",
        "checkpoint.every=0", "alarms.actions.falling_likelihood=stop", "cluster.backend=in_process",
        "telemetry.wandb=disabled",
    ]  # fmt: skip
    assert main(command) == 0
    events = rows_of(tmp_path / "run", "events.jsonl")
    (alarm,) = [e for e in events if e["kind"] == "alarm"]
    # Evaluated at steps 0 to 4: the trend of the first four readings, and that of the next four.
    assert (alarm["name"], alarm["step"], alarm["since"], alarm["action"]) == ("falling_likelihood", 4, 3, "stop")
    assert events[-1]["kind"] == "stopped" and events[-1]["step"] == 4
    assert [e["source"] for e in events if e["kind"] == "reference"] == ["computed", "computed"]
    assert main([*command, "--resume"]) == 0
    events = rows_of(tmp_path / "run", "events.jsonl")
    assert len([e for e in events if e["kind"] == "alarm"]) == 1, "it is raised already"
    assert events[-1]["kind"] == "finished" and [e["source"] for e in events if e["kind"] == "reference"][2:] == [
        "cache", "cache"
    ]  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(9)) and rows[8]["num_tokens"] == 8 * 40


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S)
@pytest.mark.parametrize("name", [*LOSSES, "conservative"])
def test_a_run_of_each_loss_learns_records_and_exports(name: str, runs: Path) -> None:
    loss: LossName = "sigmoid" if name == "conservative" else name  # type: ignore[assignment]
    smoothed = ("algorithm.label_smoothing=0.1",) if name == "conservative" else ()
    folder = run(runs, loss, "data.train.0.args.num=8", *smoothed, name=name)  # all of it in every step
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[-1]["loss"] < rows[1]["loss"] and rows[-1]["rewards/margins"] > rows[1]["rewards/margins"]
    assert all(math.isfinite(row["eval/loss"]) for row in rows[:: NUM_STEPS // 2])
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert all(math.isfinite(row[metric]) for row in rows[1:])
    if loss in ("sigmoid", "robust"):
        for value in (rows[0]["eval/loss"], rows[1]["loss"]):
            assert value == pytest.approx(math.log(2), abs=1e-4)
    if loss == "kto":
        assert rows[1]["kl"] >= 0 and rows[0]["eval/loss"] == pytest.approx(0.5, abs=1e-3)
    events = rows_of(folder, "events.jsonl")
    assert events[-1]["kind"] == "finished"
    sources = {e["source"] for e in events if e["kind"] == "reference"}
    assert bool(sources) == LOSSES[loss].has_reference
    before = hf_model().state_dict()
    assert any(not torch.equal(before[key], tensor) for key, tensor in weights(folder).items())


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_S)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_cut(tmp_path: Path) -> None:
    whole = run(tmp_path, "sigmoid", name="whole")
    run(tmp_path, "sigmoid", "run.num_steps=4", name="cut")
    resumed = run(tmp_path, "sigmoid", "--resume", name="cut")
    assert [row["step"] for row in rows_of(resumed)] == list(range(NUM_STEPS + 1))
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_S)
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_two_ranks_with_zero_2_under_ray_train_as_one_rank_does(loss: str, tmp_path: Path) -> None:
    one = run(tmp_path, loss, name="one")
    two = run(
        tmp_path, loss, "cluster.backend=ray", "learner.num_workers=2", "learner.zero_stage=2",
        "learner.token_budget=400", "model.max_length=256", f"algorithm.reference_cache={tmp_path / 'other'}",
        name="two",
    )  # fmt: skip
    for ours, theirs in zip(rows_of(two), rows_of(one), strict=True):
        for name in {"loss", "grad_norm", "eval/loss", "kl", "rewards/margins", "logps/chosen"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3), name
    expected = weights(one)
    assert all(torch.allclose(tensor, expected[name], atol=2e-4) for name, tensor in weights(two).items())
