"""No machine can block another: a VMM that does not answer delays neither lists, nor figures, nor anybody else."""

from __future__ import annotations

import asyncio
import time

import pytest
from manager_bench import Bench, document, until

from kvik.conf.enums import DomainState
from kvik.errors import HypervisorError, OperationTimeout
from kvik.hypervisor.test.driver import Behaviour
from kvik.manager import figures, recover


async def two(bench: Bench) -> None:
    for name in ("a", "b"):
        await (await bench.manager.define(document(name))).start()
    bench.driver.machines["a"].hang()


async def test_reads_of_a_stuck_machine_answer_at_once(bench: Bench) -> None:
    await two(bench)
    stuck = bench.manager.lookup_name("a")
    began = time.monotonic()
    for _ in range(100):
        assert [domain.name for domain in bench.manager.domains()] == ["a", "b"]
        assert stuck.info().state == DomainState.RUNNING
        assert "<name>a</name>" in stuck.xml()
    assert time.monotonic() - began < 3  # a command to it would take its deadline of 5 s


async def test_figures_of_all_wait_for_a_stuck_machine_once_and_shortly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "DEADLINE", 0.1)
    await two(bench)
    domains = bench.manager.domains()
    began = time.monotonic()
    stuck, fine = await bench.manager.all_stats(domains)
    first = time.monotonic() - began
    began = time.monotonic()
    await bench.manager.all_stats(domains)
    second = time.monotonic() - began
    assert first < 0.5 and second < 0.09
    assert stuck["state.state"] == DomainState.RUNNING and "net.count" not in stuck
    assert "vcpu.0.time" in fine
    assert bench.driver.machines["a"].commands.count("stats") == 1, "questions must not pile up"


async def test_after_it_recovers_a_machine_tells_figures_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DEADLINE", 0.02)
    await two(bench)
    domain = bench.manager.lookup_name("a")
    assert "vcpu.0.time" not in await domain.stats()
    bench.driver.machines["a"].release()
    await asyncio.sleep(0.01)
    one = (await domain.stats())["cpu.time"]
    await asyncio.sleep(0.005)
    other = (await domain.stats())["cpu.time"]
    assert isinstance(one, int) and isinstance(other, int) and other > one > 0


async def test_other_machines_live_on_while_one_is_stuck(bench: Bench) -> None:
    await two(bench)
    waiting = asyncio.create_task(bench.manager.lookup_name("a").suspend())
    await asyncio.sleep(0)
    other = bench.manager.lookup_name("b")
    began = time.monotonic()
    await other.suspend()
    await other.resume()
    await bench.manager.define(document("c"))
    await other.destroy()
    assert time.monotonic() - began < 3  # the stuck one's command fails after 5 s
    waiting.cancel()


async def test_a_stuck_machine_can_be_redefined_and_destroyed(bench: Bench) -> None:
    await two(bench)
    domain = bench.manager.lookup_name("a")
    waiting = asyncio.create_task(domain.suspend())
    await asyncio.sleep(0)
    await bench.manager.define(document("a", memory=999424))
    await domain.destroy()
    assert domain.state == DomainState.SHUTOFF
    with pytest.raises((HypervisorError, OperationTimeout)):
        await waiting
    await domain.start()
    assert domain.info().max_mem_kib == 999424


async def test_a_vmm_stuck_while_the_daemon_comes_back_delays_nobody_and_is_not_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "ATTACH_WAIT", 0.05)
    monkeypatch.setattr(recover, "RETRY_FIRST", 0.02)
    await two(bench)
    attach, silent = bench.driver.attach, asyncio.Event()

    async def slow(definition, directory, handle, sink):
        if definition.name == "a" and not silent.is_set():
            await asyncio.sleep(60)
        return await attach(definition, directory, handle, sink)

    monkeypatch.setattr(bench.driver, "attach", slow)
    await bench.kill()
    began = time.monotonic()
    manager = await bench.open()
    assert time.monotonic() - began < 10  # of the 60 s that it stays silent
    stuck = manager.lookup_name("a")
    assert stuck.is_active and "does not answer" in stuck.reason_text
    with pytest.raises(HypervisorError.__base__):  # a clear error, at once
        await stuck.suspend()
    bench.driver.machines["a"].release()
    silent.set()
    await until(lambda: stuck.accelerator)
    await stuck.suspend()
    assert stuck.state == DomainState.PAUSED


async def test_slow_commands_run_side_by_side(bench: Bench) -> None:
    names = "abcdefgh"
    for name in names:
        bench.driver.behaviours[name] = Behaviour(command_delay=0.5)
        await (await bench.manager.define(document(name))).start()
    began = time.monotonic()
    await asyncio.gather(*(bench.manager.lookup_name(name).suspend() for name in names))
    assert time.monotonic() - began < 0.5 * len(names) - 1
