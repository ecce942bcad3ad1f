"""Several hosts on one machine, for tests and chaos: Linux network namespaces that meet at a switch, each with an
address, a name and a /tmp/ray of its own.  They share the rest of the disk, the shared memory and the cores.

    with Network() as network:
        a, b = network.host("a"), network.host("b")
        b.start(["ping", a.address], out)
        b.cut()          # as if its cable were pulled: nothing comes, nothing goes, nobody is told
        b.heal()

Needs root and iproute2; :func:`lacking` says what a machine lacks.  Whatever a network holds is removed when it is
closed, and what a killed one left is removed by the next one.
May import: psutil.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

PREFIX = "burnish-net"  # of every namespace: PREFIX-PID-NAME
NAMES = Path("/etc/netns")  # `ip netns exec` shows /etc/netns/NAME/hosts as /etc/hosts
COMMAND_S = 20.0  # for one `ip` command
END_S, ROUNDS = 30.0, 3  # for killed processes to go
RAY_FOLDER = Path("/tmp/ray")  # noqa: S108 - where every Ray has its sockets and logs, in paths that must be short
RAY_PORT = 6379
RAY_S = 120.0  # for `ray start` to be done, and for Ray to give up a node that has gone
COUNT = """
import sys, time
import ray

address, wanted, deadline_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + deadline_s
while (found := sum(node["Alive"] for node in ray.nodes())) != wanted:
    if time.monotonic() > end:
        sys.exit(f"waited {deadline_s:g} s for Ray to have {wanted} live nodes; it has {found}")
    time.sleep(0.5)
"""


def lacking() -> str:
    """Why this machine can have no such network; empty when it can."""
    for tool in ("ip", "tc", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"there is no command {tool} (Debian packages iproute2, util-linux and mount)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network() as network:
            code = network.host("a").start(["true"]).wait(COMMAND_S)
    except HostsError as error:
        return str(error)
    return "" if code == 0 else f"no command runs in a network namespace here (exit code {code})"


class HostsError(Exception):
    """A command that makes or changes a network failed; the message says which and why."""


def _do(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        raise HostsError(f"{' '.join(command)}: not done in {COMMAND_S:g} s") from None
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


class Host:
    """One namespace.  Made by :meth:`Network.host`."""

    def __init__(self, namespace: str, switch: str, name: str, address: str) -> None:
        self.namespace, self.name, self.address = namespace, name, address
        self.disk = Path(tempfile.gettempdir()) / namespace
        self._switch, self._port = switch, f"to-{name}"  # the switch's end of the cable

    def start(
        self, command: Sequence[str], out: IO[bytes] | None = None, env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Run a command on this host; it belongs to the caller, and to the network, which ends it when it closes."""
        # `ip netns exec` and `unshare` give the process mounts and a host name that nobody else sees.
        own = f'mount --bind {self.disk} {RAY_FOLDER} && echo {self.name} > /proc/sys/kernel/hostname && exec "$@"'
        into = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", own, "sh"]
        nobody = subprocess.DEVNULL
        return subprocess.Popen([*into, *command], stdin=nobody, stdout=out, stderr=out, env=env, cwd=cwd)

    def cut(self) -> None:
        """Pull the cable at the switch."""
        _do("ip", "-n", self._switch, "link", "set", self._port, "down")

    def heal(self) -> None:
        _do("ip", "-n", self._switch, "link", "set", self._port, "up")

    def limit(self, kbit_per_s: int | None) -> None:
        """Bound what reaches this host; None: no bound."""
        if kbit_per_s is None:
            _do("tc", "-n", self._switch, "qdisc", "del", "dev", self._port, "root")
            return
        rate = ("rate", f"{kbit_per_s}kbit", "burst", "32kbit", "latency", "400ms")
        _do("tc", "-n", self._switch, "qdisc", "add", "dev", self._port, "root", "tbf", *rate)

    def num_bytes(self) -> int:
        """Sent to this host so far."""
        (link,) = json.loads(_do("ip", "-s", "-j", "-n", self._switch, "link", "show", self._port))
        return int(link["stats64"]["tx"]["bytes"])

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this host."""
        return _processes(self.namespace)

    def end(self) -> None:
        """Kill everything that runs on this host."""
        _end(self.namespace)


class Network:
    """A switch and the hosts on it; close it, or use it in ``with``."""

    def __init__(self) -> None:
        _remove_abandoned()
        self._switch, self._hosts = f"{PREFIX}-{os.getpid()}-switch", list[Host]()
        _do("ip", "netns", "add", self._switch)
        try:
            _do("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
            _do("ip", "-n", self._switch, "link", "set", "switch", "up")
        except HostsError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str) -> Host:
        """One more host; ``name`` of at most eight letters."""
        number = len(self._hosts) + 1
        host = Host(f"{PREFIX}-{os.getpid()}-{name}", self._switch, name, f"10.77.0.{number}")
        self._hosts.append(host)
        for folder in (host.disk, RAY_FOLDER):
            folder.mkdir(parents=True, exist_ok=True)
        space, port = host.namespace, f"to-{name}"
        _do("ip", "netns", "add", space)
        _do("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "-n", self._switch, "link", "set", port, "master", "switch", "up")
        _do("ip", "-n", space, "address", "add", f"{host.address}/24", "dev", "eth0")
        _do("ip", "-n", space, "link", "set", "lo", "up")
        _do("ip", "-n", space, "link", "set", "eth0", "up")
        for each in self._hosts:  # every host knows every other one by name
            known = "".join(f"{h.address} {h.name}\n" for h in self._hosts)
            (NAMES / each.namespace).mkdir(parents=True, exist_ok=True)
            (NAMES / each.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        return host

    def close(self) -> None:
        for namespace in [*(host.namespace for host in self._hosts), self._switch]:
            _remove(namespace)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _processes(namespace: str) -> list[psutil.Process]:
    found = []
    for pid in _do("ip", "netns", "pids", namespace).split():
        try:
            found.append(psutil.Process(int(pid)))
        except psutil.NoSuchProcess:
            continue
    return found


def _end(namespace: str) -> None:
    for _ in range(ROUNDS):  # what is ended may have started something meanwhile
        ending = _processes(namespace)
        for process in ending:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if not ending:
            break
        psutil.wait_procs(ending, timeout=END_S)


def _remove(namespace: str) -> None:
    """End what runs in a namespace, and it; nothing when it is not there."""
    if namespace in _namespaces():
        _end(namespace)
        _do("ip", "netns", "delete", namespace)
    shutil.rmtree(Path(tempfile.gettempdir()) / namespace, ignore_errors=True)
    shutil.rmtree(NAMES / namespace, ignore_errors=True)
    if NAMES.is_dir() and not any(NAMES.iterdir()):
        NAMES.rmdir()


def _remove_abandoned() -> None:
    for namespace in _namespaces():
        owner = namespace.removeprefix(f"{PREFIX}-").partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(namespace)


class RayNodes:
    """One Ray over several hosts: a head, and nodes that join it.  ``env`` is for its clients, too."""

    def __init__(self, head: Host, env: Mapping[str, str], logs: Path) -> None:
        self._head, self._logs = head, logs
        self.address = f"{head.address}:{RAY_PORT}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = {k: v for k, v in env.items() if k != "RAY_ADDRESS"} | token
        self.env |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}

    def start(self, host: Host, num_cpus: int) -> subprocess.Popen[bytes]:
        """`ray start` on a host, the head first; returns when it says that it runs.  The process stays with Ray's."""
        number = len(list(self._logs.glob("ray-*.log")))
        log = self._logs / f"ray-{host.name}-{number}.log"
        role = [f"--address={self.address}"]
        if host is self._head:
            role = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={host.address}",
            f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={128 * 2**20}", "--block",
        ]  # fmt: skip
        with log.open("wb") as out:
            process = host.start(command, out, self.env)
        for _ in range(int(RAY_S / 0.5)):
            if b"Ray runtime started" in log.read_bytes():
                return process
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
            break
        raise HostsError(f"ray start on {host.name}: not started in {RAY_S:g} s, or ended:\n{log.read_text()[-2000:]}")

    def settle(self, num_nodes: int) -> None:
        """Return when Ray counts exactly ``num_nodes`` live nodes: one that was lost counts until it is given up."""
        log = self._logs / "settle.log"
        command = [sys.executable, "-c", COUNT, self.address, str(num_nodes), str(RAY_S)]
        with log.open("wb") as out:
            process = self._head.start(command, out, self.env)
        try:
            code = process.wait(2 * RAY_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise HostsError(f"waited {2 * RAY_S:g} s for Ray on {self._head.name} to count its nodes") from None
        if code:
            raise HostsError(f"Ray on {self._head.name}: {log.read_text()[-2000:].strip() or f'exit code {code}'}")
