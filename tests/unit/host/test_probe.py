"""The verdict on /dev/kvm: every path of it, on made-up hosts and on this one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvik.host import kvm_probe
from kvik.host import probe as p
from kvik.host.kvm_probe import FAST, STAGES, fill_memory, guest_code
from kvik.host.probe import DeviceNode, State, Verdict, Virtualization
from kvik.kvm.exits import IoExit

INTEL = Virtualization("Intel", "VMX", "EPT", "kvm_intel", False, True, True, "")
AMD = Virtualization("AMD", "SVM", "NPT", "kvm_amd", False, False, False, "")
PVM = Virtualization("AMD", "", "", "kvm_pvm", True, None, False, "container in a virtual machine")
GOOD: dict[str, Any] = {
    "step": "done",
    "stage": len(STAGES) - 1,
    "instruction_ns": 0.4,
    "exit_us": [3.0, 1.0, 2.0],
    "api": 12,
}


def host(root: Path, *, flags: str = "fpu", modules: dict[str, dict[str, str]] | None = None) -> Path:
    """A tree like /proc and /sys."""
    (root / "proc/1").mkdir(parents=True)
    (root / "dev").mkdir()
    vendor = "GenuineIntel" if "vmx" in flags else "AuthenticAMD"
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    for name, parameters in (modules or {}).items():
        directory = root / "sys/module" / name / "parameters"
        directory.mkdir(parents=True)
        for parameter, value in parameters.items():
            (directory / parameter).write_text(value + "\n")
    return root


# Absent


def test_without_the_device_the_firmware_is_named(tmp_path: Path) -> None:
    verdict = p.probe(host(tmp_path))
    assert verdict.state is State.ABSENT and not verdict.usable
    assert "neither VMX nor SVM" in verdict.reason and "firmware" in verdict.remedy


def test_inside_a_virtual_machine_nesting_is_named(tmp_path: Path) -> None:
    verdict = p.probe(host(tmp_path, flags="fpu hypervisor"))
    assert "virtual machine" in verdict.reason and "nested" in verdict.remedy


@pytest.mark.parametrize(("flags", "module"), [("vmx", "kvm_intel"), ("svm", "kvm_amd")])
def test_with_the_extension_but_no_module_modprobe_is_named(tmp_path: Path, flags: str, module: str) -> None:
    verdict = p.probe(host(tmp_path, flags=flags))
    assert f"{module} is not loaded" in verdict.reason and f"modprobe {module}" in verdict.remedy


def test_with_the_module_but_no_node_mknod_is_named(tmp_path: Path) -> None:
    verdict = p.probe(host(tmp_path, flags="svm", modules={"kvm_amd": {}}))
    assert "mknod" in verdict.remedy


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", "environ", "cgroup", "systemd"])
def test_in_a_container_its_option_is_named(tmp_path: Path, mark: str) -> None:
    root = host(tmp_path, flags="svm", modules={"kvm_amd": {}})
    if mark == "environ":
        (root / "proc/1/environ").write_bytes(b"PATH=/bin\0container=lxc\0")
    elif mark == "cgroup":
        (root / "proc/1/cgroup").write_text("4:memory:/docker/0123456789\n")
    elif mark == "systemd":
        (root / "run/systemd").mkdir(parents=True)
        (root / "run/systemd/container").write_text("systemd-nspawn\n")
    else:
        (root / mark).parent.mkdir(exist_ok=True)
        (root / mark).touch()
    verdict = p.probe(root)
    assert "container" in verdict.reason and "--device /dev/kvm" in verdict.remedy


# Forbidden


@pytest.mark.parametrize(
    ("device", "reason", "remedy"),
    [
        (DeviceNode("root", "kvm", 0o660, "eve"), "root:kvm with mode 0660", "usermod -aG kvm eve"),
        (DeviceNode("root", "kvm", 0o660, "eve", ("eve",)), "session began before", "newgrp kvm"),
        (DeviceNode("root", "root", 0o600, "eve"), "root:root with mode 0600", "chgrp kvm /dev/kvm"),
        (DeviceNode("root", "root", 0o660, "eve"), "mode 0660", "chgrp kvm /dev/kvm"),
        (DeviceNode("root", "kvm", 0o666, "eve"), "mode 0666", "device cgroup"),
        (DeviceNode("root", "kvm", 0o660, "root"), "by root", "device cgroup"),
    ],
)
def test_a_refusal_names_owner_group_and_the_fix(tmp_path: Path, device: DeviceNode, reason: str, remedy: str) -> None:
    verdict = p.explain_refusal(device, host(tmp_path))
    assert verdict.state is State.FORBIDDEN and not verdict.usable
    assert reason in verdict.reason and remedy in verdict.remedy


def test_a_refused_open_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path)
    (root / "dev/kvm").touch()
    seen = DeviceNode("root", "kvm", 0o660, "eve")
    monkeypatch.setattr(p, "device_node", lambda path: seen)

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert p.probe(root).state is State.FORBIDDEN


def test_a_plain_file_is_no_kvm(tmp_path: Path) -> None:
    root = host(tmp_path)
    (root / "dev/kvm").touch()
    verdict = p.probe(root)
    assert verdict.state is State.UNUSABLE and "not a device" in verdict.reason and "mknod" in verdict.remedy


# Judging


def test_a_fast_and_complete_guest_is_good() -> None:
    verdict = p.judge(GOOD, INTEL)
    assert verdict == Verdict(True, "KVM works (VMX with EPT; 0.4 ns an instruction)", "", State.GOOD, 0.4, 2.0)
    assert "SVM with NPT" in p.judge(GOOD, AMD).reason
    assert "KVM-PVM" in p.judge(GOOD, PVM).reason


def test_emulation_is_unusable_whatever_else_happened() -> None:
    slow = GOOD | {"instruction_ns": 604.0}
    for result in (slow, slow | {"error": "guest code failed at SSE", "step": "run"}):
        verdict = p.judge(result, PVM)
        assert not verdict.usable and verdict.state is State.UNUSABLE
        assert "guest code runs by emulation (604 ns an instruction, KVM-PVM" in verdict.reason
        assert "software emulation" in verdict.remedy


@pytest.mark.parametrize("speed", [FAST - 0.001, FAST + 0.001])
def test_the_threshold(speed: float) -> None:
    assert p.judge(GOOD | {"instruction_ns": speed}, AMD).usable == (speed < FAST)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"step": "create", "error": "KVM_CREATE_VM: busy", "errno": 16}, "another hypervisor"),
        ({"step": "open", "error": "No such device", "errno": 19}, "no kernel module"),
        ({"step": "create", "error": "Cannot allocate memory", "errno": 12}, "Cannot allocate"),
        ({"step": "version", "error": "KVM interface version 10, not 12"}, "version 10"),
        (GOOD | {"step": "run", "stage": 3, "error": "guest code failed at descriptor tables"}, "descriptor tables"),
        ({}, "no complete answer"),
        (GOOD | {"stage": 2}, "no complete answer"),
        (GOOD | {"instruction_ns": 0}, "no complete answer"),
        (GOOD | {"instruction_ns": "fast"}, "no complete answer"),
        (GOOD | {"instruction_ns": True}, "no complete answer"),
    ],
)
def test_anything_less_than_a_whole_run_is_unusable(result: dict[str, Any], expected: str) -> None:
    verdict = p.judge(result, INTEL)
    assert not verdict.usable and verdict.state is State.UNUSABLE
    assert expected in verdict.reason and verdict.remedy


# The probing process


def device_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose /dev/kvm is there and may be opened."""
    root = host(tmp_path, flags="svm", modules={"kvm_amd": {"npt": "1", "nested": "1"}})
    (root / "dev/kvm").touch()
    monkeypatch.setattr(p, "device_node", lambda path: DeviceNode("root", "kvm", 0o660, "root"))
    return root


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_hanging_device_is_given_up_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = device_root(tmp_path, monkeypatch)
    started = time.monotonic()
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    verdict = p.probe(root, deadline=0.3, command=python(code))
    assert time.monotonic() - started < 3
    assert verdict.state is State.UNUSABLE and "did not end within 0.3 s" in verdict.reason


def test_a_hanging_guest_is_told_from_a_slow_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's time begins when the probe has started, and its end is an alarm."""
    root = device_root(tmp_path, monkeypatch)
    code = "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(60)"
    verdict = p.probe(root, command=python(code))
    assert verdict.state is State.UNUSABLE and "did not end within 2 s" in verdict.reason
    slow = python(f"import time; time.sleep(2.2); print({json.dumps(json.dumps(GOOD))})")
    assert p.probe(root, command=slow).usable


@pytest.mark.parametrize("code", ["import os; os.abort()", "print('[1]')", "print('nonsense')", "print('x' * 100000)"])
def test_a_probe_that_dies_or_talks_nonsense_is_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    verdict = p.probe(device_root(tmp_path, monkeypatch), command=python(code))
    assert verdict.state is State.UNUSABLE and "could not be probed" in verdict.reason


def test_a_good_answer_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = p.probe(device_root(tmp_path, monkeypatch), command=python(f"print({json.dumps(json.dumps(GOOD))})"))
    assert verdict.usable and "SVM with NPT" in verdict.reason


def test_this_host_gets_a_verdict_in_time() -> None:
    """The real thing, whatever this host is."""
    started = time.monotonic()
    verdict = p.probe()
    assert time.monotonic() - started < p.DEADLINE + 1.5
    assert verdict.reason
    assert verdict.usable or verdict.remedy
    assert verdict.usable == (verdict.state is State.GOOD)
    if not Path("/dev/kvm").exists():
        assert verdict.state is State.ABSENT
    elif verdict.state in (State.GOOD, State.UNUSABLE) and os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert "could not be probed" not in verdict.reason


@pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="this host's KVM is not KVM-PVM")
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm may not be opened here")
def test_kvm_pvm_is_found_to_emulate() -> None:
    verdict = p.probe()
    if not p.virtualization().extension:
        assert verdict.state is State.UNUSABLE
        assert "emulation" in verdict.reason and verdict.instruction_ns > FAST


# The CPU and the kernel


def test_virtualization_is_described(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        flags="vmx fpu",
        modules={"kvm": {}, "kvm_intel": {"ept": "Y", "nested": "N"}},
    )
    (root / "sys/class/iommu/dmar0").mkdir(parents=True)
    assert p.virtualization(root) == Virtualization("Intel", "VMX", "EPT", "kvm_intel", False, False, True, "")


def test_paravirtual_kvm_is_told_from_the_real_one(tmp_path: Path) -> None:
    found = p.virtualization(host(tmp_path, flags="hypervisor", modules={"kvm": {}, "kvm_pvm": {}}))
    assert found.paravirtual and found.extension == "" and found.inside == "virtual machine"


WATCHED = """
import signal, sys, time
sys.path.insert(0, {source!r})
from kvik.host import kvm_probe
began = time.monotonic()
kvm_probe.GUEST_DEADLINE = 0.05
kvm_probe._waited = lambda: {waited}
kvm_probe._give_up_in_time()
while time.monotonic() < began + 0.5:
    pass
signal.setitimer(signal.ITIMER_REAL, 0)
print("here")
"""


@pytest.mark.parametrize(
    ("waited", "code", "says"),
    [("0.0", -signal.SIGALRM, b""), ("time.monotonic() - began", 0, b"here\n"), ("0.2", -signal.SIGALRM, b"")],
)
def test_a_guests_time_does_not_run_while_it_waits_for_a_processor(waited: str, code: int, says: bytes) -> None:
    """As the kernel counts it. 0.2: it had waited before its time began."""
    words = WATCHED.format(source=str(Path(p.__file__).parents[2]), waited=waited)
    done = subprocess.run(python(words), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, says), done.stderr


def test_the_time_that_a_thread_waits_for_a_processor_is_counted() -> None:
    """Two that want the same one."""
    counted = Path("/proc/thread-self/schedstat")
    if not counted.exists() or counted.read_text().split() == ["0", "0", "0"]:
        pytest.skip("this kernel counts no waiting (CONFIG_SCHED_INFO)")
    before, mine = kvm_probe._waited(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    other = subprocess.Popen(python("while True: pass"))
    try:
        while kvm_probe._waited() < before + 0.01:
            pass
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, mine)


# The cache


def counted(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[int]:
    calls: list[int] = []

    def fake(root: Path) -> Verdict:
        calls.append(1)
        return verdict

    monkeypatch.setattr(p, "probe", fake)
    return calls


GOOD_VERDICT = p.judge(GOOD, INTEL)


def test_the_verdict_is_kept_privately_and_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path / "root")
    calls = counted(monkeypatch, GOOD_VERDICT)
    cache = tmp_path / "cache"
    first = p.kvm_verdict(cache, root)
    second = p.kvm_verdict(cache, root)
    assert len(calls) == 1
    assert not first.cached and second.cached
    assert (second.usable, second.reason, second.state) == (first.usable, first.reason, first.state)
    assert stat.S_IMODE((cache / "kvm-verdict.json").stat().st_mode) == 0o600
    p.kvm_verdict(cache, root, fresh=True)
    assert len(calls) == 2
    p.kvm_verdict(None, root)
    assert len(calls) == 3


def test_a_change_of_what_it_depends_on_makes_it_probe_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path / "root", modules={"kvm": {}, "kvm_amd": {"nested": "0"}})
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    boot = root / "proc/sys/kernel/random/boot_id"
    boot.write_text("one\n")
    keys = [p.cache_key(root)]

    def changed() -> bool:
        keys.append(p.cache_key(root))
        return len(set(keys)) == len(keys)

    boot.write_text("two\n")
    assert changed()
    (root / "dev/kvm").touch()
    assert changed()
    (root / "dev/kvm").chmod(0o666)
    assert changed()
    (root / "sys/module/kvm_amd/parameters/nested").write_text("1")
    assert changed()
    (root / "sys/module/kvm_pvm").mkdir()
    assert changed()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert changed()
    monkeypatch.setattr(os, "getgroups", lambda: [4242])
    assert changed()


def test_a_hang_is_not_believed_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = Verdict(False, "it hangs", "look", State.UNUSABLE)
    calls = counted(monkeypatch, hung)
    root = host(tmp_path / "root")
    p.kvm_verdict(tmp_path, root)
    p.kvm_verdict(tmp_path, root)
    assert len(calls) == 1
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: now + p.HANG_KEPT + 1)
    p.kvm_verdict(tmp_path, root)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"usable": True, "state": "unusable"},
        {"usable": "yes"},
        {"usable": False},
        {"state": "excellent"},
        {"reason": 5},
        {"reason": "x" * 5000},
        {"reason": "\x1b[2J"},
        {"instruction_ns": 600.0},
        {"instruction_ns": "NaN"},
        {"instruction_ns": -1},
        {"exit_us": None},
    ],
)
def test_a_doctored_cache_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    root = host(tmp_path / "root")
    calls = counted(monkeypatch, GOOD_VERDICT)
    p.kvm_verdict(tmp_path, root)
    file = tmp_path / "kvm-verdict.json"
    document = json.loads(file.read_text())
    document["verdict"] |= change
    file.write_text(json.dumps(document))
    assert p.kvm_verdict(tmp_path, root).usable
    assert len(calls) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 50_000, b"\xff", b"x" * 100_000])
def test_a_broken_cache_costs_only_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    calls = counted(monkeypatch, GOOD_VERDICT)
    (tmp_path / "kvm-verdict.json").write_bytes(content)
    assert p.kvm_verdict(tmp_path, host(tmp_path / "root")).usable
    assert len(calls) == 1


def test_a_cache_that_others_may_write_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path / "root")
    calls = counted(monkeypatch, GOOD_VERDICT)
    p.kvm_verdict(tmp_path, root)
    (tmp_path / "kvm-verdict.json").chmod(0o666)
    p.kvm_verdict(tmp_path, root)
    assert len(calls) == 2


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, GOOD_VERDICT)
    (tmp_path / "file").touch()
    assert p.kvm_verdict(tmp_path / "file/below", host(tmp_path / "root")).usable


# The guest


def test_the_guests_memory_holds_its_tables_and_code() -> None:
    memory = bytearray(0x10000)
    fill_memory(memory)
    assert bytes(memory[0xA000 : 0xA000 + len(guest_code())]) == guest_code()
    assert int.from_bytes(memory[0x3000:0x3008], "little") == 0x83  # a 2 MiB page at 0
    handler = int.from_bytes(memory[0x8000 + 3 * 16 : 0x8000 + 3 * 16 + 2], "little")
    assert memory[handler : handler + 2] == b"\x48\xcf"  # iretq
    assert guest_code().count(bytes((0xE6, 0xE9))) == len(STAGES)


@pytest.mark.parametrize(
    ("instruction", "entry", "hiccups", "fast"),
    [
        (0.3, 2_000, [], True),
        (2.2, 3_500_000, [], True),  # KVM nested in an emulator: milliseconds for each entry
        (0.3, 2_000, [9_000_000, 9_000_000], True),  # the host was busy elsewhere, twice
        (580.0, 30_000, [], False),
    ],
)
def test_the_speed_is_the_slope_without_entry_costs_and_hiccups(
    monkeypatch: pytest.MonkeyPatch, instruction: float, entry: int, hiccups: list[int], fast: bool
) -> None:
    """A made-up vCPU: so many ns an instruction, so many for each entry, delays on the first long runs."""
    started: list[int] = []
    delays = list(hiccups)

    def timed(vcpu: object) -> tuple[object, int]:
        late = delays.pop(0) if delays and started[-1] >= kvm_probe.LONG_RUN else 0
        data = memoryview(bytes([0x10]))
        return IoExit(True, kvm_probe.PORT, 1, 1, data), int(2 * started[-1] * instruction) + entry + late

    monkeypatch.setattr(kvm_probe, "_start", lambda vcpu, iterations: started.append(iterations))
    monkeypatch.setattr(kvm_probe, "_timed", timed)
    result: dict[str, Any] = {}
    assert kvm_probe._measure_speed(None, result)
    assert result["instruction_ns"] == pytest.approx(instruction, rel=0.1)
    assert (result["instruction_ns"] <= FAST) == fast
    assert (kvm_probe.PRECISE_RUN in started) == fast
