"""The verbs of checkpoints and backups with every option they have, on a daemon of their own.

The machine is off: its checkpoints are told of (--redefine), as after a move; what needs bitmaps is refused with the
reason. Bitmaps and backups themselves: tests/functional/daemon/test_backup.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kvik.image.create import create

UUID = "3e3fce45-4f53-4fa7-bb32-11f34168b82b"
MACHINE = f"""<domain type='test'><name>m</name><uuid>{UUID}</uuid><memory>1024</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/none/d.qcow2'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
OLD = "<domaincheckpoint><name>{}</name><creationTime>7</creationTime>{}{}</domaincheckpoint>"
# (a line, its exit code, what it says somewhere)
SESSION = [
    ("define @m.xml", 0, "Domain 'm' defined"),
    ("checkpoint-list --domain m --name", 0, "\n"),
    ("checkpoint-create m", 1, "not running"),
    ("checkpoint-create-as m c --quiesce", 1, "not running"),
    (
        "checkpoint-create-as --domain m --name c --description words --print-xml --diskspec vda,bitmap=b",
        0,
        "<disk name='vda' bitmap='b'/>",
    ),
    ("checkpoint-create-as m c words vda,checkpoint=no --print-xml", 0, "<disk name='vda' checkpoint='no'/>"),
    ("checkpoint-create-as m c --diskspec vda,foo=1", 1, "unable to parse diskspec: vda,foo=1"),
    ("checkpoint-create m @c1.xml --redefine-validate", 1, "Option --redefine is required by"),
    ("checkpoint-create m @c1.xml --redefine --quiesce", 1, "nothing to be quiesced"),
    ("checkpoint-create m @c1.xml --redefine --redefine-validate", 1, "not running"),
    ("checkpoint-create --domain m --xmlfile @c1.xml --redefine", 0, "Domain checkpoint c1 created from '@c1.xml'"),
    ("checkpoint-create m @c2.xml --redefine", 0, "Domain checkpoint c2 created"),
    ("checkpoint-create m @c3.xml --redefine", 0, "Domain checkpoint c3 created"),
    ("checkpoint-create m @loop.xml --redefine", 1, "cannot set checkpoint loop as its own parent"),
    ("checkpoint-create m @orphan.xml --redefine", 1, "parent nobody for checkpoint orphan not found"),
    ("checkpoint-create m @bare.xml --redefine", 1, "missing <domain>"),
    ("checkpoint-create m @cycle.xml --redefine", 1, "would create cycle"),
    ("checkpoint-create m @stranger.xml --redefine", 1, "must use uuid"),
    ("checkpoint-list m --tree", 0, "c1\n  |\n  +- c2\n      |\n      +- c3\n        \n"),
    ("checkpoint-list m --parent", 0, "Parent"),
    ("checkpoint-list m --roots --name", 0, "c1\n"),
    ("checkpoint-list m --leaves --name", 0, "c3\n"),
    ("checkpoint-list m --no-leaves --name --topological", 0, "c1\nc2\n"),
    ("checkpoint-list m --from c1 --descendants --name", 0, "c2\nc3\n"),
    ("checkpoint-list m --from c2 --tree", 0, "c2\n  |\n  +- c3\n"),
    ("checkpoint-list m --descendants", 1, "--descendants requires --from"),
    ("checkpoint-info --domain m --checkpointname c1", 0, "Descendants:    2"),
    ("checkpoint-info m", 1, "--checkpointname is required"),
    ("checkpoint-info m nope", 1, "no domain checkpoint with matching name 'nope'"),
    ("checkpoint-dumpxml --domain m --checkpointname c2 --security-info --no-domain", 0, "<name>c2</name>"),
    ("checkpoint-dumpxml m c2 --size", 1, "not running"),
    ("checkpoint-dumpxml m c1 --xpath //name --wrap", 0, "<nodes>"),
    ("checkpoint-parent --domain m --checkpointname c2", 0, "c1"),
    ("checkpoint-parent m c1", 1, "checkpoint 'c1' has no parent"),
    ("checkpoint-edit --domain m --checkpointname c2", 0, "not changed"),
    ("checkpoint-delete m c1 --children --children-only", 1, "mutually exclusive"),
    ("checkpoint-delete m c1", 1, "not running"),
    ("domrename m n", 0, "Domain successfully renamed"),
    ("checkpoint-list n --name", 0, "c1\nc2\nc3\n"),
    ("domrename n m", 0, "Domain successfully renamed"),
    ("undefine m", 1, "cannot delete inactive domain with 3 checkpoints"),
    ("list --all --with-checkpoint --name", 0, "m"),
    ("checkpoint-delete --domain m --checkpointname c2 --metadata", 0, "Domain checkpoint c2 deleted"),
    ("checkpoint-parent m c3", 0, "c1"),
    ("checkpoint-delete m c1 --children-only --metadata", 0, "Domain checkpoint c1 children deleted"),
    ("checkpoint-list m --name", 0, "c1\n"),
    ("checkpoint-delete m c1 --children --metadata", 0, "Domain checkpoint c1 deleted"),
    ("backup-begin --domain m --backupxml @backup.xml --checkpointxml @c1.xml --reuse-external", 1, "not running"),
    ("backup-begin m", 1, "not running"),
    ("backup-dumpxml --domain m --xpath //disk --wrap", 1, "has no backup under way"),
    ("checkpoint-create m @c1.xml --redefine", 0, "Domain checkpoint c1 created"),
    ("start m", 0, "started"),
    ("checkpoint-create-as m c2", 1, "have no bitmaps"),
    ("backup-begin m", 1, "have no bitmaps"),
    ("domjobinfo m --completed", 0, "None"),
    ("destroy m", 0, "destroyed"),
    ("undefine m --checkpoints-metadata", 0, "has been undefined"),
    ("define @m.xml", 0, "Domain 'm' defined"),
    ("checkpoint-list m --name", 0, "\n"),
]


def parent(name: str) -> str:
    return f"<parent><name>{name}</name></parent>"


def test_a_session_with_every_option(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", "true")
    machine = MACHINE.replace("/none", str(tmp_path))
    create(str(tmp_path / "d.qcow2"), "qcow2", 1 << 20)
    (tmp_path / "m.xml").write_text(machine)
    (tmp_path / "backup.xml").write_text("<domainbackup/>")
    for name, above, document in (
        ("c1", "", machine),
        ("c2", parent("c1"), machine),
        ("c3", parent("c2"), machine),
        ("loop", parent("loop"), machine),
        ("orphan", parent("nobody"), machine),
        ("bare", "", ""),
        ("stranger", "", machine.replace(UUID, UUID.replace("3", "4"))),
    ):
        (tmp_path / f"{name}.xml").write_text(OLD.format(name, above, document))
    (tmp_path / "cycle.xml").write_text(OLD.format("c1", parent("c3"), machine))
    for line, code, text in SESSION:
        done, out, errors = kvik_(*shlex.split(line.replace("@", f"{tmp_path}/")))
        assert done == code, (line, done, out, errors)
        assert text.replace("@", f"{tmp_path}/") in out + errors, (line, out, errors)
