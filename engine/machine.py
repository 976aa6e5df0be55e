"""What a computation runs on: the processor and what it can do, the cores and the memory that may be used, the GPU.

Nothing here names a machine: two machines with the same parts are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_GPU_TIMEOUT_S = 20
# What decides which kernels a runtime takes; everything else that a processor says of itself changes no speed here.
_RELEVANT_FLAGS = frozenset(
    {"avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"}
    | {"amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"}
)


@dataclass(frozen=True, kw_only=True)
class MachineIdentity:
    """`flags` of the processor that matter to a runtime, sorted; `cores` that this process may use; `gpu` is its name,
    memory and driver, "" without one."""

    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_gib: float
    gpu: str
    system: str

    @property
    def key(self) -> str:
        """16 hexadecimal digits by which plans of several machines lie in one folder."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_identity() -> MachineIdentity:
    """Asks the kernel and, where its tool is installed, NVIDIA's driver."""
    return MachineIdentity(
        processor=processor_name(),
        flags=_flags(),
        cores=allowed_cores(),
        memory_gib=memory_gib(),
        gpu=_gpu(),
        system=f"{platform.system()} {platform.machine()}",
    )


def processor_name() -> str:
    """The model's name as the kernel gives it."""
    return _cpuinfo("model name")[:200] or platform.processor()


def allowed_cores() -> int:
    """Cores that this process may use: of the machine, or of the control group (container, service unit) where that
    allows less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores  # no control group, or one without a limit ("max")


def memory_gib() -> float:
    """The machine's memory, rounded to 0.1 GiB."""
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _flags() -> tuple[str, ...]:
    found = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return tuple(sorted(_RELEVANT_FLAGS & set(found)))


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; "" where there is none."""
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def _gpu() -> str:
    """The first GPU as NVIDIA's tool describes it; "" where there is no tool, no driver or no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = ran.stdout.strip().splitlines()
    return lines[0].strip()[:200] if lines else ""
