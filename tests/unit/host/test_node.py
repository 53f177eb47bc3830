"""Figures of a node, from made-up /proc and /sys trees and from this host's own."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from kvik.conf.cpuset import format_cpuset
from kvik.host import node
from kvik.host.cpu_model import cpu_model
from kvik.host.sysfs import parse_cpu_list


def tree(
    root: Path, *, cpus: int = 8, sockets: int = 2, threads: int = 2, cells: int = 2, online: str | None = None
) -> Path:
    """A host of `sockets` packages; CPU n + cpus/threads is the sibling of CPU n, as firmware numbers them."""
    base = root / "sys/devices/system"
    (base / "cpu").mkdir(parents=True)
    (base / "cpu/present").write_text(f"0-{cpus - 1}\n")
    (base / "cpu/online").write_text(online or f"0-{cpus - 1}\n")
    cores = cpus // threads
    for cpu in range(cpus):
        topology = base / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        core = cpu % cores
        (topology / "physical_package_id").write_text(str(core * sockets // cores))
        (topology / "core_id").write_text(str(core % (cores // sockets)))
        (topology / "die_id").write_text("0")
        (topology / "thread_siblings_list").write_text(",".join(str(core + cores * n) for n in range(threads)))
    (base / "node").mkdir()
    (base / "node/online").write_text(f"0-{cells - 1}\n")
    for cell in range(cells):
        directory = base / f"node/node{cell}"
        huge = directory / "hugepages/hugepages-2048kB"
        huge.mkdir(parents=True)
        (huge / "nr_hugepages").write_text("4")
        (huge / "free_hugepages").write_text("3")
        mine = [cpu for cpu in range(cpus) if (cpu % cores) * cells // cores == cell]
        (directory / "cpulist").write_text(format_cpuset(mine))
        (directory / "meminfo").write_text(f"Node {cell} MemTotal: 1048576 kB\nNode {cell} MemFree: 524288 kB\n")
        (directory / "distance").write_text(" ".join("10" if other == cell else "21" for other in range(cells)))
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        "MemTotal: 2097152 kB\nMemFree: 1048576 kB\nMemAvailable: 1500000 kB\nBuffers: 10 kB\nCached: 20 kB\n"
    )
    (root / "proc/cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Some Xeon\n"
        "stepping\t: 7\nmicrocode\t: 0x500320a\ncpu MHz\t\t: 2100.123\n"
        "address sizes\t: 46 bits physical, 48 bits virtual\n"
        "flags\t\t: fpu sse4_1 sse4_2 nopl constant_tsc tsc_deadline_timer vmx\n\nprocessor\t: 1\nmodel\t\t: 999\n"
    )
    return root


def test_topology_as_libvirt_counts_it(tmp_path: Path) -> None:
    info = node.node_info(tree(tmp_path))
    assert (info.nodes, info.sockets, info.cores, info.threads, info.cpus) == (2, 1, 2, 2, 8)
    assert (info.memory_kib, info.mhz) == (2097152, 2100)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"cells": 1}, (1, 2, 2, 2)),
        ({"cpus": 4, "sockets": 1, "threads": 1, "cells": 1}, (1, 1, 4, 1)),
        ({"online": "0-6"}, (1, 1, 7, 1)),  # no full product: libvirt's flat answer
    ],
)
def test_other_shapes(tmp_path: Path, shape: dict[str, int], expected: tuple[int, ...]) -> None:
    info = node.node_info(tree(tmp_path, **shape))
    assert (info.nodes, info.sockets, info.cores, info.threads) == expected
    assert info.nodes * info.sockets * info.cores * info.threads >= info.cpus


def test_cells_with_memory_pages_cpus_and_distances(tmp_path: Path) -> None:
    cells = node.cells(tree(tmp_path))
    assert [cell.id for cell in cells] == [0, 1]
    first = cells[0]
    assert (first.memory_kib, first.free_kib, first.distances) == (1048576, 524288, {0: 10, 1: 21})
    assert [(cpu.id, cpu.socket_id, cpu.core_id, cpu.siblings) for cpu in first.cpus] == [
        (0, 0, 0, [0, 4]),
        (1, 0, 1, [1, 5]),
        (4, 0, 0, [0, 4]),
        (5, 0, 1, [1, 5]),
    ]
    assert first.pages == [node.Pages(4, (1048576 - 4 * 2048) // 4, 131072), node.Pages(2048, 4, 3)]


def test_a_kernel_without_numa_has_one_cell(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / "sys/devices/system/node/online").unlink()
    cells = node.cells(root)
    assert len(cells) == 1 and len(cells[0].cpus) == 8 and cells[0].memory_kib == 2097152


def test_the_cpu_is_described_in_both_spellings(tmp_path: Path) -> None:
    cpu = cpu_model(tree(tmp_path))
    assert (cpu.vendor, cpu.family, cpu.model, cpu.stepping, cpu.microcode) == ("Intel", 6, 85, 7, 0x500320A)
    assert (cpu.name, cpu.physical_bits, cpu.virtual_bits) == ("Some Xeon", 46, 48)
    assert cpu.features == ["fpu", "sse4.1", "sse4.2", "tsc-deadline", "vmx"]
    assert cpu.known_model == "qemu64"


def test_models_are_recognised_by_their_features(tmp_path: Path) -> None:
    root = tree(tmp_path)
    level = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
    (root / "proc/cpuinfo").write_text(f"vendor_id\t: GenuineIntel\nflags\t: {level}\n")
    assert cpu_model(root).known_model == "Nehalem"
    (root / "proc/cpuinfo").write_text(f"vendor_id\t: GenuineIntel\nflags\t: {level} avx aes\n")
    assert cpu_model(root).known_model == "SandyBridge"
    (root / "proc/cpuinfo").write_text(f"vendor_id\t: AuthenticAMD\nflags\t: {level} avx aes fma4\n")
    assert cpu_model(root).known_model == "Opteron_G4"


def test_cpu_time_by_cpu_and_in_sum(tmp_path: Path) -> None:
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  3 2 5 70 6 1 4 9\ncpu0 1 1 1 1 1 1 1 1\nintr 1 2\ncpu9 0 0 0 0 0 0 0 0\n")
    stats = node.cpu_stats(tmp_path)
    assert stats[-1] == node.CpuStats(kernel=10 * tick, user=5 * tick, idle=70 * tick, iowait=6 * tick)
    assert set(stats) == {-1, 0}


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert parse_cpu_list("") == []
    assert parse_cpu_list("a,-1,3-x,5") == [5]
    assert len(parse_cpu_list("0-99999999999")) == 8192  # bounded


def test_the_cpu_map_is_a_bitmap_of_present_cpus() -> None:
    assert node.CpuMap(list(range(10)), [0, 2, 9]).bitmap() == bytes((0b101, 0b10))
    assert node.CpuMap([0, 1], [0, 1]).bitmap() == b"\x03"


def test_nothing_there_gives_zeros_not_errors(tmp_path: Path) -> None:
    assert node.memory_stats(tmp_path) == node.MemoryStats(0, 0, 0, 0, 0)
    assert node.cpu_stats(tmp_path) == {}
    assert node.node_info(tmp_path).cpus >= 1
    assert cpu_model(tmp_path).vendor == ""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_bytes(b"\xff" * 1000 + b"\nmodel\t: many\nflags\t:\n")
    assert cpu_model(tmp_path).model == 0


def test_the_host_uuid_is_the_firmwares_or_kept(tmp_path: Path) -> None:
    dmi = tmp_path / "sys/class/dmi/id/product_uuid"
    dmi.parent.mkdir(parents=True)
    kept = tmp_path / "state/host-uuid"
    dmi.write_text("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n")  # a placeholder
    made = node.host_uuid(kept, tmp_path)
    assert node.host_uuid(kept, tmp_path) == made == str(uuid.UUID(made))
    kept.write_text("garbage")
    assert node.host_uuid(kept, tmp_path) != made
    dmi.write_text("4C4C4544-0042-3510-8052-B4C04F4D3732\n")
    assert node.host_uuid(kept, tmp_path) == "4c4c4544-0042-3510-8052-b4c04f4d3732"
    dmi.write_text("")
    (tmp_path / "file").touch()
    assert node.host_uuid(tmp_path / "file/x", tmp_path)  # cannot be kept: still an answer


def test_this_host_agrees_with_the_c_library() -> None:
    info = node.node_info()
    assert info.cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    assert abs(info.memory_kib - pages) <= info.memory_kib // 100
    assert 0 < node.free_memory() <= info.memory_kib * 1024
    assert node.page_sizes()[0] == os.sysconf("SC_PAGE_SIZE") // 1024
    assert node.hostname()
    assert sorted(cpu.id for cell in node.cells() for cpu in cell.cpus) == node.cpu_map().online
