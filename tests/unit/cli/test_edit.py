"""Editing: nothing is saved that was not accepted, and nothing typed is lost. Editors here are shell scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik.cli.editor import command
from kvik.errors import ConfigError, NoMetadata


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`editor("sed -i s/a/b/")`: the command gets the file; it counts its runs in `runs`."""
    runs = tmp_path / "runs"

    def script(body: str) -> Path:
        file = tmp_path / "editor.sh"
        file.write_text(f'#!/bin/sh\necho x >> {runs}\nf="$1"\n{body}\n')
        file.chmod(0o755)
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", str(file))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        return runs

    return script


def defined(kvik: Any) -> list[Any]:
    return kvik.connection.made("define")


def test_an_unchanged_document_changes_nothing(kvik: Any, editor: Any) -> None:
    editor("true")
    assert kvik("edit", "tiny-1") == 0
    assert "Domain 'tiny-1' XML configuration not changed." in kvik.out
    assert not defined(kvik)


def test_a_changed_document_is_validated_and_defined(kvik: Any, editor: Any) -> None:
    editor('sed -i s/tiny-1/other/ "$f"')
    assert kvik("edit", "tiny-1") == 0
    assert "XML configuration edited." in kvik.out
    ((_, text, flags),) = defined(kvik)
    assert "<name>other</name>" in text
    assert flags == 1
    assert kvik.connection.made("xml")[0] == ("xml", "tiny-1", 1 | 2)


def test_validation_can_be_left_out(kvik: Any, editor: Any) -> None:
    editor('echo >> "$f"')
    assert kvik("edit", "tiny-1", "--skip-validate") == 0
    assert defined(kvik)[0][2] == 0


def refuse(kvik: Any, times: int) -> None:
    left = [times]

    def define(text: str, flags: int = 0) -> Any:
        if left[0]:
            left[0] -= 1
            raise ConfigError("bad bus", line=3)
        return kvik.connection.off

    kvik.connection.replies["define"] = define


def test_a_refused_document_is_edited_again_with_what_was_typed(kvik: Any, editor: Any) -> None:
    runs = editor('echo "<!-- more -->" >> "$f"')
    refuse(kvik, 1)
    assert kvik("edit", "tiny-1", stdin="y\n") == 0
    assert "error: line 3: bad bus" in kvik.err
    assert "Failed. Try again? [y,n,i,f,?]: " in kvik.err
    assert runs.read_text().count("x") == 2
    assert defined(kvik)[1][1].count("more") == 2


def test_no_throws_the_changes_away(kvik: Any, editor: Any) -> None:
    editor('echo >> "$f"')
    refuse(kvik, 9)
    assert kvik("edit", "tiny-1", stdin="n\n") == 1
    assert len(defined(kvik)) == 1


def test_nobody_there_to_answer_ends_it(kvik: Any, editor: Any) -> None:
    editor('echo >> "$f"')
    refuse(kvik, 9)
    assert kvik("edit", "tiny-1") == 1


def test_ignore_turns_validation_off_and_help_explains(kvik: Any, editor: Any) -> None:
    runs = editor('echo >> "$f"')
    refuse(kvik, 1)
    assert kvik("edit", "tiny-1", stdin="?\ni\n") == 0
    assert "turn off validation" in kvik.err
    assert [call[2] for call in defined(kvik)] == [1, 0]
    assert runs.read_text().count("x") == 1


def test_a_document_changed_meanwhile_needs_force(kvik: Any, editor: Any) -> None:
    editor('echo >> "$f"')
    texts = iter(["<a/>\n", "<changed/>\n"])
    kvik.connection.replies["xml"] = lambda flags=0: next(texts, "<changed/>\n")
    assert kvik("edit", "tiny-1", stdin="f\n") == 0
    assert "The XML configuration was changed by another user." in kvik.err
    assert len(defined(kvik)) == 1


def test_an_editor_that_fails_changes_nothing(kvik: Any, editor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor('echo >> "$f"; exit 3')
    assert kvik("edit", "tiny-1") == 1
    assert "exit code 3" in kvik.err
    monkeypatch.setenv("EDITOR", "no-such-editor-here")
    assert kvik("edit", "tiny-1") == 1
    assert "was not found" in kvik.err
    assert not defined(kvik)


def test_the_temporary_file_is_private_and_goes_away(kvik: Any, editor: Any, tmp_path: Path) -> None:
    editor(f'stat -c %a "$f" > {tmp_path}/mode; echo "$f" > {tmp_path}/name')
    kvik("edit", "tiny-1")
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not Path((tmp_path / "name").read_text().strip()).exists()


def test_the_editors_command_may_have_arguments() -> None:
    assert command({"EDITOR": "code --wait"}) == ["code", "--wait"]
    assert command({"EDITOR": "a; b"})[:2] == ["/bin/sh", "-c"]
    assert command({"VISUAL": "v", "EDITOR": "e"}) == ["v"]
    assert command({}) == ["vi"]


def test_description_and_metadata_in_the_editor(kvik: Any, editor: Any) -> None:
    editor('printf "new words\\n" > "$f"')
    assert kvik("desc", "tiny-1", "--edit") == 0
    assert kvik.connection.made("set_metadata")[-1][2:4] == (0, "new words")
    assert kvik("metadata", "tiny-1", "u", "--edit", "--key", "k") == 0
    kvik.connection.replies["metadata"] = NoMetadata("none")
    assert kvik("metadata", "tiny-1", "u", "--edit", "--key", "k") == 0
    assert kvik("metadata", "tiny-1", "u", "--edit") == 1
    editor("true")
    assert kvik("desc", "tiny-1", "--edit") == 0
    assert "not changed" in kvik.out


def test_a_network_is_edited_the_same_way(kvik: Any, editor: Any) -> None:
    editor("true")
    assert kvik("net-edit", "--network", "lan") == 0
    assert "Network lan XML configuration not changed.\n" in kvik.out
    editor('sed -i s/virbr7/virbr8/ "$f"')
    assert kvik("net-edit", "lan") == 0
    assert "Network lan XML configuration edited.\n" in kvik.out
    ((_, text, flags),) = kvik.connection.made("define_network")
    assert "virbr8" in text
    assert flags == 1
    assert kvik.connection.made("net_xml")[0] == ("net_xml", "lan", 1)


def test_a_refused_network_is_kept_for_another_try(kvik: Any, editor: Any) -> None:
    editor('sed -i s/virbr7/virbr8/ "$f"')
    kvik.connection.replies["define_network"] = ConfigError("no such bridge")
    assert kvik("net-edit", "lan", stdin="n\n") == 1
    assert "no such bridge" in kvik.err
    assert "the changes to network lan were not saved" in kvik.err


def test_words_of_a_network_are_edited(kvik: Any, editor: Any) -> None:
    editor('echo more > "$f"')
    assert kvik("net-desc", "lan", "--edit") == 0
    assert kvik.connection.made("net_set_metadata")[0][:4] == ("net_set_metadata", "lan", 0, "more")
    assert kvik("net-metadata", "lan", "u", "--key", "k", "--edit") == 0
    assert kvik.connection.made("net_set_metadata")[1][2:6] == (2, "more\n", "k", "u")
    assert kvik("net-metadata", "lan", "u", "--edit") == 1


def test_an_interface_is_edited_as_a_machine_is(kvik: Any, editor: Any) -> None:
    editor("sed -i 's/<bridge/<mtu size=\"9000\"\\/><bridge/' $f")
    assert kvik("iface-edit", "--interface", "br0") == 0
    assert "Interface br0 XML configuration edited." in kvik.out
    assert [call[2] for call in kvik.connection.made("call") if call[1] == "INTERFACE_DEFINE_XML"] == [
        "<interface type='bridge' name='br0'>\n  <mtu size=\"9000\"/><bridge/>\n</interface>\n"
    ]
    editor("true")
    assert kvik("iface-edit", "br0") == 0
    assert "not changed" in kvik.out
