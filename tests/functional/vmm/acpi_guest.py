"""A guest of 386 bytes that does what a driver of ACPI hot-plug must do, and no more: for machines under the manager.

It says "U" on COM1 when it is up, echoes what it is sent there, says "N" at an NMI, powers off at the power button,
gives up PCI devices that it is asked to, and takes processors that come and gives up those that shall go.

In real mode, whose interrupts any KVM can emulate (KVM-PVM has no others): the PVH entry copies the rest to 0x7000 and
leaves protected mode with ds still based at the local APIC and es at the IOAPIC.
"""

from __future__ import annotations

from tiny_kernel import elf

__all__ = ["kernel"]

CODE = bytes.fromhex(
    # .code32
    "be20000001"  # mov $(0x1000000 + blob - start), %esi
    "bf00700000"  # mov $0x7000, %edi
    "b962010000"  # mov $(end - blob), %ecx
    "fc"  # cld
    "f3a4"  # rep movsb
    "0f011546700000"  # lgdt (0x7000 + gdtr - blob)
    "ea007000000800"  # ljmp $0x08, $0x7000
    # .code16
    # blob:
    "b81800"  # mov $0x18, %ax
    "8ec0"  # mov %ax, %es
    "b82000"  # mov $0x20, %ax
    "8ee0"  # mov %ax, %fs
    "8ed0"  # mov %ax, %ss
    "b81000"  # mov $0x10, %ax
    "8ed8"  # mov %ax, %ds
    "0f20c0"  # mov %cr0, %eax
    "24fe"  # and $0xfe, %al
    "0f22c0"  # mov %eax, %cr0
    "ea52700000"  # ljmp $0, $(0x7000 + real - blob)
    "0000000000000000"  # gdt: .quad 0
    "ffff0000009b8f00"  # .quad 0x008f9b000000ffff ; 16-bit code at 0
    "ffff0000e0938ffe"  # .quad 0xfe8f93e00000ffff ; data at LAPIC fee00000
    "ffff0000c0938ffe"  # .quad 0xfe8f93c00000ffff ; data at IOAPIC fec00000
    "ffff000000938f00"  # .quad 0x008f93000000ffff
    "2700"  # gdtr: .word gdtr - gdt - 1
    "1e700000"  # .long 0x7000 + gdt - blob
    "ff03"  # idtr: .word 0x3ff
    "00000000"  # .long 0
    # real:
    "640f011e4c70"  # lidt %fs:(0x7000 + idtr - blob)
    "bc006f"  # mov $0x6f00, %sp
    "6466c706400118710000"  # movl $(0x7000 + acpi - blob), %fs:(0x50*4)
    "6466c7064401fd700000"  # movl $(0x7000 + echo - blob), %fs:(0x51*4)
    "6466c7060800f5700000"  # movl $(0x7000 + nmi - blob), %fs:(2*4)
    "66c706f000ff010000"  # movl $0x1ff, 0xf0 ; spurious vector: APIC on
    "66c706800000000000"  # movl $0, 0x80 ; task priority
    "2666c706000022000000"  # movl $(0x10+9*2), %es:0 ; IOAPIC pin 9: level, vector 0x50
    "2666c706100050800000"  # movl $0x8050, %es:0x10
    "2666c706000023000000"  # movl $(0x10+9*2+1), %es:0
    "2666c706100000000000"  # movl $0, %es:0x10
    "2666c706000018000000"  # movl $(0x10+4*2), %es:0 ; pin 4: edge, vector 0x51
    "2666c706100051000000"  # movl $0x51, %es:0x10
    "2666c706000019000000"  # movl $(0x10+4*2+1), %es:0
    "2666c706100000000000"  # movl $0, %es:0x10
    "baf903"  # mov $0x3f9, %dx ; COM1: interrupt when a byte came
    "b001"  # mov $1, %al
    "ee"  # out %al, %dx
    "bafc03"  # mov $0x3fc, %dx ; MCR: OUT2
    "b008"  # mov $8, %al
    "ee"  # out %al, %dx
    "b055"  # mov $'U', %al
    "e80400"  # call say
    "fb"  # sti
    "f4"  # 1: hlt
    "ebfd"  # jmp 1b
    # say:
    "baf803"  # mov $0x3f8, %dx
    "ee"  # out %al, %dx
    "c3"  # ret
    # nmi:
    "60"  # pushaw
    "b04e"  # mov $'N', %al
    "e8f5ff"  # call say
    "61"  # popaw
    "cf"  # iretw
    # echo:
    "60"  # pushaw
    "bafd03"  # 2: mov $0x3fd, %dx
    "ec"  # in %dx, %al
    "a801"  # test $1, %al
    "7407"  # jz 3f
    "baf803"  # mov $0x3f8, %dx
    "ec"  # in %dx, %al
    "ee"  # out %al, %dx
    "ebf1"  # jmp 2b
    "66c706b00000000000"  # 3: movl $0, 0xb0
    "61"  # popaw
    "cf"  # iretw
    # acpi:
    "6660"  # pushal
    "ba0406"  # mov $0x604, %dx
    "66ed"  # in %dx, %eax
    "a801"  # test $1, %al
    "7406"  # jz 4f
    "ba0006"  # mov $0x600, %dx ; the power button: S5
    "b034"  # mov $0x34, %al
    "ee"  # out %al, %dx
    "ba1406"  # 4: mov $0x614, %dx ; slots to give up: eject them
    "66ed"  # in %dx, %eax
    "ba1806"  # mov $0x618, %dx
    "66ef"  # out %eax, %dx
    "ba2806"  # 5: mov $0x628, %dx ; next processor with an event
    "66ed"  # in %dx, %eax
    "6683f8ff"  # cmp $-1, %eax
    "7418"  # je 6f
    "ba2006"  # mov $0x620, %dx
    "66ef"  # out %eax, %dx
    "ba2406"  # mov $0x624, %dx
    "66ed"  # in %dx, %eax
    "6683e006"  # and $6, %eax ; INSERTED, REMOVING: seen
    "a804"  # test $4, %al
    "7402"  # jz 7f
    "0c08"  # or $8, %al ; EJECT
    "66ef"  # 7: out %eax, %dx
    "ebdd"  # jmp 5b
    "66c706b00000000000"  # 6: movl $0, 0xb0
    "6661"  # popal
    "cf"  # iretw
)  # fmt: skip


def kernel() -> bytes:
    return elf(CODE)
