"""Leases that a real sanlock keeps in a file, without a watchdog: machines have them from their start, and later."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, KvikError, OperationUnsupported, ResourceBusy
from kvik.host.process import find_program

from .conftest import Kvikd, until

LIVE = 1
LEASE = "<lease><lockspace>shop</lockspace><key>{}</key><target path='{}' offset='{}'/></lease>"
MIB = 1 << 20


class Sanlock:
    """A daemon of our own, host 1 of lockspace `shop`, which has the resources one, two and three."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sl"))
        self.environ = {**os.environ, "SANLOCK_RUN_DIR": f"{self.directory}/run", "SANLOCK_PRIVILEGED": "0"}
        (self.directory / "run").mkdir()
        self.place = self.directory / "le:ases"  # a colon ends a word of sanlock's
        with self.place.open("wb") as file:
            file.truncate(8 * MIB)
        with (self.directory / "log").open("wb") as log:
            words = [
                "sanlock",
                "daemon",
                "-D",
                "-w",
                "0",
                "-l",
                "0",
                "-h",
                "0",
                "-U",
                "root",
                "-G",
                "root",
                "-e",
                "one",
            ]
            self.process = subprocess.Popen(words, env=self.environ, stdout=log, stderr=log)
        until(lambda: (self.directory / "run/sanlock.sock").exists() or self.process.poll() is not None)
        self.name = str(self.place).replace(":", "\\:")
        self.call("direct", "init", "-s", f"shop:0:{self.name}:0", "-o", "1")
        for number, key in enumerate(("one", "two", "three"), 1):
            self.call("direct", "init", "-r", f"shop:{key}:{self.name}:{number * MIB}", "-o", "1")

    def call(self, *words: str) -> str:
        done = subprocess.run(["sanlock", *words], env=self.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr, (self.directory / "log").read_text()[-2000:])
        return done.stdout

    def join(self) -> None:
        self.call("client", "add_lockspace", "-s", f"shop:1:{self.name}:0", "-o", "1")

    def held(self) -> dict[str, int]:
        """Which process has which resource."""
        rows = [line.split() for line in self.call("client", "status").splitlines() if line.startswith("r ")]
        return {row[1].split(":")[1]: int(row[3]) for row in rows}

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        shutil.rmtree(self.directory)


@pytest.fixture(scope="module")
def sanlock() -> Iterator[Sanlock]:
    if find_program("sanlock") is None:
        pytest.skip("needs sanlock (apt install sanlock)")
    daemon = Sanlock()
    yield daemon
    daemon.end()


@pytest.fixture(scope="module")
def kvikd(sanlock: Sanlock) -> Iterator[Kvikd]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SANLOCK_RUN_DIR", "SANLOCK_PRIVILEGED"):
            patch.setenv(name, sanlock.environ[name])
        daemon = Kvikd()
    yield daemon
    for domain in daemon.connection.domains(1):
        domain.destroy()
    assert daemon.end() == 0
    shutil.rmtree(daemon.root)


def test_machines_have_leases_of_sanlock(make: Any, kvikd: Kvikd, sanlock: Sanlock) -> None:
    one = LEASE.format("one", sanlock.place, MIB)
    two, three = LEASE.format("two", sanlock.place, 2 * MIB), LEASE.format("three", sanlock.place, 3 * MIB)
    holder, waiting = make("holder", one + two, kernel=False), make("waiting", two, kernel=False)
    with pytest.raises(HostError, match="this host has not joined its lockspace"):
        holder.start()
    assert not holder.is_active()
    begun = time.monotonic()
    sanlock.join()
    print(f"joined in {time.monotonic() - begun:.1f} s")
    holder.start()
    held = sanlock.held()
    assert set(held) == {"one", "two"} and len({*held.values()}) == 1
    assert "qemu-system" in os.readlink(f"/proc/{held['one']}/exe")
    with pytest.raises(ResourceBusy, match="lease 'two' of lockspace 'shop': another machine of this host holds it"):
        waiting.start()
    # While it runs: taken, seen in the document, refused to others, given back.
    holder.attach_device(three, LIVE)
    assert sanlock.held() == {**held, "three": held["one"]} and "<key>three</key>" in holder.xml()
    with pytest.raises(KvikError, match="has lease 'three' already"):
        holder.attach_device(three, LIVE)
    holder.detach_device(two, LIVE)
    assert set(sanlock.held()) == {"one", "three"} and "<key>two</key>" not in holder.xml()
    waiting.start()
    assert sanlock.held()["two"] != held["one"]
    with pytest.raises(ResourceBusy, match="another machine of this host holds it"):
        holder.attach_device(two, LIVE)
    # They end with the VMM, which is found again by the next daemon meanwhile.
    assert kvikd.end(9) == -9
    kvikd.start()
    holder = kvikd.connection.lookup_name("holder")
    assert set(sanlock.held()) == {"one", "two", "three"} and "<key>three</key>" in holder.xml()
    kvikd.connection.lookup_name("waiting").destroy()
    until(lambda: set(sanlock.held()) == {"one", "three"})
    # Nothing of sanlock's is there, or has that name: nothing starts, and what is there stays as it is.
    for key, offset, words in (("two", MIB, "it has another name"), ("four", 4 * MIB, "")):
        wanted = make(f"wrong-{key}", LEASE.format(key, sanlock.place, offset), kernel=False)
        if words:
            with pytest.raises(HostError, match=words):
                wanted.start()
        else:
            wanted.start()  # no lease of sanlock's lies there: one of ours


def test_a_lease_of_our_own_comes_and_goes_too(make: Any, kvikd: Kvikd, tmp_path: Path) -> None:
    lease = "<lease><lockspace>own</lockspace><key>k</key><target path='{}'/></lease>"
    wanted, first = lease.format(tmp_path / "l"), lease.replace(">k<", ">first<").format(tmp_path / "f")
    taker, other = make("taker", first, kernel=False), make("other", wanted, kernel=False)
    taker.start()
    taker.attach_device(wanted, LIVE)
    with pytest.raises(ResourceBusy, match="lease 'k' of lockspace 'own' is held by machine 'taker'"):
        other.start()
    assert kvikd.end(9) == -9  # QEMU has it, not the daemon
    kvikd.start()
    taker, other = (kvikd.connection.lookup_name(name) for name in ("taker", "other"))
    with pytest.raises(ResourceBusy, match="is held by machine 'taker'"):
        other.start()
    taker.detach_device(wanted, LIVE)
    assert "<key>k</key>" not in taker.xml()
    other.start()
    with pytest.raises(OperationUnsupported, match="has lease 'first' from its start on"):
        taker.detach_device(first, LIVE)
    with pytest.raises(KvikError, match="has no lease 'k' in lockspace 'own'"):
        taker.detach_device(wanted, LIVE)
