"""`virsh pool-*, vol-*` and `kvik pool-*, vol-*`: the same words and the same bytes, on a real libvirtd and on kvikd.

Each session is typed into both clients from the same state, and ends with nothing left. UUIDs, times and the figures
of the file system below, which change while we look, are compared by their place only.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_net_speaks_as_virsh import ENVIRON, NEEDED, daemon, libvirtd, missing, without_hints

from kvik.cli.main import main

__all__ = ["libvirtd"]  # the fixture

pytestmark = [pytest.mark.interop, pytest.mark.root]

VOLUME = """\
<volume>
  <name>x.img</name>
  <capacity unit='KiB'>1100</capacity>
  <allocation>0</allocation>
  <target>
    <format type='raw'/>
    <permissions><mode>0640</mode><owner>7</owner><group>8</group></permissions>
  </target>
</volume>
"""
LIFE = """\
pool-list
pool-define-as p dir --target @pool
pool-list --all
pool-list --all --details
pool-list --inactive
pool-dumpxml p
pool-info p
pool-start p
pool-build p
pool-build p
pool-start p
pool-start p
pool-list
pool-list --details
pool-list --name
pool-list --uuid
pool-list --type dir
pool-list --type fs,netfs
pool-list --type foo
pool-list --autostart
pool-list --no-autostart --persistent
pool-info p
pool-info p --bytes
pool-uuid p
pool-name p
pool-dumpxml p
pool-dumpxml p --inactive
pool-dumpxml p --xpath //path
pool-autostart p
pool-info p
pool-autostart p --disable
pool-build p
pool-undefine p
pool-delete p
pool-refresh p
pool-destroy p
pool-refresh p
vol-list p
vol-create-as p x 1M
vol-info x --pool p
pool-info p
pool-delete p
pool-undefine p
pool-info p
pool-create-as p dir --target @pool
pool-create-as p dir --target @pool --build
pool-list --transient
pool-destroy p
pool-list --all
pool-delete p
pool-create @pooldoc --build
pool-destroy p
pool-define @pooldoc
pool-delete p
pool-undefine p
find-storage-pool-sources-as fs
find-storage-pool-sources-as logical
find-storage-pool-sources-as netfs
find-storage-pool-sources-as iscsi
"""
VOLUMES = """\
pool-create-as p dir --target @pool --build
vol-create-as p a.img 1M
vol-create-as p b.img 10M --allocation 0
vol-create-as p b.img 10M --allocation 0
vol-create p @vol
vol-create p /nonexistent
vol-list p
vol-list p --details
vol-info a.img p
vol-info b.img --pool p
vol-info b.img --pool p --bytes
vol-info b.img --pool p --physical
vol-info @pool/b.img
vol-dumpxml a.img p
vol-dumpxml b.img --pool p
vol-dumpxml x.img --pool p
vol-dumpxml x.img --pool p --xpath //mode
vol-key a.img p
vol-path a.img p
vol-pool @pool/a.img
vol-pool --uuid @pool/a.img
vol-name @pool/a.img
vol-clone a.img c.img --pool p
vol-clone a.img c.img --pool p
vol-clone a.img d.img --pool p --print-xml
vol-create-from p @vol a.img --inputpool p
vol-resize b.img 20M --pool p
vol-resize b.img 5M --pool p
vol-resize b.img 5M --pool p --shrink
vol-resize b.img 1M --delta --pool p
vol-resize b.img -1M --delta --pool p
vol-resize b.img -1M --delta --shrink --pool p
vol-resize b.img -1M --shrink --pool p
vol-resize b.img 8M --allocate --pool p
vol-resize b.img 1Q --pool p
vol-info b.img --pool p
vol-wipe a.img p
vol-wipe a.img p --algorithm foo
vol-upload a.img @bytes --pool p
vol-download a.img @out --pool p
vol-download a.img @out --pool p --offset 512 --length 1024
vol-upload b.img @sparse --pool p --sparse
vol-download b.img @out --pool p --sparse
vol-upload a.img @vol --pool p --offset 1048000
vol-download a.img @out --pool p
vol-upload a.img /nonexistent --pool p
vol-download a.img /nonexistent/x --pool p
vol-delete c.img --pool p
vol-delete nope --pool p
vol-info nope --pool p
vol-info nope
vol-pool nope
vol-name nope
vol-key nope
vol-create-as p ../x 1M
vol-create-as p x 1Q
vol-create-as nope x 1M
vol-create-as p x 1M --print-xml
vol-create-as p x 1M --format qcow2 --allocation 1k --print-xml
vol-create-as p x 1M --format qcow2 --backing-vol a.img --backing-vol-format raw --print-xml
vol-create-as p x 1M --format foo
vol-delete a.img p
vol-delete b.img p
vol-delete @pool/x.img
vol-list p
pool-destroy p
"""
WORDS = """\
pool-define-as p dir --target @pool --print-xml
pool-define-as p netfs --source-host h --source-path /x --source-format nfs --source-protocol-ver 4 \
--target /p --print-xml
pool-define-as p iscsi --source-host h --source-dev iqn.x --source-initiator iqn.y --auth-type chap --auth-username u \
--secret-usage s --target /dev/disk/by-path --print-xml
pool-define-as p scsi --adapter-name scsi_host2 --adapter-wwnn 20000000c9831b4b --adapter-wwpn 10000000c9831b4b \
--adapter-parent scsi_host5 --target /dev/disk/by-path --print-xml
pool-define-as p scsi --adapter-name scsi_host2 --target /dev/disk/by-path --print-xml
pool-create-as p logical --source-dev /dev/sda --source-name vg --target /dev/vg --print-xml
pool-define-as p fs --source-dev /dev/x --source-format ext4 --target /p --print-xml
pool-define-as p foo
pool-define-as p dir
pool-start p --overwrite --no-overwrite
pool-event --list
pool-event
pool-event --event frob
pool-event --event lifecycle --timeout 1
find-storage-pool-sources-as dir
find-storage-pool-sources
pool-info nope
pool-start nope
pool-name nope
pool-uuid nope
vol-list nope
vol-wipe
vol-info
"""
SESSIONS = {"a life": LIFE, "volumes": VOLUMES, "words": WORDS}


@pytest.fixture(scope="module")
def kvikd() -> Iterator[str]:
    if why := missing(*NEEDED):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="kvikd-") as directory:
        base = Path(directory)
        argv = [sys.executable, "-m", "kvik.daemon", "--system", "--root", directory, "--driver", "test"]
        with daemon([*argv, "--socket", f"{base}/s"], base / "s", base / "log") as uri:
            yield uri
        assert "failed unexpectedly" not in (base / "log").read_text()


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def unchosen(text: str) -> str:
    """Without what nobody chose: UUIDs, times, and how full the file system is."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"<([amc]time)>[0-9.]+", r"<\1>TIME", text)
    text = re.sub(r"<(allocation|available) unit='bytes'>\d{8,}<", r"<\1 unit='bytes'>N<", text)
    text = re.sub(r"^((?:Allocation|Available): +)([0-9.]+ [GT]iB|\d{9,})$", r"\1N", text, flags=re.MULTILINE)
    return re.sub(r"([0-9.]+ [GTP]iB) +[0-9.]+ [GTP]iB +[0-9.]+ [GTP]iB$|^-{70,}$", r"\1", text, flags=re.MULTILINE)


def run(argv: list[str]) -> tuple[int, str, str]:
    """A command: (exit code, standard output, standard error). Our own runs here: starting Python takes most of it."""
    if argv[0] == "virsh":
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=ENVIRON, check=False)
        return done.returncode, done.stdout, done.stderr
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(argv[1:])
    for stream in (out, errors):
        stream.seek(0)
    return code, out.read(), errors.read()


Line = tuple[str, int, str, str, bytes]


@pytest.fixture
def type_in(tmp_path: Path) -> Callable[[list[str], str], list[Line]]:
    pool, out, sparse = tmp_path / "pool", tmp_path / "out", tmp_path / "sparse"
    (tmp_path / "vol.xml").write_text(VOLUME)
    (tmp_path / "pool.xml").write_text(f"<pool type='dir'><name>p</name><target><path>{pool}</path></target></pool>")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 4096)
    with sparse.open("wb") as file:
        file.write(b"begin")
        file.seek(4 << 20)
        file.write(b"middle")
        file.truncate(8 << 20)
    names = {"@pooldoc": tmp_path / "pool.xml", "@pool": pool, "@vol": tmp_path / "vol.xml"}
    names |= {"@bytes": tmp_path / "bytes", "@sparse": sparse, "@out": out}

    def type_in(program: list[str], session: str) -> list[Line]:
        shutil.rmtree(pool, ignore_errors=True)
        text, said = SESSIONS[session], []
        for name, path in names.items():
            text = text.replace(name, str(path))
        for line in text.splitlines():
            out.unlink(missing_ok=True)
            code, stdout, stderr = run([*program, *shlex.split(line)])
            errors = "".join(one for one in stderr.splitlines(keepends=True) if not one.startswith("hint: "))
            data = out.read_bytes() if out.exists() else b""
            said.append((line, code, unchosen(stdout), unchosen(errors), data))
        return said

    return type_in


KVIK = ["kvik", "-c"]
ON = [(name, session) for name in ("libvirtd", "kvikd") for session in SESSIONS]


@pytest.mark.parametrize(("uri", "session"), ON, indirect=["uri"])
def test_same_words_bytes_and_exit_codes(uri: str, session: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", uri], session), type_in([*KVIK, uri], session)
    for their, our in zip(theirs, ours, strict=True):
        if uri.endswith("/s"):  # kvikd: libvirt's clients get the hint within the message
            their, our = ((*line[:3], without_hints(line[3]), line[4]) for line in (their, our))
        assert our == their


@pytest.mark.parametrize("session", ["a life", "volumes"])
def test_the_two_daemons_answer_virsh_alike(libvirtd: str, kvikd: str, session: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", libvirtd], session), type_in(["virsh", "-c", kvikd], session)
    for their, our in zip(theirs, ours, strict=True):
        assert (*our[:3], our[4]) == (*their[:3], their[4]), (our, their)
        assert our[3].count("\n") == their[3].count("\n"), (our, their)


def test_a_sparse_download_keeps_its_holes(kvikd: str, tmp_path: Path) -> None:
    pool, image = tmp_path / "pool", tmp_path / "back"
    virsh = ["virsh", "-c", kvikd]
    for line in (
        f"pool-create-as s dir --target {pool} --build",
        "vol-create-as s big.img 4G --allocation 0",
        f"vol-download big.img {image} --pool s --sparse",
        "pool-destroy s",
    ):
        subprocess.run([*virsh, *line.split()], check=True, capture_output=True, env=ENVIRON)
    info = os.stat(image)
    assert (info.st_size, info.st_blocks) == (4 << 30, 0)
