"""Snapshots and the reset loop, with a guest of 26 bytes on this host's KVM."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from guest import run_until
from state_guest import COUNTER, ECHO, PATTERN, Guest, awaiting, booted, restored, through_snapshot

from kvik.errors import (
    AlreadyExists,
    HostError,
    InvalidArgument,
    KvikError,
    NotFound,
    OperationFailed,
    OperationInvalid,
)
from kvik.vmm.config import CpuConfig, DiskConfig, MemoryConfig
from kvik.vmm.devices.acpi_events import CPU_EJECT
from kvik.vmm.layout import MIB, VMGENID
from kvik.vmm.machine import Machine
from kvik.vmm.state.migration import migration_of
from kvik.vmm.state.values import decode, encode
from kvik.vmm.virtio.rng import Rng

pytestmark = pytest.mark.functional

Way = Callable[[Path], AbstractContextManager[Guest]]


@pytest.fixture(params=["booted", "restored", "restored from zlib", "restored with shared memory", "rewound"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guest]:
    """The same guest, got in different ways."""
    ways: dict[str, Way] = {
        "booted": booted,
        "restored": through_snapshot,
        "restored from zlib": lambda directory: through_snapshot(directory, "zlib"),
        "restored with shared memory": lambda directory: through_snapshot(directory, shared=True),
        "rewound": booted,
    }
    with ways[request.param](tmp_path) as made:
        if request.param == "rewound":
            made.check()
            made.machine.checkpoint()
            made.check()
            made.machine.rewind()
        yield made


def test_it_counts_and_echoes(guest: Guest) -> None:
    guest.check()


@pytest.mark.parametrize("way", ["restored", "migrated"])
def test_processors_keep_their_numbers_where_some_have_left(tmp_path: Path, way: str) -> None:
    """Processor 3 came, 1 went: what goes on has 0 and 3, and 1 can come again."""
    saved, uri, cpus = tmp_path / "saved", f"unix:{tmp_path}/there", CpuConfig(count=2, maximum=4)
    with booted(tmp_path, cpus=cpus) as guest:
        machine = guest.machine
        assert machine.vcpu_hotplug is not None
        machine.vcpu_hotplug.plug(3, "late")
        registers = machine.vcpu_hotplug.registers
        registers.write(0, 4, 1)
        registers.write(4, 4, CPU_EJECT)  # as the guest does
        run_until(machine, lambda: [thread.index for thread in machine.vcpus] == [0, 3])
        with machine.paused():
            apics = [bytes(thread.vcpu.lapic()) for thread in machine.vcpus]
        if way == "restored":
            machine.save(str(saved))
        with (
            restored(saved) if way == "restored" else awaiting(tmp_path, uri, cpus=CpuConfig(count=2, maximum=4))
        ) as other:
            if way == "migrated":
                migration_of(machine).start(uri)
                run_until(machine, lambda: other.machine.loop.run_once(0) or other.machine.status == "running")
                run_until(machine, lambda: migration_of(machine).report()["status"] == "completed")
            else:
                other.machine.start()
            there = other.machine
            assert [thread.index for thread in there.vcpus] == [0, 3]
            assert [thread.apic_id for thread in there.vcpus] == [0, 3]
            with there.paused():
                assert [bytes(thread.vcpu.lapic())[0x20:0x30] for thread in there.vcpus] == [
                    apic[0x20:0x30] for apic in apics
                ]
            other.check()
            assert there.vcpu_hotplug is not None and there.vcpu_hotplug.registers.present == [1, 0, 0, 1]
            with pytest.raises(OperationInvalid, match="is there already"):
                there.vcpu_hotplug.plug(3)
            for number in (1, 2):
                there.vcpu_hotplug.plug(number)
            assert [thread.index for thread in there.vcpus] == [0, 1, 2, 3]
            other.check()


def test_a_machine_without_room_for_a_processor_says_so(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with booted(tmp_path, cpus=CpuConfig(count=1, maximum=4)) as guest:
        assert guest.machine.vcpu_hotplug is not None
        guest.machine.save(str(saved))
    path = saved / "state.json"
    state = decode(path.read_bytes(), "it")
    for index in (4, 9):
        state["state"]["cpu"]["vcpus"][0]["index"] = index
        path.write_bytes(encode(state))
        with pytest.raises(OperationFailed, match=rf"processors {index}, this one 0.*max={index + 1}"), restored(saved):
            pass


def test_it_stops_and_goes_on(guest: Guest) -> None:
    guest.machine.pause()
    before = guest.counter()
    guest.machine.loop.run_once(0.02)
    assert guest.counter() == before
    guest.machine.resume()
    guest.check()


def test_it_boots_again_when_reset(guest: Guest) -> None:
    guest.check()
    guest.machine.memory.put_u32(COUNTER, 1 << 31)
    guest.machine.reset()
    guest.echo(b"anew")
    assert guest.machine.memory.read(0x100_0850, len(ECHO)) == ECHO


def test_it_can_be_saved_again(guest: Guest, tmp_path: Path) -> None:
    guest.machine.memory.write(PATTERN, b"second generation")
    guest.machine.save(str(tmp_path / "again"))
    guest.check()
    with restored(tmp_path / "again") as other:
        assert other.machine.memory.read(PATTERN, 17) == b"second generation"
        other.machine.start()
        other.check()


# Snapshots --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A snapshot of a guest with a known pattern in memory."""
    with booted(tmp_path) as guest:
        guest.check()
        guest.machine.pause()
        guest.machine.memory.write(PATTERN, random.Random(1).randbytes(3 * MIB))
        guest.machine.save(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_all_of_memory_and_every_register_come_back(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        guest.check()
        guest.machine.pause()
        guest.machine.memory.write(PATTERN, random.Random(2).randbytes(MIB + 4097))
        guest.machine.save(str(tmp_path / "saved"))
        ram = guest.machine.memory.read(0, 64 * MIB)
        registers = guest.machine.vcpus[0].vcpu.regs()
    with restored(tmp_path / "saved") as other:
        again = other.machine.memory.read(0, 64 * MIB)
        # The generation ID is new: the one thing that must differ.
        assert again[VMGENID : VMGENID + 16] != ram[VMGENID : VMGENID + 16]
        assert again[:VMGENID] == ram[:VMGENID] and again[VMGENID + 16 :] == ram[VMGENID + 16 :]
        assert bytes(other.machine.vcpus[0].vcpu.regs()) == bytes(registers)
        assert other.machine.status == "prelaunch" and other.machine.config.paused


def test_the_file_has_holes_and_is_read_only_when_touched(saved: Path) -> None:
    memory = (saved / "memory").stat()
    assert memory.st_size == 64 * MIB and memory.st_blocks * 512 < 8 * MIB
    assert memory.st_mode & 0o777 == 0o600 and (saved / "state.json").stat().st_mode & 0o777 == 0o600

    def resident(machine: Machine) -> int:
        """Bytes of the machine's RAM that are in this process's page tables."""
        address, inside, found = machine.memory.regions[0].address, False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in (first := line.split()[0]):
                low, high = (int(part, 16) for part in first.split("-"))
                inside = address <= low and high <= address + 64 * MIB
            elif inside and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
        return found

    with restored(saved) as guest:
        assert resident(guest.machine) < MIB
        assert guest.machine.memory.read(PATTERN, 16) == random.Random(1).randbytes(3 * MIB)[:16]


def test_what_one_machine_writes_no_other_restored_from_the_file_sees(saved: Path) -> None:
    with restored(saved) as one, restored(saved) as two:
        one.machine.memory.write(PATTERN, b"mine")
        assert two.machine.memory.read(PATTERN, 4) == random.Random(1).randbytes(3 * MIB)[:4]
    with restored(saved) as three:
        assert three.machine.memory.read(PATTERN, 4) != b"mine"


def test_a_name_that_is_taken_is_refused_and_nothing_is_left_of_what_failed(saved: Path, tmp_path: Path) -> None:
    with restored(saved) as guest:
        with pytest.raises(AlreadyExists, match="saved exists already"):
            guest.machine.save(str(saved))
        with pytest.raises(HostError, match="cannot save to"):
            guest.machine.save(str(tmp_path / "no such" / "place"))
        with pytest.raises(InvalidArgument, match="no compression 'lzma'"):
            guest.machine.save(str(tmp_path / "other"), "lzma")

        class Unsaveable(Rng):
            def state(self) -> dict[str, Any]:
                raise OperationInvalid("not now")

        guest.machine.add(Unsaveable("late"))
        with pytest.raises(OperationInvalid, match="not now"):
            guest.machine.save(str(tmp_path / "other"))
        guest.machine.start()
        guest.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "saved"]


def test_a_device_that_was_plugged_is_there_again_in_its_slot(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    with booted(tmp_path) as guest:
        from kvik.vmm.monitor.hotplug import MachineHotplug

        MachineHotplug(guest.machine).plug(DiskConfig(id="late", path=str(disk), slot=9))
        guest.machine.save(str(tmp_path / "saved"))
    with restored(tmp_path / "saved") as other:
        assert other.machine.devices["late"].slot == 9
        other.machine.start()
        other.check()


def test_a_running_machine_can_be_put_into_a_saved_state(saved: Path) -> None:
    with restored(saved) as guest:
        machine = guest.machine
        machine.start()
        guest.check()
        machine.memory.write(PATTERN, b"overwritten")
        from kvik.vmm.state.snapshot import load

        load(machine, str(saved))
        assert machine.memory.read(PATTERN, 11) == random.Random(1).randbytes(3 * MIB)[:11]
        guest.check()


# Damaged and unfit ------------------------------------------------------------------------------------------------


def change(saved: Path, edit: Callable[[Any], None]) -> None:
    path = saved / "state.json"
    document = decode(path.read_bytes(), "it")
    edit(document)
    path.write_bytes(encode(document))


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another format": (lambda d: d.update(format="tar"), "no snapshot of kvik-vmm"),
    "a later version": (lambda d: d.update(version=2), "version 2, this kvik reads 1"),
    "no config": (lambda d: d.pop("config"), "config is damaged: dict was expected, not nothing"),
    "a number as name": (lambda d: d["config"].update(name=5), r"config\.name is damaged"),
    "a word as size": (lambda d: d["config"]["memory"].update(size="much"), r"config\.memory\.size is damaged"),
    "negative memory": (lambda d: d["memory"]["regions"][0].update(size=-1), r"regions\[0\]: size is damaged"),
    "other regions": (lambda d: d["memory"]["regions"][0].update(start=4096), "not this machine's"),
    "an offset beyond": (lambda d: d["memory"]["regions"][0].update(offset=1 << 40), "memory is cut off"),
    "another file": (lambda d: d["memory"].update(file="/etc/passwd"), "file is damaged"),
    "an unknown compression": (lambda d: d["memory"].update(compression="rar"), "'rar' is not known"),
    "no vCPUs": (lambda d: d["state"]["cpu"].update(vcpus=[]), "0 vCPUs, this one 1"),
    "short registers": (lambda d: d["state"]["cpu"]["vcpus"][0].update(sregs=b"x"), "cpu is damaged"),
    "a huge CPUID": (
        lambda d: d["state"]["cpu"]["vcpus"][0].update(cpuid=b"\xff" * 4 + bytes(1 << 14)), "CPUID table is damaged"
    ),
    "no clock": (lambda d: d["state"]["cpu"]["vm"].pop("clock"), "cpu is damaged"),
    "a device less": (lambda d: d["state"]["devices"].pop("rtc"), "'rtc' only here"),
    "a device more": (lambda d: d["state"]["devices"].update(tank={"kind": "t", "state": {}}), "'tank' only there"),
    "another kind": (lambda d: d["state"]["devices"]["rtc"].update(kind="toy"), "is a toy there, a mc146818rtc here"),
    "a device without state": (lambda d: d["state"]["devices"]["rtc"].update(state={}), "devices.rtc is damaged"),
    "queues in the sky": (
        lambda d: d["state"]["devices"]["rng0"]["state"]["device"]["queues"][0].update(ready=True, desc=1 << 60),
        "devices.rng0 is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_is_wrong_in_the_state_is_named(saved: Path, name: str) -> None:
    edit, message = EDITS[name]
    change(saved, edit)
    with pytest.raises(OperationFailed, match=message) as caught, restored(saved):
        pass
    assert str(saved) in str(caught.value) or "CPU" in str(caught.value)


def test_files_that_are_cut_off_or_missing_are_named(saved: Path) -> None:
    whole = (saved / "state.json").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 2):
        (saved / "state.json").write_bytes(whole[:size])
        with pytest.raises(OperationFailed, match=r"state\.json is damaged"), restored(saved):
            pass
    (saved / "state.json").write_bytes(whole)
    os.truncate(saved / "memory", 63 * MIB)
    with pytest.raises(OperationFailed, match="memory is cut off"), restored(saved):
        pass
    (saved / "memory").unlink()
    with pytest.raises(NotFound, match="memory does not exist"), restored(saved):
        pass
    (saved / "memory").symlink_to("/dev/zero")
    with pytest.raises(HostError, match="cannot open"), restored(saved):
        pass


def test_a_random_change_never_does_worse_than_an_error(saved: Path) -> None:
    whole, chance = (saved / "state.json").read_bytes(), random.Random(3)
    for _ in range(30):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice(b'0129{}[]",:-eAZ\0\xff')
        (saved / "state.json").write_bytes(data)
        try:
            with restored(saved):
                pass
        except KvikError:
            pass


def test_every_byte_of_a_compressed_memory_is_checked(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        guest.check()
        guest.machine.save(str(tmp_path / "saved"), "zlib")
    whole = (tmp_path / "saved/memory").read_bytes()
    chance = random.Random(4)
    for position in (0, 8, 12, 16, 20, len(whole) - 20, *(chance.randrange(len(whole)) for _ in range(10))):
        data = bytearray(whole)
        data[position] ^= 0x55
        (tmp_path / "saved/memory").write_bytes(data)
        with pytest.raises(OperationFailed, match=r"saved/memory is (damaged|cut off)"), restored(tmp_path / "saved"):
            pass
    (tmp_path / "saved/memory").write_bytes(whole[:-1])
    with pytest.raises(OperationFailed, match="cut off"), restored(tmp_path / "saved"):
        pass


def test_a_cpu_that_this_host_cannot_be_is_refused_by_the_features_name(saved: Path) -> None:
    def grow(document: Any) -> None:
        vcpu = document["state"]["cpu"]["vcpus"][0]
        table = bytearray(vcpu["cpuid"])
        for entry in range(int.from_bytes(table[:4], "little")):
            at = 8 + 40 * entry
            if table[at : at + 4] == b"\x01\0\0\0":
                table[at + 20] |= 1 << 5  # ECX: VMX
            if table[at : at + 4] == b"\x01\0\0\x80":
                table[at + 21] |= 1 << 7  # ECX: LWP, that no CPU has any more
        vcpu["cpuid"] = bytes(table)

    change(saved, grow)
    with pytest.raises(OperationFailed, match=r"lacks what the saved machine uses: .*lwp.*CPU model"), restored(saved):
        pass


def test_what_the_guest_sees_cannot_be_given_anew(saved: Path) -> None:
    for given, message in (
        ({"memory": MemoryConfig(size=128 * MIB)}, "has 64 MiB of memory, not 128"),
        ({"cpus": CpuConfig(count=2)}, "CPUs of a saved machine cannot change"),
        ({"disks": [DiskConfig(path="/dev/null")]}, "has 0 disks, and 1 were given"),
    ):
        with pytest.raises(InvalidArgument, match=message), restored(saved, **given):
            pass


def test_a_descriptor_of_the_old_process_must_be_given_anew(saved: Path) -> None:
    with pytest.raises(InvalidArgument, match="was a descriptor of another process"):
        Machine.restore(str(saved))


def test_a_snapshot_is_readable_json_for_whoever_looks(saved: Path) -> None:
    document = json.loads((saved / "state.json").read_text())
    assert document["format"] == "kvik-vmm snapshot" and document["config"]["memory"]["size"] == 64 * MIB


# The reset loop ---------------------------------------------------------------------------------------------------


def test_a_rewind_restores_memory_registers_and_devices(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        machine = guest.machine
        guest.check()
        machine.pause()
        machine.memory.write(PATTERN, b"kept")
        machine.checkpoint()
        ram, registers = machine.memory.read(0, 64 * MIB), bytes(machine.vcpus[0].vcpu.regs())
        for _ in range(3):
            machine.resume()
            guest.check()
            machine.pause()
            machine.memory.write(PATTERN, b"lost")
            machine.memory.write(PATTERN + 0x5000, bytes([1]) * 0x3000)  # this process's own writes
            machine.memory.discard(PATTERN + 0x10_0000, 4096)
            assert machine.rewind() >= 5
            assert machine.memory.read(0, 64 * MIB) == ram
            assert bytes(machine.vcpus[0].vcpu.regs()) == registers
        machine.forget_checkpoint()
        machine.resume()
        guest.check()


def test_a_rewind_touches_only_what_changed(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        guest.check()
        guest.machine.pause()
        guest.machine.checkpoint()
        guest.machine.rewind()
        assert guest.machine.rewind() <= 1
        guest.machine.resume()
        guest.check()
        assert guest.machine.rewind() < 32


def test_without_a_checkpoint_or_with_other_devices_there_is_no_way_back(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        with pytest.raises(OperationInvalid, match="no checkpoint"):
            guest.machine.rewind()
        guest.machine.checkpoint()
        guest.machine.add(Rng("late"))
        with pytest.raises(OperationInvalid, match="came or went"):
            guest.machine.rewind()
        guest.machine.checkpoint()
        guest.check()
        guest.machine.rewind()
        guest.check()


def test_a_machine_that_crashed_is_itself_again(tmp_path: Path) -> None:
    with booted(tmp_path) as guest:
        guest.check()
        guest.machine.checkpoint()
        guest.machine.pause("internal-error")
        guest.machine.rewind()
        guest.machine.resume()
        run_until(guest.machine, lambda: guest.machine.status == "running")
        guest.check()
