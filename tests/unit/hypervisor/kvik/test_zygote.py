"""When the daemon's zygote is made, used and replaced."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import pytest

from kvik.hypervisor.kvik import zygote as module
from kvik.hypervisor.kvik.zygote import ZygoteKeeper, identity

FAKE = """
import json, os, socket, sys
channel = socket.socket(fileno=int(sys.argv[-1]))
def say(*fds, **fields): socket.send_fds(channel, [json.dumps(fields).encode()], fds)
say(zygote=1, renames=True)
while socket.recv_fds(channel, 1 << 18, 253)[0]:
    say(os.pidfd_open(os.getpid()), pid=os.getpid())
"""


def keeper(tmp_path: Path, made_of: list[int], text: str = FAKE) -> ZygoteKeeper:
    path = tmp_path / "fake.py"
    path.write_text(text)
    return ZygoteKeeper([sys.executable, "-I", str(path)], lambda: made_of[0])


async def until_ready(kept: ZygoteKeeper) -> None:
    async with asyncio.timeout(30):
        while not kept.pid:
            await asyncio.sleep(0.01)


async def test_it_is_made_when_it_is_first_missed_and_used_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvik")
    kept = keeper(tmp_path, [1])
    assert await kept.fork("m", ["x"], {}, {}) is None
    assert "machine m is executed, not forked: there is no zygote yet" in caplog.text
    assert await kept.fork("n", ["x"], {}, {}) is None
    assert "machine n is executed, not forked: the zygote is not ready yet" in caplog.text
    await until_ready(kept)
    handle = await kept.fork("o", ["x"], {}, {})
    assert handle is not None
    assert handle.pid == kept.pid  # the fake one answers with itself
    handle.close()
    await kept.close()
    assert not kept.pid
    kept.warm()
    assert await kept.fork("p", ["x"], {}, {}) is None


async def test_other_code_on_disk_means_another_zygote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    made_of = [1]
    kept = keeper(tmp_path, made_of)
    kept.warm()
    await until_ready(kept)
    old = kept.pid
    made_of[0] = 2
    assert await kept.fork("m", ["x"], {}, {}) is None
    await until_ready(kept)
    assert kept.pid != old
    await kept.close()


async def test_one_that_is_missed_too_soon_after_another_comes_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of = [1]
    kept = keeper(tmp_path, made_of)
    kept.warm()
    await until_ready(kept)
    monkeypatch.setattr(module, "PAUSE", 3.0)
    old, made_of[0] = kept.pid, 2
    assert await kept.fork("m", ["x"], {}, {}) is None
    assert kept._making is None
    await until_ready(kept)  # nobody asks again
    assert kept.pid != old
    await kept.close()


async def test_one_that_cannot_be_made_is_not_tried_all_the_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 1000.0)
    kept = keeper(tmp_path, [1], "raise SystemExit('broken')")
    kept._tried = -1000.0
    for _ in range(3):
        kept.warm()
        async with asyncio.timeout(30):
            while kept._making is not None:
                await asyncio.sleep(0.01)
    assert caplog.text.count("no zygote could be made: the zygote ended (exit code 1): broken") == 1
    assert await kept.fork("m", ["x"], {}, {}) is None
    await kept.close()


async def test_closing_amid_the_making_leaves_nothing(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    kept = keeper(tmp_path, [1], "import time\ntime.sleep(1000)")
    kept.warm()
    await asyncio.sleep(0)
    await kept.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_identity_of_a_program_is_its_code(tmp_path: Path) -> None:
    package = tmp_path / "kvik"
    for name in ("kvm", "qmp", "image", "host", "vmm/virtio", "vmm/__pycache__", "conf"):
        (package / name).mkdir(parents=True)
    file = package / "vmm/virtio/blk.py"
    file.write_text("a")
    before = identity(package, sys.executable)
    (package / "vmm/__pycache__/x.py").write_text("")
    (package / "vmm/notes.txt").write_text("")
    (package / "conf/domain.py").write_text("")  # no machine imports it
    assert identity(package, sys.executable) == before
    file.write_text("b2")
    changed = identity(package, sys.executable)
    assert changed != before
    (package / "vmm/new.py").write_text("")
    assert identity(package, sys.executable) != changed
    assert identity(package, "/bin/sh") != identity(package, sys.executable)
    with pytest.raises(OSError, match="nowhere"):
        identity(tmp_path / "nowhere", sys.executable)
