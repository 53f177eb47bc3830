"""`virsh save` and its kin and kvik's: the same words and exit codes on kvikd.

A machine of firmware alone is saved and restored, in a file and managed; the same session is typed into both clients.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_net_speaks_as_virsh import without_hints
from test_storage_speaks_as_virsh import kvikd, run, uri

__all__ = ["kvikd", "uri"]  # fixtures

pytestmark = [pytest.mark.interop, pytest.mark.root]

MACHINE = """<domain type='test'><name>kept</name><uuid>3e3fce45-4f53-4fa7-bb32-11f34168b82c</uuid>
<memory>16384</memory><os><type arch='x86_64' machine='q35'>hvm</type></os><devices/></domain>"""
SESSION = """\
define @m.xml
managedsave-remove kept
save kept @s
managedsave kept
start kept
save kept @s
domstate kept --reason
list --all --name
save-image-dumpxml @s --xpath //domain/name
restore @s
domstate kept --reason
restore @s
managedsave kept
domstate kept --reason
list --all --with-managed-save --name
list --all --managed-save
managedsave-dumpxml kept --xpath //domain/name
undefine kept
start kept
list --all --with-managed-save --name
domstate kept --reason
managedsave kept --paused
start kept
domstate kept
resume kept
managedsave kept
managedsave-remove kept
managedsave-remove kept
start kept
domstate kept --reason
managedsave kept
start kept --force-boot
domstate kept --reason
managedsave kept
undefine kept --managed-save
restore @s
destroy kept
list --all --name
restore @nothing
save-image-dumpxml @nothing
"""


@pytest.fixture
def type_in(tmp_path: Path) -> Iterator[Callable[[list[str]], Any]]:
    tmp_path.chmod(0o755)

    def type_in(program: list[str]) -> list[tuple[str, int, str, str]]:
        for path in tmp_path.glob("*"):
            path.unlink()
        (tmp_path / "m.xml").write_text(MACHINE)
        said = []
        for line in SESSION.splitlines():
            code, out, errors = run([*program, *shlex.split(line.replace("@", f"{tmp_path}/"))])
            errors = "".join(one for one in errors.splitlines(keepends=True) if not one.startswith("hint: "))
            said.append((line, code, out, errors))
        return said

    yield type_in


@pytest.mark.parametrize("uri", ["kvikd"], indirect=True)
def test_same_words_and_exit_codes(uri: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", uri]), type_in(["kvik", "-c", uri])
    theirs, ours = ([(*line[:3], without_hints(line[3])) for line in said] for said in (theirs, ours))
    for our, their in zip(ours, theirs, strict=True):
        assert our == their
