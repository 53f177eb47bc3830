"""The command line, and the configuration it becomes."""

from __future__ import annotations

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm.config import CLASSES, DiskConfig, MachineConfig
from kvik.vmm.layout import GIB, MIB
from kvik.vmm.options import OPTIONS, help_text, parse, parse_size
from kvik.vmm.settings import fields_of, from_dict, to_dict

EXAMPLES = {
    "name": ("one", "name", "one"),
    "uuid": ("6e0f2c2e-0001-4000-8000-000000000001", "uuid", "6e0f2c2e-0001-4000-8000-000000000001"),
    "kernel": ("/k", "boot.kernel", "/k"),
    "initrd": ("/i", "boot.initrd", "/i"),
    "append": ("console=ttyS0 a,b", "boot.cmdline", "console=ttyS0 a,b"),
    "boot": ("protocol=pvh,kernel-fd=7", "boot.kernel_fd", 7),
    "firmware": ("/f", "boot.firmware", "/f"),
    "nvram": ("/n", "boot.nvram", "/n"),
    "memory": ("4G,shared,hugepages=2M,prealloc=off", "memory.hugepages", 2 * MIB),
    "numa": ("memory=1G,cpus=0-1:3,distances=10:20", "memory.nodes.0.cpus", (0, 1, 3)),
    "cpus": ("2,maximum=4,threads=2", "cpus.maximum", 4),
    "cpu": ("x86-64-v3,+avx2,-x2apic", "cpus.features", ("+avx2", "-x2apic")),
    "smbios": ("serial=ds=nocloud;;x,product=p", "smbios.serial", "ds=nocloud;;x"),
    "rtc": ("localtime", "rtc.base", "localtime"),
    "serial": ("unix:/s,id=com", "serials.0.id", "com"),
    "console": ("fd=3", "consoles.0.backend", "fd=3"),
    "channel": ("org.x,backend=unix:/c", "channels.0.backend", "unix:/c"),
    "debugcon": ("file:/d", "debugcon.0.backend", "file:/d"),
    "disk": ("/a,,b,readonly,cache=none,bps=10M", "disks.0.path", "/a,b"),
    "vhost-user-blk": ("/s,queues=2", "vhost_user_blk.0.queues", 2),
    "net": ("fd=3:4,mac=52:54:00:00:00:01", "nets.0.fds", (3, 4)),
    "rng": ("rate=100", "rng.0.rate", 100),
    "balloon": ("free-page-reporting=off", "balloon.0.free_page_reporting", False),
    "vsock": ("5,uds=/v", "vsock.0.cid", 5),
    "fs": ("tag,socket=/v", "fs.0.tag", "tag"),
    "virtio-mem": ("4G,requested=1G", "virtio_mem.0.requested", GIB),
    "watchdog": ("poweroff", "watchdog.0.action", "poweroff"),
    "pvpanic": ("off", "pvpanic", False),
    "vmgenid": ("off", "vmgenid", False),
    "qmp": ("/q", "qmp", ["/q"]),
    "gdb": ("tcp:127.0.0.1:1", "gdb", "tcp:127.0.0.1:1"),
    "metrics": ("unix:/m", "metrics", "unix:/m"),
    "paused": ("on", "paused", True),
    "incoming": ("unix:/x", "incoming", "unix:/x"),
    "restore": ("/dir", "restore", "/dir"),
    "catch-up": ("on", "catch_up", True),
    "migratable": ("on", "migratable", True),
    "snapshots": ("/snapshots", "snapshots", "/snapshots"),
    "sandbox": ("log", "sandbox", "log"),
    "trace": ("-", "trace", "-"),
    "log": ("json", "log", "json"),
    "on-reboot": ("shutdown", "on_reboot", "shutdown"),
    "on-poweroff": ("pause", "on_poweroff", "pause"),
    "on-panic": ("none", "on_panic", "none"),
}


def look_up(config: MachineConfig, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_reaches_its_field(name: str) -> None:
    text, path, expected = EXAMPLES[name]
    assert look_up(parse([f"--{name}", text]), path) == expected
    assert look_up(parse([f"--{name}={text}"]), path) == expected
    assert f"--{name}" in help_text()


def test_flags_need_no_value() -> None:
    config = parse(["--rng", "--balloon", "--paused", "--disk", "a", "--disk", "b"])
    assert len(config.rng) == 1 and len(config.balloon) == 1 and config.paused
    assert [disk.path for disk in config.disks] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kernal", "x"], "no option '--kernal'.*did you mean --kernel"),
        (["x"], "no option 'x'"),
        (["--kernel"], "--kernel needs a value"),
        (["--memory", "much"], "'much' is no size"),
        (["--memory", "1X"], "is no size"),
        (["--disk", "a,colour=red"], "--disk has no 'colour'.*readonly"),
        (["--disk", "a,readonly=maybe"], "is on or off"),
        (["--cpus", "two"], "is a number"),
        (["--numa", "memory=1G,cpus=3-1"], "is no range"),
        (["--numa", "memory=1G,cpus=0-99999999999"], "is no range"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse(words)


@pytest.mark.parametrize(("text", "size"), [("512M", 512 * MIB), ("4g", 4 * GIB), ("65536", 65536), ("0", 0)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_bare_memory_size_counts_mib_as_everywhere() -> None:
    assert parse(["--memory", "256"]).memory.size == 256 * MIB


def test_a_configuration_survives_as_dictionaries() -> None:
    config = parse([word for name, (text, _, _) in EXAMPLES.items() for word in (f"--{name}", text)])
    assert from_dict(MachineConfig, to_dict(config), CLASSES) == config
    older = to_dict(config)
    del older["vmgenid"]
    assert from_dict(MachineConfig, older, CLASSES).vmgenid is True
    with pytest.raises(InvalidArgument):
        from_dict(MachineConfig, {"boot": 3}, CLASSES)


def test_settings_are_dataclasses_in_behaviour() -> None:
    assert DiskConfig(path="a") == DiskConfig(path="a") != DiskConfig(path="b")
    assert "path='a'" in repr(DiskConfig(path="a"))
    assert "serial" in fields_of(DiskConfig)
    with pytest.raises(TypeError, match="colour"):
        DiskConfig(colour="red")
    one, two = MachineConfig(), MachineConfig()
    one.disks.append(DiskConfig())
    assert two.disks == []
