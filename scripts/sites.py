"""Where a run of chaos takes place: on this machine, or on two hosts of which it can lose one.

    OneMachine    the driver starts a Ray of its own, and the workers are its children
    TwoHosts      a has Ray's head, the driver and the trained ranks, b a Ray node with a generator; b is cut off or
                  killed, and Ray is started there again once the old node has been given up, as a supervisor would
May import: psutil, scripts.{faults, hosts, injector}.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import psutil

from scripts.faults import KINDS, Act, Fault
from scripts.hosts import Host, HostsError, Network, RayNodes
from scripts.injector import Effect, NobodyThereError, Processes, chosen, processes_of, workers_among

NUM_CPUS = 2  # of each node, in Ray's count
# Of Ray's head.  A check of 3 s every 3 s, and a node is given up after the third that fails in a row: 10 to 18 s.
QUICK_CHECKS = {"RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "3"}
GIVEN_UP_S = 100.0  # for a node to hear that it was given up, and to end what runs on it; Ray's own timeout is a minute


class Site(Protocol):
    """How a driver is started, what its run consists of, and how a host of it is lost."""

    overrides: tuple[str, ...]  # for the configuration of the run

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]
    ) -> subprocess.Popen[bytes]: ...

    def processes(self, driver: int) -> Processes:
        """Of the run whose driver has this id."""

    def take_down(self, fault: Fault) -> tuple[tuple[str, ...], Effect]:
        """Cut or kill the host of a generator.  (Its address and its workers, what brings it back.)

        Raises:
            NobodyThereError: no host but the driver's had a generator at the last look; nothing was done.
        """

    def settle(self) -> None:
        """Return when everything is as it was at the start, for a driver to be started again."""


class OneMachine:
    """This one; it cannot be lost."""

    overrides: tuple[str, ...] = ()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(command), env=dict(environment), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )

    def processes(self, driver: int) -> Processes:
        return processes_of(driver)

    def take_down(self, fault: Fault) -> tuple[tuple[str, ...], Effect]:
        raise NobodyThereError(f"{fault.kind}: the run is on one machine")

    def settle(self) -> None:
        return


class Nodes(Protocol):
    """Ray on several hosts: ``scripts.hosts.RayNodes``."""

    address: str
    env: dict[str, str]

    def start(self, host: Host, num_cpus: int) -> subprocess.Popen[bytes]: ...

    def settle(self, num_nodes: int) -> None: ...


class TwoHosts:
    """``nodes`` is started on both hosts here."""

    def __init__(self, a: Host, b: Host, nodes: Nodes) -> None:
        self._a, self._b, self._nodes = a, b, nodes
        self._far: dict[str, psutil.Process] = {}  # workers on b at the last look
        for host in (a, b):
            nodes.start(host, NUM_CPUS)
        self.overrides: tuple[str, ...] = (f"cluster.address={nodes.address}",)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return self._a.start(command, out, {**environment, **self._nodes.env})

    def processes(self, driver: int) -> Processes:
        """What the driver has started, and the actors, which are children of Ray's nodes."""
        near, self._far = workers_among(self._a.processes()), workers_among(self._b.processes())
        return Processes((*processes_of(driver).all, *near.values(), *self._far.values()), near | self._far)

    def take_down(self, fault: Fault) -> tuple[tuple[str, ...], Effect]:
        name = chosen(self._far, "generator", fault.choice)
        if not self._far[name].is_running():
            raise NobodyThereError(f"{name} has just ended")
        lost = Lost(self._b, self._nodes, list(self._far.values()))
        if KINDS[fault.kind].act is Act.CUT:
            self._b.cut()
        else:
            self._b.end()
        return (self._b.address, *sorted(self._far)), lost

    def settle(self) -> None:
        self._nodes.settle(2)


class Lost:
    """A host without a network, or without a process."""

    def __init__(self, host: Host, nodes: Nodes, workers: Sequence[psutil.Process]) -> None:
        self._host, self._nodes, self._workers = host, nodes, workers

    def end(self) -> None:
        """Mend the cable; when what ran there has ended by itself, because Ray has given it up, start Ray anew.

        Raises:
            HostsError: it did not end, or Ray did not start.
        """
        self._host.heal()
        _, left = psutil.wait_procs(list(self._workers), timeout=GIVEN_UP_S)
        if left:
            names = ", ".join(sorted(workers_among(left))) or f"{len(left)} processes"
            raise HostsError(
                f"waited {GIVEN_UP_S:g} s for {names} on host {self._host.name}, which Ray has given up, to end; they "
                "live on"
            )
        self._host.end()  # Ray's own agents take their time
        self._nodes.start(self._host, NUM_CPUS)


@contextlib.contextmanager
def open_hosts(environment: Mapping[str, str], logs: Path) -> Iterator[TwoHosts]:
    """Two hosts with Ray on them; nothing of them stays.  HostsError: they could not be made, or Ray did not start."""
    logs.mkdir(parents=True, exist_ok=True)
    with Network() as network:
        a, b = network.host("a"), network.host("b")
        yield TwoHosts(a, b, RayNodes(a, {**environment, **QUICK_CHECKS}, logs))
