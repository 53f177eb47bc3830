"""Bad documents, sent to the real daemon: refused with what, where and what to do; nothing half done, nobody harmed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fault_harness import Host, disk_xml, machine_xml

from kvik.errors import KvikError

_LAUGHS = "".join(f'<!ENTITY l{n} "{(f"&l{n - 1};" if n else "ha") * 10}">' for n in range(10))
BILLION_LAUGHS = f"<!DOCTYPE domain [{_LAUGHS}]><domain type='qemu'><name>&l9;</name></domain>"
EXTERNAL = """<!DOCTYPE domain [<!ENTITY secret SYSTEM "file://%s">]>
<domain type='qemu'><name>web</name><title>&secret;</title></domain>"""


def refused(host: Host, xml: str, pattern: str, *, seconds: float = 5.0) -> None:
    """By define and by create, in the CLI's words; within a bounded time, and without a trace on disk."""
    before = host.files()
    path = host.document("bad", xml)
    for verb in ("define", "create"):
        begun = time.monotonic()
        host.kvik(verb, path, fails=pattern)
        assert time.monotonic() - begun < seconds
    assert host.files() == before
    assert host.processes() == [host.daemon]
    assert host.connection.domains() == []


@pytest.mark.parametrize(
    ("xml", "pattern"),
    [
        ("", "empty|line 1"),
        ("not XML at all", "line 1"),
        ("<domain", "line 1"),
        ("<domain type='qemu'>\n<name>web</nam>\n</domain>", "line 2"),
        ("<domain type='qemu'>\n<name>web</name>\n", "line [23]"),
        ("<network><name>web</name></network>", "network.*domain|domain.*network"),
        ("<domain type='qemu'><name>a\x01b</name></domain>", "line 1"),
        ("<domain type='qemu'></domain>", "line 1, at /domain: <os> is missing"),
        (machine_xml("web").replace("<vcpu>1<", "<vcpu>many<"), r"line 5.*/domain/vcpu.*many"),
        (machine_xml("web").replace("type='qemu'", "type='spaceship'"), "spaceship"),
        (machine_xml("web").replace("'q35'", "'q36'"), r"q36.*-machine help"),
        (machine_xml("web").replace("hvm", "xen"), "xen|/domain/os/type"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_malformed(host: Host, xml: str, pattern: str) -> None:
    refused(host, xml, pattern)


def test_entities_are_not_expanded(host: Host) -> None:
    refused(host, BILLION_LAUGHS, "line 1: a document type declaration")
    assert int(Path(f"/proc/{host.daemon}/statm").read_text().split()[1]) * 4096 < 300 << 20


def test_no_file_of_the_host_is_read(host: Host) -> None:
    secret = host.root / "secret"
    secret.write_text("hidden-treasure")
    refused(host, EXTERNAL % secret, "line 1: a document type declaration")
    assert "hidden-treasure" not in host.messages()


def test_deep_documents(host: Host) -> None:
    for depth in (300, 10_000, 50_000):
        deep = "<a>" * depth + "</a>" * depth
        refused(
            host,
            machine_xml("web", after=f"<metadata>{deep}</metadata>"),
            "nested more than 64 elements|more than 20000 elements",
        )


def test_huge_documents(host: Host) -> None:
    # Beyond what one string of the protocol holds: told before it is sent, or by the daemon, never by a hang-up.
    refused(
        host, machine_xml("web", after=f"<description>{'x' * (5 << 20)}</description>"), "exceeds the protocol's limit"
    )
    assert host.kvik("list", "--all")


def test_many_elements(host: Host) -> None:
    """As much as the protocol carries, of what costs most: refused or taken, but within a bounded time."""
    begun = time.monotonic()
    with pytest.raises(KvikError):
        host.connection.define(machine_xml("web", "<disk/>" * 400_000))
    assert time.monotonic() - begun < 20
    assert "web" not in host.kvik("list", "--all")


@pytest.mark.parametrize(
    "name", ["a/b", "../../etc/passwd", "a\nb", "-rf", "--all", ".", "..", ".hidden", "x" * 256, "é" * 128, "a\tb", " "]
)
def test_names(host: Host, name: str) -> None:
    refused(host, machine_xml(name.replace("\n", "&#10;").replace("\t", "&#9;")), "name")


def test_a_rename_is_checked_as_well(host: Host) -> None:
    host.define("web")
    host.define("db")
    before = host.files()
    for name in ("a/b", "..", "a\nb", "x" * 256):
        with pytest.raises(KvikError, match="name"):
            host.connection.domain("web").rename(name)
    host.kvik("domrename", "web", "db", fails="there is a machine 'db' already")
    assert host.files() == before


def test_duplicates(host: Host) -> None:
    one, two = "7e0c5b4a-0000-4000-8000-000000000001", "7e0c5b4a-0000-4000-8000-000000000002"
    interface = "<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"
    host.define("web", interface, uuid=one)
    before = host.files()
    host.kvik(
        "define", host.document("d", machine_xml("db", uuid=one)), fails=f"'web' is already defined with UUID {one}"
    )
    host.kvik("define", host.document("d", machine_xml("web", uuid=two)), fails=f"'web' already exists with UUID {one}")
    host.kvik(
        "create", host.document("d", machine_xml("db", uuid=one)), fails=f"'web' is already defined with UUID {one}"
    )
    twice = host.document("d", machine_xml("db", interface * 2))
    host.kvik("define", twice, fails="52:54:00:00:00:01")
    assert host.files() == before
    # The same address in two machines is legal until both run on one network: two machines never share a switch here.
    host.define("db", interface)


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("<memory unit='MiB'>16<", f"<memory unit='KiB'>{1 << 64}<", "memory"),
        ("<memory unit='MiB'>16<", f"<memory unit='EiB'>{1 << 30}<", "memory"),
        ("<memory unit='MiB'>16<", "<memory unit='MiB'>-1<", "memory"),
        ("<memory unit='MiB'>16<", "<memory unit='MiB'>0<", "memory"),
        ("<memory unit='MiB'>16<", "<memory unit='parsec'>16<", "parsec"),
        ("<vcpu>1<", f"<vcpu>{1 << 31}<", "vcpu|vCPU"),
        ("<vcpu>1<", f"<vcpu>{1 << 64}<", "vcpu|vCPU"),
        ("<vcpu>1<", "<vcpu>0<", "vcpu|vCPU"),
        ("<vcpu>1<", "<vcpu>-1<", "vcpu|vCPU"),
        ("<vcpu>1<", "<vcpu>9999<", "vcpu|vCPU"),
        ("<vcpu>1<", f"<vcpu>{'9' * 5000}<", "vcpu|vCPU"),
    ],
)
def test_numbers(host: Host, old: str, new: str, pattern: str) -> None:
    xml = machine_xml("web").replace(old, new)
    assert new in xml
    refused(host, xml, pattern)


def test_numbers_by_command(host: Host) -> None:
    host.define("web")
    before = host.paths.domains.joinpath("web.xml").read_text()
    for verb, value in (
        ("setmem", str(1 << 64)),
        ("setmem", str((1 << 64) - 1)),
        ("setmaxmem", str(1 << 64)),
        ("setmaxmem", str((1 << 63) + 1)),
        ("setvcpus", str(1 << 31)),
        ("setvcpus", str((1 << 32) + 1)),
        ("setvcpus", "0"),
    ):
        host.kvik(verb, "web", value, "--config", fails=".")
    assert host.paths.domains.joinpath("web.xml").read_text() == before


def test_bad_devices(host: Host) -> None:
    """Attached to a machine that runs: neither it nor its definition changes."""
    host.define("web", disk_xml(host.image("a.img")))
    host.kvik("start", "web")
    pid = host.pid("web")
    before = host.files(), host.paths.domains.joinpath("web.xml").read_text(), host.kvik("dumpxml", "web")
    other = host.image("b.img")
    for xml, pattern in (
        ("<disk", "line 1"),
        ("<teapot/>", "teapot"),
        (BILLION_LAUGHS, "line 1: a document type declaration"),
        ("<a>" * 50_000 + "</a>" * 50_000, "more than 20000 elements"),
        (disk_xml(other, "vda"), "vda"),
        (disk_xml(host.root / "missing.img", "vdb"), "missing.img"),
        (disk_xml(host.root, "vdb"), "directory"),
        (disk_xml(other, "../x"), "target|dev"),
        ("<interface type='user'><mac address='52:54:00:00:00'/></interface>", "52:54:00:00:00"),
        ("<interface type='user'><mac address='ff:ff:ff:ff:ff:ff'/></interface>", "ff:ff|multicast"),
        (
            "<hostdev mode='subsystem' type='pci'><source><address domain='0' bus='255' slot='99'/></source></hostdev>",
            "slot 0x63",
        ),
    ):
        path = host.document("device", xml)
        for options in (("--live",), ("--config",), ("--live", "--config")):
            if "missing" in xml and "--live" not in options:
                continue  # a definition may name a disk that is yet to come
            if xml.endswith("</disk>") and str(host.root) + "'" in xml and "--live" not in options:
                continue
            host.kvik("attach-device", "web", path, *options, fails=pattern)
    assert (host.files(), host.paths.domains.joinpath("web.xml").read_text(), host.kvik("dumpxml", "web")) == before
    assert host.pid("web") == pid
    assert host.state("web") == "running"


def test_a_document_on_disk_that_was_damaged(host: Host) -> None:
    """Set aside under another name, said so, and the others are there."""
    host.define("web")
    host.define("db")
    path = host.paths.domains / "web.xml"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (host.paths.domains / "huge.xml").write_bytes(b"<domain>" + b" " * (5 << 20))
    (host.paths.domains / "laughs.xml").write_text(BILLION_LAUGHS)
    os.mkfifo(host.paths.domains / "fifo.xml")
    (host.paths.domains / "link.xml").symlink_to("/etc/passwd")
    connection = host.restart()
    assert [domain.name for domain in connection.domains()] == ["db"]
    kept = {path.name for path in host.paths.domains.iterdir() if "corrupt" in path.name}
    assert {name.split(".")[0] for name in kept} == {"web", "huge", "laughs", "fifo", "link"}
    assert (host.paths.domains / "web.xml.corrupt-0").read_bytes() == whole[: len(whole) // 2]
    assert "set aside" in host.messages()
    for name in kept:
        (host.paths.domains / name).unlink()
    host.define("web")
