"""Processes: identity, signals, deadlines, bounds."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kvik.errors import HostError, OperationTimeout
from kvik.host import process, tools

SLEEP = ["sleep", "60"]
STUBBORN = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]


def wait_gone(pid: int, timeout: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        stat = process.read_stat(pid)
        if stat is None or stat.ended:
            return True
        time.sleep(0.01)
    return False


def test_a_spawned_process_has_its_own_session_and_an_explicit_environment(tmp_path: Path) -> None:
    out = tmp_path / "env"
    with out.open("wb") as file:
        handle = process.spawn(["env"], env={"ONLY": "this"}, stdout=file.fileno())
        assert handle.wait(5) == 0
    assert out.read_text() == "ONLY=this\n"
    with process.spawn(SLEEP) as handle:
        stat = handle.stat()
        assert stat is not None and stat.session == handle.pid and stat.session != os.getsid(0)
        handle.kill()
        handle.wait(5)


def test_only_named_descriptors_reach_the_child() -> None:
    read, write = os.pipe()
    os.set_inheritable(read, True)
    try:
        listing = tools.run(["ls", "/proc/self/fd"], pass_fds=[write]).text.split()
        assert str(write) in listing
        assert str(read) not in listing
    finally:
        os.close(read)
        os.close(write)


def test_exit_status_of_a_child_and_of_a_killed_child() -> None:
    assert process.spawn(["/bin/sh", "-c", "exit 3"]).wait(5) == 3
    with process.spawn(SLEEP) as handle:
        assert handle.alive
        assert handle.kill()
        assert handle.wait(5) == -signal.SIGKILL
        assert not handle.alive
        assert not handle.kill()
        assert process.describe_exit(handle.code) == "killed by SIGKILL"


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    read, write = os.pipe()
    handle = process.spawn(STUBBORN, stdout=write)
    os.close(write)
    assert os.read(read, 6) == b"ready\n"
    os.close(read)
    started = time.monotonic()
    assert handle.terminate(grace=0.2) == -signal.SIGKILL
    assert 0.2 <= time.monotonic() - started < 5


async def test_an_event_loop_waits_for_several_at_once_without_blocking() -> None:
    handles = [process.spawn(["sleep", "0.2"]) for _ in range(3)]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    ticker = asyncio.create_task(tick())
    # Two waiters on one handle as well.
    codes = await asyncio.gather(*(handle.wait_async(5) for handle in [*handles, handles[0]]))
    ticker.cancel()
    assert codes == [0, 0, 0, 0]
    assert ticks > 5
    with process.spawn(SLEEP) as handle:
        with pytest.raises(OperationTimeout):
            await handle.wait_async(0.05)
        assert await handle.terminate_async() == -signal.SIGTERM


async def test_on_exit_calls_once_and_can_be_cancelled() -> None:
    called: list[int | None] = []
    handle = process.spawn(["/bin/sh", "-c", "exit 7"])
    handle.on_exit(lambda: called.append(handle.code))
    cancelled = handle.on_exit(lambda: called.append(99))
    cancelled()
    cancelled()
    await handle.wait_async(5)
    await asyncio.sleep(0.05)
    assert called == [7]


def test_find_needs_pid_start_time_and_boot() -> None:
    with process.spawn(SLEEP) as handle:
        found = process.find(handle.pid, handle.start_time, process.boot_id())
        assert found is not None and found.alive
        assert process.find(handle.pid, handle.start_time + 1) is None
        assert process.find(handle.pid, handle.start_time, "another-boot") is None
        assert process.find(0, 0) is None
        assert process.find(2**22 + 1, 1) is None
        handle.kill()
        # A zombie that its parent has not reaped is no living machine.
        assert found.wait(5) is None
        assert process.find(handle.pid, handle.start_time) is None
        found.close()
        handle.wait(5)
        assert process.read_stat(handle.pid) is None


@pytest.mark.root
def test_a_reused_pid_is_never_signalled() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: writes /proc/sys/kernel/ns_last_pid in a pid namespace of its own")
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from kvik.host import process, tools
os.system("mount -t proc proc /proc")
first = process.spawn(["sleep", "60"])
pid, started = first.pid, first.start_time
held = process.find(pid, started)
first.kill(); first.wait(5)
import time; time.sleep(0.05)
open("/proc/sys/kernel/ns_last_pid", "w").write(str(pid - 1))
second = process.spawn(["sleep", "60"])
assert second.pid == pid, (second.pid, pid)
assert second.start_time != started
assert process.find(pid, started) is None
assert not held.kill() and not held.alive
assert first.stat() is None
assert second.alive
second.kill(); second.wait(5)
print("held")
"""
    source = str(Path(process.__file__).parents[2])
    done = tools.run(
        ["unshare", "--pid", "--fork", "--mount", sys.executable, "-c", script, source],
        env={**process.BASE_ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    if b"unshare failed" in done.err:
        pytest.skip(f"no pid namespaces here: {done.message}")
    assert done.text == "held\n", done.message


def test_run_returns_both_outputs_and_feeds_input_beyond_the_pipe_size() -> None:
    data = os.urandom(300_000)
    done = tools.run(["/bin/sh", "-c", "cat; echo warned >&2"], input=data)
    assert done.out == data
    assert done.err == b"warned\n"


def test_a_tool_that_closes_its_input_early_is_judged_by_its_exit_status() -> None:
    assert tools.run(["true"], input=b"x" * 1_000_000).code == 0


def test_a_failing_tool_is_reported_in_its_own_words() -> None:
    with pytest.raises(HostError, match=r"sh failed \(exit code 4\): no such bridge"):
        tools.run(["/bin/sh", "-c", "echo no such bridge >&2; exit 4"])
    assert tools.run(["/bin/sh", "-c", "exit 4"], check=False).code == 4


def test_a_missing_tool_is_named() -> None:
    for call in (tools.run, process.spawn):
        with pytest.raises(HostError, match="kvik-no-such-tool") as raised:
            call(["kvik-no-such-tool"])
        assert raised.value.errno == 2


def test_too_much_output_stops_the_tool() -> None:
    started = time.monotonic()
    with pytest.raises(HostError, match="more than 1000 bytes"):
        tools.run(["yes"], limit=1000)
    assert time.monotonic() - started < 5


def test_a_deadline_kills_the_tool_and_its_children_and_keeps_its_words(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(OperationTimeout, match="probing"):
        tools.run(["/bin/sh", "-c", f"echo probing >&2; sleep 60 & echo $! > {note}; trap '' TERM; wait"], timeout=0.3)
    assert wait_gone(int(note.read_text()))


def test_a_grandchild_that_keeps_the_pipe_does_not_hold_up_the_caller() -> None:
    started = time.monotonic()
    done = tools.run(["/bin/sh", "-c", "sleep 3 & echo done"])
    assert done.out == b"done\n"
    assert time.monotonic() - started < 2


async def test_cancelling_an_async_run_kills_the_tool(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    task = asyncio.create_task(tools.run_async(["/bin/sh", "-c", f"echo $$ > {note}; sleep 60"]))
    while not note.exists() or not note.read_text():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert wait_gone(int(note.read_text()))
    assert (await tools.run_async(["echo", "hi"])).out == b"hi\n"


def test_a_closed_handle_leaves_no_zombie_behind() -> None:
    handle = process.spawn(["sleep", "0.05"])
    pid = handle.pid
    handle.close()
    time.sleep(0.2)
    tools.run(["true"])
    assert process.read_stat(pid) is None


def test_a_command_name_with_parentheses_is_read_right(tmp_path: Path) -> None:
    odd = tmp_path / "a) R (b"
    odd.symlink_to("/bin/sleep")
    with process.spawn([str(odd), "60"]) as handle:
        stat = process.read_stat(handle.pid)
        assert stat is not None and stat.name == "a) R (b" and stat.parent == os.getpid()
        handle.kill()
        handle.wait(5)
