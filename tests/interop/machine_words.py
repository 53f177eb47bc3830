"""A session of virsh and of kvik about a machine: the same words, on a real libvirtd and on kvikd."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from test_net_speaks_as_virsh import said, without_hints


def same_words(libvirtd: str, kvikd: str, place: Path, document: str, session: str) -> None:
    """`document`: of machine t, with {} for its kind. Both programs on both daemons say the same of each line."""
    answered = []
    for uri, kind in ((libvirtd, "qemu"), (kvikd, "test")):
        (place / "t.xml").write_text(document.format(kind))
        heard = []
        for program in (["virsh", "-c", uri], [sys.executable, "-m", "kvik.cli.main", "-c", uri]):
            if said(["virsh", "-c", uri], ["define", f"{place}/t.xml"])[0]:
                pytest.skip("this libvirtd has no machines")
            heard.append([(line, said(program, shlex.split(line))) for line in session.splitlines()])
            said(["virsh", "-c", uri], ["undefine", "t"])
        for (line, their), (_, our) in zip(*heard, strict=True):
            assert our[:2] == their[:2], (line, our, their)
            assert without_hints(our[2]) == without_hints(their[2]), (line, our, their)
        answered.append(heard[0])
    for their, our in zip(*answered, strict=True):
        assert our[1][:2] == their[1][:2], (our, their)
