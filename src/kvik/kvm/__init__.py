"""The kernel's KVM interface (Documentation/virt/kvm/api.rst).

Numbers in `constants`, layouts in `structs`, reasons for leaving guest mode in `exits`; `System`, `Vm` and `Vcpu` in
`device` mirror the three kinds of descriptor.
"""
