"""`kvik run` and `exec`: documents, disks, networks, names, stages, the end of `--rm`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from kvik.cli import run_document as doc
from kvik.cli.run_stages import follow
from kvik.client.domain import DomainState, ExecResult, Readiness, Stage
from kvik.client.network import NetworkFacts
from kvik.conf.domain import parse_domain
from kvik.errors import (
    AgentError,
    AlreadyExists,
    InvalidArgument,
    MissingPackages,
    NoNetwork,
    NotFound,
    OperationFailed,
    OperationInvalid,
    OperationTimeout,
)
from kvik.hypervisor.kvik import support
from kvik.paths import Paths

QCOW2 = b"QFI\xfb" + bytes(60)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A host without KVM, with QEMU and with the tiny image made."""
    verdict = SimpleNamespace(usable=False, reason="/dev/kvm is absent")
    image = SimpleNamespace(kernel=tmp_path / "vmlinuz", initrd=tmp_path / "initramfs")
    paths = Paths.system(tmp_path / "root")
    host = SimpleNamespace(verdict=verdict, image=image, paths=paths, packages=[])
    monkeypatch.setattr("kvik.cli.run.acceleration", lambda paths: host.verdict)
    monkeypatch.setattr("kvik.cli.run.local_paths", lambda ctx: paths)
    monkeypatch.setattr("kvik.cli.run.ensure_packages", lambda ctx, progress, **how: host.packages.append(how))
    monkeypatch.setattr("kvik.guest.tiny.tiny", lambda paths, progress=None: image)
    monkeypatch.setattr("kvik.cli.run_stages.POLL", 0.001)
    monkeypatch.setattr("kvik.cli.run_stages.STATE_EVERY", 0.001)
    return host


def document(kvik: Any, verb: str = "define") -> ElementTree.Element:
    return ElementTree.fromstring(kvik.connection.made(verb)[-1][1])


def test_the_tiny_machine_with_no_option_at_all(kvik: Any, host: Any) -> None:
    kvik.connection.replies["define"] = kvik.connection.running
    kvik.connection.replies["domains"] = []
    assert kvik("run") == 0, kvik.err
    assert kvik.out == "tiny-1 is ready after 1.25 s (emulation, address 10.0.2.15)\n"
    assert "Acceleration: software emulation, because /dev/kvm is absent ('kvik doctor' says more).\n" in kvik.err
    assert "tiny-1: started after 0.05 s\ntiny-1: ready after 1.25 s (agent answers)\n" in kvik.err
    root = document(kvik)
    assert root.get("type") == "qemu"
    assert root.findtext("name") == "tiny-1"
    assert root.findtext("memory") == str(256 << 10)
    assert root.findtext("os/kernel") == str(host.image.kernel)
    assert "console=ttyS0" in (root.findtext("os/cmdline") or "")
    assert "kvik.hostname=tiny-1" in (root.findtext("os/cmdline") or "")
    assert root.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"
    assert root.find("devices/interface").get("type") == "user"
    assert root.find("devices/serial/log").get("file").endswith("tiny-1-serial.log")
    assert root.find("devices/graphics") is None


def test_it_is_put_on_the_network_default_where_that_is_active(kvik: Any, host: Any) -> None:
    kvik.connection.replies["network_facts"] = [NetworkFacts("default", "", True, True, True)]
    assert kvik("run", "--detach") == 0, kvik.err
    assert document(kvik).find("devices/interface/source").get("network") == "default"
    assert kvik("run", "--detach", "--network", "user") == 0, kvik.err
    assert document(kvik).find("devices/interface").get("type") == "user"
    kvik.connection.replies["network_facts"] = OperationFailed("this daemon has no networks")
    assert kvik("run", "--detach") == 0, kvik.err
    assert document(kvik).find("devices/interface").get("type") == "user"


def test_under_kvm_it_says_so(kvik: Any, host: Any) -> None:
    host.verdict = SimpleNamespace(usable=True, reason="a loop ran at 0.3 ns an instruction")
    assert kvik("run", "--detach") == 0
    assert "Acceleration: a loop ran at" in kvik.err
    assert document(kvik).get("type") == "kvm"
    assert document(kvik).find("cpu").get("mode") == "host-passthrough"


def test_on_kvik_vmm_the_document_names_it_and_qemu_is_not_needed(
    kvik: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.verdict = SimpleNamespace(usable=True, reason="a loop ran at 0.3 ns an instruction")
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr("kvik.cli.run.ensure_passt", lambda ctx, progress, **how: asked.append(how))
    assert kvik("run", "--vmm", "kvik", "--detach") == 0, kvik.err
    root = document(kvik)
    assert root.findtext("devices/emulator") == "kvik-vmm"
    assert root.find("os/type").get("machine") == "kvik"
    assert root.get("type") == "kvm" and root.find("devices/graphics") is None
    assert host.packages == [] and asked == [{"yes": False}]
    assert kvik("run", "--vmm", "kvik", "--detach", "--network", "none") == 0, kvik.err
    assert len(asked) == 1


def test_a_qcow2_disk_is_no_hindrance_on_kvik_vmm(kvik: Any, host: Any, tmp_path: Path) -> None:
    host.verdict = SimpleNamespace(usable=True, reason="fine")
    (tmp_path / "k").write_bytes(b"x" * 600)
    (tmp_path / "data.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(512))
    words = ["--kernel", str(tmp_path / "k"), "--disk", str(tmp_path / "data.qcow2"), "--network", "none"]
    assert kvik("run", "--vmm", "kvik", "--detach", *words) == 0, kvik.err
    root = document(kvik)
    assert root.find("devices/disk/driver").get("type") == "qcow2"
    support.check(parse_domain(ElementTree.tostring(root, "unicode")))


@pytest.mark.parametrize("vmm", ["qemu", "kvik"])
def test_the_tiny_machine_may_have_disks(kvik: Any, host: Any, tmp_path: Path, vmm: str) -> None:
    host.verdict = SimpleNamespace(usable=True, reason="fine")
    (tmp_path / "data.qcow2").write_bytes(QCOW2)
    words = ["--image", "tiny", "--disk", str(tmp_path / "data.qcow2"), "--network", "none"]
    assert kvik("run", "--vmm", vmm, "--detach", *words) == 0, kvik.err
    root = document(kvik)
    assert root.findtext("name", "").startswith("tiny-")
    assert root.findtext("os/kernel") and root.find("os/boot") is None
    assert root.find("os").get("firmware") is None  # type: ignore[union-attr]
    assert root.find("devices/disk/target").get("dev") == "vda"  # type: ignore[union-attr]


def test_what_kvik_vmm_cannot_do_is_said_before_anything_is_made(kvik: Any, host: Any, tmp_path: Path) -> None:
    (tmp_path / "debian.raw").write_bytes(bytes(512))
    assert kvik("run", "--vmm", "kvik") != 0
    assert "kvik-vmm needs KVM" in kvik.err and "/dev/kvm is absent" in kvik.err and "QEMU" in kvik.err
    host.verdict = SimpleNamespace(usable=True, reason="fine")
    assert kvik("run", "--vmm", "kvik", "--firmware", "bios", str(tmp_path / "debian.raw")) != 0
    assert "no BIOS" in kvik.err and "UEFI" in kvik.err
    assert kvik("run", "--vmm", "xen") != 0
    assert "one of: qemu, kvik" in kvik.err
    assert kvik.connection.made("define") == [] and host.packages == []


def test_every_option_reaches_the_document(kvik: Any, host: Any, tmp_path: Path) -> None:
    for name in ("k", "i", "c.iso"):
        (tmp_path / name).write_bytes(b"x" * 600)
    (tmp_path / "d.qcow2").write_bytes(QCOW2)
    code = kvik(
        "run", "--name", "n1", "--memory", "1GiB", "--vcpus", "3", "--cpu", "Nehalem", "--machine", "pc",
        "--firmware", "uefi", "--network", "none", "--kernel", str(tmp_path / "k"), "--initrd", str(tmp_path / "i"),
        "--append", "a=<b> 'c'", "--disk", f"path={tmp_path}/d.qcow2,bus=scsi,readonly", "--disk", str(tmp_path / "k"),
        "--cdrom", str(tmp_path / "c.iso"), "--yes", "--detach",
    )  # fmt: skip
    assert code == 0, kvik.err
    root = document(kvik)
    assert root.findtext("name") == "n1"
    assert (root.findtext("memory"), root.findtext("vcpu")) == (str(1 << 20), "3")
    assert root.findtext("cpu/model") == "Nehalem"
    assert root.find("os").get("firmware") == "efi"
    assert root.find("os/type").get("machine") == "pc"
    assert root.findtext("os/cmdline") == "a=<b> 'c'"
    assert root.findtext("os/initrd") == str(tmp_path / "i")
    assert root.find("devices/interface") is None
    disks = root.findall("devices/disk")
    assert [disk.find("target").get("dev") for disk in disks] == ["sda", "vda", "sdb"]
    assert [disk.find("driver").get("type") for disk in disks] == ["qcow2", "raw", "raw"]
    assert disks[0].find("readonly") is not None
    assert disks[2].get("device") == "cdrom"
    assert host.packages == [{"uefi": True, "yes": True}]
    assert f"disk {tmp_path}/d.qcow2: qcow2, by its name and header" in kvik.err


def test_an_image_by_position_is_a_disk_with_a_screen(kvik: Any, host: Any, tmp_path: Path) -> None:
    (tmp_path / "debian-12.raw").write_bytes(bytes(512))
    assert kvik("run", "--image", str(tmp_path / "debian-12.raw")) == 0, kvik.err
    root = document(kvik)
    assert root.findtext("name") == "debian-12-1"
    assert root.find("os/boot").get("dev") == "hd"
    assert root.find("devices/graphics").get("listen") == "127.0.0.1"
    assert "is running" in kvik.out


def test_a_command_runs_and_its_code_is_ours_and_the_machine_goes(kvik: Any, host: Any) -> None:
    assert kvik("run", "--rm", "--", "uname", "-a") == 3
    assert kvik.out == "out\n"
    assert kvik.err.endswith("err\n")
    assert kvik.connection.made("exec") == [("exec", "tiny-1", ["uname", "-a"], b"", None)]
    # Transient and tied to the connection, so that even SIGKILL leaves nothing.
    assert kvik.connection.made("create")[0][2] == 2
    assert kvik.connection.made("destroy") == [("destroy", "tiny-1")]
    assert not kvik.connection.made("define")


def test_standard_input_goes_to_the_command_only_when_asked(kvik: Any, host: Any) -> None:
    kvik("run", "--rm", "--interactive", "--timeout", "9", "--", "cat", stdin="data")
    assert kvik.connection.made("exec")[0][3:] == (b"data", 9.0)


def test_rm_removes_on_errors_and_on_ctrl_c(kvik: Any, host: Any) -> None:
    kvik.connection.replies["exec"] = OperationFailed("agent gone")
    assert kvik("run", "--rm", "--", "x") == 125
    assert kvik.connection.made("destroy")
    kvik.connection.calls.clear()
    kvik.connection.replies["exec"] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        kvik("run", "--rm", "--", "x")
    assert kvik.connection.made("destroy")
    kvik.connection.calls.clear()
    kvik.connection.replies["stages"] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        kvik("run", "--rm", "--", "x")
    assert kvik.connection.made("destroy")


def test_a_detached_machine_with_rm_outlives_the_command(kvik: Any, host: Any) -> None:
    assert kvik("run", "--rm", "--detach") == 0
    assert kvik.connection.made("create")[0][2] == 0
    assert not kvik.connection.made("destroy")


def test_a_stall_names_its_stage_and_keeps_the_machine(kvik: Any, host: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(
        False, [Stage("booted", 1.0, 1, ""), Stage("address", 0.0, 2, "no answer from DHCP")]
    )
    assert kvik("run") == 1
    assert "stalled before 'address'" in kvik.err
    assert "no answer from DHCP" in kvik.err
    assert "web was kept" in kvik.err
    assert not kvik.connection.made("destroy")
    assert kvik("run", "--rm") == 1
    assert "tiny-1 was removed" in kvik.err


def test_a_timeout_names_the_stage(kvik: Any, host: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(False, [Stage("booted", 0.0, 0, "")])
    assert kvik("run", "--timeout", "0.05") == 1
    assert "stalled before 'booted'" in kvik.err


def test_a_machine_that_ends_is_not_waited_for(kvik: Any, host: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(False, [Stage("booted", 0.0, 0, "")])
    kvik.connection.replies["state"] = DomainState(5, 3)
    log = host.paths.domain_logs / "tiny-2-serial.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"Kernel panic\x1b[2J\r\n")
    assert kvik("run") == 1
    assert "ended before it was booted: shut off, crashed" in kvik.err
    assert "  Kernel panic\\x1b[2J\n" in kvik.err


def test_names_are_counted_and_a_race_is_lost_gracefully(kvik: Any, host: Any) -> None:
    outcomes = [AlreadyExists("taken"), kvik.connection.off]
    taken = [kvik.connection.running]

    def define(xml: str, flags: int = 0) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            taken.append(SimpleNamespace(name="tiny-2"))
            raise outcome
        return outcome

    kvik.connection.replies["define"] = define
    kvik.connection.replies["domains"] = lambda flags=0: taken
    assert kvik("run", "-d") == 0
    names = [ElementTree.fromstring(call[1]).findtext("name") for call in kvik.connection.made("define")]
    assert names == ["tiny-2", "tiny-3"]
    outcomes[:] = [AlreadyExists("taken")]
    assert kvik("run", "--name", "web") == 1
    assert "taken" in kvik.err


def test_a_definition_that_cannot_start_is_not_left(kvik: Any, host: Any) -> None:
    kvik.connection.replies["start"] = OperationFailed("QEMU said no")
    assert kvik("run") == 1
    assert kvik.connection.made("undefine")
    assert "error: Failed to start 'tiny-2'\nerror: QEMU said no\n" in kvik.err


def test_missing_packages_end_with_77(kvik: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ensure(*args: Any, **kwargs: Any) -> None:
        raise MissingPackages("QEMU is missing", packages=("qemu-system-x86",), command="sudo apt-get install x")

    monkeypatch.setattr("kvik.cli.run.ensure_packages", ensure)
    assert kvik("run") == 77
    assert "hint: run: sudo apt-get install x" in kvik.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--initrd", "x"], "--initrd needs --kernel"),
        (["--image", "tiny", "--kernel", "x"], "--image tiny brings its own kernel"),
        (["nosuch"], "there is no image 'nosuch'"),
        (["--kernel", "/nonexistent"], "No such file or directory"),
        (["--disk", "/nonexistent"], "give the path of an existing disk image"),
        (["--memory", "0"], "at least one vCPU"),
        (["--vcpus", "-1"], "at least one vCPU"),
        (["--vcpus", "0"], "at least one vCPU"),
        (["--name", "tiny-1"], "there is a machine 'tiny-1' already"),
        (["uname"], "kvik run --rm -- uname"),
        (["--firmware", "coreboot"], "one of: bios, uefi"),
        (["--network", "nosuchbridge"], "there is no network or bridge 'nosuchbridge'"),
        (["--allow", "example.org"], "--allow needs an interface whose packets this host sees"),
        (["--allow", "example.org", "--network", "none"], "--allow needs an interface"),
        (["--console", "--detach"], "--console does not go with --detach"),
        (["--detach", "--", "x"], "kvik exec NAME"),
        (["--timeout", "soon"], "invalid value of --timeout"),
        (["--disk", "size=1"], "unknown 'size'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    kvik: Any, host: Any, words: list[str], message: str
) -> None:
    assert kvik("run", *words) == (125 if "--" in words else 1)
    assert message in kvik.err
    assert not host.packages
    assert not kvik.connection.made("define")


def test_ready_as_json(kvik: Any, host: Any) -> None:
    kvik.connection.replies["define"] = kvik.connection.running
    assert kvik("--json", "run") == 0
    facts = json.loads(kvik.out)
    assert (facts["ready"], facts["acceleration"], facts["address"]) == (True, "emulation", "10.0.2.15")
    assert facts["stages"][1]["name"] == "ready"
    assert {stage["state"] for stage in facts["stages"]} == {"done"}


# disks


def test_the_format_of_a_disk_is_never_guessed(tmp_path: Path) -> None:
    def image(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    assert doc.disk_format(image("a.qcow2", QCOW2), None)[0] == "qcow2"
    assert doc.disk_format(image("a.raw", bytes(512)), None)[0] == "raw"
    assert doc.disk_format(image("a.img", bytes(512)), None)[0] == "raw"
    assert doc.disk_format(image("b.img", QCOW2), "qcow2")[0] == "qcow2"
    assert doc.disk_format(image("b.img", QCOW2), "raw")[0] == "raw"
    with pytest.raises(InvalidArgument, match="begins like a qcow2 image") as error:
        doc.disk_format(image("b.raw", QCOW2), None)
    assert "format=qcow2" in error.value.remedy
    with pytest.raises(InvalidArgument, match="no qcow2 header"):
        doc.disk_format(image("c.qcow2", bytes(512)), None)
    with pytest.raises(InvalidArgument, match="is no qcow2 image"):
        doc.disk_format(image("c.img", bytes(512)), "qcow2")
    with pytest.raises(InvalidArgument, match="is a vmdk image") as error:
        doc.disk_format(image("d", b"KDMV" + bytes(60)), None)
    assert "qemu-img convert -f vmdk" in error.value.remedy


def test_paths_are_absolute_and_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.raw").write_bytes(b"")
    assert doc.disk("x.raw").path == str(tmp_path / "x.raw")
    with pytest.raises(InvalidArgument, match="neither a file nor a block device"):
        doc.existing(str(tmp_path), "disk image")
    with pytest.raises(NotFound):
        doc.existing("nothing", "kernel")


def test_target_names_go_on_after_z() -> None:
    assert [doc.target_name("vd", n) for n in (0, 25, 26, 701, 702)] == ["vda", "vdz", "vdaa", "vdzz", "vdaaa"]


def test_networks(tmp_path: Path) -> None:
    (tmp_path / "br0/bridge").mkdir(parents=True)
    (tmp_path / "eth0").mkdir()
    sys, networks = str(tmp_path), {"lan": True, "off": False}
    assert doc.network_xml("none", networks, sys) == ""
    assert "type='user'" in doc.network_xml("user", networks, sys)
    assert "<source bridge='br0'/>" in doc.network_xml("br0", networks, sys)
    assert "<source bridge='br0'/>" in doc.network_xml("bridge=br0", networks, sys)
    for name in ("lan", "network=lan"):
        assert "<source network='lan'/>" in doc.network_xml(name, networks, sys)
    for wrong in ("eth0", "default", "bridge=", "../br0", ".", "bridge=lan", "network=br0"):
        with pytest.raises(NoNetwork) as error:
            doc.network_xml(wrong, networks, sys)
        assert "networks here: lan, off; bridges here: br0" in error.value.remedy
    with pytest.raises(OperationInvalid) as inactive:
        doc.network_xml("off", networks, sys)
    assert inactive.value.remedy == "start it: kvik net-start off"


def test_without_a_word_it_is_the_network_default_where_that_is_active() -> None:
    assert "<source network='default'/>" in doc.network_xml(None, {"lan": True, "default": True})
    assert "type='user'" in doc.network_xml(None, {"lan": True, "default": False})
    assert "type='user'" in doc.network_xml(None, {})


def test_an_allow_list_becomes_a_filter_of_the_interface() -> None:
    network = "    <interface type='bridge'>\n      <source bridge='br0'/>\n    </interface>\n"
    assert doc.allow_names(network, []) == network
    interface = ElementTree.fromstring(doc.allow_names(network, ["example.org", "example.net'/>"]))
    reference = interface.find("filterref")
    assert reference is not None and reference.get("filter") == "allow-names"
    found = [(one.get("name"), one.get("value")) for one in reference]
    assert found == [("ALLOW", "example.org"), ("ALLOW", "example.net'/>")], "as text; the daemon checks names"


def test_what_the_user_writes_cannot_add_elements() -> None:
    machine = doc.Machine("a<b>&'\"", accelerated=False)
    machine.kernel = "/k'><x/>"
    root = ElementTree.fromstring(doc.domain_xml(machine))
    assert root.findtext("name") == "a<b>&'\""
    assert root.findtext("os/kernel") == "/k'><x/>"


# stages


class Progress:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def transient(self, text: str) -> None:
        pass


def test_each_stage_is_shown_once_as_it_ends(kvik: Any) -> None:
    answers = [
        Readiness(False, [Stage("started", 0.1, 1, ""), Stage("booted", 0.0, 0, "")]),
        Readiness(False, [Stage("started", 0.1, 1, ""), Stage("booted", 0.9, 1, ""), Stage("agent", 0.0, 0, "")]),
        Readiness(True, [Stage("started", 0.1, 1, ""), Stage("booted", 0.9, 1, ""), Stage("agent", 1.2, 1, "")]),
    ]
    kvik.connection.replies["stages"] = lambda: answers.pop(0)
    progress = Progress()
    assert follow(kvik.connection.running, progress, 10).ready
    assert [line.split(": ")[1].split(" ")[0] for line in progress.lines] == ["started", "booted", "agent"]


def test_a_later_stage_proves_the_earlier_ones(kvik: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(
        False, [Stage("started", 0.1, 1, ""), Stage("first output", 0.0, 0, ""), Stage("agent", 1.2, 1, "")]
    )
    assert follow(kvik.connection.running, Progress(), 1).ready


def test_a_stage_that_will_not_come_ends_the_waiting(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.cli.run_stages.DIAGNOSE_EVERY", 0.0)
    kvik.connection.replies["stages"] = Readiness(False, [Stage("first output", 0.0, 0, "")])
    kvik.connection.replies["wait_ready"] = Readiness(False, [Stage("first output", 0.0, 4, "the kernel panicked")])
    with pytest.raises(OperationTimeout, match="does not boot: the kernel panicked"):
        follow(kvik.connection.running, Progress(), 60)


def test_at_the_end_of_the_waiting_the_daemon_says_why(kvik: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(False, [Stage("agent", 0.0, 0, "")])
    kvik.connection.replies["wait_ready"] = Readiness(False, [Stage("agent", 0.0, 2, "is it installed?")])
    with pytest.raises(OperationTimeout, match=r"stalled before 'agent': is it installed\?"):
        follow(kvik.connection.running, Progress(), 0.01)


def test_waiting_has_an_end(kvik: Any) -> None:
    kvik.connection.replies["stages"] = Readiness(False, [])
    with pytest.raises(OperationTimeout, match="before its first stage"):
        follow(kvik.connection.running, Progress(), 0.01)


# exec


def test_exec_passes_bytes_on_untouched_and_signals_as_a_shell_does(kvik: Any) -> None:
    kvik.connection.replies["exec"] = ExecResult(0, 9, b"\x1b[31mred", b"", True)
    assert kvik("exec", "tiny-1", "--", "x") == 137
    assert kvik.out == "\x1b[31mred"
    assert "its end is missing" in kvik.err


def test_exec_needs_a_command_and_a_running_machine(kvik: Any) -> None:
    assert kvik("exec", "tiny-1") == 125
    assert "no command to run" in kvik.err
    assert kvik("exec", "web", "--", "x") == 125
    assert "kvik start web" in kvik.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AgentError("'x' cannot be run in the guest: No such file or directory"), 127),
        (AgentError("'x' cannot be run in the guest: Permission denied"), 126),
        (AgentError("the agent is gone"), 125),
        (OperationTimeout("x did not end within 1 s"), 124),
    ],
)
def test_exec_tells_its_own_failures_from_the_commands(kvik: Any, error: Exception, code: int) -> None:
    kvik.connection.replies["exec"] = error
    assert kvik("exec", "tiny-1", "--", "x") == code


def test_the_document_has_a_uuid_so_that_it_never_redefines_a_machine(kvik: Any, host: Any) -> None:
    assert kvik("run") == 0
    assert kvik("run") == 0
    one, two = (re.findall("<uuid>(.*)</uuid>", call[1]) for call in kvik.connection.made("define"))
    assert one
    assert two
    assert one != two


def test_exec_as_json(kvik: Any) -> None:
    assert kvik("--json", "exec", "tiny-1", "--", "x") == 3
    assert json.loads(kvik.out)["stdout"] == "out\n"


def test_progress_on_a_terminal_is_one_line_and_elsewhere_plain(tty: Any) -> None:
    from io import StringIO

    from kvik.cli.progress import Progress as Real

    plain = StringIO()
    with Real(plain) as progress:
        for done in range(0, 101, 10):
            progress.bar("fetching", done << 20, 100 << 20, is_bytes=True)
        progress.transient("never seen")
    assert plain.getvalue() == "fetching (100.0 MiB)\n"
    screen = tty()
    with Real(screen) as progress:
        progress.bar("fetching", 50, 100)
        progress.bar("fetching", 100, 100)
        progress.transient("waiting")
    assert "[##############..............]  50%" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
    assert screen.getvalue().count("\n") == 1


@pytest.mark.parametrize("columns", [30, 50, 60, 80])
def test_a_bar_is_as_long_as_the_terminal_has_room(tty: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    from kvik.cli import term
    from kvik.cli.progress import Progress as Real

    monkeypatch.setattr(term, "columns", lambda stream: columns)
    screen = tty()
    with Real(screen) as progress:
        progress.bar("fetching", 10 << 20, 4 << 30, is_bytes=True)
        progress.bar("fetching", 4 << 30, 4 << 30, is_bytes=True)
    lines = screen.getvalue().replace("\x1b[K", "").replace("\r", "\n").split("\n")
    assert max(len(line) for line in lines) < columns
    if columns > 40:
        assert any(line.endswith("] 100% 4096.0 MiB of 4096.0 MiB") for line in lines)
        assert any(line.endswith("]   0% 10.0 MiB of 4096.0 MiB") for line in lines)


def test_an_images_bar_goes_forward_only_and_makes_room_for_the_answer(tty: Any, tmp_path: Path) -> None:
    from kvik.cli.context import Context
    from kvik.cli.main import run_verb

    source = tmp_path / "a.raw"
    with source.open("wb") as file:
        file.write(b"x" * (3 << 20))  # the hole behind it is told of before its last part
        file.truncate(64 << 20)
    screen = tty()
    context = Context(stdout=screen, stderr=screen, colour=False)
    assert run_verb(context, ["img", "convert", "-p", "-O", "raw", str(source), str(tmp_path / "b.raw")]) == 0
    assert screen.getvalue().endswith("100% 64.0 MiB of 64.0 MiB\n")
    screen.truncate(0)
    assert run_verb(context, ["img", "compare", "-p", str(source), str(tmp_path / "b.raw")]) == 0
    assert screen.getvalue().endswith("100% 64.0 MiB of 64.0 MiB\nImages are identical.\n")
    with (tmp_path / "b.raw").open("r+b") as file:
        file.seek((3 << 20) - 1)
        file.write(b"y")
    screen.truncate(0)
    assert run_verb(context, ["img", "compare", "-p", str(source), str(tmp_path / "b.raw")]) == 1
    assert screen.getvalue().endswith("\r\x1b[KContent mismatch at offset 3145216!\n")
