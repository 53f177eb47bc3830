"""The process that undoes a pending change when its time is up: `watchdog.py IMPORTS DIRECTORY`.

It has read all that it needs, code and record, before it says "armed": what it does at the end needs no file. SIGTERM
makes it look whether the change was kept or undone and end then; if not, it stays: stopping the daemon's service, with
all that the daemon started, must not take the way back along. SIGHUP: the record has grown.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, sys.argv[1])
    from kvik.errors import KvikError
    from kvik.network.interfaces.pending import Pending, boottime

    signals = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pending = Pending(Path(sys.argv[2]))
    known = pending.open()
    if known is None or not known.deadline:
        sys.stderr.write("there is no change to watch\n")
        return 1
    os.write(1, b"armed\n")
    os.close(1)
    while (left := known.deadline - boottime()) > 0:
        if signal.sigtimedwait(signals, left) is None:
            continue
        try:
            record = pending.read()
        except KvikError as error:
            sys.stderr.write(f"{error}\n")
            continue  # what is known is enough
        if record is None or record.id != known.id or record.state != "open":
            return 0
        known = record
    done = pending.expire(known)
    if done is not None:
        sys.stderr.write(f"{done.words}: {done.outcome}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
