"""`./kvik` and `scripts/bootstrap`, in a copy of the clone, with a pip that only pretends.

The interpreter is real and so is the virtual environment; the installer is a script on PATH called `uv`, so that
nothing is fetched and each step can be made to fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_UV = """#!/bin/sh
echo "uv $*" >>"$FAKE_LOG"
case $1 in
--version) echo uv ;;
venv) while [ $# -gt 1 ]; do [ "$1" = --python ] && python=$2; shift; done; exec "$python" -m venv --without-pip "$1" ;;
pip) [ -z "${FAKE_SLEEP:-}" ] || sleep "$FAKE_SLEEP" ;;
esac
exit "${FAKE_EXIT:-0}"
"""
MAIN = "import sys\n\ndef main():\n    print('ran', sys.argv[1:], sys.flags.isolated)\n    return 5\n"


class Clone:
    """A copy of what the launcher needs."""

    def __init__(self, path: Path, tools: Path) -> None:
        self.path = path
        self.log = tools / "log"
        for name in ("kvik", "scripts/bootstrap", "requirements/run.txt"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
        for package in ("cli", "daemon"):
            (path / "src/kvik" / package).mkdir(parents=True)
            (path / "src/kvik" / package / "__init__.py").touch()
        (path / "src/kvik/__init__.py").touch()
        (path / "src/kvik/cli/main.py").write_text(MAIN)
        (tools / "uv").write_text(FAKE_UV)
        (tools / "uv").chmod(0o755)
        (tools / "python3.13").symlink_to(sys.executable)
        self.environment = {
            "PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(tools),
            "FAKE_LOG": str(self.log),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.path / "kvik"), *words],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installs(self) -> int:
        return self.log.read_text().count("uv pip install") if self.log.exists() else 0


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    (tmp_path / "tools").mkdir()
    (tmp_path / "a clone").mkdir()  # a blank in the path is where shebang lines break
    return Clone(tmp_path / "a clone", tmp_path / "tools")


def test_the_first_run_makes_the_environment_and_the_second_finds_it(clone: Clone) -> None:
    code, out, err = clone.run("list", "--name", "a b")
    assert (code, out) == (5, "ran ['list', '--name', 'a b'] 1\n"), err
    assert "making a private Python environment" in err
    assert clone.run("x")[::2] == (5, "")
    assert clone.installs == 1


def test_bytecode_is_compiled_even_where_the_variable_forbids_it(clone: Clone) -> None:
    clone.run("x")
    assert list((clone.path / "src").rglob("main.*.pyc"))


def test_the_installed_scripts_run_by_themselves_from_anywhere(clone: Clone) -> None:
    clone.run("x")
    done = subprocess.run(
        [clone.path / ".kvik/env/bin/kvik", "a"],
        cwd="/",
        env=clone.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "ran ['a'] 1\n")


def test_a_link_to_the_launcher_works(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(clone.path / "kvik")
    done = subprocess.run([tmp_path / "link"], env=clone.environment, capture_output=True, check=False)
    assert done.returncode == 5


def test_kvik_img_beside_it_is_the_verb_in_one_word(clone: Clone, tmp_path: Path) -> None:
    assert (ROOT / "kvik-img").readlink() == Path("kvik")
    (clone.path / "kvik-img").symlink_to("kvik")
    (tmp_path / "kvik-img").symlink_to(clone.path / "kvik-img")
    for place in (clone.path, tmp_path):
        done = subprocess.run(
            [place / "kvik-img", "info", "a b"], env=clone.environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (5, "ran ['img', 'info', 'a b'] 1\n")


def test_a_changed_lock_makes_a_new_environment_and_keeps_the_one_before(clone: Clone) -> None:
    clone.run("x")
    first = (clone.path / ".kvik/env").resolve()
    time.sleep(0.02)
    with (clone.path / "requirements/run.txt").open("a") as stream:
        stream.write("# changed\n")
    assert clone.run("x")[0] == 5
    second = (clone.path / ".kvik/env").resolve()
    assert second != first and first.exists() and clone.installs == 2


def test_a_touched_lock_costs_no_new_environment(clone: Clone) -> None:
    clone.run("x")
    os.utime(clone.path / "requirements/run.txt", (time.time() + 5, time.time() + 5))
    assert clone.run("x")[0] == 5
    assert clone.installs == 1


def test_killed_halfway_the_next_run_begins_anew(clone: Clone) -> None:
    process = clone.start("x", FAKE_SLEEP="30")
    deadline = time.monotonic() + 20
    while clone.installs == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (clone.path / ".kvik/env").exists()
    assert clone.run("x")[0] == 5
    assert not list((clone.path / ".kvik").glob(".new-*"))


def test_two_at_once_install_once(clone: Clone) -> None:
    both = [clone.start("x", FAKE_SLEEP="1") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (5, "ran ['x'] 1\n"), err
    assert clone.installs == 1


def test_no_python_and_no_root_prints_the_command(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    (tools / "python3.13").unlink()
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")
    (tools / "id").chmod(0o755)
    for name in ("sh", "dirname", "mkdir", "printf", "readlink", "cat", "env"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/false")
    (tools / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    (tools / "apt-get").chmod(0o755)
    code, _, err = clone.run("x", PATH=str(tools))
    assert code == 77
    assert "sudo apt-get update && sudo apt-get install -y --no-install-recommends python3" in err


@pytest.mark.parametrize("shell", ["dash", "sh", "bash"])
@pytest.mark.parametrize("script", ["kvik", "scripts/bootstrap", "scripts/test", "scripts/lock"])
def test_the_scripts_are_good_shell(shell: str, script: str) -> None:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not on this system")
    subprocess.run([found, "-n", ROOT / script], check=True)
