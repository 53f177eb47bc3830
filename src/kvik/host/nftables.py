"""nftables through libnftables: JSON in, JSON out, every call one transaction (libnftables(3), libnftables-json(5)).

    nftables.run([{"add": {"table": {"family": "inet", "name": "kvik"}}}, ...])
    tables = nftables.run([{"list": {"tables": None}}])

All commands of a call take effect together or not at all, also for packets: the kernel swaps rule sets whole. A call
acts in the network namespace of its thread, takes some 200 us, and may come from any thread.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from kvik.errors import HostError, MissingPackages
from kvik.host.packages import how_to_install

Command = dict[str, Any]  # an object of libnftables-json(5), such as {"add": {"table": {...}}}

_LIBRARY = "libnftables.so.1"
_OUTPUT_HANDLE, _OUTPUT_JSON, _OUTPUT_ECHO = 1 << 3, 1 << 4, 1 << 5  # nftables/libnftables.h
_MAX_OUTPUT = 64 << 20
_MAX_WORDS = 500
# libnftables keeps a cache of interface names, among others, in variables of its own: one call at a time in a process.
_lock = threading.Lock()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        command = how_to_install("libnftables")
        raise MissingPackages(
            f"{_LIBRARY} is not installed, without which there are no packet filters and no address translation",
            packages=("libnftables1",), command=command,
        ) from error  # fmt: skip
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


def run(commands: Sequence[Command], *, echo: bool = False) -> list[dict[str, Any]]:
    """Do all of it in one transaction, or nothing. What `list` commands found; with `echo` also what was added, with
    its handles. `HostError` has the kernel's words, the errno and the first command that was refused."""
    if not commands:
        return []
    failure, output = _execute(commands, echo=echo)
    if failure is not None:
        raise _refusal_of(commands, failure)
    return parse_output(output)


def check(commands: Sequence[Command]) -> None:
    """Have the kernel check it, and change nothing; `HostError` as `run` raises it."""
    failure = _execute(commands, dry=True)[0] if commands else None
    if failure is not None:
        raise _refusal_of(commands, failure)


def parse_output(output: bytes) -> list[dict[str, Any]]:
    """The objects of an answer, less the "metainfo" that it begins with."""
    if len(output) > _MAX_OUTPUT:
        raise HostError(f"nftables' answer is larger than {_MAX_OUTPUT >> 20} MiB", errno=errno.E2BIG)
    try:
        found = json.loads(output)["nftables"] if output.strip() else []
        return [item for item in found if "metainfo" not in item]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HostError(
            f"nftables' answer is not as libnftables-json(5) has it: {error}", errno=errno.EBADMSG
        ) from error


def _execute(commands: Sequence[Command], *, echo: bool = False, dry: bool = False) -> tuple[str | None, bytes]:
    """The words of a failure, or None; and the output."""
    text = json.dumps({"nftables": [{"metainfo": {"json_schema_version": 1}}, *commands]}).encode()
    library = _library()
    with _lock:
        context = library.nft_ctx_new(0)  # opens a socket in the thread's namespace
        if not context:
            raise HostError("cannot talk to nftables: libnftables gave no context", errno=errno.ENOMEM)
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_output_set_flags(context, _OUTPUT_JSON | _OUTPUT_HANDLE | (_OUTPUT_ECHO if echo else 0))
            library.nft_ctx_set_dry_run(context, dry)
            failed = library.nft_run_cmd_from_buffer(context, text)
            output: bytes = library.nft_ctx_get_output_buffer(context) or b""
            words: bytes = library.nft_ctx_get_error_buffer(context) or b""
        finally:
            library.nft_ctx_free(context)
    if not failed:
        return None, output
    return words[: 1 << 16].decode("utf-8", "replace").strip() or "no reason given", b""


def _refusal_of(commands: Sequence[Command], failure: str) -> HostError:
    """Find the first command that is refused, by checks (which have no effect) of ever shorter beginnings."""
    below, first = 0, len(commands) - 1
    while below < first:
        middle = (below + first) // 2
        words, _ = _execute(commands[: middle + 1], dry=True)
        if words is None:
            below = middle + 1
        else:
            first, failure = middle, words
    return refusal(commands[first], failure)


def refusal(command: Command, words: str) -> HostError:
    """A `HostError` of what libnftables wrote, such as "internal:0:0-0: Error: Could not process rule: File exists"."""
    found = re.search(r"Error: (.*)", words)
    reason = (found[1] if found else words.partition("\n")[0]).removeprefix("Could not process rule: ")
    number = _ERRNO_OF.get(reason.partition(";")[0].rpartition(": ")[2], 0)  # "...; did you mean table"
    remedy = "run as root, or with CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else ""
    shown = json.dumps(command)
    shown = shown if len(shown) <= _MAX_WORDS else shown[: _MAX_WORDS - 1] + "…"
    return HostError(f"nftables refused {shown}: {reason[:_MAX_WORDS]}", errno=number, remedy=remedy)


_ERRNO_OF = {os.strerror(number): number for number in errno.errorcode}
