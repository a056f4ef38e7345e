"""What CPU this is: name, usable cores and memory, instruction sets."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_X86_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
)  # fmt: skip
_ARM_SETS = ("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")

# macOS names its features its own way.
_DARWIN_ARM = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}
_DARWIN_X86 = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512BW": "avx512bw", "FMA": "fma"}
_WINDOWS_X86 = {39: "avx", 40: "avx2", 41: "avx512f"}
"""Codes of IsProcessorFeaturePresent (winnt.h)."""


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """What the operating system says of the CPU.

    Attributes:
        name: Model name.
        vendor: ``Intel``, ``AMD``, ``Apple``, ``ARM`` or ``unknown``.
        machine: ``x86_64``, ``aarch64``, ...
        cores: Logical processors that this process may use: affinity and cgroup limits count.
        memory_bytes: Memory that this process may use, cgroup limits counted.
        memory_available_bytes: What of it is free now.
        instruction_sets: Those that matter for inference, as Linux names them.
        problems: What could not be found out.
    """

    name: str
    vendor: str
    machine: str
    cores: float
    memory_bytes: int | None
    memory_available_bytes: int | None
    instruction_sets: tuple[str, ...]
    problems: tuple[str, ...] = ()


def detect_cpu(root: Path = Path("/"), *, system: str | None = None) -> CpuFacts:
    """Find out what the CPU is.

    Args:
        root: Where ``proc`` and ``sys`` lie; another folder in tests.
        system: ``Linux``, ``Darwin`` or ``Windows``; this one by default.
    """
    system = system or platform.system()
    if system == "Linux":
        return _linux(root)
    if system == "Darwin":
        return _darwin()
    if system == "Windows":
        return _windows()
    return CpuFacts(
        name=platform.processor() or platform.machine() or "CPU",
        vendor="unknown",
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=None,
        memory_available_bytes=None,
        instruction_sets=(),
        problems=(f"On {system} neither memory nor instruction sets of the CPU can be read.",),
    )


def _linux(root: Path) -> CpuFacts:
    problems: list[str] = []
    facts = _cpuinfo(root)
    machine = platform.machine()
    words = frozenset((facts.get("flags") or facts.get("Features") or "").split())
    arm = "Features" in facts
    sets = tuple(name for name in (_ARM_SETS if arm else _X86_SETS) if name in words)
    if arm and "asimd" in sets and "neon" not in sets:
        # 64-bit ARM calls NEON "asimd".
        sets = ("neon", *sets)
    if not words:
        problems.append(
            "The CPU's instruction sets are not known: /proc/cpuinfo lists no flags. "
            "Name the hardware with --gpu, for example --gpu cpu-avx2-ddr5-2ch."
        )
    total, available = _linux_memory(root)
    if total is None:
        problems.append("The memory is not known: /proc/meminfo cannot be read.")
    return CpuFacts(
        name=facts.get("model name") or _arm_name(facts) or f"{machine} CPU",
        vendor=_vendor(facts.get("vendor_id", ""), arm=arm),
        machine=machine,
        cores=_linux_cores(root),
        memory_bytes=total,
        memory_available_bytes=available,
        instruction_sets=sets,
        problems=tuple(problems),
    )


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    return facts


def _arm_name(facts: dict[str, str]) -> str | None:
    if "CPU implementer" not in facts:
        return None
    part = facts.get("CPU part", "unknown")
    return f"ARM CPU (implementer {facts['CPU implementer']}, part {part})"


def _vendor(vendor_id: str, *, arm: bool) -> str:
    known = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}
    return known.get(vendor_id, "ARM" if arm else "unknown")


def _linux_cores(root: Path) -> float:
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    for folder in _cgroup_folders(root, "cpu"):
        quota = period = ""
        if words := _read(folder / "cpu.max").split():
            quota, period = (*words, "100000")[:2]
        elif (folder / "cpu.cfs_quota_us").exists():
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, int(quota) / int(period))
    return int(cores) if cores == int(cores) else cores


def _linux_memory(root: Path) -> tuple[int | None, int | None]:
    values: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            values[key] = int(words[0]) * 1024
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is None or (total is not None and limit >= total):
            continue
        total = limit
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if used is not None:
            left = max(limit - used, 0)
            available = left if available is None else min(available, left)
    if total is not None and available is not None:
        available = min(available, total)
    return total, available


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return this process's cgroup folders, innermost first: every one of them may limit."""
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controllers == "":
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        inner = top / path.strip().lstrip("/")
        if ".." in inner.parts:
            inner = top
        while inner != top:
            folders.append(inner)
            inner = inner.parent
        folders.append(top)
    return folders or [mount]


def _number(*paths: Path) -> int | None:
    for path in paths:
        text = _read(path).strip()
        if text.isdigit():
            return int(text)
    return None


def _read(path: Path) -> str:
    # A missing file of /proc or /sys means that the kernel does not tell.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""


def _darwin() -> CpuFacts:
    arm = platform.machine() == "arm64"
    if arm:
        found = ["neon", "asimd"]
        found += [name for key, name in _DARWIN_ARM.items() if _sysctl(key) == "1"]
    else:
        words = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".split()
        found = [name for key, name in _DARWIN_X86.items() if key in words]
    memory = _sysctl("hw.memsize")
    return CpuFacts(
        name=_sysctl("machdep.cpu.brand_string") or "Mac CPU",
        vendor="Apple" if arm else "Intel",
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=int(memory) if memory.isdigit() else None,
        memory_available_bytes=None,
        instruction_sets=tuple(found),
        problems=() if found else ("The CPU's instruction sets are not known: no sysctl.",),
    )


def _sysctl(key: str) -> str:
    # An absent key means an absent feature.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=True
        )
        return answer.stdout.strip()
    return ""


def _windows() -> CpuFacts:
    kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    memory = available = None
    sets: tuple[str, ...] = ()
    if kernel is not None:
        # MEMORYSTATUSEX: its own size, the load, then seven 64-bit numbers, total and free first.
        status = (ctypes.c_uint64 * 8)()
        status[0] = ctypes.sizeof(status)
        if kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
            memory, available = int(status[1]), int(status[2])
        sets = tuple(
            name for code, name in _WINDOWS_X86.items() if kernel.IsProcessorFeaturePresent(code)
        )
    return CpuFacts(
        name=platform.processor() or "Windows CPU",
        vendor="Intel" if "Intel" in platform.processor() else "unknown",
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=memory,
        memory_available_bytes=available,
        instruction_sets=sets,
        problems=("Windows does not tell of AVX-512 VNNI and AMX; name the CPU with --gpu.",),
    )


def whole_cores(cores: float) -> int:
    """Return the number of threads worth starting: whole cores, at least one.

    A part of a core counts for nothing: threads that share their work wait for the slowest.
    """
    return max(1, int(cores))
