"""Tables fit, hostile text stays text, colours are for terminals, errors say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvik.cli import term
from kvik.cli.suggest import distance, nearest
from kvik.cli.table import SMALLEST, Table
from kvik.errors import ConfigError, OperationInvalid


def test_a_table_looks_as_virsh_draws_it() -> None:
    table = Table("Id", "Name", "State").add(1, "test", "running")
    assert table.render() == " Id   Name   State\n----------------------\n 1    test   running\n"


def test_quiet_leaves_header_and_its_width_out() -> None:
    assert Table("Id", "Name").add(1, "a").render(header=False) == " 1   a\n"
    assert Table("Id", "Name").render(header=False) == ""


@pytest.mark.parametrize("limit", [20, 30, 40, 60, 80])
def test_rows_fit_the_terminal_while_columns_can_give(limit: int) -> None:
    table = Table("Name", "Source").add("machine-with-a-long-name", "/a/very/long/path/" + "x" * 100).add("b", "c")
    lines = table.render(limit=limit).splitlines()
    assert max(term.width(line) for line in lines) <= max(limit, 2 * SMALLEST + 6)
    assert any("…" in line for line in lines)


def test_a_header_that_is_longer_than_its_values_gives_way_first() -> None:
    table = Table("Name", "Autostart", "Capacity").add("images", "yes", "251.97 GiB")
    assert term.width(table.render().splitlines()[0]) == 30
    assert table.render(limit=31).splitlines()[0] == " Name     Autos…   Capacity"
    assert table.render(limit=31).splitlines()[2] == " images   yes      251.97 GiB"
    assert "251.9…" in table.render(limit=20)


def test_nothing_is_clipped_into_a_pipe() -> None:
    assert "x" * 300 in Table("Name").add("x" * 300).render(limit=None)


def test_wide_characters_keep_columns_straight() -> None:
    lines = Table("Name", "S").add("機械", "a").add("plain", "b").render().splitlines()
    assert lines[2] == " 機械    a"
    assert term.width(lines[2]) == term.width(lines[3])
    assert term.width("e\u0301") == 1
    assert term.clip("機械機械", 5) == "機械…"


@pytest.mark.parametrize(
    "hostile",
    ["\x1b]0;owned\x07", "a\rb", "a\nb", "\x9b31m", "\u202egpj", "\u2066x", "a\x00b", "\ud800", "\u2028"],
)
def test_no_character_that_drives_a_terminal_gets_through(hostile: str) -> None:
    shown = term.neutralise(hostile)
    assert shown.isprintable()
    assert shown != hostile
    cell = Table("Name").add(hostile).render()
    assert cell.count("\n") == 3
    assert "\x1b" not in cell


def test_a_hostile_machine_name_is_escaped_wherever_it_is_printed(kvik: Any) -> None:
    evil = "x\x1b[2Jy"
    kvik.connection.rows = [kvik.connection.rows[1]._replace(name=evil, title=evil, address=evil)]
    kvik.connection.running.name = evil
    kvik.connection.replies["domain"] = lambda key: kvik.connection.running
    for line in (["list", "--title"], ["list", "--name"], ["ps"], ["dominfo", "3"], ["domname", "3"], ["domstats"]):
        assert kvik(*line) == 0
        assert "\x1b" not in kvik.out, line
        assert "x\\x1b[2Jy" in kvik.out, line


def test_a_document_is_untouched_in_a_pipe_and_harmless_on_a_terminal(kvik: Any) -> None:
    kvik.connection.replies["xml"] = "<a>\u009b31m</a>\n"
    kvik("dumpxml", "tiny-1")
    assert "\u009b" in kvik.out
    kvik("dumpxml", "tiny-1", tty=True)
    assert "\u009b" not in kvik.out
    assert "<a>\\x9b31m</a>\n" in kvik.out


def test_colour_is_for_terminals_without_no_color(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    kvik("list")
    assert "\x1b" not in kvik.out
    kvik("list", tty=True)
    assert "\x1b[32mrunning\x1b[0m" in kvik.out
    kvik("list", "--no-color", tty=True)
    assert "\x1b" not in kvik.out
    kvik("--no-color", "list", tty=True)
    assert "\x1b" not in kvik.out
    monkeypatch.setenv("NO_COLOR", "1")
    kvik("list", tty=True)
    assert "\x1b" not in kvik.out


def test_quiet_prints_data_and_nothing_else(kvik: Any) -> None:
    kvik("-q", "start", "web")
    assert kvik.out == ""
    kvik("-q", "domname", "3")
    assert kvik.out == "tiny-1\n"


def test_timing_ends_with_the_time(kvik: Any) -> None:
    kvik("-t", "domname", "3")
    assert kvik.out.startswith("tiny-1\n\n(Time: ")


def test_an_action_has_json_too(kvik: Any) -> None:
    kvik("start", "web", "--json")
    assert json.loads(kvik.out) == {"message": "Domain 'web' started"}


def test_list_as_json_says_how_machines_run(kvik: Any) -> None:
    kvik("list", "--all", "--json")
    rows = json.loads(kvik.out)
    assert rows[0]["acceleration"] == "emulation"
    assert rows[0]["address"] == "10.0.2.15"
    assert rows[1]["id"] is None


def test_columns_are_virshs_where_nothing_is_emulated(kvik: Any) -> None:
    kvik.connection.rows = [row._replace(accelerator="kvm") for row in kvik.connection.rows]
    kvik("list", "--all")
    assert kvik.out.splitlines()[0] == " Id   Name     State"


def test_echo_to_stderr(kvik: Any) -> None:
    kvik("echo", "--err", "x")
    assert (kvik.out.strip(), kvik.err) == ("", "x\n")


# errors


def test_an_error_says_what_failed_why_and_what_to_do(kvik: Any) -> None:
    kvik.connection.replies["start"] = OperationInvalid("no memory left", remedy="stop another machine")
    assert kvik("start", "web") == 1
    assert kvik.err == ("error: Failed to start domain 'web'\nerror: no memory left\nhint: stop another machine\n")


def test_a_document_error_says_where(kvik: Any, tmp_path: Any) -> None:
    kvik.connection.replies["define"] = ConfigError("bad bus", line=7, path="/domain/devices/disk")
    file = tmp_path / "d.xml"
    file.write_text("<domain/>")
    assert kvik("define", str(file)) == 1
    assert "error: line 7, at /domain/devices/disk: bad bus\n" in kvik.err


def test_errors_as_json(kvik: Any) -> None:
    assert kvik("--json", "dominfo", "nope") == 1
    assert json.loads(kvik.err) == {
        "error": "failed to get domain 'nope'",
        "hint": "'kvik list --all' shows every machine",
    }


def test_a_missing_or_huge_or_binary_file_is_an_error_with_its_name(kvik: Any, tmp_path: Any) -> None:
    assert kvik("define", str(tmp_path / "nope.xml")) == 1
    assert "No such file or directory" in kvik.err
    (tmp_path / "big.xml").write_bytes(b" " * ((10 << 20) + 1))
    assert kvik("define", str(tmp_path / "big.xml")) == 1
    assert "larger than 10 MiB" in kvik.err
    (tmp_path / "bin.xml").write_bytes(b"\xff\xfe")
    assert kvik("define", str(tmp_path / "bin.xml")) == 1
    assert "not UTF-8" in kvik.err


def test_a_document_comes_from_standard_input(kvik: Any) -> None:
    assert kvik("define", "-", stdin="<domain>x</domain>") == 0
    assert kvik.connection.made("define") == [("define", "<domain>x</domain>", 0)]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["lisst"], "unknown command: 'lisst'", "did you mean 'list'?"),
        (["suspnd", "x"], "unknown command: 'suspnd'", "did you mean 'suspend'?"),
        (["list", "--al"], "command 'list' doesn't support option --al", "did you mean --all?"),
        (["dominfo", "tiny-2"], "failed to get domain 'tiny-2'", "did you mean 'tiny-1'?"),
        (["dominfo"], "command 'dominfo' requires <domain> option", "see 'kvik help dominfo'"),
        (["list", "x"], "unexpected data 'x'", ""),
        (["help", "strat"], "command or command group 'strat' doesn't exist", "did you mean 'start'?"),
        (["start"], "command 'start' requires <domain> option", ""),
        (["setvcpus", "tiny-1", "x"], "Numeric value 'x' for <count> option is malformed or out of range", ""),
        (["setmem", "tiny-1", "5Q"], "Scaled numeric value '5Q' for <size> option is malformed", ""),
        (["setmem", "tiny-1", "18446744073709551616"], "is malformed or out of range", ""),
        (["shutdown", "tiny-1", "--mode", "x"], "Unknown mode x value", ""),
        (["attach-interface", "tiny-1", "bridge"], "requires <source> option", ""),
        (["start", "tiny-1"], "Domain is already active", "kvik console tiny-1"),
        (["list", "--all=1"], "invalid '=' after option --all", ""),
        (["desc", "--domain"], "expected syntax: --domain <string>", ""),
        (["list", "--name", "--table"], "Only one argument from", ""),
        (["attach-device", "tiny-1", "x", "--live", "--current"], "mutually exclusive", ""),
        (["event", "--event", "lifecicle"], "unknown event type lifecicle", "did you mean lifecycle?"),
        (["send-key", "tiny-1", "KEY_EMTER"], "invalid keycode: 'KEY_EMTER'", "KEY_ENTER"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_the_next_step_suggested(kvik: Any, words: list[str], error: str, hint: str) -> None:
    assert kvik(*words) == 1
    assert error in kvik.err
    assert hint in kvik.err


def test_nearest_is_near() -> None:
    assert distance("abc", "acb") == 1
    assert distance("", "abc") == 3
    assert nearest("xyzzy", ["list", "start"]) is None
    assert nearest("tiny1", ["tiny-1", "tiny-10"]) == "tiny-1"


@pytest.mark.parametrize(
    ("text", "limit", "lines"),
    [
        ("short", 20, ["short"]),
        ("a sentence that is longer than the line", 20, ["a sentence that is", "  longer than the", "  line"]),
        ("x" * 30 + " y", 20, ["x" * 30, "  y"]),
        ("  indented sentence goes on", 20, ["  indented sentence", "  goes on"]),
    ],
)
def test_long_lines_break_between_words(text: str, limit: int, lines: list[str]) -> None:
    assert term.wrap(text, limit, "  ").split("\n") == lines


def test_define_warns_of_what_it_does_not_understand(kvik: Any, tmp_path: Path) -> None:
    kvik.connection.replies["messages"] = ["/domain/devices/teapot: unknown element, kept but without effect"]
    file = tmp_path / "web.xml"
    file.write_text("<domain/>")
    assert kvik("define", str(file)) == 0
    assert "warning: /domain/devices/teapot" in kvik.err
    assert "defined from" in kvik.out
