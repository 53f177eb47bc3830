"""Character devices' host side: which there are, adding and removing.

Reference: QEMU's qapi/char.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ANYTHING, ID, NOTHING, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_ADDED = 64


def added(context: Context) -> dict[str, Any]:
    """id -> backend, as chardev-add gave them: devices plugged later take them."""
    backends: dict[str, Any] = context.server.values.setdefault("chardevs", {})
    return backends


def _in_use(context: Context) -> dict[str, tuple[Any, bool]]:
    """id -> (Chardev, whether the guest has it open) of the devices that have one, or several."""
    found: dict[str, tuple[Any, bool]] = {}
    for device in context.devices():
        chardev = getattr(device, "chardev", None)
        if chardev is not None:
            found[f"char{device.name}"] = (chardev, True)
        for port in getattr(device, "ports", ()):
            if getattr(port, "chardev", None) is not None:
                found[f"char{port.alias}"] = (port.chardev, port.guest_open)
    return found


def query_chardev(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    listed = [
        {
            "label": name,
            "filename": str(chardev.filename),
            "frontend-open": is_open,
        }
        for name, (chardev, is_open) in _in_use(context).items()
    ]
    return listed + [
        {"label": name, "filename": backend, "frontend-open": False} for name, backend in added(context).items()
    ]


def _word(context: Context, kind: str, data: dict[str, Any]) -> str:
    """A ChardevBackend of QEMU's -> the words of `backends.char`. Raises `QmpError`."""
    if kind in ("null", "pty"):
        return kind
    if kind == "file" and isinstance(data.get("out"), str):
        return f"file:{data['out']}"
    if kind == "socket" and isinstance(data.get("addr"), dict):
        address = data["addr"]
        inner = address.get("data")
        if isinstance(inner, dict):
            if address.get("type") == "unix" and isinstance(inner.get("path"), str):
                return f"unix:{inner['path']}"
            if address.get("type") == "fd" and isinstance(inner.get("str"), str):
                fd = context.server.named_fds.get(inner["str"])
                if fd is None:
                    raise QmpError(f"File descriptor named '{inner['str'][:80]}' has not been found")
                return f"fd={fd}"
        raise QmpError("a socket backend is of type unix or fd here")
    raise QmpError(f"Parameter 'backend.type' does not accept value '{kind[:80]}'")


def chardev_add(context: Context, arguments: Arguments) -> dict[str, Any]:
    name, backend = arguments["id"], arguments["backend"]
    if name in added(context) or name in _in_use(context):
        raise QmpError(f"Chardev with id '{name}' already exists")
    if len(added(context)) >= MAX_ADDED:
        raise QmpError(f"more than {MAX_ADDED} character devices without a front end")
    data = backend.get("data", {})
    added(context)[name] = _word(context, backend["type"], data if isinstance(data, dict) else {})
    return {}


def chardev_remove(context: Context, arguments: Arguments) -> None:
    name = arguments["id"]
    if name in added(context):
        del added(context)[name]
    elif name in _in_use(context):
        raise QmpError(f"Chardev '{name}' is busy")
    else:
        raise QmpError(f"Chardev '{name}' not found")


COMMANDS: Sequence[Command] = (
    Command("query-chardev", query_chardev, summary="the character devices' host side"),
    Command(
        "chardev-add",
        chardev_add,
        Struct({"id": ID, "backend": Struct({"type": ID, "data": ANYTHING})}),
        summary="null, pty, file or socket, for a device that is plugged next",
    ),
    Command("chardev-remove", chardev_remove, Struct({"id": ID}), NOTHING),
)
