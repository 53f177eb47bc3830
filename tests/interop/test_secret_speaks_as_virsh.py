"""`virsh secret-*` and `kvik secret-*`: the same words, on a real libvirtd and on kvikd."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from test_net_speaks_as_virsh import kvikd, libvirtd, said, without_hints

__all__ = ["kvikd", "libvirtd"]  # the fixtures

pytestmark = [pytest.mark.interop, pytest.mark.root]

ONE, TWO = "55806c7d-8e93-456f-829b-607d8c198367", "55806c7d-8e93-456f-829b-607d8c198368"
DOCUMENTS = {
    "one": f"<secret ephemeral='yes' private='yes'><uuid>{ONE}</uuid></secret>",
    "two": f"<secret><uuid>{TWO}</uuid><description>d &amp; e</description>"
    "<usage type='volume'><volume>/v/x</volume></usage></secret>",
    "b64": "b3BlbiBzZXNhbWU=",
    "plain": "open sesame",
}
SESSION = f"""\
secret-list
secret-define @one
secret-dumpxml {ONE}
secret-get-value {ONE}
secret-set-value {ONE} b3BlbiBzZXNhbWU=
secret-get-value {ONE}
secret-define @two --validate
secret-dumpxml {TWO}
secret-dumpxml {TWO} --xpath //volume
secret-dumpxml {TWO} --xpath //volume --wrap
secret-set-value {TWO} --file @plain --plain
secret-get-value {TWO}
secret-get-value {TWO} --plain
secret-set-value {TWO} --file @b64
secret-get-value {TWO} --plain
secret-set-value {TWO}
secret-set-value {TWO} --file @b64 --interactive
secret-set-value {TWO} --plain --interactive
secret-set-value {TWO} --plain b64
secret-set-value {TWO} --file @b64 b64
secret-set-value {TWO} --file /nonexistent
secret-list
secret-list --private
secret-list --no-private
secret-list --ephemeral
secret-list --no-ephemeral
secret-list --private --no-private
secret-undefine nope
secret-undefine 55806c7d-8e93-456f-829b-607d8c198300
secret-define /nonexistent
secret-define
secret-event --list
secret-event
secret-event --event foo
secret-event --event lifecycle --timeout 1
secret-undefine {TWO}
secret-undefine {TWO}
secret-undefine {ONE}
"""


def transcript(program: list[str], directory: Path) -> list[tuple[str, tuple[int, str, str]]]:
    lines = SESSION
    for name, text in DOCUMENTS.items():
        (directory / name).write_text(text)
        lines = lines.replace(f"@{name}", f"{directory}/{name}")
    return [(line, said(program, shlex.split(line))) for line in lines.splitlines()]


def test_same_words_on_both_daemons(libvirtd: str, kvikd: str, tmp_path: Path) -> None:
    if said(["virsh", "-c", libvirtd], ["secret-list"])[0]:
        pytest.skip("this libvirtd has no secrets")
    answered = []
    for uri in (libvirtd, kvikd):
        theirs = transcript(["virsh", "-c", uri], tmp_path)
        ours = transcript([sys.executable, "-m", "kvik.cli.main", "-c", uri], tmp_path)
        for (line, their), (_, our) in zip(theirs, ours, strict=True):
            assert our[:2] == their[:2], (line, our, their)
            # libvirt's clients get the hint of kvikd within the message, and kvik's own mistakes have one.
            assert without_hints(our[2]) == without_hints(their[2]), (line, our, their)
        answered.append(theirs)
    for their, our in zip(*answered, strict=True):
        assert our[1][:2] == their[1][:2], (our, their)
