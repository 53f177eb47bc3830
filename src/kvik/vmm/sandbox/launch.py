"""Runs one helper of a machine with nothing but what it is given: `python -I -S .../launch.py OPTION... -- PROGRAM ...`

    --life=FD        a socket: when its other end closes, the program gets SIGTERM
    --read=FD        an open file that the program may open again, through /proc/self/fd/FD, for reading
    --write=FD       the same for writing
    --lock=FD        hold QEMU's image lock on it as the image's only writer (after --write) or as a reader
    --root=DIRECTORY for what needs the network and mounts FUSE: a root directory of its own (own_root.py), made over
                     this one, with an empty file /volume; in place of Landlock
    --key=FD         with --root: a secret, which is the file /key there
    --alone          no network, no sockets, no other process (isolation.py); and not at all without Landlock
    --cpu=SECONDS    with --alone: of processor time
    --memory=BYTES   with --alone: of address space
    --size=BYTES     with --alone: of any file that it writes

Landlock then lets the program open those files and what lies in the system's program directories, and no more; no TCP,
no new privileges, and of root's capabilities only those that open files whatever their mode, which Landlock bounds.

The life line is the kernel's doing (fcntl(2), F_SETSIG): it survives execve, and needs nobody who watches. The locks
are of open file descriptions, which the program inherits, so they end when it does.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys

__all__ = ["main"]

_PROGRAMS = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/gnu/store")
_SETTINGS = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # linux/capability.h


def main(words: list[str]) -> int:
    """Never returns when all goes well."""
    from kvik.errors import KvikError
    from kvik.image.lock import lock_image
    from kvik.vmm.sandbox import landlock, privileges

    split = words.index("--")
    program = words[split + 1 :]
    files: dict[int, bool] = {}
    limits: dict[str, int] = {}
    alone, root = False, ""
    given = {"/volume": b""}
    try:
        for word in words[:split]:
            option, _, value = word.partition("=")
            if option == "--alone":
                alone = True
                continue
            if option == "--root":
                root = value
                continue
            if option in ("--cpu", "--memory", "--size"):
                limits[option[2:]] = int(value)
                continue
            fd = int(value)
            if option == "--life":
                _tie(fd)
            elif option == "--key":
                with open(fd, "rb") as file:
                    given["/key"] = file.read()
            elif option == "--lock":
                lock_image(fd, f"/proc/self/fd/{fd}", write=files.get(fd, False))
            else:
                files[fd] = {"--read": False, "--write": True}[option]
        places = {*filter(os.path.isdir, _PROGRAMS), os.path.dirname(os.path.realpath(program[0]))}  # noqa: PTH120
        if root:
            from kvik.vmm.sandbox import own_root

            own_root.enter(root, sorted(_outermost(places)), given)
            own_root.restrict()
            os.execv(program[0], program)
        if alone:
            from kvik.vmm.sandbox import isolation

            isolation.leave_namespaces()
        privileges.limit()
        privileges.no_new_privileges()
        privileges.bound_capabilities((_DAC_OVERRIDE, _DAC_READ_SEARCH))
        files |= {os.open(path, os.O_PATH | os.O_CLOEXEC): path == "/dev/null" for path in _SETTINGS}
        if not landlock.restrict(programs=tuple(sorted(places)), files=files):
            if alone:
                raise OSError(0, "this kernel has no Landlock, without which the program could open files of its own")
            sys.stderr.write("this kernel has no Landlock: the program can open whatever its user can\n")
        if alone:
            isolation.isolate(limits)
        os.execv(program[0], program)
    except (OSError, KvikError) as error:
        sys.stderr.write(f"{error}\n")
    return 1


def _outermost(places: set[str]) -> list[str]:
    return [place for place in places if not any(place.startswith(f"{other}/") for other in places)]


def _tie(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    try:
        if not os.read(fd, 1):
            raise OSError(0, "whoever asked for this has ended")
    except BlockingIOError:
        return


if __name__ == "__main__":
    root = __file__.rsplit("/", 4)[0]
    packages = "{}/lib/python{}.{}/site-packages".format(sys.executable.rsplit("/", 2)[0], *sys.version_info)
    sys.path[:] = [item for item in sys.path if item != __file__.rsplit("/", 1)[0]]
    sys.path += [root] if root == packages else [root, packages]
    sys.exit(main(sys.argv[1:]))
