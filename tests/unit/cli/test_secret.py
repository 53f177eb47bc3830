"""The verbs of secrets with every option they have, on a daemon with machines in memory."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kvik.cli.verbs import VERBS

UUID = "55806c7d-8e93-456f-829b-607d8c198367"
XML = f"<secret private='no'><uuid>{UUID}</uuid><usage type='tls'><name>n</name></usage></secret>"
# (a line, its exit code, what it says somewhere)
SESSION = [
    ("secret-define --file @xml --validate", 0, f"Secret {UUID} created"),
    ("secret-list --ephemeral --no-ephemeral --private --no-private", 0, f" {UUID}   tls n"),
    ("secret-list --private", 0, "Usage\n"),
    (f"secret-get-value {UUID}", 1, "does not have a value"),
    (f"secret-set-value --secret {UUID} --file @b64", 0, "Secret value set"),
    (f"secret-get-value --secret {UUID} --plain", 0, "open sesame"),
    (f"secret-set-value {UUID} --file @plain --plain", 0, "Secret value set"),
    (f"secret-get-value {UUID}", 0, base64.b64encode(b"plain one").decode()),
    (f"--json secret-get-value {UUID}", 0, json.dumps(base64.b64encode(b"plain one").decode())),
    (f"secret-set-value {UUID} --base64 b3BlbiBzZXNhbWU=", 0, "Passing secret value as command-line argument"),
    (f"secret-set-value {UUID} !!!", 1, "the value is not base64"),
    (f"secret-set-value {UUID} --file @empty --plain", 1, "the value is empty"),
    (f"secret-set-value {UUID} --file @large --plain", 1, "at most 65536 bytes"),
    (f"secret-set-value {UUID} --file /nonexistent", 1, "Failed to open file '/nonexistent'"),
    (f"secret-dumpxml --secret {UUID} --xpath //name --wrap", 0, "<name>n</name>"),
    ("--readonly secret-list", 0, UUID),
    (f"--readonly secret-get-value {UUID}", 1, "read only"),
    ("secret-event --list", 0, "value-changed"),
    (f"secret-event --secret {UUID} --event value-changed --timeout 1 --timestamp --loop", 1, "timed out"),
    ("secret-event --event lifecycle --secret nope", 1, "failed to get secret 'nope'"),
    (f"secret-undefine --secret {UUID}", 0, f"Secret {UUID} deleted"),
    (f"secret-dumpxml {UUID}", 1, f"no secret with matching uuid '{UUID}'"),
]


def test_a_session_with_every_option(kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "xml").write_text(XML)
    (tmp_path / "b64").write_text("b3BlbiBz\nZXNhbWU=\n")
    (tmp_path / "plain").write_text("plain one")
    (tmp_path / "empty").write_text("")
    (tmp_path / "large").write_bytes(bytes(140_000))
    for line, code, text in SESSION:
        done, out, errors = kvik_(*shlex.split(line.replace("@", f"{tmp_path}/")))
        assert done == code, (line, done, out, errors)
        assert text in out + errors, (line, out, errors)


def test_a_value_from_a_pipe_or_the_terminal(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xml").write_text("<secret ephemeral='yes'/>")
    uuid = kvik_("secret-define", str(tmp_path / "xml"))[1].split()[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    assert kvik_("secret-set-value", uuid, "--interactive")[0] == 0
    assert kvik_("secret-get-value", uuid, "--plain")[1].strip() == "from a pipe"
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(ours, b"from a terminal\n")  # before it is asked for, so that nothing waits
        code, out, errors = kvik_("secret-set-value", uuid, "--interactive")
        assert code == 0 and "Enter new value for secret:" in out and "terminal" not in out, errors
    os.close(ours)
    assert kvik_("secret-get-value", uuid, "--plain")[1].strip() == "from a terminal"
    kvik_("secret-undefine", uuid)


def test_every_verb_of_secrets_is_here() -> None:
    typed = {line.replace("--json ", "").replace("--readonly ", "").split()[0] for line, _, _ in SESSION}
    assert typed == {name for name in VERBS if name.startswith("secret-")}
