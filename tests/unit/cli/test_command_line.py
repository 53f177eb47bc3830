"""Global options, the fast paths, and what a command does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvik
from kvik.cli.context import Context
from kvik.cli.main import GLOBALS, main, parse_globals
from kvik.cli.options import UsageError

SRC = Path(kvik.__file__).parent.parent


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(SRC)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
        check=False,
    )


def test_list_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = {
        "lxml", "asyncio", "msgspec", "rich", "argparse", "dataclasses", "inspect", "subprocess", "xml", "json",
        "difflib", "logging", "uvloop", "ctypes",
    }  # fmt: skip
    code = (
        "from kvik.cli.main import main; code = main(['-c', 'qemu+unix:///system?socket=/nonexistent', 'list']);"
        "print('\\n'.join(sys.modules)); print(code)"
    )
    result = python(code)
    loaded = set(result.stdout.split())
    assert "kvik.client.connection" in loaded, result
    assert loaded & heavy <= set()
    assert result.stdout.split()[-1] == "1"
    assert "error: Failed to list domains" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_imports_next_to_nothing() -> None:
    loaded = set(
        python("from kvik.cli.main import main; main(['--version']); print('\\n'.join(sys.modules))").stdout.split()
    )
    assert {name for name in loaded if name.startswith("kvik")} == {"kvik", "kvik.cli", "kvik.cli.main"}
    assert not loaded & {"re", "typing", "argparse", "socket", "pathlib"}


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
        "from kvik.cli.main import main; sys.exit(main(['help']))"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (141, "")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvik.cli.main._main", interrupted)
    assert main(["list"]) == 130


@pytest.mark.parametrize("words", [["--version"], ["-v"], ["--version=short"]])
def test_version(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"{kvik.__version__}\n"


@pytest.mark.parametrize("words", [["-V"], ["--version=long"]])
def test_long_version(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    assert "Hypervisors:" in capsys.readouterr().out


def test_help_lists_every_global_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in GLOBALS)


def test_a_verbs_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--help"]) == 0
    assert "--force-boot" in capsys.readouterr().out


def parsed(*words: str) -> tuple[Context, list[str]]:
    context = Context()
    return context, parse_globals(list(words), context)[0]


def test_global_options() -> None:
    context, rest = parsed("-c", "kvik:///session", "-rqt", "-e", "^A", "--json", "--no-color", "list", "--all")
    assert rest == ["list", "--all"]
    assert (context.uri, context.readonly, context.quiet, context.timing) == ("kvik:///session", True, True, True)
    assert (context.escape, context.json, context.colour) == ("^A", True, False)
    assert parsed("--connect=x", "--readonly", "--quiet", "--timing", "--escape=^B")[0].uri == "x"
    assert parsed("-cx", "list")[0].uri == "x"


def test_a_log_file(tmp_path: Path) -> None:
    parsed("-d", "0", "-l", str(tmp_path / "log"), "list")
    assert (tmp_path / "log").exists()
    parsed("--debug=4", f"--log={tmp_path}/log2")


@pytest.mark.parametrize("words", [["--conect=x"], ["-c"], ["-Z"]])
def test_wrong_global_options(words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parsed(*words)
    if words == ["--conect=x"]:
        assert "--connect" in error.value.remedy


def test_one_word_of_several_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo a; echo 'b c'"]) == 0
    assert capsys.readouterr().out == "a\nb c\n"
    assert main(["quit"]) == 0


def test_readonly_and_uri_reach_the_connection() -> None:
    seen: list[Any] = []
    context = Context(uri="kvik:///x", readonly=True, connector=lambda *args: seen.append(args))
    _ = context.connection
    assert seen == [("kvik:///x", True)]


def test_no_help_page_is_wider_than_a_terminal(kvik: Any) -> None:
    from kvik.cli.main import load
    from kvik.cli.options import describe
    from kvik.cli.verbs import VERBS

    for name, (_, _, summary) in VERBS.items():
        page = describe(name, "", load(name))
        described = {line.strip() for line in load(name).description.splitlines()}
        wide = [
            line for line in page.splitlines() if len(line) > 80 and (name == "run" or line.strip() not in described)
        ]
        assert not wide, (name, summary, wide)


def test_virshs_commands_that_are_still_to_come_are_said_to_be(kvik: Any) -> None:
    from kvik.cli.main import ABSENT
    from kvik.cli.verbs import VERBS

    assert not ABSENT & set(VERBS)
    assert kvik("migrate", "tiny-1") == 1
    assert "kvik has no 'migrate' yet" in kvik.err
