"""`virsh nwfilter-*` and `kvik nwfilter-*`: the same words, on a real libvirtd and on kvikd.

Each runs in a network namespace of its own, kvikd with an interface to put filters on.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_net_speaks_as_virsh import NEEDED, daemon, libvirtd, missing, said

__all__ = ["libvirtd"]  # the fixture

pytestmark = [pytest.mark.interop, pytest.mark.root]

FILTER = """\
<filter name='web' chain='root'>
  <uuid>5c6d49af-b071-6127-b4ec-6f8ed4b55335</uuid>
  <rule action='accept' direction='in' priority='500'>
    <tcp dstportstart='80'/>
  </rule>
  <rule action='drop' direction='inout' priority='900' statematch='false'>
    <all/>
  </rule>
</filter>
"""
BINDING = """\
<filterbinding>
  <owner>
    <name>vm1</name>
    <uuid>12345678-1234-4234-8234-123456789abc</uuid>
  </owner>
  <portdev name='v0'/>
  <mac address='52:54:00:7b:35:93'/>
  <filterref filter='web'/>
</filterbinding>
"""
DEFINITIONS = """\
nwfilter-list
nwfilter-define @filter
nwfilter-define @filter --validate
nwfilter-list
nwfilter-dumpxml web
nwfilter-dumpxml 5c6d49af-b071-6127-b4ec-6f8ed4b55335
nwfilter-dumpxml web --xpath //rule/@action
nwfilter-dumpxml web --xpath //tcp --wrap
nwfilter-define /nonexistent
nwfilter-undefine nope
nwfilter-dumpxml nope
nwfilter-define
nwfilter-binding-list
nwfilter-binding-dumpxml nope
nwfilter-binding-delete nope
nwfilter-undefine web
nwfilter-dumpxml web
"""
BINDINGS = """\
nwfilter-define @filter
nwfilter-binding-create @binding
nwfilter-binding-list
nwfilter-binding-dumpxml v0
nwfilter-undefine web
nwfilter-binding-create @binding
nwfilter-binding-delete v0
nwfilter-binding-list
nwfilter-undefine web
nwfilter-dumpxml clean-traffic
nwfilter-undefine clean-traffic
"""


def transcript(program: list[str], lines: str, directory: Path) -> list[tuple[str, tuple[int, str, str]]]:
    (directory / "filter.xml").write_text(FILTER)
    (directory / "binding.xml").write_text(BINDING)
    lines = lines.replace("@filter", f"{directory}/filter.xml").replace("@binding", f"{directory}/binding.xml")
    return [(line, said(program, shlex.split(line))) for line in lines.splitlines()]


def kvik(address: str) -> list[str]:
    return [sys.executable, "-m", "kvik.cli.main", "-c", address]


@pytest.fixture(scope="module")
def kvikd() -> Iterator[str]:
    if why := missing(*NEEDED):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="kvikd-") as directory:
        base = Path(directory)
        argv = [sys.executable, "-m", "kvik.daemon", "--system", "--root", directory, "--driver", "test"]
        interface = "ip link add v0 type veth peer name v1;"
        with daemon([*argv, "--socket", f"{base}/s"], base / "s", base / "log", interface) as address:
            yield address
        assert "failed unexpectedly" not in (base / "log").read_text()


def test_same_words_on_libvirtd(libvirtd: str, tmp_path: Path) -> None:
    if said(["virsh", "-c", libvirtd], ["nwfilter-list"])[0]:
        pytest.skip("this libvirtd has no network filters")
    theirs = transcript(["virsh", "-c", libvirtd], DEFINITIONS, tmp_path)
    ours = transcript(kvik(libvirtd), DEFINITIONS, tmp_path)
    for their, our in zip(theirs, ours, strict=True):
        assert our == their


@pytest.mark.parametrize("session", [DEFINITIONS, BINDINGS], ids=["definitions", "bindings"])
def test_same_words_on_kvikd(kvikd: str, session: str, tmp_path: Path) -> None:
    theirs = transcript(["virsh", "-c", kvikd], session, tmp_path)
    ours = transcript(kvik(kvikd), session, tmp_path)
    for their, our in zip(theirs, ours, strict=True):
        # virsh prints the daemon's whole message, kvik its remedy as a hint of its own.
        assert our[0] == their[0] and our[1][:2] == their[1][:2], (our, their)


def test_virsh_finds_the_built_in_filters_and_binds_one(kvikd: str, tmp_path: Path) -> None:
    virsh = ["virsh", "-c", kvikd]
    code, listed, _ = said(virsh, ["nwfilter-list"])
    assert code == 0 and "clean-traffic" in listed and "no-ip-spoofing" in listed
    for line, (code, output, error) in transcript(virsh, BINDINGS, tmp_path):
        expected = 1 if line in ("nwfilter-undefine web", "nwfilter-undefine clean-traffic") else 0
        if line == "nwfilter-undefine web" and "in use" not in error:
            expected = 0  # the second time nothing uses it
        if line.startswith("nwfilter-binding-create") and "has a filter binding already" in error:
            expected = 1
        assert code == expected, (line, output, error)
