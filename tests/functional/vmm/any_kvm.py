"""`any_kvm.py daemon|cli ARGUMENTS`: kvikd or kvik on a host whose /dev/kvm is taken as it is.

kvik's own probe wants a KVM that boots a kernel in seconds; a guest of a few instructions runs on any.
"""

from __future__ import annotations

import os
import sys

from kvik.host import probe
from kvik.host.probe import State, Verdict


def main(role: str, arguments: list[str]) -> int:
    def verdict(*given: object, **options: object) -> Verdict:
        there = os.access("/dev/kvm", os.R_OK | os.W_OK)
        return Verdict(there, "it is there" if there else "/dev/kvm is not there", "", State.GOOD)

    probe.kvm_verdict = verdict
    if role == "daemon":
        from kvik.daemon.main import main as daemon

        sys.argv[1:] = arguments
        return daemon()
    from kvik.cli.main import main as cli

    return cli(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
