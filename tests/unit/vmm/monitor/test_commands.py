"""The commands on a machine that only remembers; the schema; rude input at random."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvik
from kvik.vmm.blk import monitor as of_blk
from kvik.vmm.monitor.commands import COMMANDS, GROUPS
from kvik.vmm.monitor.events import LIMITED, SCHEMA
from kvik.vmm.monitor.server import MonitorServer

SRC = Path(kvik.__file__).parent


def test_every_command_that_kviks_manager_uses_is_there() -> None:
    used = set()
    # A display is QEMU's own: kvik-vmm has none and `query-vnc` is how the driver learns that.
    elsewhere = {"set_password", "expire_password", "query-vnc", "add_client"}
    # Of block jobs, which it does not begin, and of thresholds, which it does not watch
    elsewhere |= {"block-job-cancel", "block-job-set-speed", "block-set-write-threshold"}
    # Of checkpoints and backups, which it has none of
    elsewhere |= {"block-dirty-bitmap-remove", "blockdev-reopen", "nbd-server-start", "nbd-server-stop"}
    elsewhere |= {"block-export-add", "block-export-del", "query-block-exports"}
    for path in [*(SRC / "hypervisor").rglob("*.py"), *(SRC / "manager").rglob("*.py")]:
        used |= set(re.findall(r"(?:execute|ask)\(\s*\"([a-z][a-z_-]+)\"", path.read_text()))
    used = {name for name in used if not name.startswith("guest-")}
    assert len(used) > 40
    assert used - elsewhere <= {*COMMANDS, *of_blk.COMMANDS}


def test_no_command_is_in_two_groups_and_each_is_told_of() -> None:
    names = [command.name for group in GROUPS.values() for command in group.COMMANDS]
    assert len(names) == len(set(names)) == len(COMMANDS)


def test_the_schema_is_whole_and_lists_everything(client: Any) -> None:
    schema = client.get("query-qmp-schema")
    entries = {entry["name"]: entry for entry in schema}
    assert len(entries) == len(schema)
    for entry in schema:
        for member in ("arg-type", "ret-type", "element-type"):
            assert entry.get(member, "any") in entries or member not in entry
        for item in entry.get("members", []) if entry["meta-type"] == "object" else []:
            assert item["type"] in entries
        assert entry["meta-type"] in ("builtin", "enum", "array", "object", "command", "event")
    listed = {item["name"] for item in client.get("query-commands")}
    assert (
        listed
        == {entry["name"] for entry in schema if entry["meta-type"] == "command"}
        == {*COMMANDS, "qmp_capabilities"}
    )
    assert {entry["name"] for entry in schema if entry["meta-type"] == "event"} == set(SCHEMA) and set(LIMITED) <= set(
        SCHEMA
    )
    balloon = entries[entries["balloon"]["arg-type"]]
    assert balloon["members"] == [{"name": "value", "type": "int"}]


def test_status_stop_cont_reset_powerdown_quit(client: Any, machine: Any) -> None:
    assert client.get("stop") == {} and machine.status == "paused"
    assert client.get("query-status") == {"status": "paused", "running": False, "singlestep": False}
    assert client.get("cont") == {} and machine.status == "running"
    client.get("system_reset")
    client.get("system_powerdown")
    client.get("quit")
    assert machine.calls == ["reset", "powerdown", "quit"]
    assert [event["event"] for event in client.events] == ["STOP", "RESUME", "RESET", "POWERDOWN", "SHUTDOWN"]
    machine.status = "guest-panicked"
    assert client.error("cont") == ("GenericError", "Resetting the Virtual Machine is required")


def test_actions_change_the_configuration(client: Any, machine: Any) -> None:
    client.get("set-action", {"reboot": "shutdown", "shutdown": "pause", "panic": "exit-failure"})
    assert (machine.config.on_reboot, machine.config.on_poweroff, machine.config.on_panic) == (
        "shutdown",
        "pause",
        "exit-failure",
    )
    client.get("set-action", {"shutdown": "poweroff"})
    assert machine.config.on_poweroff == "shutdown"


def test_vcpus_their_places_and_who_may_come(client: Any) -> None:
    cpus = client.get("query-cpus-fast")
    assert [(item["cpu-index"], item["thread-id"]) for item in cpus] == [(0, 1000), (1, 1001)]
    slots = client.get("query-hotpluggable-cpus")
    assert len(slots) == 4 and sum("qom-path" in slot for slot in slots) == 2
    assert len({json.dumps(slot["props"], sort_keys=True) for slot in slots}) == 4


def test_an_nmi_goes_to_every_vcpu_while_it_stands_still(client: Any, machine: Any) -> None:
    client.get("inject-nmi")
    assert [thread.vcpu.nmis for thread in machine.vcpus] == [1, 1] and machine.holds == 0


def test_block_nodes_open_their_files_at_once(client: Any, server: MonitorServer, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    lower = {"driver": "file", "filename": str(image), "node-name": "f0"}
    client.get("blockdev-add", lower)
    client.get("blockdev-add", {"driver": "raw", "node-name": "n0", "file": "f0", "read-only": True})
    assert client.error("blockdev-add", lower)[1] == "Duplicate nodes with node-name='f0'"
    assert client.error("blockdev-del", {"node-name": "f0"})[1] == "Node f0 is in use"
    told = {node["node-name"]: node for node in client.get("query-named-block-nodes", {"flat": True})}
    assert told["n0"]["image"]["virtual-size"] == 1 << 20 and told["n0"]["ro"]
    client.get("blockdev-del", {"node-name": "n0"})
    client.get("blockdev-del", {"node-name": "f0"})
    assert client.error("blockdev-add", {"driver": "file", "filename": str(tmp_path / "none"), "node-name": "x"})[
        1
    ].endswith("No such file or directory")
    assert "neither" in client.error("blockdev-add", {"driver": "file", "filename": "/dev/null", "node-name": "x"})[1]
    assert (
        client.error("blockdev-add", {"driver": "file", "filename": "/x", "node-name": "x", "zz": 1})[1]
        == "Parameter 'zz' is unexpected"
    )


def test_hot_plug_makes_settings_of_qemus_words(
    client: Any, server: MonitorServer, machine: Any, tmp_path: Path
) -> None:
    plugged: list[Any] = []

    class Hotplug:
        def plug(self, settings: Any) -> Any:
            plugged.append(settings)
            machine.devices[settings.id] = type("Device", (), {"kind": "virtio-blk", "name": settings.id})()

        def unplug(self, name: str) -> None:
            plugged.append(name)

    server._hotplug = Hotplug()
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with image.open("r+b") as stream:
        made = client.get("add-fd", {"opaque": "disk:vdb:0"}, fds=(stream.fileno(),))
    client.get(
        "blockdev-add",
        {"driver": "file", "filename": f"/dev/fdset/{made['fdset-id']}", "node-name": "s", "aio": "io_uring"},
    )
    client.get("blockdev-add", {"driver": "raw", "node-name": "n", "file": "s", "discard": "unmap"})
    client.get(
        "device_add",
        {
            "driver": "virtio-blk-pci",
            "id": "vdb",
            "drive": "n",
            "bus": "pci.0",
            "addr": "0x5",
            "serial": "S1",
            "werror": "stop",
        },
    )
    (disk,) = plugged
    assert (disk.id, disk.slot, disk.serial, disk.werror, disk.aio, disk.discard) == (
        "vdb",
        5,
        "S1",
        "stop",
        "io_uring",
        True,
    )
    assert os.fstat(disk.fd).st_ino == image.stat().st_ino
    os.close(disk.fd)
    assert client.error("device_add", {"driver": "virtio-blk-pci", "id": "vdb"})[1] == "Duplicate device ID 'vdb'"
    assert client.error("device_add", {"driver": "virtio-blk-pci", "id": "y", "drive": "n"})[1].startswith(
        "Node 'n' is busy"
    )
    assert (
        client.error("device_add", {"driver": "virtio-rng-pci", "id": "y", "zz": 1})[1]
        == "Property 'virtio-rng-pci.zz' not found"
    )
    assert client.error("blockdev-del", {"node-name": "n"})[1] == "Node n is in use"
    assert client.get("qom-list", {"path": "/machine/peripheral"})[1]["name"] == "vdb"
    client.get("device_del", {"id": "vdb"})
    assert plugged[-1] == "vdb"


def test_network_back_ends_take_descriptors(client: Any, server: MonitorServer) -> None:
    client.get("getfd", {"fdname": "tap0"}, fds=(0,))
    client.get("netdev_add", {"type": "tap", "id": "n0", "fd": "tap0", "vhost": False})
    assert not server.named_fds
    assert client.error("netdev_add", {"type": "tap", "id": "n1", "fd": "tap0"})[1].endswith("has not been found")
    assert "has no network of type user" in client.error("netdev_add", {"type": "user", "id": "n1"})[1]
    client.get("netdev_del", {"id": "n0"})


def test_a_migration_to_no_place_is_refused_not_swallowed(client: Any) -> None:
    assert "no such kind of migration" in client.error("migrate", {"uri": "rdma:somewhere"})[1]
    assert client.get("query-migrate") == {}


def test_character_back_ends(client: Any) -> None:
    client.get(
        "chardev-add",
        {"id": "c", "backend": {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/x"}}}}},
    )
    assert {"label": "c", "filename": "unix:/x", "frontend-open": False} in client.get("query-chardev")
    client.get("chardev-remove", {"id": "c"})
    assert "does not accept" in client.error("chardev-add", {"id": "c", "backend": {"type": "udp", "data": {}}})[1]


@pytest.mark.parametrize(
    "name", sorted(name for name in COMMANDS if name.startswith("query-") and not COMMANDS[name].arguments.members)
)
def test_every_query_answers(client: Any, name: str) -> None:
    message = client.ask(name)
    refused = ("balloon", "migrate-parameters", "migrate-capabilities")
    assert "return" in message or name.removeprefix("query-") in refused, message


def value(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice == 0:
        return rng.choice([0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**30, 0.5, 1e308])
    if choice in (1, 2):
        return rng.choice(
            ["", "a", "/dev/fdset/0", "file:", "x" * 5000, "\0", "n0", "/machine/peripheral/a", "fd:a", "on", "é"]
        )
    if choice == 3:
        return rng.choice([True, False, None])
    if choice in (4, 5):
        return rng.randrange(100)
    if choice == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(["driver", "type", "id", "data", "addr", "file", "path", "node-name", "x"]): value(rng, depth + 1)
        for _ in range(3)
    }


def command(rng: random.Random, names: list[str]) -> bytes:
    """A command that looks right, more or less."""
    name = rng.choice(names)
    members = list(COMMANDS[name].arguments.members)
    if COMMANDS[name].arguments.others:
        members += [
            "drive",
            "netdev",
            "file",
            "filename",
            "fd",
            "fds",
            "addr",
            "mac",
            "cache",
            "size",
            "chardev",
            "memdev",
        ]
    arguments = {member: value(rng) for member in members if rng.random() < 0.7}
    if "driver" in members:
        arguments["driver"] = rng.choice(
            ["virtio-blk-pci", "virtio-net-pci", "virtio-rng-pci", "host-x86_64-cpu", "raw", "file"]
        )
    if name == "netdev_add":
        arguments["type"] = rng.choice(["tap", "stream"])
    return (
        json.dumps(
            {rng.choice(["execute", "execute", "exec-oob"]): name, "arguments": arguments, "id": value(rng)}
        ).encode()
        + b"\n"
    )


def test_random_commands_and_random_bytes_are_answered_or_refused(
    connect: Callable[..., Any], server: MonitorServer, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """KVIK_FUZZ_OPERATIONS makes it longer, KVIK_FUZZ_SEED another."""
    monkeypatch.chdir(tmp_path)
    operations = int(os.environ.get("KVIK_FUZZ_OPERATIONS", "4000"))
    rng = random.Random(int(os.environ.get("KVIK_FUZZ_SEED", "1")))
    bugs: list[Any] = []
    monkeypatch.setattr(MonitorServer, "log", lambda self, text, **fields: bugs.append((text, fields)))
    # What ends or dumps the machine has its own tests.
    elsewhere = ("quit", "dump-guest-memory", "human-monitor-command", "migrate", "x-kvik-snapshot-save")
    names = [name for name in COMMANDS if name not in elsewhere]
    client = connect(enable=("oob",))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(operations):
        if rng.random() < 0.05:
            junk = rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b" ")
            # An open brace or quote waits for its end: such junk goes to a session of its own.
            rude = connect(negotiate=False)
            rude.send(junk + b'"{[')
            rude.pump()
            rude.sock.close()
            junk = junk.translate(None, b'{}[]"')
            client.send(junk + b"\n")
            if not junk.strip():
                continue
        else:
            client.send(command(rng, names), (0,) if rng.random() < 0.05 else ())
        message = client.reply()
        assert "return" in message or message["error"]["class"] in (
            "GenericError", "CommandNotFound", "DeviceNotFound", "DeviceNotActive"
        ), message  # fmt: skip
        client.events.clear()
    assert not bugs, bugs[:3]
    assert client.get("query-name") == {"name": "fake"}
    assert len(os.listdir("/proc/self/fd")) - before < 400  # what it added is bounded, and closed with the server


def test_qemus_own_client_speaks_with_us(machine: Any, tmp_path: Path) -> None:
    qmp = pytest.importorskip("qemu.qmp", reason="the package qemu.qmp is not installed")
    server = MonitorServer(machine)
    server.listen(str(tmp_path / "qmp"))

    async def talk() -> tuple[Any, Any, str]:
        client = qmp.QMPClient("kvik")
        events = qmp.EventListener()
        client.register_listener(events)

        async def turn() -> None:
            while True:
                machine.loop.run_once(0)
                await asyncio.sleep(0.002)

        turning = asyncio.create_task(turn())
        await asyncio.wait_for(client.connect(str(tmp_path / "qmp")), 10)
        name = await asyncio.wait_for(client.execute("query-name"), 10)
        await asyncio.wait_for(client.execute("stop"), 10)
        event = await asyncio.wait_for(events.get(), 10)
        try:
            await asyncio.wait_for(client.execute("nonsense"), 10)
            error = ""
        except qmp.ExecuteError as failure:
            error = failure.error_class
        await client.disconnect()
        turning.cancel()
        return name, event, error

    name, event, error = asyncio.run(talk())
    server.close()
    assert name == {"name": "fake"} and event["event"] == "STOP" and error == "CommandNotFound"


def test_memory_that_grows_is_told_of_and_asked_for(client: Any, machine: Any) -> None:
    from types import SimpleNamespace

    from kvik.vmm.virtio.mem import Mem

    device = Mem("mem0", 64 << 20)
    device.transport = SimpleNamespace(config_changed=lambda change: change())
    device.config["block_size"], device.config["addr"] = device.block, 1 << 32
    machine.devices["mem0"] = device
    place = {"path": "/machine/peripheral/mem0", "property": "requested-size"}
    client.get("qom-set", place | {"value": 32 << 20})
    assert client.get("qom-get", place) == 32 << 20
    assert client.get("qom-get", place | {"property": "size"}) == 0
    (found,) = client.get("query-memory-devices")
    assert found["data"]["max-size"] == 64 << 20 and found["data"]["memaddr"] == 1 << 32
    assert found["data"]["requested-size"] == 32 << 20 and found["data"]["block-size"] == 2 << 20
