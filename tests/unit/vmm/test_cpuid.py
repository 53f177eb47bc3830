"""CPUID tables: topology, models, features."""

from __future__ import annotations

import struct

import pytest

from kvik.errors import InvalidArgument, OperationUnsupported
from kvik.kvm.structs import CpuidTable
from kvik.vmm.config import CpuConfig
from kvik.vmm.cpu.cpuid import check_physical_bits, cpuid_for, fill, leaves
from kvik.vmm.cpu.features import FEATURES, canonical
from kvik.vmm.cpu.listing import listing
from kvik.vmm.cpu.models import MODELS
from kvik.vmm.cpu.topology import Topology

EAX, EBX, ECX, EDX = range(4)
ALL = 0xFFFFFFFF


def host(vendor: bytes = b"GenuineIntel", without: tuple[str, ...] = ()) -> CpuidTable:
    """A host that has every feature, and leaves of the usual shape."""
    b, d, c = struct.unpack("<3I", vendor)
    found: dict[tuple[int, int], list[int]] = {
        (0, 0): [0x1F, b, c, d],
        (0x40000000, 0): [0x40000001, 0, 0, 0],
        (0x80000000, 0): [0x80000021, b, c, d],
    }
    for function, index, register, bit in FEATURES.values():
        found.setdefault((function, index), [0, 0, 0, 0])[register] |= bit
    found[1, 0][EAX] = 0x000A0F11
    found[1, 0][EBX] = 0xAB000800
    found[4, 0] = [0x1C004121, 0, 0, 0]
    found[4, 1] = [0x1C03C163, 0, 0, 0]
    found[4, 2] = [0, 0, 0, 0]
    found[7, 0][EAX] = 1
    found[0xA, 0] = [0x07300404, 0, 0, 0x603]
    found[0xD, 0] = [0x602E7, 0x980, 0x2B00, 0]
    found[0xD, 2] = [0x100, 0x240, 0, 0]
    found[0xD, 5] = [0x40, 0x340, 0, 0]
    found[0xD, 6] = [0x200, 0x380, 0, 0]
    found[0xD, 7] = [0x400, 0x580, 0, 0]
    found[0xD, 9] = [8, 0x980, 0, 0]
    found[0xD, 17] = [0x40, 0xAC0, 2, 0]
    found[0xD, 18] = [0x2000, 0xB00, 6, 0]
    for part in (2, 3, 4):
        found[0x80000000 + part, 0] = [0x6B6B6B6B] * 4
    found[0x80000008, 0][EAX] = 0x3930
    found[0x8000001D, 0] = [0x4121, 0, 0, 0]
    found[0x8000001D, 3] = [0x1C163, 0, 0, 0]
    found[0x8000001E, 0] = [0, 0, 0, 0]
    for feature in without:
        function, index, register, bit = FEATURES[feature]
        found[function, index][register] &= ~bit
    return fill(CpuidTable(), found, {4, 7, 0xD, 0x8000001D})


def guest(config: CpuConfig, index: int = 0, table: CpuidTable | None = None) -> dict[tuple[int, int], list[int]]:
    return leaves(cpuid_for(table or host(), config, index))[0]


def has(found: dict[tuple[int, int], list[int]], feature: str) -> bool:
    function, index, register, bit = FEATURES[feature]
    return bool(found.get((function, index), [0, 0, 0, 0])[register] & bit)


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        (Topology(1, 1, 4, 1), [0, 1, 2, 3]),
        (Topology(2, 1, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Topology(2, 1, 3, 2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]),
        (Topology(2, 3, 1, 1), [0, 1, 2, 4, 5, 6]),
        (Topology(3, 1, 1, 1), [0, 1, 2]),
    ],
)
def test_apic_ids_have_gaps_where_a_level_is_no_power_of_two(shape: Topology, ids: list[int]) -> None:
    assert [shape.apic_id(index) for index in range(len(ids))] == ids
    assert shape.largest_apic_id == ids[-1]


@pytest.mark.parametrize("shape", [Topology(1, 1, 64, 1), Topology(7, 3, 5, 2), Topology(16, 1, 32, 2)])
def test_no_two_processors_share_an_apic_id(shape: Topology) -> None:
    count = shape.sockets * shape.per_socket
    assert len({shape.apic_id(index) for index in range(count)}) == count


def test_what_is_not_given_of_a_topology_follows() -> None:
    assert Topology.of(CpuConfig(count=6)).cores == 6
    assert Topology.of(CpuConfig(count=2, maximum=8, sockets=2, threads=2)).cores == 2


@pytest.mark.parametrize(
    "config",
    [
        *[CpuConfig(count=0), CpuConfig(count=4, maximum=2), CpuConfig(count=2000)],
        *[CpuConfig(count=8, sockets=1, cores=2, threads=2), CpuConfig(count=1, sockets=2, cores=1024)],
    ],
)
def test_a_topology_that_does_not_add_up_is_refused(config: CpuConfig) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Topology.of(config)
    assert caught.value.remedy


def test_each_processor_sees_its_own_place() -> None:
    config = CpuConfig(count=12, sockets=2, cores=3, threads=2)
    for index, apic_id in enumerate([0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]):
        found = guest(config, index)
        assert found[1, 0][EBX] >> 24 == apic_id and found[1, 0][EBX] >> 16 & 0xFF == 6
        for function in (0xB, 0x1F):
            assert found[function, 0] == [1, 2, 0x100, apic_id]
            assert found[function, 1] == [3, 6, 0x201, apic_id]
            assert found[function, 2] == [0, 0, 2, apic_id]


def test_dies_are_a_level_of_their_own() -> None:
    found = guest(CpuConfig(count=8, sockets=1, dies=2, cores=2, threads=2), 7)
    assert [found[0x1F, level][ECX] >> 8 for level in range(4)] == [1, 2, 5, 0]
    assert [found[0x1F, level][EAX] for level in range(3)] == [1, 2, 3]
    assert found[0xB, 1][:2] == [3, 8]


def test_caches_are_shared_by_cores_and_dies() -> None:
    found = guest(CpuConfig(count=8, cores=4, threads=2))
    first, last = found[4, 0][EAX], found[4, 1][EAX]
    assert (first >> 14 & 0xFFF, last >> 14 & 0xFFF) == (1, 7) and first >> 26 == last >> 26 == 3
    assert found[4, 2] == [0, 0, 0, 0]


def test_amds_leaves_tell_the_same() -> None:
    found = guest(CpuConfig(count=8, sockets=2, cores=2, threads=2), 6, host(b"AuthenticAMD"))
    assert found[0x80000008, 0][ECX] & 0xF0FF == 2 << 12 | 3
    assert found[0x8000001E, 0] == [6, 0x101 | 0, 1, 0] or found[0x8000001E, 0][:2] == [6, 0x103]
    assert found[0x8000001E, 0][1] >> 8 & 0xFF == 1
    assert (found[0x8000001D, 0][EAX] >> 14 & 0xFFF, found[0x8000001D, 3][EAX] >> 14 & 0xFFF) == (1, 3)


def test_every_guest_is_told_that_it_is_one() -> None:
    for model in ("host", "x86-64-v2"):
        found = guest(CpuConfig(model=model))
        assert all(has(found, name) for name in ("hypervisor", "x2apic", "tsc-deadline", "kvmclock"))
        assert not found[1, 0][ECX] & 1 << 27  # OSXSAVE follows the guest's CR4


def test_large_machines_have_wide_interrupt_destinations() -> None:
    table = host(without=("kvm-msi-ext-dest-id",))
    assert not has(guest(CpuConfig(count=254), 0, table), "kvm-msi-ext-dest-id")
    assert has(guest(CpuConfig(count=300), 0, table), "kvm-msi-ext-dest-id")


def test_host_shows_everything_and_a_model_only_its_list() -> None:
    everything = guest(CpuConfig(model="host"))
    assert has(everything, "amx-tile") and everything[0xA, 0][EAX]
    level = guest(CpuConfig(model="x86-64-v2"))
    for feature in MODELS["x86-64-v2"].features:
        assert has(level, feature), feature
    for feature in ("avx", "avx2", "aes", "vmx", "svm", "hle", "spec-ctrl", "invtsc", "amx-tile", "monitor"):
        assert not has(level, feature), feature
    assert level[0xA, 0] == [0, 0, 0, 0]


def test_a_model_looks_the_same_on_different_hosts() -> None:
    """What makes a state movable: two hosts, one with more than the model needs, give the same table."""
    lean = host(without=("avx512f", "amx-tile", "vmx", "pku", "spec-ctrl", "invtsc", "mpx", "sha-ni", "gfni"))
    for model in ("x86-64-v2", "x86-64-v3", "Haswell-noTSX"):
        assert guest(CpuConfig(model=model), 0, lean) == guest(CpuConfig(model=model), 0, host())


def test_the_levels_contain_each_other() -> None:
    for lower, higher in zip(("x86-64-v1", "x86-64-v2", "x86-64-v3"), ("x86-64-v2", "x86-64-v3", "x86-64-v4")):
        assert set(MODELS[lower].features) < set(MODELS[higher].features)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_known_features_and_works_where_they_are(name: str) -> None:
    model = MODELS[name]
    assert set(model.features) <= set(FEATURES)
    found = guest(CpuConfig(model=name), 0, host(model.vendor or b"GenuineIntel"))
    brand = b"".join(struct.pack("<4I", *found[0x80000002 + part, 0]) for part in range(3))
    assert brand.rstrip(b"\0") == f"kvik {name}".encode()


def test_signatures_are_those_of_the_processors() -> None:
    assert guest(CpuConfig(model="SandyBridge"))[1, 0][EAX] == 0x206A1
    assert guest(CpuConfig(model="EPYC-Rome"), 0, host(b"AuthenticAMD"))[1, 0][EAX] == 0x830F10


def test_state_components_follow_the_features() -> None:
    plain = guest(CpuConfig(model="x86-64-v3"))
    assert plain[0xD, 0] == [7, 0x340, 0x340, 0] and plain[0xD, 5] == [0, 0, 0, 0]
    assert guest(CpuConfig(model="x86-64-v4"))[0xD, 0][EAX] == 0xE7
    assert guest(CpuConfig(model="x86-64-v2"))[0xD, 0] == [0, 0, 0, 0]
    assert guest(CpuConfig(model="host", features=("-amx-tile",)))[0xD, 0][EAX] == 0x2E7


def test_features_are_added_and_taken_away() -> None:
    found = guest(CpuConfig(model="x86-64-v2", features=("+aes", "+sse4_1", "-popcnt", "+kvm-hint-dedicated")))
    assert has(found, "aes") and not has(found, "popcnt") and has(found, "kvm-hint-dedicated")
    assert canonical("SSE4_2") == "sse4.2" and canonical("lzcnt") == "abm"


def test_what_the_host_lacks_is_said_with_what_it_could_be() -> None:
    table = host(without=("avx2",))
    with pytest.raises(OperationUnsupported, match=r"avx2.*x86-64-v3.*choose.*host, x86-64-v1, x86-64-v2"):
        cpuid_for(table, CpuConfig(model="x86-64-v3"), 0)
    with pytest.raises(OperationUnsupported, match="avx2"):
        cpuid_for(table, CpuConfig(features=("+avx2",)), 0)
    assert not has(guest(CpuConfig(model="x86-64-v3", features=("-avx2",)), 0, table), "avx2")


@pytest.mark.parametrize(
    "config",
    [
        *[CpuConfig(model="Z80"), CpuConfig(features=("+no-such",)), CpuConfig(features=("avx2",))],
        CpuConfig(features=("+avx2", "-avx2")),
    ],
)
def test_nonsense_is_refused(config: CpuConfig) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cpuid_for(host(), config, 0)
    assert caught.value.remedy


def test_the_list_tells_what_a_guest_can_have_here() -> None:
    lines = dict(line.split(maxsplit=1) for line in listing(host(without=("avx512f", "avx512vl"))).splitlines())
    assert list(lines) == ["host", *MODELS]
    assert lines["x86-64-v4"] == "unusable: the host has no avx512f, avx512vl"
    assert lines["EPYC"] == "unusable: it is AuthenticAMD's"
    assert lines["Broadwell-noTSX"] == "usable, nearest to this host" and lines["x86-64-v3"] == "usable"
    assert [line for line in lines.values() if "nearest" in line] == [lines["Broadwell-noTSX"]]
    assert set(dict(line.split(maxsplit=1) for line in listing(None).splitlines()).values()) == {
        "unknown: KVM cannot be asked"
    }


def test_a_model_of_another_vendor_is_refused() -> None:
    with pytest.raises(OperationUnsupported, match=r"EPYC.*AuthenticAMD's.*GenuineIntel's"):
        cpuid_for(host(), CpuConfig(model="EPYC"), 0)


def test_the_address_map_must_fit_the_physical_bits() -> None:
    table = cpuid_for(host(), CpuConfig(model="x86-64-v2"), 0)
    assert leaves(table)[0][0x80000008, 0][EAX] & 0xFF == 40
    check_physical_bits(table, 1 << 40)
    with pytest.raises(InvalidArgument, match=r"40 bits: 1024 GiB.*less memory"):
        check_physical_bits(table, (1 << 40) + 1)


def test_a_full_table_is_refused_instead_of_cut() -> None:
    with pytest.raises(ValueError, match="more than the 256"):
        fill(CpuidTable(), {(number, 0): [0] * 4 for number in range(257)}, set())
