"""The saver's program.

    saver --out=4 --vmm=5 [--back-end=6 ...]

    --out=FD       where the stream goes: a pipe
    --vmm=FD       connection to the VMM, which says where RAM is
    --back-end=FD  connection to a kvik-blk, which says where it has mapped the same RAM

On standard output a line "ready" when it can be told of memory, and the reason if it fails. Exit codes: 0 all of it is
in the pipe, 1 it is not.
"""

from __future__ import annotations

import os
import socket

from kvik.errors import InvalidArgument, KvikError
from kvik.vmm.saver.saver import Saver

__all__ = ["READY", "main"]

READY = "ready"


def main(words: list[str]) -> int:
    from kvik.vmm import sandbox
    from kvik.vmm.confinement import import_all
    from kvik.vmm.sandbox import isolation

    saver = None
    try:
        out, channels = _options(words)
        sandbox.close_stray({out, *channels})
        isolation.leave_namespaces()
        import_all(("encodings.ascii", "json", "traceback"))
        sandbox.enter("main", sandbox.Policy("errno", descriptors=1024))
        os.set_blocking(out, False)
        sockets = [socket.socket(fileno=fd) for fd in channels]
        print(READY, flush=True)
        saver = Saver(out, sockets)
        saver.run()
    except (KvikError, OSError) as error:
        print(str(error), flush=True)
        if saver is not None:
            saver.let_go()
        return 1
    return 0


def _options(words: list[str]) -> tuple[int, list[int]]:
    out, vmm, back_ends = -1, -1, []
    for word in words:
        name, _, value = word.partition("=")
        if not value.isdecimal() or len(value) > 9:
            raise InvalidArgument(f"{word}: not a number")
        if name == "--out":
            out = int(value)
        elif name == "--vmm":
            vmm = int(value)
        elif name == "--back-end":
            back_ends.append(int(value))
        else:
            raise InvalidArgument(f"unknown option {word}")
    if out < 0 or vmm < 0:
        raise InvalidArgument("needs --out and --vmm")
    return out, [vmm, *back_ends]
