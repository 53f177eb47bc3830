"""What a command answers when it cannot do what was asked: QEMU's error classes and its wording.

Clients test the class and, where QEMU has only GenericError, sometimes the words (libvirt does): so the words here are
QEMU's (qapi/qmp/qerror.h).
"""

from __future__ import annotations


class QmpError(Exception):
    """`kind` is a QapiErrorClass: GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound, KVMMissingCap."""

    def __init__(self, description: str, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.description = description
        self.kind = kind


def device_not_found(name: str) -> QmpError:
    return QmpError(f"Device '{name}' not found", "DeviceNotFound")


def refused(what: str, why: str) -> QmpError:
    """What kvik-vmm does not have, said with the reason."""
    return QmpError(f"kvik-vmm {what}: {why}")
