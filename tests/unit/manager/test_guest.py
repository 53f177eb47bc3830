"""Readiness, addresses and commands through the guest's agent."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from manager_bench import AGENT, Bench, document, until

from kvik.errors import AgentError, InvalidArgument, OperationInvalid, OperationTimeout
from kvik.hypervisor.driver import EventKind
from kvik.hypervisor.test.driver import Behaviour
from kvik.manager import exec
from kvik.manager.guest import decode_interfaces

NIC = "<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"


def states(stages: list[Any]) -> dict[str, str]:
    return {stage.name: stage.state for stage in stages}


async def test_a_good_machine_becomes_ready_stage_by_stage(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    stages = await domain.wait_ready(2)
    assert set(states(stages).values()) == {"done"}
    assert [stage.seconds for stage in stages] == sorted(stage.seconds for stage in stages)
    assert (domain.ready, domain.address) == (True, "192.0.2.10")
    told = [event.fields["stage"] for event in bench.events if event.kind == "stage"]
    assert told == ["vmm started", "guest running", "first output", "agent", "address"]


@pytest.mark.parametrize(
    ("behaviour", "stage", "hint"),
    [
        (Behaviour(output_delay=60), "first output", "console=ttyS0"),
        (Behaviour(has_agent=False), "agent", "qemu-guest-agent"),
        (Behaviour(addresses=[]), "address", "DHCP"),
        (Behaviour(replies={"guest-network-get-interfaces": AgentError("disabled")}), "address", "disabled"),
    ],
)
async def test_a_stalled_stage_is_named_with_its_likely_cause(
    bench: Bench, behaviour: Behaviour, stage: str, hint: str
) -> None:
    bench.driver.behaviours["a"] = behaviour
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    stages = await domain.wait_ready(0.05)
    (stalled,) = [row for row in stages if row.state == "stalled"]
    assert stalled.name == stage and hint in stalled.hint
    assert not domain.ready


async def test_a_kernel_panic_on_the_console_is_the_hint(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(has_agent=False)
    domain = await bench.manager.define(document())
    await domain.start()
    assert domain.run
    (domain.run.directory / "console.log").write_text("boot\r\nKernel panic - not syncing: VFS: no root\r\n")
    stages = await domain.wait_ready(0.02)
    assert "Kernel panic - not syncing: VFS: no root" in next(row.hint for row in stages if row.state == "failed")


async def test_a_paused_machine_stalls_before_its_first_instruction(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start(paused=True)
    assert states(await domain.wait_ready(0.02))["guest running"] == "stalled"


async def test_a_machine_that_ends_while_waited_for_says_so_at_once(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(has_agent=False)
    domain = await bench.manager.define(document())
    await domain.start()
    waiting = asyncio.create_task(domain.wait_ready(30))
    await asyncio.sleep(0.01)
    bench.driver.machines["a"].die("out of memory")
    stages = await asyncio.wait_for(waiting, 1)
    assert any("out of memory" in stage.hint for stage in stages)


async def test_what_a_machine_cannot_show_is_skipped(bench: Bench) -> None:
    domain = await bench.manager.define(document().replace(AGENT, ""))
    await domain.start()
    found = states(await domain.wait_ready(1))
    assert (found["agent"], found["address"], domain.ready) == ("skipped", "skipped", True)


async def test_a_reboot_starts_over_with_the_agent(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    await domain.wait_ready(1)
    bench.driver.machines["a"].behaviour.agent_delay = 60
    bench.driver.machines["a"].guest_reboot()
    assert (domain.ready, domain.address) == (False, "")


async def test_a_command_runs_in_the_guest(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await until(lambda: domain.ready)
    assert (await domain.agent_exec(["uname", "-a"])).stdout.startswith(b"Linux")
    assert (await domain.agent_exec(["cat"], stdin=b"\0\xff")).stdout == b"\0\xff"
    assert (await domain.agent_exec(["false"])).code == 1
    with pytest.raises(AgentError, match="Failed to execute"):
        await domain.agent_exec(["no-such-command"])
    for bad in ([], [""], ["a\0b"]):
        with pytest.raises(InvalidArgument):
            await domain.agent_exec(bad)


async def test_a_command_that_does_not_end_is_killed(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await until(lambda: domain.ready)
    machine = bench.driver.machines["a"]
    with pytest.raises(OperationTimeout, match="was killed"):
        await domain.agent_exec(["sleep", "1000"], timeout=0.03)
    assert machine.commands.count("agent:guest-exec") == 2


@pytest.mark.parametrize(
    "status",
    ["nonsense", {"exited": True, "out-data": "*"}, {"exited": True, "out-data": 7}, {"exited": True, "out-data": [1]}],
)
async def test_nonsense_from_the_agent_is_an_agent_error(status: Any) -> None:
    async def agent(command: str, arguments: Any, timeout: float) -> Any:
        return {"pid": 1} if command == "guest-exec" else status

    with pytest.raises(AgentError):
        await exec.run(agent, ["x"])


async def test_a_signal_and_cut_output_are_told() -> None:
    async def agent(command: str, arguments: Any, timeout: float) -> Any:
        return {"pid": 1} if command == "guest-exec" else {"exited": True, "signal": 9, "out-truncated": True}

    assert await exec.run(agent, ["x"]) == exec.ExecResult(137, b"", b"", 9, True)


@pytest.mark.parametrize("answer", [None, {}, "x", 7])
def test_interfaces_that_are_no_list_are_refused(answer: Any) -> None:
    with pytest.raises(AgentError):
        decode_interfaces(answer)


def test_of_hostile_interfaces_only_what_is_sound_is_taken() -> None:
    found = decode_interfaces(
        [
            7,
            {"name": ["x"], "ip-addresses": "y"},
            {"name": "n" * 9999, "ip-addresses": [None, {"ip-address": "1.2.3.4; rm -rf /"}, {"ip-address": 5}]},
            {"name": "e", "ip-addresses": [{"ip-address": "fe80::1%eth0", "prefix": -5}, {"ip-address": "10.0.0.1"}]},
        ]
    )
    assert [len(item.addresses) for item in found] == [0, 0, 2]
    assert found[2].addresses == [(1, "fe80::1", 0), (0, "10.0.0.1", 0)]
    assert max(len(item.name) for item in found) <= 256


async def test_raw_agent_and_monitor_commands_speak_json(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    with pytest.raises(OperationInvalid):
        await domain.agent_command('{"execute":"guest-ping"}')
    await domain.start()
    await until(lambda: domain.ready)
    assert json.loads(await domain.agent_command('{"execute":"guest-ping"}')) == {"return": {}}
    assert json.loads(await domain.monitor_command('{"execute":"query-status"}'))["return"]["running"] is True
    assert json.loads(await domain.monitor_command('{"execute":"nope"}'))["error"]["class"] == "CommandNotFound"
    assert "running" in await domain.monitor_command("info status", hmp=True)
    for bad in ("", "[]", "{", '{"execute":7}', '{"execute":"x","arguments":[]}'):
        with pytest.raises(InvalidArgument):
            await domain.agent_command(bad)


async def test_the_console_echoes_and_screens_and_keys_work(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    fd = domain.open_console()
    try:
        os.write(fd, b"root\r")
        await asyncio.sleep(0.02)
        assert os.read(fd, 4096).endswith(b"login: root\r\n")
    finally:
        os.close(fd)
    mime, image = await domain.screenshot(0)
    assert mime == "image/png" and image.startswith(b"\x89PNG")
    await domain.send_key(7, 50, [4, 0xE1])  # USB: a, left shift
    assert bench.driver.machines["a"].keys == [([30, 42], 50)]
    await domain.inject_nmi()
    assert bench.driver.machines["a"].nmis == 1


async def test_a_display_disk_errors_and_the_monitors_events(bench: Bench) -> None:
    disk = "<disk type='file' device='disk'><source file='/dev/null'/><target dev='vda' bus='virtio'/></disk>"
    domain = await bench.manager.define(document(devices=f"<graphics type='vnc'/>{disk}"))
    with pytest.raises(OperationInvalid):
        await domain.open_graphics(0)
    await domain.start()
    fd = await domain.open_graphics(0, skip_auth=True)
    assert os.read(fd, 100) == b"display 0 without password"
    os.close(fd)
    assert await domain.disk_errors() == {}
    machine = bench.driver.machines["a"]
    machine.io_error("virtio-disk0")
    assert await domain.disk_errors() == {"vda": 2}
    machine.tell(EventKind.MONITOR, "NEWS", a=1)
    (event,) = [event for event in bench.events if event.kind == "monitor"]
    assert (event.fields["event"], json.loads(event.fields["details"])) == ("NEWS", {"a": 1})


async def test_the_period_of_memory_statistics(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices="<memballoon model='virtio'/>"))
    await domain.set_memory_stats_period(5, 2)
    assert "<stats period='5'/>" in domain.xml()
    await domain.start()
    await domain.set_memory_stats_period(2, 1)
    assert bench.driver.machines["a"].balloon_period == 2
    assert "<stats period='2'/>" in domain.xml() and "<stats period='5'/>" in domain.xml(2)
    await domain.set_memory_stats_period(0, 3)
    assert "<stats" not in domain.xml() and "<stats" not in domain.xml(2)
    with pytest.raises(InvalidArgument):
        await domain.set_memory_stats_period(-1, 2)


async def test_a_clock_that_the_guest_sets_is_kept(bench: Bench) -> None:
    domain = await bench.manager.define(document(extra="<clock offset='utc' adjustment='60'/>"))
    await domain.start()
    bench.driver.machines["a"].tell(EventKind.RTC_CHANGE, offset=3600)
    assert "offset='variable' adjustment='3600' basis='utc'" in domain.xml()
    assert [event.fields["offset"] for event in bench.events if event.kind == "rtc-change"] == [3600]
