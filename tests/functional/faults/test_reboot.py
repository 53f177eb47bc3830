"""The host was rebooted: what is left of the last boot means nothing; nobody else's process is taken for a machine."""

from __future__ import annotations

import os
import signal

from fault_harness import Host, alive, eventually, machine_xml

from kvik.host.process import boot_id, read_stat

OTHER_BOOT = "0b0b0b0b-0000-4000-8000-00000000b007"


def reboot(host: Host, *, keep: str = "") -> None:
    """Daemon and machines die without a word; the files in /run stay, as those of another boot."""
    pids = [pid for pid in host.processes() if pid != host.daemon]
    host.kill_daemon()
    for pid in pids:
        if str(pid) not in keep:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not alive(pid), "death of a machine")
    for path in (*host.paths.status.glob("*.xml"), host.paths.run / "autostarted"):
        path.write_text(path.read_text().replace(boot_id(), OTHER_BOOT))


def test_machines_are_off_and_their_files_gone(host: Host) -> None:
    host.define("web", "<serial type='pty'/>")
    host.kvik("start", "web")
    host.kvik("create", host.document("t", machine_xml("transient")))
    reboot(host)
    connection = host.start()
    assert [domain.name for domain in connection.domains()] == ["web"]
    assert host.reason("web") == "shut off (unknown)"
    assert "rebooted" in host.log("web")
    host.check_consistent()
    host.kvik("start", "web")


def test_machines_start_once_per_boot(host: Host) -> None:
    for name in ("web", "db"):
        host.define(name)
    host.kvik("autostart", "web")
    host.kvik("start", "db")
    host.restart()
    assert host.state("web") == "shut off"  # the same boot
    reboot(host)
    host.start()
    eventually(lambda: host.state("web") == "running", "it starts with the host")
    assert host.state("db") == "shut off"
    eventually(lambda: boot_id() in (host.paths.run / "autostarted").read_text(), "the boot is noted")
    host.kvik("destroy", "web")
    host.restart()
    assert host.state("web") == "shut off"


def test_an_autostart_that_fails_keeps_nobody_else(host: Host) -> None:
    host.define("broken", "<disk type='file' device='disk'><source file='/no/such'/><target dev='vda'/></disk>")
    host.define("web")
    for name in ("broken", "web"):
        host.kvik("autostart", name)
    reboot(host)
    host.start()
    eventually(lambda: host.state("web") == "running", "it starts with the host")
    assert "'broken' was not started automatically: disk vda of machine 'broken': /no/such" in host.messages()


def test_somebody_elses_process_is_left_alone(host: Host) -> None:
    """Another process has the pid, in the same boot or another, even with the same start time."""
    bystander = host.spawn("sleep", "600")
    host.define("web")
    for boot, start_time in ((OTHER_BOOT, "its own"), (OTHER_BOOT, "the old"), (boot_id(), "the old")):
        host.kvik("start", "web")
        status = host.status("web")
        old = int(status.attrib["pid"])
        old_start = status.attrib["pid-start"]
        host.kill_daemon()
        os.kill(old, signal.SIGKILL)
        eventually(lambda pid=old: not alive(pid), "death of the machine")
        path = host.paths.status / "web.xml"
        text = path.read_text().replace(str(old), str(bystander)).replace(boot_id(), boot)
        if start_time == "its own":
            stat = read_stat(bystander)
            assert stat
            text = text.replace(old_start, str(stat.start_time))
        path.write_text(text)
        host.start()
        assert host.state("web") == "shut off", (boot, start_time)
        assert alive(bystander)
        assert "web.xml" not in " ".join(os.listdir(host.paths.status))
        host.kvik("destroy", "web", fails="not running")
        assert alive(bystander)
    os.kill(bystander, signal.SIGKILL)


def test_a_status_file_that_is_damaged(host: Host) -> None:
    """Its machine's process cannot be known any more from it; the others are found again."""
    for name in ("web", "db"):
        host.define(name)
        host.kvik("start", name)
    pid, other = host.pid("web"), host.pid("db")
    host.kill_daemon()
    path = host.paths.status / "web.xml"
    path.write_bytes(path.read_bytes()[:200])
    host.start()
    assert host.pid("db") == other and host.state("db") == "running"
    assert "web.xml was set aside" in host.messages()
    # Without its status nobody could ever end it: it is not left running unowned.
    eventually(lambda: not alive(pid), "its process is ended")
    assert host.state("web") == "shut off"
    for aside in host.paths.status.glob("*.corrupt-*"):
        aside.unlink()
    host.kvik("start", "web")
