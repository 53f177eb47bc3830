"""CPU models: which of the host's features a guest sees, so that its state can move to every host that has them.

`host` (and `max`, the same under KVM) is all that KVM supports here. A named model is exactly its list: what the host
has besides is hidden, what it lacks is an error. The levels x86-64-v1 to v4 are those of the x86-64 psABI ("Micro-
Architecture Levels"); the others are processors as QEMU and libvirt name them. A feature can be added or taken away:
`x86-64-v3,+aes,-avx2`. The vendor is always the host's: guests choose code by it, no state moves across vendors.
"""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument, OperationUnsupported
from kvik.named import NamedTuple
from kvik.vmm.cpu.features import EAX, EBX, ECX, EDX, FEATURES, REGISTERS, canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.cpu.cpuid import Leaves

__all__ = ["HOST", "MODELS", "apply_model", "why_not"]

HOST = ("host", "max")
INTEL, AMD = b"GenuineIntel", b"AuthenticAMD"

_V1 = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm arat"
_V2 = _V1 + " pni ssse3 cx16 sse4.1 sse4.2 popcnt lahf-lm"
_V3 = _V2 + " avx avx2 bmi1 bmi2 f16c fma abm movbe xsave xsaveopt"
_V4 = _V3 + " avx512f avx512dq avx512cd avx512bw avx512vl"
_WESTMERE = _V2 + " vme aes pclmulqdq"
_SANDY = _WESTMERE + " avx xsave xsaveopt rdtscp"
_IVY = _SANDY + " f16c rdrand fsgsbase smep erms"
_HASWELL = _IVY + " fma bmi1 bmi2 avx2 movbe abm pcid invpcid"
_BROADWELL = _HASWELL + " rdseed adx smap 3dnowprefetch"
_SKYLAKE = _BROADWELL + " pdpe1gb clflushopt clwb xsavec xgetbv1 avx512f avx512dq avx512cd avx512bw avx512vl"
_ICELAKE = (
    _SKYLAKE + " umip pku avx512vbmi avx512vbmi2 gfni vaes vpclmulqdq avx512vnni avx512bitalg avx512-vpopcntdq rdpid"
    " sha-ni fsrm"
)
_EPYC = _V3 + (
    " vme aes pclmulqdq rdrand fsgsbase smep rdseed adx smap clflushopt sha-ni xsavec xgetbv1 cr8legacy sse4a"
    " misalignsse 3dnowprefetch pdpe1gb rdtscp mmxext fxsr-opt"
)
_ROME = _EPYC + " clwb rdpid umip wbnoinvd clzero xsaveerptr"
_MILAN = _ROME + " vaes vpclmulqdq pcid invpcid pku erms fsrm"

# What every guest gets if the host has it: KVM's own, and what is needed to run well beneath a hypervisor at all.
_ALWAYS = (
    *("hypervisor", "x2apic", "tsc-deadline", "tsc-adjust", "ht", "osxsave", "ospke", "cmp-legacy", "topoext"),
    *("kvmclock", "kvmclock2", "kvmclock-stable-bit", "kvm-nopiodelay", "kvm-asyncpf", "kvm-asyncpf-int"),
    *("kvm-steal-time", "kvm-pv-eoi", "kvm-pv-unhalt", "kvm-pv-tlb-flush", "kvm-pv-ipi", "kvm-poll-control"),
    *("kvm-pv-sched-yield", "kvm-msi-ext-dest-id"),
)
# Bits of leaf 0x80000001 EDX that repeat leaf 1's on AMD.
_REPEATED = 0x0183F3FF
PHYSICAL_BITS = 40  # of a named model: what nearly every host has; the guest's map below must fit


class Model(NamedTuple):
    features: tuple[str, ...]
    vendor: bytes  # b"": any
    family: int
    model: int
    stepping: int


def _model(features: str, vendor: bytes = b"", family: int = 0, model: int = 0, stepping: int = 0) -> Model:
    return Model(tuple(features.split()), vendor, family, model, stepping)


MODELS: dict[str, Model] = {
    "x86-64-v1": _model(_V1),
    "x86-64-v2": _model(_V2),
    "x86-64-v2-AES": _model(_V2 + " aes"),
    "x86-64-v3": _model(_V3),
    "x86-64-v4": _model(_V4),
    "Nehalem": _model(_V2 + " vme", INTEL, 6, 26, 3),
    "Westmere": _model(_WESTMERE, INTEL, 6, 44, 1),
    "SandyBridge": _model(_SANDY, INTEL, 6, 42, 1),
    "IvyBridge": _model(_IVY, INTEL, 6, 58, 9),
    "Haswell-noTSX": _model(_HASWELL, INTEL, 6, 60, 1),
    "Broadwell-noTSX": _model(_BROADWELL, INTEL, 6, 61, 2),
    "Skylake-Server-noTSX": _model(_SKYLAKE, INTEL, 6, 85, 4),
    "Icelake-Server-noTSX": _model(_ICELAKE, INTEL, 6, 134, 0),
    "EPYC": _model(_EPYC, AMD, 23, 1, 2),
    "EPYC-Rome": _model(_ROME, AMD, 23, 49, 0),
    "EPYC-Milan": _model(_MILAN, AMD, 25, 1, 1),
}


def apply_model(found: Leaves, name: str, changes: Sequence[str]) -> None:
    """Cut the host's leaves down to the model with its changes ("+name", "-name"), in place. Raises `InvalidArgument`
    for a name that nobody knows, `OperationUnsupported` for what this host has not."""
    model = None if name in HOST else MODELS.get(name)
    if model is None and name not in HOST:
        raise InvalidArgument(
            f"there is no CPU model {name!r}", remedy=f"one of {', '.join((*HOST, *MODELS))}, then +feature or -feature"
        )
    added, removed = _changes(changes)
    wanted = set(added)
    if model is not None:
        _check_vendor(found, name, model)
        wanted |= set(model.features)
    missing = sorted(feature for feature in wanted - removed if not _has(found, feature))
    if missing:
        able = [other for other in MODELS if not why_not(found, MODELS[other])]
        raise OperationUnsupported(
            f"this host's KVM cannot give a guest {', '.join(missing)}"
            + (f", which the CPU model {name} has" if model is not None else ""),
            remedy=f"leave it out, or choose a model that this host can be: {', '.join(('host', *able))}",
        )
    if model is not None:
        _mask(found, wanted | set(_ALWAYS))
        _identify(found, name, model)
    for feature in removed:
        function, index, register, bit = FEATURES[feature]
        if (function, index) in found:
            found[function, index][register] &= ~bit
    for feature in added:  # what KVM supports but this table has off
        function, index, register, bit = FEATURES[feature]
        found[function, index][register] |= bit
    if model is not None or removed:
        _state_components(found)


def _changes(changes: Sequence[str]) -> tuple[set[str], set[str]]:
    added: set[str] = set()
    removed: set[str] = set()
    for change in changes:
        feature = canonical(change[1:])
        if change[:1] not in ("+", "-") or feature not in FEATURES:
            raise InvalidArgument(f"{change!r} is no CPU feature", remedy="like +avx2 or -pcid, by QEMU's names")
        (added if change[0] == "+" else removed).add(feature)
    if both := added & removed:
        raise InvalidArgument(f"{', '.join(sorted(both))}: both added and taken away", remedy="say it once")
    return added, removed


def _has(found: Leaves, feature: str) -> bool:
    if feature == "kvm-hint-dedicated":  # a promise of ours, not an ability of the host's
        return True
    function, index, register, bit = FEATURES[feature]
    return bool(found.get((function, index), (0, 0, 0, 0))[register] & bit)


def _vendor(found: Leaves) -> bytes:
    zero = found[0, 0]
    return struct.pack("<3I", zero[EBX], zero[EDX], zero[ECX])


def why_not(found: Leaves, model: Model) -> str:
    """Why this host cannot be that model; empty if it can."""
    if model.vendor not in (b"", _vendor(found)):
        return f"it is {model.vendor.decode()}'s"
    missing = sorted(feature for feature in model.features if not _has(found, feature))
    return f"the host has no {', '.join(missing)}" if missing else ""


def _check_vendor(found: Leaves, name: str, model: Model) -> None:
    if model.vendor and model.vendor != _vendor(found):
        mine = _vendor(found).decode("ascii", "replace")
        raise OperationUnsupported(
            f"the CPU model {name} is {model.vendor.decode()}'s, this host's CPU is {mine}'s",
            remedy="choose a model of the same vendor, or a level: x86-64-v1 to x86-64-v4",
        )


def _mask(found: Leaves, wanted: set[str]) -> None:
    """Clear every feature bit that is not wanted, also those that have no name here."""
    masks = dict.fromkeys(REGISTERS, 0)
    for feature in wanted:
        function, index, register, bit = FEATURES[feature]
        masks[function, index, register] |= bit
    if _vendor(found) == AMD:
        masks[0x80000001, 0, EDX] |= _REPEATED & found[1, 0][EDX]
    for (function, index, register), mask in masks.items():
        if (function, index) in found:
            found[function, index][register] &= mask
    # Leaves that tell of features with no bit of their own: what a model does not list it has not.
    for key in found:
        function, index = key
        if function in (
            5,
            0xA,
            0xF,
            0x10,
            0x12,
            0x14,
            0x17,
            0x18,
            0x1C,
            0x1D,
            0x1E,
            0x8000001B,
            0x8000001F,
            0x80000022,
        ):
            found[key][:] = [0, 0, 0, 0]
        elif function == 7 and index == 1:
            found[key][EBX:] = [0, 0, 0]
        elif function == 7 and index > 1:
            found[key][:] = [0, 0, 0, 0]
        elif function == 0x80000021:
            found[key][EBX:] = [0, 0, 0]


def _identify(found: Leaves, name: str, model: Model) -> None:
    """Signature and name. The levels are no product: they take the signature of an old one of the vendor. (Not AMD's
    family 15, as QEMU's do: Linux then looks for a GART on 256 PCI buses, which takes 33,000 exits.)"""
    family, number, stepping = model.family, model.model, model.stepping
    if not family:
        family, number, stepping = (23, 1, 2) if _vendor(found) == AMD else (6, 26, 3)
    signature = stepping | (number & 15) << 4 | min(family, 15) << 8 | number >> 4 << 16 | max(family - 15, 0) << 20
    found[1, 0][EAX] = signature
    if (0x80000001, 0) in found and _vendor(found) == AMD:
        found[0x80000001, 0][EAX] = signature
    brand = f"kvik {name}".encode().ljust(48, b"\0")
    for part in range(3):
        found[0x80000002 + part, 0] = list(struct.unpack_from("<4I", brand, 16 * part))
    found[0x80000000, 0][EAX] = max(found[0x80000000, 0][EAX], 0x80000004)
    if (sizes := found.get((0x80000008, 0))) is not None:
        sizes[EAX] = sizes[EAX] & 0xFF00 | min(sizes[EAX] & 0xFF, PHYSICAL_BITS)


# XSAVE state components (SDM vol. 1, 13.1) and the feature each belongs to.
_COMPONENTS = {
    2: "avx",
    3: "mpx",
    4: "mpx",
    5: "avx512f",
    6: "avx512f",
    7: "avx512f",
    9: "pku",
    17: "amx-tile",
    18: "amx-tile",
}
_LEGACY_AREA = 576  # x87, SSE and the XSAVE header


def _state_components(found: Leaves) -> None:
    """Leaf 0xD: only the state of features that are there, and the size of the area that holds it."""
    main = found.get((0xD, 0))
    if main is None:
        return
    if not _has(found, "xsave"):
        for key in [key for key in found if key[0] == 0xD]:
            found[key][:] = [0, 0, 0, 0]
        return
    size = _LEGACY_AREA
    for component in range(2, 63):
        registers = found.get((0xD, component))
        feature = _COMPONENTS.get(component)
        if registers is None or not registers[EAX]:
            continue
        if feature is None or not _has(found, feature):
            word, bit = (EAX, component) if component < 32 else (EDX, component - 32)
            main[word] &= ~(1 << bit)
            registers[:] = [0, 0, 0, 0]
        elif not registers[ECX] & 1:  # user state: at a fixed offset
            size = max(size, registers[EAX] + registers[EBX])
    main[EBX] = main[ECX] = size
    if (more := found.get((0xD, 1))) is not None:
        more[ECX] = more[EDX] = 0  # no supervisor state: a model lists none
