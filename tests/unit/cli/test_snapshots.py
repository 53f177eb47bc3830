"""The verbs of snapshots with every option they have, on a daemon of their own and a machine that is off."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kvik.cli.history import draw
from kvik.image.create import create

MACHINE = """<domain type='test'><name>m</name><memory>1024</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}/d.qcow2'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
OLD = """<domainsnapshot><name>{}</name><state>shutoff</state><creationTime>7</creationTime>{}
<disks><disk name='vda' snapshot='external'/></disks></domainsnapshot>"""
# (a line, its exit code, what it says somewhere)
SESSION = [
    ("define @m.xml", 0, "Domain 'm' defined"),
    (
        "snapshot-create-as m s --print-xml --memspec snapshot=external,file=/a",
        0,
        "<memory snapshot='external' file='/a'/>",
    ),
    ("snapshot-create-as m s --print-xml --memspec /a,,b", 0, "<memory file='/a,b'/>"),
    ("snapshot-create-as m s --print-xml --diskspec vda,stype=block,file=/dev/x", 0, "<source dev='/dev/x'/>"),
    ("snapshot-create-as m s --memspec bar=1", 1, "unable to parse memspec: bar=1"),
    ("snapshot-create-as m s --diskspec vda,x=1", 1, "unable to parse diskspec: vda,x=1"),
    ("snapshot-create-as m s --diskspec vda,stype=x", 1, "Unknown storage type: 'x'"),
    ("snapshot-current m", 1, "domain 'm' has no current snapshot"),
    ("snapshot-create-as --domain m --name s1 --description words --disk-only --atomic", 0, "snapshot s1 created"),
    (
        "snapshot-create --domain m --xmlfile @s2.xml --atomic --validate",
        0,
        "Domain snapshot s2 created from '@s2.xml'",
    ),
    ("snapshot-create m --current", 1, "Option --redefine is required by option --current"),
    ("snapshot-create-as m s1", 1, "domain snapshot s1 already exists"),
    ("snapshot-create-as m s3 --validate --diskspec vda,snapshot=external,driver=qcow2,file=@own", 0, "s3 created"),
    ("snapshot-list m --tree", 0, "s1\n  |\n  +- s2\n      |\n      +- s3\n        \n"),
    ("snapshot-list m --parent", 0, "Parent"),
    ("snapshot-list m --roots --name", 0, "s1\n"),
    ("snapshot-list m --leaves --name", 0, "s3\n"),
    ("snapshot-list m --no-leaves --name", 0, "s1\ns2\n"),
    ("snapshot-list m --metadata --inactive --external --name --topological", 0, "s1\ns2\ns3\n"),
    ("snapshot-list m --no-metadata --active --disk-only --internal", 0, "Creation Time"),
    ("snapshot-list m --from s1 --descendants --name", 0, "s2\ns3\n"),
    ("snapshot-list m --from s2 --tree", 0, "s2\n  |\n  +- s3\n"),
    ("snapshot-list m --current --name", 0, "\n"),
    ("snapshot-list m --descendants", 1, "--descendants requires either"),
    ("snapshot-info m --snapshotname s2", 0, "Descendants:    1"),
    ("snapshot-info m --current", 0, "Location:       external"),
    ("snapshot-info m s1 --current", 1, "--snapshotname and --current are mutually exclusive"),
    ("snapshot-info m", 1, "--snapshotname or --current is required"),
    ("snapshot-dumpxml --domain m --snapshotname s1 --security-info", 0, "<description>words</description>"),
    ("snapshot-dumpxml m s1 --xpath //name --wrap", 0, "<nodes>"),
    ("snapshot-current m --name", 0, "s3"),
    ("snapshot-current m --security-info", 0, "<name>s3</name>"),
    ("snapshot-current m --snapshotname s1", 0, "Snapshot s1 set as current"),
    ("snapshot-current m --name", 0, "s1"),
    ("snapshot-parent m --snapshotname s2", 0, "s1"),
    ("snapshot-parent m --current", 1, "snapshot 's1' has no parent"),
    ("snapshot-edit --domain m --snapshotname s2 --current", 0, "Snapshot s2 XML configuration not changed."),
    ("snapshot-edit m s2 --rename --clone", 1, "mutually exclusive"),
    ("snapshot-create m @old.xml --redefine --current", 0, "Domain snapshot old created"),
    ("snapshot-create m @loop.xml --redefine", 1, "cannot set snapshot loop as its own parent"),
    ("snapshot-create m @orphan.xml --redefine", 1, "parent nobody for snapshot orphan not found"),
    ("snapshot-revert m old", 1, "lacks domain"),
    ("snapshot-delete m --current --metadata", 0, "Domain snapshot old deleted"),
    ("snapshot-revert --domain m --snapshotname s1 --running --paused", 1, "Failed to revert snapshot s1"),
    ("snapshot-revert m s1 --force --reset-nvram", 0, "Domain snapshot s1 reverted"),
    ("snapshot-revert m s1 --force", 0, "Domain snapshot s1 reverted"),
    ("snapshot-revert m --current", 0, "Domain snapshot s1 reverted"),
    ("snapshot-delete --domain m --snapshotname s1 --plan", 0, "forget snapshot s1"),
    ("snapshot-delete m s1 --children --children-only", 1, "Failed to delete snapshot s1"),
    ("snapshot-delete m s1 --children-only", 0, "Domain snapshot s1 children deleted"),
    ("snapshot-create-as m s4 --no-metadata", 0, "Domain snapshot s4 created"),
    ("snapshot-create-as m s5 --reuse-external --diskspec vda,file=@none", 1, "none"),
    ("snapshot-create-as m s5 --live --quiesce --halt", 1, "add --disk-only"),
    ("snapshot-create-as m s5 --live", 1, "is not running"),
    ("list --all --with-snapshot --name", 0, "m"),
    ("undefine m", 1, "cannot delete inactive domain with 1 snapshots"),
    ("snapshot-delete m s1 --children", 0, "Domain snapshot s1 deleted"),
    ("undefine m --snapshots-metadata", 0, "has been undefined"),
]


def test_a_session_with_every_option(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", "true")
    create(str(tmp_path / "d.qcow2"), "qcow2", 1 << 20)
    (tmp_path / "m.xml").write_text(MACHINE.format(tmp_path))
    (tmp_path / "s2.xml").write_text("<domainsnapshot><name>s2</name></domainsnapshot>")
    for name, parent in (("old", ""), ("loop", "loop"), ("orphan", "nobody")):
        (tmp_path / f"{name}.xml").write_text(
            OLD.format(name, f"<parent><name>{parent}</name></parent>" if parent else "")
        )
    for line, code, text in SESSION:
        done, out, errors = kvik_(*shlex.split(line.replace("@", f"{tmp_path}/")))
        assert done == code, (line, done, out, errors)
        assert text.replace("@", f"{tmp_path}/") in out + errors, (line, out, errors)


def test_renaming_and_cloning_in_the_editor(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(str(tmp_path / "d.qcow2"), "qcow2", 1 << 20)
    (tmp_path / "m.xml").write_text(MACHINE.format(tmp_path))
    assert kvik_("define", str(tmp_path / "m.xml"))[0] == 0
    assert kvik_("snapshot-create-as", "m", "one")[0] == 0
    monkeypatch.setenv("EDITOR", "sed -i 's,<name>one<,<name>two<,'")
    assert kvik_("snapshot-edit", "m", "one", "--clone")[:2] == (
        0, "Snapshot two XML configuration edited.\nSnapshot one cloned to two.\n\n",
    )  # fmt: skip
    assert kvik_("snapshot-list", "m", "--name")[1] == "one\ntwo\n\n"
    monkeypatch.setenv("EDITOR", "sed -i 's,<name>two<,<name>three<,'")
    assert kvik_("snapshot-edit", "m", "two", "--rename")[0] == 0
    assert kvik_("snapshot-list", "m", "--name")[1] == "one\nthree\n\n"
    for name in ("one", "three"):
        assert kvik_("snapshot-delete", "m", name)[0] == 0
    assert {path.name for path in tmp_path.glob("d.*")} == {"d.qcow2"}
    assert kvik_("undefine", "m")[0] == 0


def test_a_tree_is_drawn_as_virsh_draws_it() -> None:
    parents = {"s1": None, "s3": "s1", "t1": "s1", "t2": "t1", "z": "t2"}
    assert draw("s1", parents) == [
        "s1", "  |", "  +- s3", "  +- t1", "      |", "      +- t2", "          |", "          +- z", "            ",
    ]  # fmt: skip
    assert draw("a", {"a": None}) == ["a", ""]
    parents = {"r": None, "a": "r", "b": "a", "c": "r"}
    assert draw("r", parents)[:6] == ["r", "  |", "  +- a", "  |   |", "  |   +- b", "  |     "]
