"""The host's CPU: what /proc/cpuinfo says of the first one, in the kernel's, libvirt's and QEMU's words.

`root` moves /proc and /sys below another directory, for tests. Source: proc(5).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from kvik.host.sysfs import read_int

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class CpuModel:
    """The first CPU as /proc/cpuinfo describes it."""

    arch: str  # as uname -m says: "x86_64"
    vendor_id: str  # "GenuineIntel", "AuthenticAMD", ...
    name: str  # marketing name
    family: int
    model: int
    stepping: int
    microcode: int
    mhz: int
    flags: frozenset[str]  # the kernel's spellings
    physical_bits: int  # 0: unknown
    virtual_bits: int

    @property
    def vendor(self) -> str:
        """libvirt's name of the vendor: "Intel", "AMD", ..., or empty."""
        return _VENDORS.get(self.vendor_id, "")

    @property
    def features(self) -> list[str]:
        """The flags in QEMU's and libvirt's spelling, those that are CPUID bits, sorted."""
        return sorted({_FLAG_NAMES.get(flag, flag) for flag in self.flags if flag not in _KERNEL_FLAGS})

    @property
    def known_model(self) -> str:
        """The newest of QEMU's named CPU models whose defining features are all here, or "qemu64"."""
        for vendor, name, needed in _MODELS:
            if vendor == self.vendor and needed <= self.flags:
                return name
        return "qemu64"


_VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon", "CentaurHauls": "VIA"}

# Where the kernel's name in /proc/cpuinfo differs from QEMU's (both come from the vendors' manuals).
_FLAG_NAMES = {
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "cr8_legacy": "cr8legacy",
    "sha_ni": "sha-ni",
    "tsc_deadline_timer": "tsc-deadline",
    "avx512_bf16": "avx512-bf16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512-vpopcntdq",
    "avx512_fp16": "avx512-fp16",
    "avx_vnni": "avx-vnni",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "nonstop_tsc": "invtsc",
    "arch_capabilities": "arch-capabilities",
    "md_clear": "md-clear",
}
# Made up by Linux, without a CPUID bit that a guest could have.
_KERNEL_FLAGS = frozenset(
    [
        "constant_tsc",
        "rep_good",
        "nopl",
        "xtopology",
        "extd_apicid",
        "tsc_known_freq",
        "cpuid",
        "aperfmperf",
        "art",
        "arch_perfmon",
        "pebs",
        "bts",
        "tpr_shadow",
        "flexpriority",
        "ept",
        "vpid",
        "ept_ad",
        "vnmi",
        "hypervisor",
        "pti",
        "ibrs_enhanced",
        "fsrm_kernel",
        "tsc_reliable",
        "amd_dcm",
        "fxsave_leak",
        "cqm",
        "cat_l3",
        "cat_l2",
        "cdp_l3",
        "cdp_l2",
        "mba",
        "ssbd_kernel",
        "retpoline",
    ]
)

_LEVEL_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_HASWELL = _LEVEL_V2 | frozenset(["avx", "avx2", "bmi1", "bmi2", "fma", "movbe", "abm", "aes", "xsave", "fsgsbase"])
_SKYLAKE = _HASWELL | frozenset(["adx", "rdseed", "smap", "xsavec", "clflushopt"])
_AVX512 = _SKYLAKE | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_ZEN = _HASWELL | frozenset(["adx", "rdseed", "smap", "sha_ni", "sse4a", "clflushopt"])
_MODELS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("Intel", "SapphireRapids", _AVX512 | {"amx_tile", "avx512_bf16", "avx512_vnni"}),
    ("Intel", "Icelake-Server", _AVX512 | {"avx512_vnni", "avx512_vbmi2", "la57"}),
    ("Intel", "Cascadelake-Server", _AVX512 | {"avx512_vnni"}),
    ("Intel", "Skylake-Server", _AVX512),
    ("Intel", "Skylake-Client", _SKYLAKE),
    ("Intel", "Haswell", _HASWELL),
    ("Intel", "IvyBridge", _LEVEL_V2 | {"avx", "aes", "f16c", "rdrand", "fsgsbase"}),
    ("Intel", "SandyBridge", _LEVEL_V2 | {"avx", "aes"}),
    ("Intel", "Nehalem", _LEVEL_V2),
    ("AMD", "EPYC-Genoa", _ZEN | _AVX512 | {"avx512_bf16", "vaes", "clwb"}),
    ("AMD", "EPYC-Milan", _ZEN | {"vaes", "vpclmulqdq", "clwb", "pcid"}),
    ("AMD", "EPYC-Rome", _ZEN | {"clwb", "rdpid"}),
    ("AMD", "EPYC", _ZEN),
    ("AMD", "Opteron_G5", _LEVEL_V2 | {"avx", "aes", "fma4", "tbm"}),
    ("AMD", "Opteron_G4", _LEVEL_V2 | {"avx", "aes", "fma4"}),
)


def cpu_model(root: Path = _ROOT) -> CpuModel:
    """Bounded: only the first processor's paragraph is read."""
    fields: dict[str, str] = {}
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for _ in range(200):
                line = file.readline(65536)
                key, _, value = line.partition(":")
                if not line.strip():
                    break
                fields[key.strip()] = value.strip()
    except OSError:
        pass

    def number(key: str, base: int = 10) -> int:
        try:
            return int(fields.get(key, "0"), base)
        except ValueError:
            return 0

    bits = [int(match) for match in re.findall(r"(\d{1,3}) bits", fields.get("address sizes", ""))]
    return CpuModel(
        arch=platform.machine() or "x86_64",
        vendor_id=fields.get("vendor_id", ""),
        name=fields.get("model name", ""),
        family=number("cpu family"),
        model=number("model"),
        stepping=number("stepping"),
        microcode=number("microcode", 0),
        mhz=_mhz(fields.get("cpu MHz", ""), root),
        flags=frozenset(fields.get("flags", "").split()),
        physical_bits=bits[0] if len(bits) == 2 else 0,
        virtual_bits=bits[1] if len(bits) == 2 else 0,
    )


def _mhz(cpuinfo: str, root: Path) -> int:
    # The base frequency where the host tells it: the current one swings with load.
    base = read_int(root / "sys/devices/system/cpu/cpu0/cpufreq/base_frequency")
    if base > 0:
        return base // 1000
    try:
        return int(float(cpuinfo))
    except ValueError:
        return 0
