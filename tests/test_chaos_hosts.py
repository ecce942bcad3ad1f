"""Lost hosts in chaos: their part of the schedule, what counts as recovered, and a supervised run over two namespaces
whose driver and whose Ray are stand-ins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.chaos import HOST_STEPS, LONG, plan
from scripts.chaos_report import Asked, markdown, report
from scripts.chaos_run import ChaosRun, RunOutcome
from scripts.chaos_runs import FAMILIES, commands
from scripts.disk import FileLimit
from scripts.faults import KINDS, NUM_COSTLY, Act, Fault, Phase, schedule
from scripts.hosts import Host, HostsError, Network, lacking
from scripts.injector import NobodyThereError, workers_among
from scripts.recovery import Recovery
from scripts.sites import Lost, OneMachine, TwoHosts

ALL = tuple(family for family, _ in LONG.values())
OF_HOSTS = FAMILIES["hosts"].kinds
DEADLINE_S = 30.0
REPOSITORY = Path(__file__).resolve().parent.parent


# --- the schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_faults", "num_each"), [(100, NUM_COSTLY), (1000, NUM_COSTLY), (40, 2), (10, 0)])
def test_the_loss_of_a_host_comes_five_times_at_most_and_other_kinds_share_the_rest(
    num_faults: int, num_each: int
) -> None:
    for seed in range(5):
        counts = Counter(fault.kind for fault in schedule(seed, num_faults, tuple(KINDS)))
        assert counts.total() == num_faults
        assert all(counts[kind] == num_each for kind in OF_HOSTS)
        for costly in (True, False):
            others = [counts[kind] for kind in KINDS if kind not in OF_HOSTS and KINDS[kind].is_costly is costly]
            assert max(others) - min(others) <= 1 and (num_faults < 100 or min(others) >= 5)
    alone = Counter(fault.kind for fault in schedule(0, 15, OF_HOSTS))
    assert sorted(alone.values()) == [7, 8], "alone they are asked for"


def test_the_long_plan_gives_the_lost_hosts_to_a_run_of_their_own_and_does_without_them_where_it_must() -> None:
    (hosts,) = [p for p in plan(0, 100, ALL) if p.family == "hosts"]
    assert Counter(f.kind for f in hosts.faults) == dict.fromkeys(OF_HOSTS, 5)
    assert hosts.num_steps == 10 * HOST_STEPS
    without = plan(0, 100, [family for family in ALL if family != "hosts"])
    faults = [f for p in without for f in p.faults]
    assert len(faults) == 100 and not {f.kind for f in faults} & set(OF_HOSTS)
    assert min(Counter(f.kind for f in faults).values()) >= 5
    (alone,) = plan(0, 3, ["hosts"])
    assert len(alone.faults) == 3 and {f.kind for f in alone.faults} == set(OF_HOSTS)


def test_the_run_joins_the_ray_of_its_hosts_and_paces_itself() -> None:
    from launch.overrides import load_config

    words = commands("hosts", "run", Path("/d"), 0, None, ("cluster.address=10.77.0.1:6379",))(16, False)
    config = load_config(words[words.index("train") + 1], words[words.index("train") + 2 :]).config
    assert config.cluster.address == "10.77.0.1:6379" and config.cluster.num_nodes == 2
    assert config.health.adopt_up_to == config.generator.num_workers + 1
    assert config.learner.num_workers == config.reward_workers.num_workers == 1, "what cannot be lost is on one host"
    assert [reward.function for reward in config.rewards] == ["scripts.paced:letters"]


# --- recovery -----------------------------------------------------------------------------------

ADDRESS = "10.77.0.2"
VICTIMS = (ADDRESS, "generator-1")


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **fields}


def node(kind: str, name: str, address: str = ADDRESS, **fields: Any) -> dict[str, Any]:
    return event(kind, node=name, address=address, **fields)


DIED = event("worker_died", worker="generator-1", reason="no sign of life")
LEFT, JOINED = node("node_left", "old"), node("node_joined", "new")
ADOPTED, SCALING = node("node_adopted", "new", num_generators=1), event("scaling", before=2, wanted=3)


def came(number: int) -> dict[str, Any]:
    return event("generator_joined", worker="generator-7", num_generators=number)


def fed(kind: str, *rows: dict[str, Any]) -> Recovery:
    """At 10, one second between rows."""
    recovery = Recovery(Fault(0, kind, KINDS[kind].phases[0], 0.0, 1), 10.0, VICTIMS)
    for second, row in enumerate(rows, 11):
        recovery.see({"time_unix": float(second), **row})
    return recovery


@pytest.mark.parametrize("kind", OF_HOSTS)
def test_a_lost_host_comes_back_when_ray_has_given_it_up_and_is_over_when_all_generators_work(kind: str) -> None:
    died = fed(kind, {"step": 4}, DIED)
    assert died.detected_at == 12.0 and died.reason == "no sign of life"
    assert not died.lift, "a node that is healed before Ray has given it up never leaves"
    left = fed(kind, DIED, LEFT)
    assert left.lift and left.detected_at == 11.0
    done = fed(kind, DIED, LEFT, came(2), JOINED, ADOPTED, SCALING, came(2), {"step": 5}, came(3), came(3))
    assert done.recovered_at == 19.0, "not with one that joins on the other host meanwhile"
    assert fed(kind, LEFT).detected_at == 11.0, "Ray may be the first"
    assert not any(done.may_end(code) or left.may_end(code) for code in (-9, 0, 1))


def test_only_the_node_of_the_host_that_was_hit_counts() -> None:
    other = node("node_left", "old", "10.77.0.1")
    assert not fed("cut_network", other).lift
    early = fed("cut_network", JOINED, ADOPTED, SCALING, came(3))
    assert early.recovered_at is None and early.missing == "event node_left"
    stranger = fed("cut_network", LEFT, JOINED, node("node_adopted", "another"), came(3))
    assert stranger.recovered_at is None and stranger.missing == "event node_adopted"
    assert fed("kill_node", LEFT).missing == "event node_joined"
    assert "3 generators" in fed("kill_node", LEFT, JOINED, ADOPTED, SCALING).missing
    again = fed("kill_node", LEFT, JOINED, ADOPTED, SCALING, node("node_joined", "newer"), came(3))
    assert again.recovered_at is None, "the one that counts is the last to join"


def test_who_starts_on_a_lost_host_dies_by_its_fault() -> None:
    recovery = fed("cut_network", LEFT)
    assert recovery.explains(DIED)
    assert recovery.explains(event("worker_died", worker="generator-5", reason=f"its node {ADDRESS} left the cluster"))
    assert not recovery.explains(event("worker_died", worker="generator-0", reason="its node 10.77.0.1 left"))
    killed = Recovery(Fault(0, "kill_generator", Phase.SAMPLING, 0.0, 1), 0.0, ("generator-1",))
    assert not killed.explains(event("worker_died", worker="generator-0", reason="after generator-1"))


# --- the report ---------------------------------------------------------------------------------


def test_the_report_says_in_one_line_which_kinds_did_not_run_and_why_and_passes() -> None:
    asked = Asked(0, 0, 0, (), False, "cut_network and kill_node, because network namespaces need root")
    found = report(asked, [], {}, {}, "nothing")
    assert found["passed"]
    assert "Left out: cut_network and kill_node, because network namespaces need root." in markdown(found).splitlines()
    assert "Left out" not in markdown(report(Asked(0, 0, 0, (), False), [], {}, {}, ""))


def test_on_one_machine_no_host_can_be_lost() -> None:
    with pytest.raises(NobodyThereError, match="on one machine"):
        OneMachine().take_down(Fault(0, "kill_node", Phase.SAMPLING, 0.0, 1))


# --- a supervised run over two hosts ------------------------------------------------------------

# Stands in for Ray on host b: a generator, and a port that says which node this is.  One that is told that it was given
# up ends, with its generator.
NODE = '''
import ctypes, shutil, signal, socket, subprocess, sys
address, name = sys.argv[1:]
die = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
subprocess.Popen([f"ray::burnish-generator-{name}", "600"], executable=shutil.which("sleep"), preexec_fn=die)
server, told = socket.create_server((address, 7000)), b""
while told != b"gone":
    asked, _ = server.accept()
    asked.settimeout(1)
    try:
        asked.sendall(name.encode())
        told = asked.recv(4)
    except OSError:  # it was cut off in mid-answer
        continue
'''

# Stands in for `burnish train`: asks the node of the other host who it is, as Ray does.
DRIVER = '''
import socket, sys, time
from pathlib import Path
from launch.journal import Journal, cut_after

folder, num_steps, resume, other = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
folder.mkdir(exist_ok=True)
step = 0
metrics, events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")

def event(kind, **fields):
    events.append({"time_unix": time.time(), "kind": kind, "step": step, **fields})

lost = set()

def ask():
    try:
        with socket.create_connection((other, 7000), timeout=1) as node:
            name = node.recv(64).decode()
            node.sendall(b"gone" if name in lost else b"stay")
            return "" if name in lost else name
    except OSError:
        return ""

known, failed = ask(), 0
event("ready", version="0.0")
while step < num_steps:
    found = ask()
    failed = 0 if found else failed + 1
    if known and failed == 2:
        event("worker_died", role="generator", worker="generator-" + known, reason="silent")
        event("node_left", node=known, address=other)
        lost.add(known)
        known = ""
    elif found and not known:
        known = found
        event("node_joined", node=known, address=other)
        event("node_adopted", node=known, address=other)
        event("scaling", before=1, wanted=2)
        event("generator_joined", worker="generator-" + known, num_generators=2)
    step += 1
    event("pushing", version=str(step))
    time.sleep(0.02)
    metrics.append({"step": step, "time_unix": time.time(), "reward": 1.0})
    time.sleep(0.02)
event("finished")
'''


class StandIn:
    """Nodes without Ray, each with a name of its own; the head's is not needed."""

    address = "10.77.0.1:7000"

    def __init__(self) -> None:
        self.env = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
        self.started: list[str] = []
        self.num_settled = 0

    def start(self, host: Host, num_cpus: int) -> subprocess.Popen[bytes]:
        number = str(len(self.started))
        self.started.append(host.name)
        command = ["true"] if host.name == "a" else [sys.executable, "-c", NODE, host.address, number]
        process = host.start(command, None, self.env)
        deadline = time.monotonic() + DEADLINE_S
        while host.name != "a" and not workers_among(host.processes()):
            assert time.monotonic() < deadline and process.poll() is None, f"no node on {host.name}"
            time.sleep(0.02)
        return process

    def settle(self, num_nodes: int) -> None:
        assert num_nodes == 2
        self.num_settled += 1


@pytest.fixture(scope="module")
def lacked() -> str:
    return lacking()


@pytest.fixture
def network(lacked: str) -> Iterator[Network]:
    if lacked:
        pytest.skip(f"THE TESTS OVER TWO HOSTS DID NOT RUN: {lacked}")
    with Network() as made:
        yield made


def supervised(folder: Path, nodes: StandIn, network: Network, faults: list[Fault], num_steps: int) -> RunOutcome:
    script = folder / "driver.py"
    script.write_text(DRIVER)
    a, b = network.host("a"), network.host("b")

    def command(steps: int, resume: bool) -> list[str]:
        return [sys.executable, str(script), str(folder / "run"), str(steps), str(int(resume)), b.address]

    return ChaosRun(
        "run", folder / "run", command, faults, num_steps, 100, 4, FileLimit(folder), folder / "log", {}, print,
        TwoHosts(a, b, nodes),
    ).go()  # fmt: skip


@pytest.mark.slow
def test_a_run_over_two_hosts_is_cut_and_killed_in_turn_and_each_time_the_host_comes_back(
    tmp_path: Path, network: Network
) -> None:
    kinds = ["cut_network", "kill_node"]
    faults = [Fault(n, kind, KINDS[kind].phases[n], 0.5, 2) for n, kind in enumerate(kinds)]
    nodes = StandIn()
    found = supervised(tmp_path, nodes, network, faults, 200)
    assert found.problem is None, (found.problem, (tmp_path / "log").read_text()[-2000:])
    assert [outcome.kind for outcome in found.faults] == kinds
    assert nodes.started == ["a", "b", "b", "b"]
    assert [outcome.victims for outcome in found.faults] == [("10.77.0.2", f"generator-{n}") for n in (1, 2)]
    assert all(0 < (outcome.detected_s or 0) < outcome.recovered_s for outcome in found.faults)
    assert found.num_unexplained == found.num_orphans == 0
    assert found.num_starts - 1 == nodes.num_settled, "before a resume all is as it was"


@pytest.mark.slow
def test_a_run_that_ends_while_a_host_is_lost_gets_it_back_and_the_fault_comes_again(
    tmp_path: Path, network: Network
) -> None:
    nodes = StandIn()
    found = supervised(tmp_path, nodes, network, [Fault(0, "kill_node", Phase.SAMPLING, 0.5, 1)], num_steps=3)
    assert found.problem is None, (found.problem, (tmp_path / "log").read_text()[-2000:])
    assert len(found.faults) == 1 and found.num_steps > 3
    assert nodes.num_settled == found.num_starts - 1 >= 1


def test_what_outlives_its_node_is_a_problem(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.sites.GIVEN_UP_S", 0.5)
    b, nodes = network.host("b"), StandIn()
    stubborn = b.start(["sleep", "600"])
    with pytest.raises(HostsError, match=r"waited 0.5 s for 1 processes on host b.*live on"):
        Lost(b, nodes, [psutil.Process(stubborn.pid)]).end()
    assert nodes.started == []


def test_the_two_kinds_differ_in_what_is_done_alone() -> None:
    cut, killed = (KINDS[kind] for kind in OF_HOSTS)
    assert (cut.act, killed.act) == (Act.CUT, Act.KILL)
    assert (cut.target, cut.phases, cut.ends) == (killed.target, killed.phases, killed.ends)
