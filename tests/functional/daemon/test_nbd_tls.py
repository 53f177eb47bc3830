"""NBD over TLS, both ends: backups that only clients of the host's authority pull, disks on servers that it signed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import KvikError
from kvik.host.process import find_program

from .conftest import Kvikd, Make, until
from .test_backup import MIB, SIZE, Guest, ask, machine, nothing_left, ok, over, place, run, start_backup

__all__ = ["place"]  # a fixture
pytestmark = pytest.mark.skipif(
    any(find_program(name) is None for name in ("openssl", "qemu-img")),
    reason="needs openssl and qemu-img (apt install openssl qemu-utils)",
)


def authority(directory: Path, *ends: str) -> Path:
    """Its certificate in `directory`, and those that it signed for the server's or a client's end."""
    directory.mkdir(parents=True)
    key, pem = directory / "ca-key.pem", directory / "ca-cert.pem"
    new = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    run(*new, "-x509", "-keyout", str(key), "-out", str(pem), "-subj", "/CN=authority")
    for end in ends:
        request = directory / "request"
        run(*new, "-keyout", str(directory / f"{end}-key.pem"), "-out", str(request), "-subj", "/CN=localhost")
        (directory / "names").write_text(f"subjectAltName=DNS:localhost\nextendedKeyUsage={end}Auth\n")
        signed = ("-CA", str(pem), "-CAkey", str(key), "-CAcreateserial", "-days", "2", "-in", str(request))
        extended = ("-extfile", str(directory / "names"), "-out", str(directory / f"{end}-cert.pem"))
        run("openssl", "x509", "-req", *signed, *extended)
    return directory


def read(port: int, directory: Path | None, to: Path) -> subprocess.CompletedProcess[str]:
    """What a client with these certificates, or without any, gets."""
    source = f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=vda"
    words = ["qemu-img", "convert", "-O", "raw"]
    if directory is not None:
        words += ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={directory},verify-peer=yes"]
        source += ",tls-creds=tls"
    words += ["--image-opts", source, str(to)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def test_only_those_with_a_certificate_of_the_authority_read(kvikd: Kvikd, make: Make, place: Path) -> None:
    machine(kvikd, make, place, "sealed")
    guest = Guest(kvikd, "sealed")
    guest.write(0x11, 0, 2 * MIB)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = f"<server name='localhost' port='{port}' tls='yes'/>"
    xml = (
        f"<domainbackup mode='pull'>{server}<disks><disk name='vda' type='file'><scratch file='{place / 'scratch'}'/>"
        "</disk></disks></domainbackup>"
    )
    pki = kvikd.paths.certificates
    with pytest.raises(KvikError, match=r"needs ca-cert\.pem"):
        start_backup(kvikd, "sealed", xml)
    authority(pki, "server", "client")
    (pki / "server-key.pem").rename(pki / "away")
    (pki / "server-key.pem").write_text("no key")
    with pytest.raises(KvikError, match="server-key"):
        start_backup(kvikd, "sealed", xml)
    nothing_left(kvikd, "sealed", place / "scratch")
    (pki / "away").rename(pki / "server-key.pem")
    start_backup(kvikd, "sealed", xml)
    assert "-key.pem" not in str(ask(kvikd, "sealed", "query-fdsets")) and "backup-tls" not in str(
        ask(kvikd, "sealed", "query-fdsets")
    )
    then = bytes(guest.holds[0])
    guest.write(0x22, MIB, MIB)
    stranger = authority(place / "stranger", "client")
    with (stranger / "ca-cert.pem").open("ab") as known:  # knows the server, is not known to it
        known.write((pki / "ca-cert.pem").read_bytes())
    nobody = place / "nobody"
    nobody.mkdir()
    shutil.copy(pki / "ca-cert.pem", nobody)
    out = place / "out"
    for certificates in (None, nobody, stranger):
        done = read(port, certificates, out)
        assert done.returncode and "TLS" in done.stderr, done.stderr
        assert not out.exists()
    # The daemon dies; the server goes on, and the next daemon ends it.
    kvikd.end(signal.SIGKILL)
    kvikd.start()
    done = read(port, pki, out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == then
    kvikd.connection.domain("sealed").abort_job()
    assert over(kvikd, "sealed") == "completed"
    nothing_left(kvikd, "sealed", place / "scratch")
    objects = ask(kvikd, "sealed", "qom-list", path="/objects")
    assert "backup-tls" not in [item["name"] for item in objects]


@pytest.fixture
def export(place: Path) -> Iterator[tuple[Path, int]]:
    """A file of 4 MiB that a qemu-nbd serves over TLS alone, to clients of its authority (`place`/pki); its port."""
    path, pki = place / "export", authority(place / "pki", "server", "client")
    path.write_bytes(bytes(SIZE))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={pki},verify-peer=yes"
    words = ["qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "data", "-b", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen([*words, "--object", credentials, "--tls-creds", "tls", str(path)])
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield path, port
    finally:
        server.kill()
        server.wait()


def network_disk(port: int, target: str, more: str = "") -> str:
    return (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='nbd' name='data' tls='yes' {more}><host name='127.0.0.1' port='{port}'/></source>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


def test_a_disk_on_a_server_that_the_authority_signed(
    kvikd: Kvikd, make: Make, place: Path, export: tuple[Path, int]
) -> None:
    path, port = export
    pki = kvikd.paths.certificates
    shutil.rmtree(pki, ignore_errors=True)
    named = "tlsHostname='localhost'"
    domain = make("far", network_disk(port, "vda", named), kernel=False)
    with pytest.raises(KvikError, match=r"TLS needs ca-cert\.pem"):
        domain.start()
    # Of another authority: the server is not believed, nor is the client.
    authority(pki, "client")
    with pytest.raises(KvikError, match=r"certificate"):
        domain.start()
    shutil.rmtree(pki)
    shutil.copytree(place / "pki", pki)
    domain.start()
    guest = Guest(kvikd, "far")
    guest.write(0x5A, MIB, 4096)
    ok(
        kvikd,
        "qemu-monitor-command",
        "far",
        "--hmp",
        'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "flush"',
    )
    assert path.read_bytes() == bytes(guest.holds[0])
    # Its name is checked, by what the document says or by the host.
    domain.destroy()
    wrong = make("wrong", network_disk(port, "vda", "tlsHostname='elsewhere'"), kernel=False)
    with pytest.raises(KvikError, match=r"elsewhere|certificate"):
        wrong.start()
    # Plugged in: no copy of a certificate stays on the host.
    (place / "disk.xml").write_text(network_disk(port, "vdb", named))
    machine(kvikd, make, place, "plugged")
    ok(kvikd, "attach-device", "plugged", str(place / "disk.xml"), "--live")

    def credentials() -> list[str]:
        objects = ask(kvikd, "plugged", "qom-list", path="/objects")
        return [item["name"] for item in objects if item["name"].endswith("-tls")]

    assert credentials() == ["virtio-disk1-2-tls"]
    assert not list(kvikd.paths.run.glob("tls-*"))
    assert "BEGIN" not in ok(kvikd, "dumpxml", "plugged", "--security-info")
