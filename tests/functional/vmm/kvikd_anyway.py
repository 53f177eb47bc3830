"""kvikd with a probe that calls this host's /dev/kvm usable: guests of a few instructions run on any."""

from __future__ import annotations

import sys
from pathlib import Path

from kvik.daemon.main import main
from kvik.host import probe
from kvik.host.probe import Verdict


def verdict(cache: Path) -> Verdict:
    return Verdict(usable=True, reason="a test says so")


if __name__ == "__main__":
    probe.kvm_verdict = verdict  # type: ignore[assignment]
    sys.exit(main())
