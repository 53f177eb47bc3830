"""No room, or no right to write: clear errors, nothing half done, what runs goes on, and all is well afterwards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fault_harness import Host, alive, eventually, machine_xml

FULL = "No space left on device"
READ_ONLY = "Read-only file system"


class Room:
    """A small file system of the daemon's, which can be filled and emptied."""

    def __init__(self, host: Host, directory: Path) -> None:
        host.mount(directory, "64k")
        self.host, self.directory = host, directory
        self.filler = host.inside(directory) / "filler"

    def fill(self) -> None:
        fd = os.open(self.filler, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
        os.close(fd)

    def free(self) -> None:
        self.filler.unlink()

    def read_only(self, on: bool) -> None:
        self.host.enter("mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.directory))


def definitions_intact(host: Host, broken: str) -> None:
    web = host.inside(host.paths.domains / "web.xml").read_bytes()
    before = host.files()
    new = host.document("new", machine_xml("new"))
    uuid = host.connection.domain("web").uuid
    host.kvik("define", new, fails=f"new.xml: {broken}")
    host.kvik("define", host.document("again", machine_xml("web", memory=32, uuid=uuid)), fails=f"web.xml: {broken}")
    host.kvik("setmem", "web", "8M", "--config", fails=broken)
    host.kvik("desc", "web", "something else", "--config", fails=broken)
    assert host.inside(host.paths.domains / "web.xml").read_bytes() == web
    assert host.files() == before
    assert [domain.name for domain in host.connection.domains()] == ["web"]
    assert "something else" not in host.kvik("dumpxml", "web")
    assert "<memory unit='KiB'>16384" in host.kvik("dumpxml", "web")


def test_no_room_for_definitions(private_host: Host) -> None:
    host = private_host
    room = Room(host, host.paths.domains)
    host.start()
    host.define("web")
    room.fill()
    definitions_intact(host, FULL)
    # What runs does not need that room: it starts and ends as ever.
    host.kvik("start", "web")
    host.kvik("destroy", "web")
    host.restart()
    assert [domain.name for domain in host.connection.domains()] == ["web"]
    room.free()
    host.define("new")
    host.kvik("setmem", "web", "8M", "--config")


def test_definitions_that_cannot_be_written(private_host: Host) -> None:
    host = private_host
    room = Room(host, host.paths.domains)
    host.start()
    host.define("web")
    room.read_only(True)
    definitions_intact(host, READ_ONLY)
    host.kvik("autostart", "web", fails=READ_ONLY)
    host.kvik("undefine", "web", fails=READ_ONLY)
    host.kvik("domrename", "web", "db", fails=READ_ONLY)
    assert "disable" in host.kvik("dominfo", "web")
    host.kvik("start", "web")
    pid = host.pid("web")
    host.restart()
    assert host.pid("web") == pid and host.state("web") == "running"
    room.read_only(False)
    host.kvik("autostart", "web")
    host.kvik("undefine", "web")
    host.kvik("destroy", "web")


def test_no_room_for_status(private_host: Host) -> None:
    host = private_host
    room = Room(host, host.paths.status)
    host.start()
    host.define("web")
    host.define("db")
    host.kvik("start", "web")
    pid = host.pid("web")
    room.fill()
    before = host.files()
    host.kvik("start", "db", fails=f"db.xml: {FULL}")
    host.kvik("create", host.document("new", machine_xml("new")), fails=f"new.xml: {FULL}")
    assert host.state("db") == "shut off"
    eventually(lambda: host.processes() == sorted([host.daemon, pid]), "no machine was left half started")
    assert host.files() == before
    # What runs can be worked with all the same, and be ended.
    host.kvik("suspend", "web")
    assert host.state("web") == "paused"
    host.restart()
    assert host.pid("web") == pid
    eventually(lambda: host.state("web") == "paused", "what QEMU says counts, not what the status says")
    host.kvik("resume", "web")
    host.kvik("destroy", "web")
    assert not alive(pid)
    room.free()
    host.kvik("start", "db")
    host.kvik("start", "web")


def test_status_that_cannot_be_written(private_host: Host) -> None:
    host = private_host
    room = Room(host, host.paths.status)
    host.start()
    host.define("web")
    host.define("db")
    host.kvik("start", "web")
    pid = host.pid("web")
    room.read_only(True)
    host.kvik("start", "db", fails=READ_ONLY)
    assert host.processes() == sorted([host.daemon, pid])
    host.kvik("suspend", "web")
    host.restart()
    assert host.pid("web") == pid
    host.kvik("destroy", "web")
    assert not alive(pid)
    assert host.state("web") == "shut off"
    room.read_only(False)
    # What could not be removed then is put right by the next daemon.
    host.restart()
    assert host.state("web") == "shut off"
    host.kvik("start", "db")
    host.kvik("start", "web")


def test_no_room_for_logs(private_host: Host) -> None:
    """A log is worth less than the machine: it runs, with a shorter log."""
    host = private_host
    room = Room(host, host.paths.domain_logs)
    host.start()
    host.define("web")
    room.fill()
    host.kvik("start", "web")
    host.kvik("destroy", "web")
    room.free()
    host.kvik("start", "web")
    assert "-name" in host.log("web")


def test_logs_that_cannot_be_written(private_host: Host) -> None:
    host = private_host
    room = Room(host, host.paths.domain_logs)
    host.start()
    host.define("web")
    room.read_only(True)
    before = host.files()
    host.kvik("start", "web", fails=f"web.log: {READ_ONLY}")
    assert host.state("web") == "shut off"
    assert host.files() == before
    assert host.processes() == [host.daemon]
    room.read_only(False)
    host.kvik("start", "web")


def test_a_daemon_that_cannot_write_anything(private_host: Host) -> None:
    host = private_host
    for directory in (host.paths.run, host.paths.config):
        room = Room(host, directory)
        room.read_only(True)
        daemon = host.spawn(*host.daemon_command())
        assert host.exit_code(daemon) == 1
        assert READ_ONLY in host.messages()
        assert "Traceback" not in host.messages()
        host.enter("umount", str(directory))
