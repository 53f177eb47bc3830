"""The binding at work: tiny guests that interrupt, notify, log, step and are moved."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import kvik
from kvik.kvm import Capability, ExitReason, KvmError, System, constants, routing, stats
from kvik.kvm.constants import InternalErrorKind, Irqchip, MpState
from kvik.kvm.exits import DebugExit, InternalErrorExit, IoExit, MmioExit, MsrExit, ShutdownExit
from unit.kvm.tiny import CODE, HANDLER, SIZE, STACK, VECTOR, WAIT, Tiny, needs_kvm

pytestmark = needs_kvm

OUT = "b0 41 e6 10"  # mov $0x41,%al; out %al,$0x10
MSI = 0xFEE00000  # to the local APIC 0, fixed delivery


def out_of(reason: object) -> tuple[int, bytes]:
    assert isinstance(reason, IoExit) and reason.out, reason
    return reason.port, bytes(reason.data)


def test_an_msi_interrupts_a_halted_guest() -> None:
    with Tiny(WAIT, OUT + "f4", irqchip=True) as tiny:
        tiny.enable_lapic()
        assert tiny.halts()
        assert tiny.vm.signal_msi(MSI, VECTOR)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        assert not tiny.vm.signal_msi(MSI | 7 << 12, VECTOR), "there is no APIC 7"


def test_an_irqfd_interrupts_through_a_routed_gsi() -> None:
    with Tiny(WAIT, OUT + "cf", irqchip=True) as tiny:
        tiny.enable_lapic()
        tiny.vm.set_gsi_routing([*routing.default_routes(), routing.MsiRoute(24, MSI | 0xFF << 32, VECTOR)])
        fd = os.eventfd(0)
        tiny.vm.irqfd(fd, 24)
        assert tiny.halts()
        os.eventfd_write(fd, 1)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        tiny.vm.irqfd(fd, 24, deassign=True)
        os.eventfd_write(fd, 1)
        assert os.eventfd_read(fd) == 1, "the kernel left it alone"
        os.close(fd)


def test_a_line_with_a_resample_descriptor_is_resampled_once_after_the_interrupt() -> None:
    # handler: out; EOI through the x2APIC (MSR 0x80B := 0); out; iret
    eoi = "66 b9 0b 08 00 00 66 31 c0 66 31 d2 0f 30"
    with Tiny(WAIT, f"b0 41 e6 10 {eoi} b0 42 e6 10 cf", irqchip=True) as tiny:
        sregs = tiny.vcpu.sregs()
        sregs.apic_base |= 1 << 10  # x2APIC
        tiny.vcpu.set_sregs(sregs)
        tiny.enable_lapic()
        chip = bytearray(tiny.vm.irqchip(Irqchip.IOAPIC))
        struct.pack_into("<Q", chip, 24 + 8 * 20, 1 << 15 | VECTOR)  # pin 20 (no PIC has it): level
        tiny.vm.set_irqchip(Irqchip.IOAPIC, bytes(chip))
        fd, resample = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        tiny.vm.irqfd(fd, 20, resample)
        os.eventfd_write(fd, 1)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        assert out_of(tiny.run()) == (0x10, b"\x42")
        assert os.eventfd_read(resample) == 1  # by now; KVM-PVM tells it before the guest's EOI
        assert tiny.halts(), "the line is down, nothing comes again"
        os.close(fd)
        os.close(resample)


def test_a_line_of_the_ioapic_interrupts() -> None:
    with Tiny(WAIT, OUT + "f4", irqchip=True) as tiny:
        tiny.enable_lapic()
        chip = bytearray(tiny.vm.irqchip(Irqchip.IOAPIC))
        struct.pack_into("<Q", chip, 24 + 8 * 9, VECTOR)  # pin 9: edge
        tiny.vm.set_irqchip(Irqchip.IOAPIC, bytes(chip))
        tiny.vm.irq_line(9, True)
        tiny.vm.irq_line(9, False)
        assert out_of(tiny.run()) == (0x10, b"\x41")


def test_the_local_apics_timer_interrupts() -> None:
    with Tiny(WAIT, OUT + "f4", irqchip=True) as tiny:
        tiny.enable_lapic()
        state = bytearray(tiny.vcpu.lapic())
        for register, value in ((0x320, VECTOR), (0x3E0, 0xB), (0x380, 100_000)):  # LVT timer, divide by 1, count
            struct.pack_into("<I", state, register, value)
        tiny.vcpu.set_lapic(bytes(state))
        assert out_of(tiny.run()) == (0x10, b"\x41")


def test_an_nmi_reaches_its_handler() -> None:
    with Tiny(WAIT, OUT + "f4", irqchip=True) as tiny:
        tiny.memory[2 * 4 : 2 * 4 + 4] = HANDLER.to_bytes(4, "little")
        assert tiny.halts()
        tiny.vcpu.nmi()
        assert out_of(tiny.run()) == (0x10, b"\x41")


def test_an_ioeventfd_takes_a_port_write_without_an_exit() -> None:
    # out $7,$0x20; out $8,$0x20; out $1,$0x10
    with Tiny("b0 07 e6 20 b0 08 e6 20 b0 01 e6 10 f4") as tiny:
        fd = os.eventfd(0)
        tiny.vm.ioeventfd(fd, 0x20, 1, datamatch=7, pio=True)
        assert out_of(tiny.run()) == (0x20, b"\x08"), "only the value that matches is taken"
        assert out_of(tiny.run()) == (0x10, b"\x01")
        assert os.eventfd_read(fd) == 1
        tiny.vm.ioeventfd(fd, 0x20, 1, datamatch=7, pio=True, deassign=True)
        with pytest.raises(KvmError, match=r"KVM_IOEVENTFD.*port 0x20"):
            tiny.vm.ioeventfd(fd, 0x20, 1, datamatch=7, pio=True, deassign=True)
        os.close(fd)


# mov $0x2000,%ax; mov %ax,%ds; movb $0x55,(0x10): guest-physical 0x20010, behind the memory
STORE = "b8 00 20 8e d8 c6 06 10 00 55"


def test_an_ioeventfd_takes_a_memory_write_of_any_size() -> None:
    with Tiny(STORE + OUT) as tiny:
        fd = os.eventfd(0)
        tiny.vm.ioeventfd(fd, 0x20010, 0)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        assert os.eventfd_read(fd) == 1
        os.close(fd)


def test_the_cheap_accessors_tell_what_the_typed_exit_tells() -> None:
    # the store; mov (0x10),%bl; mov $0x41,%al; out %al,$0x10; in $0x11,%ax
    with Tiny(STORE + "8a 1e 10 00" + OUT + "e5 11 f4") as tiny:
        vcpu = tiny.vcpu
        assert vcpu.enter() == ExitReason.MMIO
        address, size, write, data = vcpu.mmio()
        assert (address, size, write, data[0]) == (0x20010, 1, 1, 0x55)
        found = vcpu.exit()
        assert isinstance(found, MmioExit) and (found.write, found.address, bytes(found.data)) == (True, 0x20010, b"U")
        assert vcpu.enter() == ExitReason.MMIO
        assert vcpu.mmio()[:3] == (0x20010, 1, 0)
        data[0] = 0x99
        assert vcpu.enter() == ExitReason.IO
        assert vcpu.regs().rbx & 0xFF == 0x99
        out, size, port, count, offset = vcpu.io()
        assert (out, size, port, count, vcpu.page[offset]) == (1, 1, 0x10, 1, 0x41)
        assert vcpu.enter() == ExitReason.IO
        out, size, port, count, offset = vcpu.io()
        assert (out, size, port, count) == (0, 2, 0x11, 1)
        vcpu.page[offset : offset + 2] = b"\x34\x12"
        assert vcpu.enter() == ExitReason.HLT
        assert vcpu.regs().rax & 0xFFFF == 0x1234
        vcpu.immediate_exit = True
        assert vcpu.enter() == ExitReason.INTR
        del found, data


def test_coalesced_writes_wait_for_the_next_exit() -> None:
    with Tiny(STORE + "c6 06 10 00 66 b0 09 e6 21" + OUT) as tiny:
        tiny.vm.register_coalesced(0x20000, 0x1000)
        tiny.vm.register_coalesced(0x21, 1, pio=True)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        assert tiny.vcpu.coalesced() == [(0x20010, False, b"\x55"), (0x20010, False, b"\x66"), (0x21, True, b"\x09")]
        assert tiny.vcpu.coalesced() == []


# movb $1,(0x5000); out; movb $1,(0x6000); out; movb $1,(0x5001); out
WRITES = "c6 06 00 50 01 e6 10 c6 06 00 60 01 e6 10 c6 06 01 50 01 e6 10 f4"


def dirty_pages(bitmap: bytearray) -> set[int]:
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(SIZE // 4096) if bits >> page & 1}


def test_the_dirty_log_tells_the_pages_written() -> None:
    with Tiny(WRITES, flags=constants.MEM_LOG_DIRTY_PAGES) as tiny:
        bitmap = bytearray(8)
        tiny.run()
        tiny.vm.get_dirty_log(0, bitmap)
        assert 5 in dirty_pages(bitmap) and 6 not in dirty_pages(bitmap)
        tiny.run()
        tiny.vm.get_dirty_log(0, bitmap)
        assert 6 in dirty_pages(bitmap) and 5 not in dirty_pages(bitmap), "reading cleared it"


def test_the_dirty_log_can_be_cleared_by_hand() -> None:
    with Tiny(WRITES, flags=constants.MEM_LOG_DIRTY_PAGES) as tiny:
        tiny.vm.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, constants.DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        bitmap = bytearray(8)
        tiny.run()
        for _ in range(2):
            tiny.vm.get_dirty_log(0, bitmap)
            assert 5 in dirty_pages(bitmap), "reading leaves it"
        tiny.vm.clear_dirty_log(0, 0, SIZE // 4096, bitmap)
        tiny.vm.get_dirty_log(0, bitmap)
        assert 5 not in dirty_pages(bitmap)
        tiny.run()
        tiny.run()
        tiny.vm.get_dirty_log(0, bitmap)
        assert {5, 6} <= dirty_pages(bitmap)


def test_the_dirty_ring_tells_the_pages_written() -> None:
    with Tiny(WRITES) as tiny:
        if not tiny.vm.check_extension(Capability.DIRTY_LOG_RING):
            pytest.fail("this KVM has no dirty ring")
        tiny.vm.enable_dirty_ring(1024)
        tiny.map_memory(constants.MEM_LOG_DIRTY_PAGES)
        ring = tiny.vcpu.dirty_ring
        assert ring is not None
        tiny.run()
        assert (0, 5) in ring.take() and ring.take() == []
        assert tiny.vm.reset_dirty_rings() >= 1
        tiny.run()
        tiny.run()
        pages = {page for _, page in ring.take()}
        assert {5, 6} <= pages, "a page that was reset counts anew"


def test_single_steps_come_one_by_one() -> None:
    with Tiny("90 90 b0 07 f4") as tiny:  # nop; nop; mov $7,%al; hlt
        tiny.vcpu.set_guest_debug(constants.GUESTDBG_ENABLE | constants.GUESTDBG_SINGLESTEP)
        places = []
        for _ in range(3):
            reason = tiny.run()
            assert isinstance(reason, DebugExit) and reason.dr6 & 1 << 14, reason
            places.append(reason.pc)
        assert places == [CODE + 1, CODE + 2, CODE + 4]
        assert tiny.vcpu.regs().rax & 0xFF == 7


def test_a_hardware_breakpoint_stops_at_its_address() -> None:
    if "QEMU TCG" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU is TCG, whose SVM leaves a guest's breakpoints out; KVM-PVM and hardware have them")
    with Tiny("90 90 90 f4") as tiny:
        tiny.vcpu.set_guest_debug(
            constants.GUESTDBG_ENABLE | constants.GUESTDBG_USE_HW_BP, (CODE + 2, 0, 0, 0, 0, 0, 0, 0x402)
        )
        reason = tiny.run()
        assert isinstance(reason, DebugExit) and reason.pc == CODE + 2 and reason.dr6 & 1


def test_a_denied_msr_is_answered_in_user_space() -> None:
    # mov $0x10,%ecx (the TSC); rdmsr; out %al,$0x10; wrmsr; hlt
    with Tiny("66 b9 10 00 00 00 0f 32 e6 10 0f 30 f4") as tiny:
        tiny.vm.set_user_space_msr(constants.MSR_EXIT_REASON_FILTER)
        tiny.vm.set_msr_filter([(constants.MSR_FILTER_READ | constants.MSR_FILTER_WRITE, 0x10, b"\xfe")])
        reason = tiny.run()
        assert reason == MsrExit(False, 0x10, reason[2], constants.MSR_EXIT_REASON_FILTER), reason
        tiny.vcpu.set_msr_result(0x5A)
        assert out_of(tiny.run()) == (0x10, b"\x5a")
        reason = tiny.run()
        assert isinstance(reason, MsrExit) and reason.write and reason.data & 0xFF == 0x5A


def test_msrs_resume_behind_one_that_is_refused() -> None:
    tsc_aux_like = [0x174, 0xDEAD0001, 0x175, 0xDEAD0002, 0xDEAD0003, 0x176]
    with Tiny("f4") as tiny:
        found, refused = tiny.vcpu.msrs(tsc_aux_like)
        assert [index for index, _ in found] == [0x174, 0x175, 0x176]
        assert refused == [0xDEAD0001, 0xDEAD0002, 0xDEAD0003]
        assert tiny.vcpu.set_msrs([(0x174, 8), (0xDEAD0001, 1), (0x175, 0x1234)]) == [0xDEAD0001]
        assert tiny.vcpu.msrs([0x175])[0] == [(0x175, 0x1234)]


def test_an_interrupt_without_an_irqchip_is_injected() -> None:
    with Tiny("fb 90 90 eb fe", OUT) as tiny:  # sti; nop; nop; jmp .
        tiny.vcpu.request_interrupt_window(True)
        assert tiny.vcpu.enter() == ExitReason.IRQ_WINDOW_OPEN
        tiny.vcpu.request_interrupt_window(False)
        tiny.vcpu.interrupt(VECTOR)
        assert out_of(tiny.run()) == (0x10, b"\x41")


def test_synced_registers_need_no_call() -> None:
    with Tiny("b8 34 12 e6 10 e6 10 f4") as tiny:  # mov $0x1234,%ax; out twice
        tiny.vcpu.sync(constants.SYNC_X86_REGS)
        tiny.run()
        registers = tiny.vcpu.synced_regs()
        assert registers.rax & 0xFFFF == 0x1234
        registers.rax = 0x77
        tiny.vcpu.synced_changed(constants.SYNC_X86_REGS)
        assert out_of(tiny.run()) == (0x10, b"\x77")
        del registers


def test_a_fetch_from_where_nothing_is_ends_in_a_typed_exit() -> None:
    # ljmp $0x2000,$0: code from beyond memory. What KVM says to it differs: an instruction it cannot fetch, or the end.
    with Tiny("ea 00 00 00 20") as tiny:
        reason = tiny.run()
        assert isinstance(reason, InternalErrorExit | ShutdownExit | MmioExit), reason
        if isinstance(reason, InternalErrorExit):
            assert reason.kind == InternalErrorKind.EMULATION and "EMULATION" in str(reason)


def test_the_whole_state_moves_to_another_machine() -> None:
    # a counter in %cx: 1: inc %cx; mov %cl,%al; out %al,$0x10; jmp 1b
    code = "41 88 c8 e6 10 eb f9"
    with Tiny(code, irqchip=True) as source, Tiny(code, irqchip=True) as target:
        for expected in (1, 2, 3):
            assert out_of(source.run()) == (0x10, bytes([expected]))
        source.vcpu.immediate_exit = True
        source.run()  # completes the port access (api.rst 5)
        old, new = source.vcpu, target.vcpu
        target.memory[:] = source.memory[:]
        for chip in (Irqchip.PIC_MASTER, Irqchip.PIC_SLAVE, Irqchip.IOAPIC):
            target.vm.set_irqchip(chip, source.vm.irqchip(chip))
        target.vm.set_clock(source.vm.clock().clock)
        new.set_sregs(old.sregs())
        new.set_xcrs(old.xcrs())
        new.set_xsave(old.xsave())
        new.set_fpu(old.fpu())
        new.set_debugregs(old.debugregs())
        new.set_lapic(old.lapic())
        pairs, refused = old.msrs(source.system.msr_index_list())
        assert len(pairs) + len(refused) == len(source.system.msr_index_list()) and len(pairs) > 10
        assert new.set_msrs(pairs) == []
        new.set_vcpu_events(old.vcpu_events())
        new.set_mp_state(old.mp_state())
        new.set_regs(old.regs())
        assert bytes(new.regs()) == bytes(old.regs()) and new.mp_state() == MpState.RUNNABLE
        assert new.lapic() == old.lapic() and new.xsave() == old.xsave()
        assert out_of(target.run()) == (0x10, b"\x04")


def test_translation_follows_the_guests_mode() -> None:
    with Tiny("f4") as tiny:
        answer = tiny.vcpu.translate(0x1234)
        assert answer.valid and answer.physical_address == 0x1234, "real mode has no paging"


def test_the_split_irqchip_takes_messages_only() -> None:
    with Tiny(WAIT, OUT + "f4") as tiny:
        tiny.vm.enable_split_irqchip(24)
        tiny.vm.set_gsi_routing([routing.MsiRoute(30, MSI, VECTOR)])
        tiny.enable_lapic()
        fd = os.eventfd(0)
        tiny.vm.irqfd(fd, 30)
        os.eventfd_write(fd, 1)
        assert out_of(tiny.run()) == (0x10, b"\x41")
        with pytest.raises(KvmError, match="KVM_GET_IRQCHIP"):
            tiny.vm.irqchip(Irqchip.IOAPIC)
        os.close(fd)


def test_the_pit_and_the_clock_are_kept() -> None:
    with Tiny("f4", irqchip=True) as tiny:
        tiny.vm.create_pit2()
        state = tiny.vm.pit2()
        state.channels[2].count = 0x1234
        tiny.vm.set_pit2(state)
        assert tiny.vm.pit2().channels[2].count == 0x1234
        tiny.vm.set_clock(5_000_000_000_000)
        assert 5_000_000_000_000 <= tiny.vm.clock().clock < 5_100_000_000_000


def test_statistics_are_named_and_count() -> None:
    with Tiny("e6 10 e6 10 f4") as tiny:
        if not tiny.vm.check_extension(Capability.BINARY_STATS_FD):
            pytest.fail("this KVM has no statistics descriptor")
        with stats.Stats(tiny.vcpu.stats_fd()) as counters:
            before = counters.read()
            tiny.run()
            after = counters.read()
        assert after["exits"][0] > before["exits"][0]
        assert counters.units["exits"] == "none"


def test_capabilities_and_lists_of_the_system() -> None:
    with System() as system:
        capabilities = system.capabilities()
        assert capabilities["USER_MEMORY"] and capabilities["NR_MEMSLOTS"] >= 32
        assert 0x174 in system.msr_index_list()
        features = system.msr_feature_index_list()
        found, refused = system.msrs(features)
        assert len(found) + len(refused) == len(features)
        assert system.supported_cpuid().nent > 10 and system.emulated_cpuid().nent > 0


def test_a_failing_call_names_itself_and_what_it_needs() -> None:
    with Tiny("f4") as tiny:
        with pytest.raises(KvmError, match="KVM_IRQ_LINE") as raised:
            tiny.vm.irq_line(1, True)
        assert raised.value.capability == "IRQCHIP" and "not created" in str(raised.value)
        with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP: .*capability 9999"):
            tiny.vm.enable_cap(9999)
        with pytest.raises(KvmError, match=r"slot 1, 0x7b bytes at 0x20000"):
            tiny.vm.set_user_memory_region(1, 0x20000, 123, 0x1000)
        assert STACK < SIZE and ctypes.sizeof(type(tiny.vcpu.sregs2())) == 320


def test_importing_the_binding_is_cheap() -> None:
    """A machine's start pays for each of these; see the start-up budget in docs/internals/vmm.md."""
    banned = (
        "dataclasses typing enum signal threading selectors json msgspec logging argparse asyncio contextlib pathlib"
    )
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kvik.kvm.stats, kvik.kvm.device; print(*sys.modules)"
    source = str(Path(kvik.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-ISc", code, source], capture_output=True, text=True, check=True)
    assert "kvik.kvm.vcpu" in done.stdout.split()
    assert not set(done.stdout.split()) & {*banned.split(), "inspect", "re", "kvik.kvm.exits"}
