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
    (
        "Invalid password, cannot unlock any keyslot",
        "the disk's secret has another passphrase: kvik secret-set-value",
    ),
    ("invalid kernel header", "<kernel> must name a Linux kernel (bzImage), or an ELF kernel with a PVH entry"),
    *(
        (f"Unknown driver '{name}'", "QEMU's driver for that protocol is missing: apt install qemu-block-extra")
        for name in ("http", "https", "ftp", "ftps", "ssh", "iscsi", "rbd", "gluster", "nfs")
    ),
    ("using publickey authentication", "the user that kvikd runs as needs a key that the server knows, in ~/.ssh"),
    (
        "no host key was found in known_hosts",
        "ssh to that host once as the user that kvikd runs as, to confirm its key",
    ),
    ("could not load PC BIOS", "install the firmware: apt install seabios"),
)


def remedy_for(said: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in said), "")
