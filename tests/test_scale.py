"""`burnish scale`: what is asked, who answers, what is refused in one line."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.assemble import why_not
from launch.cli import main
from launch.scale import ScaleDesk, parse_scale, scale
from trainers.errors import InputError

LIMIT_S = 20.0


class Fleet:
    num_wanted = 2

    def __init__(self) -> None:
        self.asked: list[int] = []

    def scale(self, num_workers: int) -> None:
        self.asked.append(num_workers)


class Driver:
    """A desk with a journal, as a run has one."""

    def __init__(self, folder: Path, refusal: Callable[[int], str] = lambda n: "") -> None:
        self.folder, self.fleet = folder, Fleet()
        (folder / "events.jsonl").touch()
        self.desk = ScaleDesk(folder, self.fleet, refusal, self.event, poll_s=0.01)  # type: ignore[arg-type]

    def event(self, kind: str, **fields: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as out:
            out.write(json.dumps({"kind": kind, **fields}) + "\n")

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def answers(self, ask: Callable[[], Any]) -> Any:
        """What ``ask`` gives while the desk is open."""

        async def law() -> Any:
            listening = asyncio.create_task(self.desk.run())
            try:
                async with asyncio.timeout(LIMIT_S):
                    while not (self.folder / "control" / "driver.json").exists():  # noqa: ASYNC110
                        await asyncio.sleep(0)
                    return await asyncio.to_thread(ask)
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

        return asyncio.run(law())


def test_a_live_run_takes_the_number_and_says_so(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    line = driver.answers(lambda: scale(tmp_path, parse_scale(["generators=5"]), LIMIT_S))
    assert driver.fleet.asked == [5] and "2 -> 5 generators" in line
    (event,) = driver.events()
    assert event["kind"] == "scale_accepted" and event["wanted"] == 5
    assert list((tmp_path / "control").iterdir()) == [], "the request is gone, and with the driver its mark"


def test_what_the_run_cannot_have_is_refused_with_its_reason(tmp_path: Path) -> None:
    driver = Driver(tmp_path, lambda n: f"{n} generators hold {n} GPUs, and the cluster had 4")
    with pytest.raises(InputError, match="scale = 'generators=9': 9 generators hold 9 GPUs, and the cluster had 4; "):
        driver.answers(lambda: scale(tmp_path, parse_scale(["generators=9"]), LIMIT_S))
    assert driver.fleet.asked == []


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"generators": 0}', '{"generators": "3"}', '{"generators": 2.5}', '{"generators": true}',
             '{"generators": 3, "learners": 1}', '{"generators": 3}' + " " * 5000],
)  # fmt: skip
def test_a_request_that_is_none_is_refused_and_removed_and_the_desk_stays_open(tmp_path: Path, body: str) -> None:
    driver = Driver(tmp_path)

    def ask() -> str:
        (tmp_path / "control" / "request-00.json").write_text(body)
        return scale(tmp_path, parse_scale(["generators=1"]), LIMIT_S)

    assert "2 -> 1" in driver.answers(ask)
    assert [e["kind"] for e in driver.events()] == ["scale_refused", "scale_accepted"]
    assert driver.fleet.asked == [1] and driver.events()[0]["reason"]


def test_a_request_that_is_withdrawn_between_two_looks_at_it_costs_the_desk_nothing(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.desk._answer(tmp_path / "control" / "request-00.json")
    assert driver.events() == [] == driver.fleet.asked


def test_requests_of_an_earlier_driver_are_not_carried_out(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "request-00.json").write_text('{"generators": 7}')
    driver = Driver(tmp_path)
    driver.answers(lambda: scale(tmp_path, parse_scale(["generators=1"]), LIMIT_S))
    assert driver.fleet.asked == [1]


@pytest.mark.parametrize(
    "words", [["generators"], ["generators="], ["generators=0"], ["generators=-1"], ["generators=1.5"],
              ["generators=²"], ["learners=2"], ["generators=1", "generators=2"]],
)  # fmt: skip
def test_a_wrong_command_is_one_line_and_exit_2(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "generators=2" in said


def test_no_run_and_no_driver_and_no_answer_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        scale(tmp_path, parse_scale(["generators=2"]))
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(InputError, match="no driver listens"):
        scale(tmp_path, parse_scale(["generators=2"]))
    (tmp_path / "control").mkdir()
    mark = tmp_path / "control" / "driver.json"
    mark.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    with pytest.raises(InputError, match="no driver listens"):
        scale(tmp_path, parse_scale(["generators=2"]))
    mark.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    with pytest.raises(InputError, match=r"did not answer in 0\.3 s; .*withdrawn"):
        scale(tmp_path, parse_scale(["generators=2"]), deadline_s=0.3)
    assert [p.name for p in (tmp_path / "control").iterdir()] == ["driver.json"]


def test_more_generators_than_gpus_are_refused_and_on_cpu_there_is_no_such_bound() -> None:
    from cluster.layout import NodeSupply, RoleDemand, plan_layout

    nodes = [NodeSupply("here", 16, 4)]
    layout = plan_layout([RoleDemand("generator", 2, 1.0), RoleDemand("learner", 1, 1.0)], nodes, colocate=False)
    assert why_not(4, layout, 4, "group") == ""
    assert "5 generators hold 5 GPUs" in why_not(5, layout, 4, "group")
    assert why_not(2, layout, 4, "ipc") == "" and "there are 2" in why_not(3, layout, 4, "ipc")
    on_cpu = plan_layout([RoleDemand("generator", 2, 0.0)], [NodeSupply("here", 2, 0)], colocate=False)
    assert why_not(9, on_cpu, 0, "file") == ""
