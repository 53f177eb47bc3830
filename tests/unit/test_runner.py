"""`pytest -n`: a run of a small copy of this tree, with the same conftest."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="pytest-xdist is not installed: pytest -n cannot be")

TESTS = Path(__file__).parents[1]
SUPPORT = ("conftest.py", "interrupted.py", "order.py", "repeats.py", "schedule.py")


def tree(root: Path, **files: str) -> Path:
    """`unit_a="..."` becomes tests/unit/test_a.py. Each test may write to `NOTES`, which is returned."""
    (root / "pytest.ini").write_text("[pytest]\ntestpaths = tests\naddopts = -ra --import-mode=importlib\n")
    (root / "tests").mkdir()
    for name in SUPPORT:
        shutil.copy(TESTS / name, root / "tests")
    notes = root / "notes"
    for name, body in files.items():
        directory, _, module = name.partition("_")
        path = root / "tests" / directory / f"test_{module}.py"
        path.parent.mkdir(exist_ok=True)
        head = f"import os, time, pathlib, pytest\nNOTES = pathlib.Path({str(notes)!r})\n"
        head += "def note(text):\n    with NOTES.open('a') as file: file.write(text + '\\n')\n"
        path.write_text(head + body)
    return notes


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *options]


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*options), cwd=root, capture_output=True, text=True, timeout=60, check=False)


SLOW = "def test_one(): note('begin {0}'); time.sleep(0.3)\ndef test_two(): time.sleep(0.3); note('end {0}')\n"


def test_files_run_beside_each_other_and_the_lab_at_the_end_by_two(tmp_path: Path) -> None:
    lab = "def test_one(): note(f'lab {os.getpid()}')\ndef test_two(): time.sleep(0.2)\n"
    files = {f"lab_{name}": lab for name in "abcdef"}
    notes = tree(tmp_path, **files, unit_a=SLOW.format("a"), functional_b=SLOW.format("b"))
    done = run(tmp_path, "-n", "3")
    assert done.returncode == 0 and "16 passed" in done.stdout, done.stdout
    lines = notes.read_text().splitlines()
    workers = [line for line in lines if line.startswith("lab")]
    assert {*lines[:3]} == {"begin a", "begin b", workers[0]}, "a worker for which no other file is left begins the lab"
    assert len(workers) == 6 and len(set(workers)) == 2


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_what_was_repeated_is_told_and_a_failure_is_the_exit_code(tmp_path: Path, jobs: str) -> None:
    late = "def test_late():\n    note('x')\n    assert NOTES.read_text() != 'x\\n', 'not yet'\n"
    unit = "def test_skipped(): pytest.skip('no such thing')\ndef test_never(): assert False\n"
    tree(tmp_path, functional_a=late, unit_b=unit)
    done = run(tmp_path, "-n", jobs)
    assert done.returncode == 1 and "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    assert re.search(r"= repeated =+\ntests/functional/test_a.py::test_late: it failed\n", done.stdout)
    assert "AssertionError: not yet" in done.stdout
    assert "SKIPPED [1] tests/unit/test_b.py:5: no such thing" in done.stdout


def test_a_worker_that_crashes_fails_its_test_alone(tmp_path: Path) -> None:
    crash = "def test_crash(): os._exit(3)\ndef test_next(): note('next')\n"
    notes = tree(tmp_path, unit_a=crash, unit_b=SLOW.format("b"), lab_a="def test_last(): note('lab')\n")
    done = run(tmp_path, "-n", "2")
    assert done.returncode == 1 and "1 failed, 4 passed" in done.stdout, done.stdout
    assert re.search("crashed while running 'tests/unit/test_a.py::test_crash'", done.stdout)
    lines = notes.read_text().splitlines()
    assert lines.index("next") < lines.index("lab")


@pytest.mark.parametrize(("jobs", "number"), [("0", signal.SIGHUP), ("2", signal.SIGTERM)])
def test_a_signal_ends_what_the_tests_started(tmp_path: Path, jobs: str, number: int) -> None:
    body = (
        "import subprocess\n"
        "@pytest.fixture\ndef child():\n"
        "    child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    yield child\n    time.sleep(0.2)\n    child.kill()\n    child.wait()\n    note('cleared')\n"
        "def test_waits(child): note(str(child.pid)); child.wait()\n"
    )
    notes = tree(tmp_path, functional_a=body, functional_b=body)
    process = subprocess.Popen(command("-n", jobs), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wanted = max(int(jobs), 1)
    deadline = time.monotonic() + 30
    while not notes.exists() or len(notes.read_text().split()) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = [int(line) for line in notes.read_text().split()]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "KeyboardInterrupt" in out, out
    assert notes.read_text().split()[wanted:] == ["cleared"] * wanted
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_what_is_left_behind_is_told_and_killed() -> None:
    # Not a shell: a signal that comes just before its `wait` is looked at after it.
    lines = (
        "import os, signal, subprocess, time",
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))",
        "subprocess.Popen(['sleep', '600'])",
        "print(subprocess.Popen(['sleep', '601'], start_new_session=True).pid, flush=True)",
        "while True: time.sleep(0.1)",
    )
    reaper = [sys.executable, str(TESTS / "reaper.py"), sys.executable, "-c", "\n".join(lines)]
    process = subprocess.Popen(reaper, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = int(process.stdout.readline())
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 7
    told = [line.split()[3] for line in out.splitlines() if line.startswith("left behind, killed: ")]
    assert len(told) == 2 and str(last) in told
    assert not os.path.exists(f"/proc/{last}")
