"""The interactive shell and completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik.cli import completion
from kvik.cli.context import Context, Quit
from kvik.cli.options import UsageError
from kvik.cli.shell import Shell, split


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("list --all", [["list", "--all"]]),
        ("list; nodeinfo ;", [["list"], ["nodeinfo"]]),
        ("echo 'a b' \"c;d\"", [["echo", "a b", "c;d"]]),
        (r"echo a\ b \"", [["echo", "a b", '"']]),
        (r'echo "a\"b"', [["echo", 'a"b']]),
        ("echo ''", [["echo", ""]]),
        ("# nothing", []),
        ("list # rest", [["list"]]),
        ("echo a#b", [["echo", "a#b"]]),
        ("", []),
        (";;", []),
    ],
)
def test_lines_are_split_as_virsh_does(line: str, commands: list[list[str]]) -> None:
    assert split(line) == commands


def test_an_open_quote_is_an_error() -> None:
    with pytest.raises(UsageError, match="missing closing quote"):
        split("echo 'a")


@pytest.fixture
def shell(kvik: Any) -> Any:
    kvik("pwd")
    return Shell(kvik.context)


def test_commands_of_one_line_stop_at_the_first_failure(kvik: Any, shell: Any) -> None:
    assert shell.run_line("suspend tiny-1; dominfo nope; resume tiny-1") == 1
    assert kvik.connection.made("suspend")
    assert not kvik.connection.made("resume")


def test_the_shell_reads_lines_until_quit(kvik: Any) -> None:
    kvik("pwd", stdin="suspend tiny-1\n\nquit\nresume tiny-1\n")
    assert Shell(kvik.context).loop() == 0
    assert kvik.connection.made("suspend")
    assert not kvik.connection.made("resume")


def test_the_end_of_input_ends_the_shell_with_the_last_code(kvik: Any) -> None:
    kvik("pwd", stdin="dominfo nope\n")
    assert Shell(kvik.context).loop() == 1


@pytest.mark.parametrize("word", ["quit", "exit"])
def test_quit_and_exit_leave(kvik: Any, word: str) -> None:
    with pytest.raises(Quit):
        kvik(word)


def test_cd_only_in_the_shell(kvik: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert kvik("cd", "--dir", str(tmp_path)) == 1
    assert "only in interactive mode" in kvik.err
    shell = Shell(kvik.context)
    shell.context.interactive = True
    shell.run_line(f"cd {tmp_path}")
    assert Path.cwd() == tmp_path
    assert shell.run_line("cd /nonexistent") == 1


def test_connect_replaces_the_connection(kvik: Any, shell: Any) -> None:
    shell.run_line("domname 3; connect kvik:///session --readonly")
    assert kvik.connection.made("close")
    assert (shell.context.uri, shell.context.readonly) == ("kvik:///session", True)


def test_completion_in_the_shell(kvik: Any, shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.candidates("susp") == ["suspend"]
    assert shell.candidates("list; dominfo ") == ["tiny-1", "web"]
    assert shell.candidates("start ") == ["web"]
    assert shell.candidates("suspend ") == ["tiny-1"]
    (tmp_path / "a.xml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert shell.candidates("define ") == ["a.xml"]


# the shell's own completion


def names(kvik: Any, *words: str) -> list[str]:
    kvik("pwd")
    return [name for name, _ in completion.complete(list(words), kvik.context)]


def test_verbs_and_options_complete(kvik: Any) -> None:
    assert "nodeinfo" in names(kvik, "node")
    assert names(kvik, "list", "--ina") == ["--inactive"]
    assert "--all" not in names(kvik, "list", "--all", "--")
    assert "--connect" in names(kvik, "--")
    assert names(kvik, "-c", "kvik:///session", "dominfo", "w") == ["web"]
    assert names(kvik, "nonsense", "") == []


def test_values_complete(kvik: Any) -> None:
    assert names(kvik, "reboot", "tiny-1", "--mode", "a") == ["acpi", "agent"]
    assert names(kvik, "reboot", "--mode=a") == ["--mode=acpi", "--mode=agent"]
    assert names(kvik, "domblkinfo", "tiny-1", "v") == ["vda"]
    assert names(kvik, "domifstat", "tiny-1", "") == ["vnet0", "52:54:00:aa:bb:cd"]
    assert names(kvik, "help", "dom")[:2] == ["domdisplay", "domfsinfo"]
    assert names(kvik, "send-key", "tiny-1", "KEY_LEFTC") == ["KEY_LEFTCTRL"]
    assert "lifecycle" in names(kvik, "event", "--event", "")
    assert names(kvik, "define", "") == [completion.FILES]
    assert names(kvik, "exec", "tiny-1", "--", "l") == [completion.FILES]


def test_names_of_networks_complete(kvik: Any) -> None:
    assert names(kvik, "net-dumpxml", "") == ["lan", "lab"]
    assert names(kvik, "net-start", "") == ["lab"]
    assert names(kvik, "net-destroy", "l") == ["lan"]
    assert names(kvik, "net-name", "1") == ["11111111-2222-3333-4444-555555555555"]
    assert names(kvik, "net-event", "--network", "la") == ["lan", "lab"]
    assert names(kvik, "net-event", "--event", "m") == ["metadata-change"]
    assert names(kvik, "net-update", "lan", "add-") == ["add-first", "add-last"]
    assert names(kvik, "net-update", "lan", "add", "dns-") == ["dns-host", "dns-txt", "dns-srv"]
    assert names(kvik, "net-port-dumpxml", "lan", "") == ["99999999-8888-7777-6666-555555555555"]
    assert "net-dhcp-leases" in names(kvik, "net-d")


def test_completing_never_prints_an_error_or_starts_a_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def connect(uri: Any, *, readonly: bool, autostart: bool) -> Any:
        asked.append(autostart)
        raise OSError("nobody there")

    monkeypatch.setattr("kvik.client.connect", connect)
    for verb in ("dominfo", "net-info"):
        assert completion.complete_main([verb, ""]) == 0
    assert completion.complete_main(["net-port-delete", "lan", ""]) == 0
    assert asked == [False] * 3
    assert capsys.readouterr() == ("", "")


def test_a_name_that_could_break_the_shells_line_is_not_offered(kvik: Any) -> None:
    kvik.connection.running.name = "a\nb"
    assert names(kvik, "dominfo", "") == ["web"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_ask_the_hidden_verb(kvik: Any, shell: str) -> None:
    kvik("completion", shell)
    assert "__complete" in kvik.out


def test_the_bash_script_works(tmp_path: Path) -> None:
    import shutil
    import subprocess
    import sys

    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    import kvik

    src = Path(kvik.__file__).parent.parent
    fake = tmp_path / "kvik"
    fake.write_text(f'#!/bin/sh\nPYTHONPATH={src} exec {sys.executable} -m kvik.cli.main "$@"\n')
    fake.chmod(0o755)
    script = f"""
    source <({fake} completion bash)
    COMP_WORDS=({fake} list --ina); COMP_CWORD=2
    _kvik_complete
    echo "${{COMPREPLY[@]}}"
    """
    result = subprocess.run([bash, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "--inactive\n", result.stderr


def test_unknown_shell(kvik: Any) -> None:
    assert kvik("completion", "tcsh") == 1
    assert "bash, fish, zsh" in kvik.err


def test_history_is_kept_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Shell(Context())._history_path() == f"{tmp_path}/kvik/history"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Shell(Context())._history_path() == str(Path("~/.cache/kvik/history").expanduser())
