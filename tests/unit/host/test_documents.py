"""What the stores of machines, networks and filters do alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.host import documents, files


def test_what_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "web.xml"
    for text in ("one", "two"):
        path.write_text(text)
        assert "was set aside as web.xml.corrupt-" in documents.set_aside(path, "not XML")
    assert sorted(other.read_text() for other in tmp_path.iterdir()) == ["one", "two"]


def test_what_cannot_be_set_aside_is_said_to_be_ignored(tmp_path: Path) -> None:
    assert "is ignored: not XML (and it cannot be renamed" in documents.set_aside(tmp_path / "gone.xml", "not XML")


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_is_not_durable_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path, link = tmp_path / "web.xml", tmp_path / "link.xml"
    link.symlink_to(path)
    if before is not None:
        path.write_bytes(before)
    whole = files.atomic_write

    def not_durable(path: Path, data: bytes, *, durable: bool = True) -> None:
        whole(path, data, durable=False)
        if durable:
            raise HostError("cannot sync: the disk is gone", errno=5)

    monkeypatch.setattr(files, "atomic_write", not_durable)
    with pytest.raises(HostError, match="cannot sync"):
        documents.replace(path, b"new", link)
    assert files.try_read_file(path) == before
    assert link.is_symlink() == (before is not None)  # a link of an earlier document does not start a new one


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", " a", "a\n", "\udc80", "ä" * 101])
def test_a_name_must_do_for_a_file(name: str) -> None:
    with pytest.raises(InvalidArgument, match="network"):
        documents.check_document_name(name, "network")
