"""Laws of the folder of ``make chaos``: it can be gone on with, and nothing that failed is forgotten by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from scripts import chaos
from scripts.chaos import mean_reward, plan, run_all
from scripts.chaos_folder import FolderError, Planned, open_folder, read_outcome, write_outcome
from scripts.chaos_run import Outcome, RunOutcome
from scripts.chaos_runs import FAMILIES
from scripts.disk import Disk, FileLimit

FAULT = Outcome(3, "kill_generator", "pushing", 7, ("generator-1",), 0.25, 31.5, False, "it ended")
FAMILY = tuple(FAMILIES)


def test_a_folder_of_the_same_schedule_is_gone_on_with_and_another_is_refused_untouched(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "chaos"
    open_folder(directory, plan(0, 100, FAMILY))
    before = {path: path.read_bytes() for path in directory.iterdir()}
    open_folder(directory, plan(0, 100, FAMILY))
    for other in (plan(1, 100, FAMILY), plan(0, 101, FAMILY), plan(0, 100, ["async"])):
        with pytest.raises(FolderError, match="another schedule; remove it or give another --directory"):
            open_folder(directory, other)
    with pytest.raises(FolderError, match="is not of chaos; remove it or give another"):
        open_folder(tmp_path, plan(0, 100, FAMILY))
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = RunOutcome("async-0", 256, [FAULT, replace(FAULT, detected_s=None)], 3, 1, 0, 12.5, "it hung")
    assert read_outcome(tmp_path, "async-0") is None
    write_outcome(tmp_path, whole)
    assert read_outcome(tmp_path, "async-0") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["async-0.outcome.json"]


def test_runs_that_are_over_are_not_run_again_even_those_that_failed_and_the_rest_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [Planned(name, "small", 0, 16) for name in ("done", "failed", "stopped", "new")]
    kept = [RunOutcome("done", 16, num_starts=2), RunOutcome("failed", 16, problem="it hung")]
    for outcome in kept:
        write_outcome(tmp_path, outcome)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "metrics.jsonl").write_text('{"step": 1}\n')
    ran: list[str] = []

    class Run:
        """Leaves nothing."""

        def __init__(self, name: str, folder: Path, *_: object) -> None:
            assert not folder.exists(), "what a stopped run left is no start for another"
            self._name = name

        def go(self) -> RunOutcome:
            ran.append(self._name)
            return RunOutcome(self._name, 16)

    monkeypatch.setattr(chaos, "ChaosRun", Run)
    disk: Disk = FileLimit(tmp_path)
    for expected in (["stopped", "new"], []):
        ran.clear()
        outcomes, counts = run_all(planned, tmp_path, disk, Console(quiet=True))
        assert ran == expected and not counts
        assert outcomes == [*kept, RunOutcome("stopped", 16), RunOutcome("new", 16)]


def test_steps_that_were_added_for_faults_do_not_count_in_the_reward(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "reward": {r}}}\n' for s, r in
                                                    ((1, 0.0), (2, 1.0), (3, 9.0))))  # fmt: skip
    assert mean_reward(tmp_path, 2) == 0.5
