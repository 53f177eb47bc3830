"""kvik-vmm: one machine on /dev/kvm, one process, one thread a vCPU.

Where to look first: `vcpu` (the run loop), `machine` (the parts and how they come together), `layout` (every address),
`device` (what a device is). docs/internals/vmm.md walks through them in that order.
"""
