"""What kind of file system a path lies on, by the number that statfs(2) gives, and whether other hosts share it."""

from __future__ import annotations

import ctypes
import os
import re

from kvik.host.files import host_error

__all__ = [
    "SHARED",
    "locks_stay_here",
    "may_stand_still",
    "mount_point",
    "shared_as",
    "type_name",
    "type_number",
    "unescaped",
]

# <linux/magic.h>, and for those that are not in it the file systems' own sources.
SHARED = {
    0x6969: "nfs", 0xFF534D42: "cifs", 0xFE534D42: "cifs", 0x517B: "cifs", 0x01161970: "gfs2", 0x7461636F: "ocfs2",
    0x00C36400: "ceph", 0x5346414F: "afs", 0x47504653: "gpfs", 0x0BD00BD0: "lustre",
}  # fmt: skip
MOUNTS = "/proc/self/mountinfo"
FUSE = 0x65735546  # any server may be behind it: the mount says which
SHARED_FUSE = {"fuse.glusterfs": "glusterfs", "fuse.ceph": "ceph", "fuse.ceph-fuse": "ceph"}
_ESCAPE = re.compile(r"\\([0-7]{3})")  # as the kernel writes blanks in its list of mounts (proc(5))
_libc = ctypes.CDLL(None, use_errno=True)


class _Statfs(ctypes.Structure):
    """struct statfs of 64-bit Linux; only its first field is looked at."""

    _fields_ = [("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 120)]


def type_number(fd: int) -> int:
    """Of what the descriptor is open on. HostError."""
    found = _Statfs()
    if _libc.fstatfs(fd, ctypes.byref(found)) != 0:
        number = ctypes.get_errno()
        raise host_error("look at the file system of", f"descriptor {fd}", OSError(number, os.strerror(number)))
    return int(found.f_type) & 0xFFFFFFFF


def shared_as(fd: int) -> str:
    """The name of the shared file system that the descriptor is on; "" if it is this host's own."""
    number = type_number(fd)
    return SHARED_FUSE.get(_mount(fd)[0], "") if number == FUSE else SHARED.get(number, "")


def may_stand_still(fd: int) -> bool:
    """Whether a server, or a process of users, has to answer for what is done with the descriptor."""
    number = type_number(fd)
    return number == FUSE or number in SHARED


def type_name(fd: int) -> str:
    """The file system that the descriptor is on, by its name in the list of mounts; "" if it is not there. Nothing is
    asked of the file system itself, which may not answer."""
    with open(f"/proc/self/fdinfo/{fd}") as file:  # noqa: PTH123
        number = next((line.split()[1] for line in file if line.startswith("mnt_id:")), "")
    with open(MOUNTS, errors="surrogateescape") as file:  # noqa: PTH123
        for line in file:
            before, _, after = line.partition(" - ")
            if before.split(" ", 1)[0] == number:
                return after.split(" ", 1)[0]
    return ""


def unescaped(text: str) -> str:
    """A field of the list of mounts as it is."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def mount_point(path: str) -> str:
    """What a path is mounted with, by its text alone: nothing on the way is looked at, and links are not seen through.
    "" if that cannot be told."""
    path, found = os.path.normpath(path), ""
    try:
        with open(MOUNTS, errors="surrogateescape") as file:  # noqa: PTH123
            for line in file:
                fields = line.split(" ", 5)
                point = unescaped(fields[4]) if len(fields) > 5 else ""
                if len(point) > len(found) and (path == point or path.startswith(f"{point.rstrip('/')}/")):
                    found = point
    except OSError:
        return ""
    return found


def locks_stay_here(fd: int) -> str:
    """Why locks on files of a shared file system, as it is mounted, do not reach other hosts; "" if they do, or if it
    is not shared. Of the options that the kernel shows: nfs(5), mount.cifs(8), gfs2(5), mount.ocfs2(8), lustre(7).
    """
    name = shared_as(fd)
    if not name:
        return ""
    options = _mount(fd)[1]
    if name == "nfs" and (kept := {"nolock", "local_lock=all", "local_lock=posix"} & options):
        return f"it is mounted with {min(kept)}"
    if name == "cifs":
        # Without it they would be locks of SMB, which forbid others, and QEMU itself, to read and write those bytes.
        return "it is mounted with nobrl" if "nobrl" in options else "SMB has no locks of this kind"
    if name in ("gfs2", "ocfs2") and (kept := {"lockproto=lock_nolock", "localflocks"} & options):
        return f"it is mounted with {min(kept)}"
    if name == "lustre" and "flock" not in options:
        return "it is mounted without flock"
    return "AFS locks whole files only" if name == "afs" else ""


def _mount(fd: int) -> tuple[str, set[str]]:
    """Of the mount that a file lies on its type, its options and those of its file system."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open(MOUNTS, errors="surrogateescape") as file:  # noqa: PTH123
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, rest = before.split(" "), after.split(" ")
            if fields[2:3] == [wanted] and len(fields) >= 6 and len(rest) >= 3:
                return rest[0], {*fields[5].split(","), *rest[2].split(",")}
    return "", set()
