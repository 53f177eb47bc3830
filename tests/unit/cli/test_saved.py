"""The verbs of saved machines with every option they have, on a daemon of their own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

MACHINE = """<domain type='test'><name>m</name><memory>1024</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices/></domain>"""
# (a line, its exit code, what it says somewhere)
SESSION = [
    ("define @m.xml", 0, "Domain 'm' defined"),
    ("save m @s", 1, "Failed to save domain 'm' to @s"),
    ("managedsave m", 1, "is not running"),
    ("managedsave-remove m", 0, "Domain 'm' has no manage save image; removal skipped"),
    ("managedsave-dumpxml m", 1, "has no managed save"),
    ("start m", 0, "started"),
    ("save --domain m --file @s --bypass-cache --xml @m.xml", 1, "uuid cannot change"),
    ("save m @s --running --paused", 1, "mutually exclusive"),
    ("save m @s --paused --verbose", 0, "Domain 'm' saved to @s"),
    ("save-image-dumpxml --file @s --security-info", 0, "<name>m</name>"),
    ("save-image-dumpxml @s --xpath //name --wrap", 0, "<nodes>"),
    ("restore --file @s --bypass-cache --reset-nvram", 0, "Domain restored from @s"),
    ("domstate m", 0, "paused"),
    ("destroy m", 0, "destroyed"),
    ("save-image-edit @s", 0, "Saved image @s XML configuration not changed."),
    ("save-image-edit --file @s --running --paused", 1, "mutually exclusive"),
    ("restore @s --running --xml @m.xml", 1, "uuid cannot change"),
    ("save-image-dumpxml @s", 0, "<domain"),
    ("save-image-define --file @s --xml @dumped.xml --running", 0, "State file @s updated."),
    ("save-image-define @s @m.xml --paused", 1, "Failed to update @s"),
    ("restore @s", 0, "restored"),
    ("domstate m --reason", 0, "running (restored)"),
    ("destroy m", 0, "destroyed"),
    ("restore @s --paused", 0, "restored"),
    ("domstate m", 0, "paused"),
    ("managedsave --domain m --bypass-cache --running --verbose", 0, "state saved by libvirt"),
    ("dominfo m", 0, "Managed save:   yes"),
    ("list --all --with-managed-save --name", 0, "m"),
    ("list --all --managed-save", 0, "saved"),
    ("managedsave-dumpxml --domain m --security-info", 0, "<name>m</name>"),
    ("managedsave-dumpxml m --xpath //name --wrap", 0, "<nodes>"),
    ("managedsave-edit --domain m", 0, "Managed save image of domain 'm' XML configuration not changed."),
    ("managedsave-edit m --running --paused", 1, "mutually exclusive"),
    ("managedsave-define --domain m --xml @dumped.xml --paused", 0, "Managed save state file of domain 'm' updated."),
    ("managedsave-define m @m.xml --running", 1, "Failed to update m XML configuration"),
    ("undefine m", 1, "Refusing to undefine while domain managed save image exists"),
    ("start m", 0, "started"),
    ("domstate m", 0, "paused"),
    ("managedsave m --paused", 0, "state saved"),
    ("managedsave-remove m", 0, "Removed managedsave image for domain 'm'"),
    ("start m", 0, "started"),
    ("domstate m --reason", 0, "running (booted)"),
    ("managedsave m", 0, "state saved"),
    ("start m --force-boot --bypass-cache", 0, "started"),
    ("domstate m --reason", 0, "running (booted)"),
    ("managedsave m", 0, "state saved"),
    ("undefine m --managed-save", 0, "has been undefined"),
    ("restore @nothing", 1, "No such file"),
]


def test_a_session_with_every_option(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", "true")
    (tmp_path / "m.xml").write_text(MACHINE)
    for line, code, text in SESSION:
        done, out, errors = kvik_(*shlex.split(line.replace("@", f"{tmp_path}/")))
        assert done == code, (line, done, out, errors)
        assert text.replace("@", f"{tmp_path}/") in out + errors, (line, out, errors)
        if line == "save-image-dumpxml @s":
            (tmp_path / "dumped.xml").write_text(out)
