"""Names of CPU features and where CPUID tells of them. The names are QEMU's and libvirt's, underscores count as dashes.

Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; for KVM's own Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

__all__ = ["FEATURES", "REGISTERS", "canonical"]

EAX, EBX, ECX, EDX = range(4)

# (function, index, register): names from bit 0 on; "-" is a bit without a name here. N* skips N bits.
_WORDS: dict[tuple[int, int, int], str] = {
    (1, 0, EDX): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx "
    "fxsr sse sse2 ss ht tm ia64 pbe",
    (1, 0, ECX): "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca sse4.1 "
    "sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor",
    (6, 0, EAX): "- - arat",
    (7, 0, EBX): "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - avx512f avx512dq rdseed "
    "adx smap avx512ifma - clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    (7, 0, ECX): "- avx512vbmi umip pku ospke waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - "
    "avx512-vpopcntdq - la57 5* rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks",
    (7, 0, EDX): "2* avx512-4vnniw avx512-4fmaps fsrm 3* avx512-vp2intersect - md-clear 3* serialize - tsx-ldtrk "
    "2* arch-lbr - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities "
    "core-capability ssbd",
    (7, 1, EAX): "4* avx-vnni avx512-bf16 - cmpccxadd 2* fzrm fsrs fsrc 8* amx-fp16 - avx-ifma",
    (0xD, 1, EAX): "xsaveopt xsavec xgetbv1 xsaves",
    (0x80000001, 0, ECX): "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
    "skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    (0x80000001, 0, EDX): "11* syscall 7* mp nx - mmxext 2* fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    (0x80000007, 0, EDX): "8* invtsc",
    (0x80000008, 0, EBX): "clzero - xsaveerptr 6* wbnoinvd 2* ibpb - ibrs amd-stibp - stibp-always-on 6* amd-ssbd "
    "virt-ssbd amd-no-ssb - amd-psfd",
    (0x8000000A, 0, EDX): "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists 2* pause-filter "
    "- pfthreshold avic - v-vmsave-vmload vgif",
    (0x80000021, 0, EAX): "no-nested-data-bp - lfence-always-serializing 3* null-sel-clr-base - auto-ibrs",
    (
        0x40000001,
        0,
        EAX,
    ): "kvmclock kvm-nopiodelay kvm-mmu kvmclock2 kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt "
    "- kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int "
    "kvm-msi-ext-dest-id 8* kvmclock-stable-bit",
    (0x40000001, 0, EDX): "kvm-hint-dedicated",
}
REGISTERS = tuple(_WORDS)
_ALIASES = {
    "sse3": "pni",
    "lzcnt": "abm",
    "sse4-1": "sse4.1",
    "sse4-2": "sse4.2",
    "pclmul": "pclmulqdq",
    "rdtsc": "tsc",
}


def _table() -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for word, names in _WORDS.items():
        bit = 0
        for name in names.split():
            if name.endswith("*"):
                bit += int(name[:-1])
                continue
            if name != "-":
                found[name] = (*word, 1 << bit)
            bit += 1
        assert bit <= 32, word
    return found


FEATURES = _table()  # name -> (function, index, register, mask)


def canonical(name: str) -> str:
    """The name used here for what a user wrote."""
    name = name.strip().lower().replace("_", "-")
    return _ALIASES.get(name, name)
