"""The lab keeps its promises: commands, their ends and limits, the tree, modules, disks, its own end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvik.errors import ImageError, NotFound
from lab.harness import Lab, LabError, LabOptions, LabTimeout
from lab.kernel import Kernel, LabUnavailable, dependency_table, ensure_kernel


def test_it_is_a_kernel_of_its_own_with_a_true_kvm(lab: Lab) -> None:
    release = lab.sh("uname -r").strip()
    assert release == lab.kernel.version != os.uname().release
    assert "SVM" in lab.sh("dmesg | grep -i kvm")
    assert lab.sh("cat /sys/module/kvm_amd/parameters/npt").strip() in ("Y", "1")
    assert lab.sh("stat -c '%U:%G %a %t' /dev/kvm").strip() == "root:kvm 660 a"


def test_a_commands_streams_code_input_and_environment(lab: Lab) -> None:
    code, out, err = lab.run(["/bin/sh", "-c", "cat; echo $WORD >&2; exit 7"], env={"WORD": "said"}, stdin=b"given\n")
    assert (code, out, err) == (7, "given\n", "said\n")
    assert lab.run(["/bin/sh", "-c", "kill -TERM $$"]).code == -signal.SIGTERM
    assert lab.run(["/bin/pwd"], cwd="/usr").stdout == "/usr\n"
    big = os.urandom(300_000).hex()
    assert lab.run(["/bin/cat"], stdin=big.encode()).stdout == big


def test_commands_run_beside_each_other_and_can_be_signalled(lab: Lab) -> None:
    slow = lab.spawn(["/bin/sleep", "50"])
    assert lab.sh("echo meanwhile") == "meanwhile\n"
    slow.signal(signal.SIGKILL)
    assert slow.wait().code == -signal.SIGKILL


def test_a_command_that_does_not_end_is_killed_with_what_it_started(lab: Lab) -> None:
    started = time.monotonic()
    with pytest.raises(LabTimeout, match="first words"):
        lab.run(["/bin/sh", "-c", "echo first words; sleep 4321 & wait"], timeout=1)
    assert time.monotonic() - started < 10
    assert lab.run(["pgrep", "-f", "^sleep 4321"]).code == 1


def test_a_command_that_is_not_there_is_the_labs_error(lab: Lab) -> None:
    with pytest.raises(LabError, match="No such file"):
        lab.run(["/nowhere/command"])


def test_a_daemon_that_keeps_the_streams_open_does_not_hold_its_caller(lab: Lab) -> None:
    started = time.monotonic()
    assert lab.sh("setsid sleep 4322 & echo left") == "left\n"
    assert time.monotonic() - started < 10
    lab.sh("pkill -f '^sleep 4322'")
    deadline = time.monotonic() + 10
    while lab.run(["pgrep", "-f", "^sleep 4322"]).code == 0:
        assert time.monotonic() < deadline, "nobody reaped it"


def test_the_hosts_tree_is_seen_and_never_changed(lab: Lab) -> None:
    probe = f"/usr/written-in-the-lab-{os.getpid()}"
    assert lab.sh(f"cat {__file__}") == Path(__file__).read_text()
    lab.sh(f"echo gone with the lab > {probe}; cat {probe}")
    assert not Path(probe).exists()
    assert lab.run(["/bin/sh", "-c", "echo x > /run/lower/etc/hostname"]).code != 0
    assert lab.sh("ls /etc/kvik /var/lib/kvik").split() == ["/etc/kvik:", "/var/lib/kvik:", "network"]


def test_the_share_is_written_from_both_sides(lab: Lab) -> None:
    (lab.share / "from-host").write_text("host")
    lab.sh("cat /run/lab/from-host > /run/lab/from-lab")
    assert (lab.share / "from-lab").read_text() == "host"


def test_another_user_is_really_another(lab: Lab) -> None:
    assert lab.sh("id -un", user="nobody").strip() == "nobody"
    assert lab.run(["/bin/cat", "/etc/shadow"], user="nobody").code != 0


def test_modules_are_loaded_with_what_they_need_also_by_the_kernel_itself(lab: Lab) -> None:
    lab.load("vhost_net", "bridge")
    assert lab.sh("ls -d /sys/module/vhost /sys/module/bridge /dev/vhost-net").count("\n") == 3
    lab.sh("ip link add lab0 type dummy && ip link set lab0 up && ip link del lab0")
    with pytest.raises(NotFound, match="no_such"):
        lab.load("no_such")


def test_disks_and_nics_come_with_a_lab_of_their_own_and_it_ends_with_its_process(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"on the disk".ljust(1 << 20, b"\0"))
    options = LabOptions(memory_mib=1024, vcpus=1, disks=(disk,), nics=("user",), kernel_arguments=("lab.test=yes",))
    with Lab(options) as lab:
        assert (
            lab.sh("head -c 11 /dev/vda; nproc; grep -o lab.test=yes /proc/cmdline") == "on the disk1\nlab.test=yes\n"
        )
        assert "52:54:00:1a:b0:00" in lab.sh("ip link")
        directory, waiting = lab.share.parent, lab.spawn(["/bin/sleep", "60"])
        os.kill(lab.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="ended"):
            waiting.wait()
        assert not lab.alive
    assert not directory.exists()


# Without booting ------------------------------------------------------------------------------------------------------


def test_modules_are_ordered_by_their_needs() -> None:
    table = dependency_table({"top": ["left", "right"], "left": ["base"], "right": ["left", "base"], "base": []})
    order = [*reversed(table["top"]), "top"]
    assert sorted(order) == ["base", "left", "right", "top"]
    assert order.index("base") < order.index("left") < order.index("right") < order.index("top")
    with pytest.raises(ImageError, match="a -> b -> a"):
        dependency_table({"a": ["b"], "b": ["a"]})


def test_the_load_order_skips_what_is_built_in(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/modules.dep").write_text("kernel/x/kvm-amd.ko: kernel/x/kvm.ko kernel/y/irq.ko\n")
    (tmp_path / "modules/modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    kernel = Kernel(tmp_path, "6.1")
    assert kernel.load_order(["ext4", "kvm_amd"]) == ["kernel/y/irq.ko", "kernel/x/kvm.ko", "kernel/x/kvm-amd.ko"]


def test_no_package_source_is_a_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.kernel.shutil", SimpleNamespace(which=lambda name: None))
    with pytest.raises(LabUnavailable, match="apt-get"):
        ensure_kernel(tmp_path)
