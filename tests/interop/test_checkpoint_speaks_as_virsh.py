"""`virsh checkpoint-*` and `kvik checkpoint-*`: the same words and exit codes, on a real libvirtd and on kvikd.

The libvirtd of these tests runs no machines: its checkpoints are told of (--redefine), and what needs a running machine
is refused by both. With a real QEMU virsh is used in tests/functional/daemon/test_backup.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_net_speaks_as_virsh import libvirtd, without_hints
from test_storage_speaks_as_virsh import kvikd, run, uri

from kvik.image.create import create

__all__ = ["kvikd", "libvirtd", "uri"]  # fixtures

pytestmark = [pytest.mark.interop, pytest.mark.root]

MACHINE = """<domain type='{}'><name>marked</name><uuid>3e3fce45-4f53-4fa7-bb32-11f34168b82d</uuid>
<memory unit='KiB'>65536</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}/d.qcow2'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
CHECKPOINT = "<domaincheckpoint><name>{}</name><creationTime>7</creationTime>{}{}</domaincheckpoint>"
SESSION = """\
define @m.xml
checkpoint-list marked
checkpoint-list marked --tree
checkpoint-create-as marked a words --print-xml vda,bitmap=x vdb,checkpoint=no
checkpoint-create-as marked --diskspec vda,foo=1
checkpoint-create marked --redefine-validate
checkpoint-create marked @c1.xml --redefine
checkpoint-create marked @c2.xml --redefine
checkpoint-create marked @c3.xml --redefine
checkpoint-list marked
checkpoint-list marked --parent
checkpoint-list marked --tree
checkpoint-list marked --name
checkpoint-list marked --roots
checkpoint-list marked --leaves --name
checkpoint-list marked --no-leaves --name
checkpoint-list marked --topological --name
checkpoint-list marked --from c1
checkpoint-list marked --from c1 --descendants --name
checkpoint-list marked --from c2 --tree
checkpoint-list marked --from nope
checkpoint-list marked --tree --roots
checkpoint-list marked --tree --name
checkpoint-list marked --leaves --tree
checkpoint-list marked --descendants
checkpoint-info marked c1
checkpoint-info marked c2
checkpoint-info marked
checkpoint-info marked nope
checkpoint-parent marked c2
checkpoint-parent marked c1
checkpoint-parent marked
checkpoint-dumpxml marked c2 --no-domain
checkpoint-dumpxml marked c2 --xpath //parent/name
checkpoint-dumpxml marked nope
list --all --with-checkpoint --name
list --all --without-checkpoint --name
checkpoint-delete marked
checkpoint-delete marked nope
checkpoint-delete marked c1 --children --children-only
checkpoint-delete marked c2 --metadata
checkpoint-parent marked c3
checkpoint-delete marked c1 --children-only --metadata
checkpoint-delete marked c1 --children --metadata
checkpoint-list marked
undefine marked
"""


@pytest.fixture
def type_in(tmp_path: Path) -> Iterator[Callable[[list[str], bool], Any]]:
    tmp_path.chmod(0o755)
    create(str(tmp_path / "d.qcow2"), "qcow2", 1 << 20)

    def type_in(program: list[str], test_driver: bool) -> list[tuple[str, int, str, str]]:
        machine = MACHINE.format("test" if test_driver else "qemu", tmp_path)
        (tmp_path / "m.xml").write_text(machine)
        for name, above in (("c1", ""), ("c2", "c1"), ("c3", "c2")):
            parent = f"<parent><name>{above}</name></parent>" if above else ""
            (tmp_path / f"{name}.xml").write_text(CHECKPOINT.format(name, parent, machine))
        said = []
        for line in SESSION.splitlines():
            words = shlex.split(line.replace("@", f"{tmp_path}/"))
            code, out, errors = run([*program, *words])
            errors = "".join(one for one in errors.splitlines(keepends=True) if not one.startswith("hint: "))
            said.append((line, code, re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", "WHEN", out), errors))
        return said

    yield type_in


@pytest.mark.parametrize("uri", ["libvirtd", "kvikd"], indirect=True)
def test_same_words_and_exit_codes(uri: str, type_in: Any) -> None:
    test_driver = uri.endswith("/s")
    theirs, ours = type_in(["virsh", "-c", uri], test_driver), type_in(["kvik", "-c", uri], test_driver)
    if test_driver:  # kvikd: libvirt's clients get the hint within the message
        theirs, ours = ([(*line[:3], without_hints(line[3])) for line in said] for said in (theirs, ours))
    assert [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]] == []


def test_the_two_daemons_answer_virsh_alike(libvirtd: str, kvikd: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", libvirtd], False), type_in(["virsh", "-c", kvikd], True)
    for their, our in zip(theirs, ours, strict=True):
        assert our[:3] == their[:3], (our, their)
        assert our[3].count("\n") == their[3].count("\n"), (our, their)
