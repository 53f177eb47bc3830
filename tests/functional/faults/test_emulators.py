"""What a machine is made of is missing, taken or broken: the start fails within its deadline, with the cause."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_harness import CLI, Host, alive, disk_xml, eventually, machine_xml

from kvik.image.create import create

QEMU = shutil.which("qemu-system-x86_64") or ""


def nothing_started(host: Host, name: str, before: dict[str, str]) -> None:
    """The machine is off, and its start left no process, file or status behind."""
    assert host.state(name) == "shut off"
    eventually(lambda: host.processes() == [host.daemon], "nothing but the daemon runs")
    assert host.files() == before
    assert "not started" in host.log(name)


# Files ----------------------------------------------------------------------------------------------------------


def test_missing_files(host: Host) -> None:
    host.define("web", disk_xml(host.root / "gone.img"))
    host.define("db", kernel=str(host.root / "vmlinuz"))
    before = host.files()
    host.kvik("start", "web", fails=r"disk vda of machine 'web': \S*/gone.img: No such file or directory")
    host.kvik("start", "db", fails=r"kernel of machine 'db': \S*/vmlinuz: No such file or directory")
    host.kvik("create", host.document("t", machine_xml("t", disk_xml("/no/such.img"))), fails="/no/such.img: No such")
    assert host.files() == before
    assert host.state("web") == host.state("db") == "shut off"
    (host.root / "gone.img").write_bytes(bytes(1 << 20))
    host.kvik("start", "web")


def test_files_of_the_wrong_kind(host: Host) -> None:
    (host.root / "directory").mkdir()
    os.mkfifo(host.root / "fifo")
    (host.root / "loop").symlink_to(host.root / "loop")
    for number, (name, pattern) in enumerate(
        (("directory", "is a directory"), ("loop", "Too many levels of symbolic links"), ("fifo", "fifo"))
    ):
        machine = host.define(f"m{number}", disk_xml(host.root / name))
        before = host.files()
        begun = time.monotonic()
        host.kvik("start", machine, fails=pattern)
        assert time.monotonic() - begun < 10
        assert host.files() == before


def test_images_that_name_what_they_should_not(host: Host) -> None:
    """No image makes the host read a file for it that nobody gave it, or look for one for ever."""
    root = host.root / "images"
    root.mkdir()
    for name, below, kind in (
        ("secret", "/etc/shadow", "raw"),
        ("json", "json:{}", "raw"),
        ("nbd", "nbd://localhost/x", "raw"),
        ("loop", "loop", "qcow2"),
        ("gone", "absent", "qcow2"),
        *((f"deep{number}", f"deep{number + 1}", "qcow2") for number in range(300)),
    ):
        create(str(root / name), "qcow2", 1 << 20, backing_file=below, backing_format=kind)
    create(str(root / "deep300"), "qcow2", 1 << 20)
    create(str(root / "data"), "qcow2", 1 << 20, data_file="/etc/shadow", data_file_raw=True)
    header = (root / "secret").read_bytes()
    (root / "guests.raw").write_bytes(header + bytes((1 << 20) - len(header)))
    for number, (name, pattern) in enumerate(
        (
            ("secret", "sits on /etc/shadow, a file of the host's own.*<backingStore>"),
            ("json", "sits on json:{}, which is no plain file"),
            ("nbd", "which is no plain file"),
            ("loop", "its chain is longer than 200 images"),
            ("deep0", "its chain is longer than 200 images"),
            ("gone", "sits on .*/absent: .*No such file.*bring that image back"),
            ("data", "keeps its data in another file"),
        )
    ):
        machine = host.define(f"m{number}", disk_xml(root / name, format="qcow2"))
        before = host.files()
        host.kvik("start", machine, fails=pattern)
        nothing_started(host, machine, before)
    # What a guest wrote to its raw disk is bytes and nothing else.
    host.define("raw", disk_xml(root / "guests.raw"))
    host.kvik("start", "raw")
    assert "/etc/shadow" not in _files_of(host.pid("raw"))


def test_a_raw_base_is_followed_only_where_people_said_so(host: Host) -> None:
    """Anything is a raw disk: a header that came from elsewhere could name any file for a guest to read."""
    images, theirs = host.root / "images", host.root / "theirs"
    images.mkdir()
    theirs.mkdir()
    (theirs / "key").write_bytes(bytes(1 << 20))
    (images / "link").symlink_to(theirs / "key")
    key = str(theirs / "key")
    create(str(images / "elsewhere"), "qcow2", 1 << 20, backing_file=key, backing_format="raw")
    create(str(images / "linked"), "qcow2", 1 << 20, backing_file="link", backing_format="raw")
    create(str(images / "middle"), "qcow2", 1 << 20, backing_file="elsewhere", backing_format="qcow2")
    refused = f"sits on {key}, which is in no storage pool and not beside it.*<backingStore>.*{theirs}.*pool-define-as"
    for name in ("elsewhere", "linked", "middle"):
        machine = host.define(name, disk_xml(images / name, format="qcow2"))
        before = host.files()
        host.kvik("start", machine, fails=refused)
        nothing_started(host, machine, before)
    host.define("web", disk_xml(host.image("web.img")))
    host.kvik("start", "web")
    device = host.document("vdb", disk_xml(images / "middle", "vdb", format="qcow2"))
    host.kvik("attach-device", "web", device, "--live", fails=refused)
    # Who names it has it.
    named = f"<backingStore type='file'><format type='raw'/><source file='{key}'/><backingStore/></backingStore>"
    host.define("named", disk_xml(images / "elsewhere", extra=named, format="qcow2"))
    host.kvik("start", "named")
    host.kvik("destroy", "named")
    # So has who said of its directory that images are there.
    host.kvik("pool-define-as", "bases", "dir", "--target", str(theirs))
    host.kvik("attach-device", "web", device, "--live")
    host.kvik("start", "linked")
    host.kvik("destroy", "linked")
    host.kvik("pool-undefine", "bases")
    host.kvik("start", "linked", fails=refused)


def test_what_a_snapshot_or_copy_elsewhere_rests_on_is_named_for_the_next_start(host: Host) -> None:
    elsewhere = host.root / "elsewhere"
    elsewhere.mkdir()
    for name in ("off", "on", "copied"):
        host.define(name, disk_xml(host.image(f"{name}.img")))
    new = ("--disk-only", "--no-metadata", "--diskspec")
    host.kvik("snapshot-create-as", "off", "s", *new, f"vda,file={elsewhere}/off")
    host.kvik("start", "on")
    host.kvik("snapshot-create-as", "on", "s", *new, f"vda,file={elsewhere}/on")
    host.kvik("start", "copied")
    host.kvik("snapshot-create-as", "copied", "s", *new, f"vda,file={host.root}/top")
    host.kvik("blockcopy", "copied", "vda", f"{elsewhere}/copied", "--shallow", "--wait", "--pivot")
    for name in ("on", "copied"):
        host.kvik("destroy", name)
    for name in ("off", "on", "copied"):
        host.kvik("start", name)
        assert f"{elsewhere}/{name}" in host.kvik("domblklist", name)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to run a daemon as somebody else"
)
def test_unreadable_files(tmp_path: Path) -> None:
    """Root may read all; so this daemon is somebody else's."""
    nobody = 65534
    host = Host()
    try:
        os.chown(host.root, nobody, nobody)
        image = host.image("secret.img")
        image.chmod(0o600)
        readable = host.image("readonly.img")
        readable.chmod(0o644)
        host.output.touch()
        wrapper = ("setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", "--")
        host.start(wrapper=wrapper)
        host.define("web", disk_xml(image))
        host.define("db", disk_xml(readable))
        before = host.files()
        host.kvik(
            "start",
            "web",
            fails=r"disk vda of machine 'web': \S*/secret.img cannot be read and written: permission denied",
        )
        host.kvik("start", "db", fails=r"readonly.img cannot be read and written: permission denied")
        assert host.files() == before
    finally:
        host.end()


def test_a_disk_that_another_machine_uses(host: Host) -> None:
    image = host.image("shared.img")
    alias = host.root / "alias.img"
    alias.symlink_to(image)
    host.define("web", disk_xml(image))
    host.define("db", disk_xml(alias))
    host.define("ro", disk_xml(image, extra="<readonly/>"))
    host.kvik("start", "web")
    pid = host.pid("web")
    for name in ("db", "ro"):
        host.kvik("start", name, fails=r"\.img is in use by machine 'web'.*shut that machine down")
        assert host.state(name) == "shut off"
    host.define("third")
    host.kvik("start", "third")
    path = host.document("disk", disk_xml(image, "vdb"))
    host.kvik("attach-device", "third", path, "--live", fails="in use by machine 'web'")
    assert host.pid("web") == pid
    # Also after the daemon came back: what runs is known again before anything is started.
    host.restart()
    host.kvik("start", "db", fails="in use by machine 'web'")
    host.kvik("destroy", "web")
    host.kvik("start", "db")


def test_a_disk_that_a_foreign_qemu_holds(host: Host) -> None:
    """No machine of ours: QEMU finds out, and its words reach the user."""
    image = host.image("taken.img")
    foreign = subprocess.Popen(
        [QEMU, "-nodefaults", "-display", "none", "-S", "-drive", f"file={image},format=raw,if=ide"],
        stdin=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: str(image) in " ".join(_files_of(foreign.pid)), "the foreign QEMU has opened it")
        host.define("web", disk_xml(image))
        host.define("db")
        before = host.files()
        # Until its lock is taken, a moment after it was opened.
        time.sleep(0.3)
        host.kvik("start", "web", fails=r"lock.*another (machine|process|program)")
        nothing_started(host, "web", before)
        host.kvik("start", "db")
        path = host.document("disk", disk_xml(image, "vdb"))
        host.kvik("attach-device", "db", path, "--live", fails="taken.img.*lock")
        assert "taken.img" not in host.kvik("domblklist", "db")
        assert alive(foreign.pid)
    finally:
        foreign.kill()
        foreign.wait()
    host.kvik("start", "web")


def _files_of(pid: int) -> Iterator[str]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(fd)
        except OSError:
            continue


# Emulators ------------------------------------------------------------------------------------------------------


def script(host: Host, text: str, name: str = "emulator") -> str:
    path = host.root / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_an_emulator_that_is_missing(host: Host) -> None:
    missing = str(host.root / "qemu-none")
    path = host.document("web", machine_xml("web", emulator=missing))
    host.kvik("define", path, fails=r"qemu-none.*(No such file|not found|does not exist|no such)")
    not_executable = host.image("qemu-data")
    path = host.document("web", machine_xml("web", emulator=str(not_executable)))
    host.kvik("define", path, fails=r"qemu-data.*(not executable|[Pp]ermission denied)")
    # It was there when the machine was defined.
    copy = host.root / "qemu-copy"
    copy.symlink_to(QEMU)
    host.define("web", emulator=str(copy))
    before = host.files()
    copy.unlink()
    host.kvik("start", "web", fails=r"qemu-copy.*(No such file|not found|does not exist|no such)")
    assert host.state("web") == "shut off"
    assert host.files() == before


def test_no_emulator_at_all(private_host: Host) -> None:
    """Its name is looked for where programs are: a daemon that finds none says what to install."""
    for name in ("qemu-system-x86_64", "kvm", "qemu-kvm"):
        if (found := shutil.which(name)) is not None:
            private_host.enter("mount", "--bind", "/dev/null", os.path.realpath(found))
    private_host.start()
    xml = private_host.document("web", machine_xml("web"))
    private_host.kvik("define", xml, fails="no QEMU for x86_64 is installed.*apt install qemu-system-x86")
    assert private_host.connection.domains() == []


FAKE = '''#!%(python)s
"""Is QEMU when it is asked what it can do, and something else when it is to run a machine."""
import json, os, socket, sys, time

arguments = sys.argv[1:]
if "none,accel=tcg" in arguments:
    os.execv(%(qemu)r, [%(qemu)r, *arguments])


def monitor():
    """The socket that is to speak QMP: given as a descriptor, or to be listened on."""
    for word in arguments:
        if not word.startswith(("socket,", "unix:")) or "monitor" not in word and "mon" not in word:
            continue
        options = dict(item.partition("=")[::2] for item in word.split(","))
        if "fd" in options:
            sock = socket.socket(fileno=int(options["fd"]))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(options["path"])
            sock.listen(1)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock, _ = sock.accept()
        return sock
    raise SystemExit("no monitor among " + repr(arguments))


GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
'''


def fake(host: Host, body: str, name: str = "emulator") -> str:
    return script(host, FAKE % {"python": sys.executable, "qemu": QEMU} + body, name)


OLD = """#!%(python)s
import json, socket, sys
words = [word for word in sys.argv if word.startswith("socket,")]
options = dict(item.partition("=")[::2] for item in words[0].split(","))
sock = socket.socket(fileno=int(options["fd"]))
stream = sock.makefile("rwb")
def say(value):
    stream.write(json.dumps(value).encode() + b"\\r\\n")
    stream.flush()
say({"QMP": {"version": {"qemu": {"major": 2, "minor": 11, "micro": 1}, "package": ""}, "capabilities": []}})
for line in stream:
    command = json.loads(line)
    answers = {"query-kvm": {"present": False}, "query-target": {"arch": "x86_64"}, "qmp_capabilities": {}}
    say({"return": answers.get(command["execute"], []), **({"id": command["id"]} if "id" in command else {})})
"""


def test_an_emulator_that_is_too_old(host: Host) -> None:
    emulator = script(host, OLD % {"python": sys.executable})
    xml = host.document("web", machine_xml("web", emulator=emulator))
    host.kvik("define", xml, fails=r"emulator is QEMU 2\.11\.1, which is too old.*install QEMU \d+\.\d+ or newer")
    assert host.connection.domains() == []
    assert host.processes() == [host.daemon]


def test_a_program_that_is_no_emulator(host: Host) -> None:
    emulator = script(host, "#!/bin/sh\necho 'usage: tool FILE' >&2\nexit 3\n")
    xml = host.document("web", machine_xml("web", emulator=emulator))
    host.kvik("define", xml, fails=r"cannot learn what \S*/emulator can do.*usage: tool FILE")
    bare = host.image("bare")
    bare.write_bytes(b"\x7fELF nonsense")
    bare.chmod(0o755)
    host.kvik("define", host.document("web", machine_xml("web", emulator=str(bare))), fails=r"bare.*Exec format error")
    assert host.processes() == [host.daemon]


@pytest.mark.parametrize("sleep", [True, False], ids=["hangs", "QEMU itself"])
def test_the_daemon_is_killed_while_an_emulator_is_asked(host: Host, sleep: bool) -> None:
    """Nobody would ever ask it again: the next daemon ends it."""
    text = "#!/bin/sh\nexec sleep 600\n" if sleep else f'#!/bin/sh\nexec {QEMU} "$@"\n'
    path = host.document("web", machine_xml("web", emulator=script(host, text)))
    client = host.spawn(*CLI, "-c", host.uri, "define", path)
    eventually(lambda: len(host.processes()) == 3, "the emulator is asked")
    host.kill_daemon()
    assert host.exit_code(client) == 1
    host.start()
    eventually(lambda: host.processes() == [host.daemon], "it is ended")


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        (
            'sys.stderr.write("the gears are worn\\n"); sys.exit(5)',
            r"ended while machine web was starting.*5.*the gears are worn",
        ),
        ("os.kill(os.getpid(), 11)", r"ended while machine web was starting.*(SIGSEGV|11)"),
        ("sys.exit(0)", r"ended while machine web was starting.*said nothing"),
        (
            'sys.stderr.write("x" * 100 + "\\n" * 9 + "y\\n" * 100_000); sys.exit(1)',
            r"ended while machine web was starting.*y",
        ),
        (
            'os.write(2, bytes(range(256)) + b"\\x1b[2Jhuh\\n"); sys.exit(1)',
            r"ended while machine web was starting.*huh",
        ),
    ],
    ids=["complains", "crashes", "silent", "floods", "control characters"],
)
def test_an_emulator_that_dies_at_once(host: Host, body: str, pattern: str) -> None:
    host.define("web", emulator=fake(host, body))
    before = host.files()
    begun = time.monotonic()
    output = host.kvik("start", "web", fails=pattern)

    assert time.monotonic() - begun < 10
    assert len(output) < 10_000
    assert "\x1b" not in output
    nothing_started(host, "web", before)


def test_options_that_qemu_does_not_know(host: Host) -> None:
    xml = machine_xml("web", after="<qemu:commandline><qemu:arg value='-frobnicate'/></qemu:commandline>")
    host.connection.define(xml)
    before = host.files()
    host.kvik("start", "web", fails="QEMU ended while machine web was starting.*-frobnicate: invalid option")
    nothing_started(host, "web", before)
    assert "-frobnicate" in host.log("web")
    host.kvik("create", host.document("t", xml.replace("web", "transient")), fails="-frobnicate: invalid option")
    assert "transient" not in host.kvik("list", "--all")


@pytest.mark.parametrize(
    ("body", "pattern", "seconds"),
    [
        ('monitor().sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n"); time.sleep(600)', "QMP|JSON|monitor", 10),
        ("monitor().sendall(os.urandom(100_000)); time.sleep(600)", "QMP|JSON|monitor", 10),
        ("monitor().sendall(b'{\"QMP\": []}\\r\\n'); time.sleep(600)", "greeting|QMP", 10),
        ('monitor().sendall(b"[" * 100_000 + b"\\r\\n"); time.sleep(600)', "QMP|JSON|nest", 10),
        (
            'sock = monitor()\ntry:\n    while True: sock.sendall(b"x" * (1 << 20))\nexcept OSError: time.sleep(600)',
            "long|large|limit|bytes",
            20,
        ),
        (
            'sock = monitor(); sock.sendall(json.dumps(GREETING).encode() + b"\\r\\n"); sock.recv(1)\n'
            'sock.sendall(b\'{"return": {}, "id": "somebody else"}\\r\\n\' * 5); time.sleep(600)',
            ".",
            40,
        ),
        ("sock = monitor(); sock.close(); time.sleep(600)", "monitor|closed|QMP", 10),
    ],
    ids=["other protocol", "noise", "bad greeting", "deep", "endless line", "wrong replies", "hang-up"],
)
def test_a_monitor_that_talks_nonsense(host: Host, body: str, pattern: str, seconds: float) -> None:
    host.define("web", emulator=fake(host, body))
    before = host.files()
    begun = time.monotonic()
    host.kvik("start", "web", fails=pattern)
    assert time.monotonic() - begun < seconds
    nothing_started(host, "web", before)
    assert int(Path(f"/proc/{host.daemon}/statm").read_text().split()[1]) * 4096 < 300 << 20


def test_a_monitor_that_is_silent(host: Host) -> None:
    """The deadline of a start ends it; nobody else waits meanwhile, and a destroy does not wait for it."""
    host.kill_daemon(signal.SIGTERM)
    host.start(start_deadline=8)
    host.define("web", emulator=fake(host, "sock = monitor(); time.sleep(600)"))
    host.define("db", emulator=fake(host, "sock = monitor(); time.sleep(600)", "other"))
    host.define("good")
    before = host.files()
    silent = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "kvik.cli.main", "-c", host.uri, "start", name],
            env=host.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("web", "db")
    ]
    eventually(lambda: len(host.processes()) == 3, "both emulators run")
    host.kvik("start", "good")
    assert "good" in host.kvik("list")
    host.kvik("destroy", "db")
    assert silent[0].poll() is None, "the others did not wait for this one's deadline"
    _, error = silent[1].communicate(timeout=10)
    assert "destroyed while it was starting" in error
    _, error = silent[0].communicate(timeout=60)
    assert silent[0].returncode == 1 and ("in time" in error or " s" in error), error
    host.kvik("destroy", "good")
    nothing_started(host, "web", before)
    nothing_started(host, "db", before)


def test_a_monitor_that_breaks_off_later(host: Host) -> None:
    """QEMU is stopped from outside its monitor's will: the machine ends as crashed and says so."""
    host.define("web")
    host.kvik("start", "web")
    os.kill(host.pid("web"), signal.SIGABRT)
    eventually(lambda: host.state("web") == "shut off", "the machine is off")
    assert "crashed" in host.reason("web")
    assert "SIGABRT" in host.log("web")
