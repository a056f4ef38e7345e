"""The CPU as /proc, cgroups and other systems tell."""

from __future__ import annotations

import os
import platform

import pytest

from advisor.hardware import cpu
from advisor.hardware.cpu import detect_cpu, whole_cores
from advisor.hardware.detect import cpu_profile

MEMINFO = "MemTotal:       32000000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n"
SAPPHIRE_RAPIDS = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Platinum 8480+\n"
    "flags\t\t: fpu sse4_2 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512vl avx512_vnni "
    "avx512_bf16 amx_bf16 amx_tile amx_int8\n\nprocessor\t: 1\nmodel name\t: second\n"
)
HASWELL = "vendor_id : GenuineIntel\nmodel name : i7-4770\nflags : sse4_2 avx f16c fma avx2\n"
GRAVITON = (
    "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp sve i8mm bf16\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
)


def facts_of(linux, cpuinfo=HASWELL, **files):
    root = linux(proc__cpuinfo=cpuinfo, proc__meminfo=MEMINFO, **files)
    return detect_cpu(root, system="Linux")


def test_instruction_sets_of_a_server(linux):
    facts = facts_of(linux, SAPPHIRE_RAPIDS)
    assert facts.name == "Intel(R) Xeon(R) Platinum 8480+"
    assert facts.vendor == "Intel"
    able = cpu_profile(facts).capabilities
    assert able.avx2
    assert able.avx512_vnni
    assert able.amx_int8
    assert able.amx_bf16
    assert able.bf16
    assert not able.neon


def test_old_desktop_has_avx2_and_no_more(linux):
    able = cpu_profile(facts_of(linux)).capabilities
    assert able.avx2
    more = (able.avx512, able.avx512_vnni, able.avx_vnni, able.amx_int8, able.bf16)
    assert not any(more)


def test_arm_server(linux):
    facts = facts_of(linux, GRAVITON)
    assert facts.vendor == "ARM"
    assert "0xd40" in facts.name
    able = cpu_profile(facts).capabilities
    assert able.neon
    assert able.neon_dotprod
    assert able.neon_i8mm
    assert not able.avx2


def test_unreadable_proc_is_told_and_nothing_is_invented(tmp_path):
    facts = detect_cpu(tmp_path, system="Linux")
    assert facts.instruction_sets == ()
    assert facts.memory_bytes is None
    assert len(facts.problems) == 2
    profile = cpu_profile(facts)
    assert profile.memory_bytes is None
    assert set(profile.unknown) == {"memory_gib", "bandwidth_gb_s"}


def test_memory_without_a_limit_is_the_machines(linux):
    facts = facts_of(linux)
    assert facts.memory_bytes == 32_000_000 * 1024
    assert facts.memory_available_bytes == 20_000_000 * 1024
    assert cpu_profile(facts).memory_bytes == facts.memory_bytes


def test_container_limit_is_the_memory(linux):
    facts = facts_of(
        linux,
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__memory_DOT_max="8589934592\n",
        sys__fs__cgroup__memory_DOT_current="1073741824\n",
    )
    assert facts.memory_bytes == 8 * 2**30
    assert facts.memory_available_bytes == 7 * 2**30


def test_limit_of_an_outer_group_counts(linux):
    facts = facts_of(
        linux,
        proc__self__cgroup="0::/user/job\n",
        sys__fs__cgroup__user__memory_DOT_max="4294967296\n",
        sys__fs__cgroup__user__job__memory_DOT_max="max\n",
    )
    assert facts.memory_bytes == 4 * 2**30


def test_first_version_of_cgroups(linux):
    facts = facts_of(
        linux,
        proc__self__cgroup="5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
        sys__fs__cgroup__memory__docker__x__memory_DOT_limit_in_bytes="2147483648\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
    )
    assert facts.memory_bytes == 2 * 2**30


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1.5), ("max 100000", 8), ("1600000 100000", 8)]
)
def test_cores_are_affinity_and_quota(linux, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    facts = facts_of(
        linux, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu_DOT_max": quota + "\n"}
    )
    assert facts.cores == cores


def test_threads_are_whole_cores():
    assert [whole_cores(cores) for cores in (0.5, 1.5, 8)] == [1, 1, 8]


def test_mac(monkeypatch):
    answers = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.memsize": str(16 * 2**30),
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_BF16": "0",
    }
    monkeypatch.setattr(cpu, "_sysctl", lambda key: answers.get(key, ""))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    facts = detect_cpu(system="Darwin")
    assert (facts.name, facts.vendor, facts.memory_bytes) == ("Apple M2", "Apple", 16 * 2**30)
    assert facts.instruction_sets == ("neon", "asimd", "asimddp", "i8mm")


def test_intel_mac(monkeypatch):
    answers = {"machdep.cpu.features": "FMA AVX1.0", "machdep.cpu.leaf7_features": "AVX2 BMI1"}
    monkeypatch.setattr(cpu, "_sysctl", lambda key: answers.get(key, ""))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    facts = detect_cpu(system="Darwin")
    assert set(facts.instruction_sets) == {"avx2", "fma"}
    assert facts.memory_bytes is None


@pytest.mark.parametrize("system", ["Windows", "Plan9"])
def test_other_systems_answer_and_say_what_is_missing(system):
    facts = detect_cpu(system=system)
    assert facts.cores >= 1
    assert facts.name
    assert facts.problems
