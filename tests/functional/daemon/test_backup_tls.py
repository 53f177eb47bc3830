"""Backups that are pulled over TLS: by clients whose certificates the host's authority signed, and by nobody else."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from kvik.errors import KvikError
from kvik.host.process import find_program

from .conftest import Kvikd, Make
from .test_backup import MIB, Guest, ask, machine, nothing_left, over, place, run, start_backup

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
