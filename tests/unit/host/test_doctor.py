"""The doctor: each finding says what, why and the fix."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from kvik.cli import doctor as cli
from kvik.host import doctor, facilities, packages
from kvik.host.doctor import Emulator, Report, Status
from kvik.host.packages import Release
from kvik.host.probe import State, Verdict
from kvik.paths import Paths

QEMU = Emulator("/usr/bin/qemu-system-x86_64", (7, 2, 1), ("tcg", "kvm"))
GOOD = Verdict(True, "KVM works", state=State.GOOD, instruction_ns=0.4)
BAD = Verdict(False, "/dev/kvm does not exist", "modprobe kvm_amd", State.ABSENT)
DEBIAN = Release("debian", "12", "Debian 12")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("proc/1", "sys/fs/cgroup", "etc", "usr/share/seabios", "usr/share/qemu"):
        (root / name).mkdir(parents=True)
    (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n')
    (root / "usr/share/seabios/bios-256k.bin").touch()
    (root / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 4194304 kB\nMemAvailable: 4194304 kB\n")
    (root / "proc/cpuinfo").write_text("vendor_id\t: AuthenticAMD\nmodel name\t: Some EPYC\nflags\t: svm\n")
    return root


def examine(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, verdict: Verdict = GOOD, emulator: Emulator = QEMU
) -> Report:
    monkeypatch.setattr(doctor, "kvm_verdict", lambda *args, **kwargs: verdict)
    return doctor.examine(Paths.system(root), root=root, emulator=emulator)


def test_good_kvm_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(root, monkeypatch)
    assert report.accelerator == "kvm" and report.usable
    assert report.finding("kvm").status is Status.OK
    assert report.finding("accelerator").what == "kvm"
    assert report.finding("extension").what == "SVM"


def test_without_kvm_emulation_is_used_and_the_reason_and_remedy_are_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = examine(root, monkeypatch, verdict=BAD)
    assert report.accelerator == "tcg" and report.usable
    found = report.finding("kvm")
    assert (found.status, found.what, found.why, found.fix) == (Status.WARN, "absent", BAD.reason, BAD.remedy)
    assert "emulation" in report.finding("accelerator").what


def test_a_qemu_without_kvm_is_named_as_the_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(root, monkeypatch, emulator=Emulator("/q", (7, 2, 0), ("tcg",)))
    assert report.accelerator == "tcg"
    assert "without KVM" in report.finding("accelerator").why


@pytest.mark.parametrize(
    ("emulator", "why"),
    [
        (Emulator(), "none of the usual directories"),
        (Emulator("/q", (5, 1, 0), ("tcg", "kvm")), "too old"),
        (Emulator("/q", error="it crashed"), "it crashed"),
        (Emulator("/q", (7, 2, 0), ()), "built in"),
    ],
)
def test_without_a_good_qemu_nothing_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, why: str
) -> None:
    report = examine(root, monkeypatch, emulator=emulator)
    assert report.accelerator == "" and not report.usable
    failed = [finding for finding in report.findings if finding.status is Status.FAIL and finding.group == "qemu"]
    assert why in failed[0].why
    assert "apt-get install --no-install-recommends qemu-system-x86" in failed[0].fix


def test_missing_firmware_names_its_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(root, monkeypatch)
    assert report.finding("seabios").status is Status.OK
    assert report.finding("ovmf").status is Status.WARN and "ovmf" in report.finding("ovmf").fix
    (root / "usr/share/seabios/bios-256k.bin").unlink()
    assert not examine(root, monkeypatch).usable


def test_every_problem_names_a_fix(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.process, "find_program", lambda name: None)
    for name in ("landlock", "userfaultfd", "io_uring", "bridge", "nf_tables"):
        monkeypatch.setattr(facilities, name, lambda: facilities.Facility(0, "the kernel was built without it"))
    for report in (
        examine(root, monkeypatch, verdict=BAD, emulator=Emulator()),
        examine(root, monkeypatch, verdict=BAD, emulator=Emulator("/q", error="x")),
    ):
        problems = [finding for finding in report.findings if finding.status in (Status.WARN, Status.FAIL)]
        assert len(problems) >= 8
        assert [finding.name for finding in problems if not finding.fix] == []
        assert all(finding.what and finding.why for finding in problems)
        names = [finding.name for finding in report.findings]
        assert len(names) == len(set(names))


def test_low_memory_and_a_state_directory_in_the_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 1024 kB\n")
    (root / "etc/kvik").touch()  # a file where the directory belongs
    report = examine(root, monkeypatch)
    assert report.finding("memory").status is Status.WARN
    assert report.finding("directory-config").status is Status.FAIL
    assert not report.usable


def test_cgroup_versions_are_told_apart(root: Path) -> None:
    base = root / "sys/fs/cgroup"
    assert facilities.cgroups(root).version == 0
    (base / "memory").mkdir()
    (base / "memory/cgroup.procs").touch()
    assert facilities.cgroups(root) == facilities.Cgroups(1, ("memory",), False)
    (base / "cgroup.controllers").write_text("cpu memory pids\n")
    assert facilities.cgroups(root) == facilities.Cgroups(2, ("cpu", "memory", "pids"), True)


def test_switched_off_user_namespaces_name_the_sysctl(root: Path) -> None:
    (root / "proc/self/ns").mkdir(parents=True)
    for kind in ("ipc", "mnt", "net", "pid", "user", "uts"):
        (root / "proc/self/ns" / kind).symlink_to(f"{kind}:[1]")
    assert facilities.namespaces(root).value == 6
    (root / "proc/sys/user").mkdir(parents=True)
    (root / "proc/sys/user/max_user_namespaces").write_text("0\n")
    found = facilities.namespaces(root)
    assert not found and "max_user_namespaces" in found.why


def test_facilities_of_this_kernel_leave_no_descriptor_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for probe in (facilities.landlock, facilities.io_uring, facilities.userfaultfd, facilities.bridge):
        found = probe()
        assert found or found.why
    assert facilities.nf_tables() or facilities.nf_tables().why
    assert facilities.seccomp() or facilities.seccomp().why
    assert not facilities.device("/dev/kvik-none") and facilities.device("/dev/null")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def script(path: Path, body: str) -> str:
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def test_the_emulator_is_asked_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = 'case "$1" in --version) echo "QEMU emulator version 8.1.3 (x)"; exit;; esac\n'
    path = script(tmp_path / "good", version + "printf 'Accelerators:\\ntcg\\nkvm\\n'")
    assert doctor.find_emulator(path) == Emulator(path, (8, 1, 3), ("tcg", "kvm"))
    assert "not QEMU's" in doctor.find_emulator(script(tmp_path / "odd", "echo hello")).error
    broken = script(tmp_path / "broken", "echo library missing >&2; exit 127")
    assert "library missing" in doctor.find_emulator(broken).error
    monkeypatch.setattr(doctor, "TOOL_TIMEOUT", 0.2)
    assert "did not finish" in doctor.find_emulator(script(tmp_path / "hangs", "sleep 60")).error


def test_packages_by_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert packages.how_to_install("qemu-img", DEBIAN) == "sudo apt-get install --no-install-recommends qemu-utils"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    both = packages.how_to_install(["nft", "dnsmasq"], DEBIAN)
    assert both == "apt-get install --no-install-recommends dnsmasq-base nftables"
    assert packages.package_for("virtiofsd", DEBIAN) == "qemu-system-common"
    assert packages.package_for("virtiofsd", Release("debian", "13", "")) == "virtiofsd"
    assert "Fedora" in packages.how_to_install("nft", Release("fedora", "40", "Fedora"))
    assert Release("ubuntu", "24.04", "Ubuntu", ("debian",)).debian


# The command


def test_the_table_is_aligned_and_plain_off_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(root, monkeypatch, verdict=BAD)
    out = io.StringIO()
    cli.write(report, out, width=100)
    text = out.getvalue()
    assert "\033" not in text
    assert all(len(line) <= 120 for line in text.replace(str(root), "").splitlines())
    assert "modprobe kvm_amd" in text and BAD.reason in text
    assert text.splitlines()[-1] == "Machines can run here, with tcg (software emulation)."


def test_colour_only_on_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    cli.write(examine(root, monkeypatch), out)
    assert "\033[32mok  \033[0m" in out.getvalue()


@pytest.mark.parametrize(("emulator", "code"), [(QEMU, 0), (Emulator(), 1)])
def test_json_and_exit_code(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    emulator: Emulator,
    code: int,
) -> None:
    report = examine(root, monkeypatch, verdict=BAD, emulator=emulator)
    monkeypatch.setattr(cli, "examine", lambda *args, **kwargs: report)
    assert cli.run(["--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] is (code == 0)
    kvm = next(finding for finding in document["findings"] if finding["name"] == "kvm")
    assert kvm == {
        "group": "acceleration",
        "name": "kvm",
        "status": "warn",
        "what": "absent",
        "why": BAD.reason,
        "fix": BAD.remedy,
    }
    assert cli.run(["--all"]) == code


def test_the_real_host_is_examined_without_an_exception(tmp_path: Path) -> None:
    report = doctor.examine(Paths.system(tmp_path))
    assert {"kvm", "accelerator", "qemu", "landlock", "disk"} <= {finding.name for finding in report.findings}
    assert (tmp_path / "var/cache/kvik/kvm-verdict.json").exists()
