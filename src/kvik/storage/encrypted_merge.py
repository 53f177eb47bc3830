"""Merging an encrypted image down into the one below it while no VMM has them open: by a confined qemu-img, which gets
the images and their passphrases as open files and can open nothing else (see `encryption`).

As every merge (`overlays`) it changes nothing of what any image but the one that goes shows: data is written to where
the image above hides it, and that one stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvik.conf.storage_pool import AuthSecret
from kvik.errors import HostError, OperationUnsupported
from kvik.host.files import host_error
from kvik.host.jail import run_qemu_img
from kvik.host.secret_file import lent
from kvik.image.lock import lock_image
from kvik.storage.backend import SecretReader
from kvik.storage.encryption import SLOWEST, image_node, secret_object

__all__ = ["Locked", "merge_back"]


class Locked(NamedTuple):
    """An image of a chain. `format`: "raw" or "qcow2", in each of which LUKS may be; `secret`: of its passphrase."""

    path: str
    format: str
    size: int
    allocated: int
    secret: AuthSecret | None = None


def merge_back(chain: Sequence[Locked], secret: SecretReader) -> None:
    """Write what the first image of a chain (from the top down, all of it) has of its own into the second. Raises
    `NoSecret`, `HostError`, `ResourceBusy`; then it can be done again from the start."""
    top, below = chain[0], chain[1]
    with ExitStack() as stack:
        keys: dict[str, int] = {}
        objects: list[str] = []
        fds: list[int] = []
        for number, image in enumerate(chain):
            fds.append(_open(image.path, writable=number < 2))
            stack.callback(os.close, fds[-1])
            lock_image(fds[-1], image.path, write=number < 2)
            if image.secret is not None:
                keys[image.path] = stack.enter_context(lent(secret("volume", image.secret)))
                objects += secret_object(f"key{number}", keys[image.path])
        node: dict[str, Any] | None = None
        for number, (image, fd) in reversed(list(enumerate(zip(chain, fds, strict=True)))):
            above = image_node(image.format, fd, f"key{number}" if image.secret is not None else "")
            if image.format == "qcow2":
                above["backing"] = node  # what its header names is not asked
            node = above
        done = run_qemu_img(
            ["commit", "-q", "-d", *objects, "json:" + json.dumps(node)],
            readable=fds[2:],
            writable=fds[:2],
            private=list(keys.values()),
            seconds=60 + top.allocated // SLOWEST,
            size=max(below.size, os.fstat(fds[1]).st_size) + 2 * top.allocated + (64 << 20),
        )
        if done.code:
            said = done.message.replace("qemu-img: ", "")
            for image, fd in zip(chain, fds, strict=True):
                said = said.replace(f"/proc/self/fd/{fd}", image.path)
            kind = OperationUnsupported if "Landlock" in said else HostError
            raise kind(
                f"{top.path} cannot be merged into {below.path}: {said or f'qemu-img ended with {done.code}'}",
                remedy="start the machine: it merges them while it runs",
            )
        os.fsync(fds[1])


def _open(path: str, *, writable: bool) -> int:
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise host_error("open", path, error) from error
