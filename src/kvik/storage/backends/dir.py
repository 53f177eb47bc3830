"""Pools of type dir: a directory of the host, as it is."""

from __future__ import annotations

from kvik.storage.directory import DirectoryBackend

__all__ = ["Backend"]


class Backend(DirectoryBackend):
    type = "dir"
