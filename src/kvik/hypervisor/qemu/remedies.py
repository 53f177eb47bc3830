"""What QEMU says when it gives up, and what a person can do about it."""

from __future__ import annotations

__all__ = ["remedy_for"]

_REMEDIES = (
    (
        'Failed to get "write" lock',
        "another machine or program uses this image; stop it, or mark the disk <shareable/>",
    ),
    ('Failed to get shared "write" lock', "another machine or program uses this image"),
    ("Address already in use", "another program has this port; choose another one or autoport='yes'"),
    ("Cannot allocate memory", "give the machine less <memory> or free some on the host"),
    ("Could not access KVM kernel module", "kvik doctor says what is wrong with /dev/kvm"),
    ("cannot set up guest memory", "give the machine less <memory> or free some on the host"),
    ("failed to find romfile", "install the firmware: apt install seabios ipxe-qemu"),
    ("invalid kernel header", "<kernel> must name a Linux kernel (bzImage), or an ELF kernel with a PVH entry"),
    ("could not load PC BIOS", "install the firmware: apt install seabios"),
)


def remedy_for(said: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in said), "")
