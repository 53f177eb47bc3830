"""Any exception -> the error that a client receives.

A deliberate error (`KvikError`) carries libvirt's number and error domain already. Anything else is our own fault or
the host's: the client gets an internal error with an id, the log gets the traceback under the same id, and the
daemon goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets

from kvik.errors import HostError, KvikError, NoSupport, NotFound, OperationTimeout

__all__ = [
    "MultipleInterfaces",
    "NoConnection",
    "NoNodeDevice",
    "OperationAborted",
    "OperationDenied",
    "UnknownProcedure",
    "client_error",
]

log = logging.getLogger("kvik.daemon")


class OperationDenied(KvikError):
    """A read-only connection asked for a change."""

    code = 29  # VIR_ERR_OPERATION_DENIED


class OperationAborted(KvikError):
    code = 78  # VIR_ERR_OPERATION_ABORTED


class NoConnection(KvikError):
    """The URI names a hypervisor or scope that is not served here."""

    code = 5  # VIR_ERR_NO_CONNECT


class NoNodeDevice(NotFound):
    code = 53  # VIR_ERR_NO_NODE_DEVICE
    domain = 22  # VIR_FROM_NODEDEV


class MultipleInterfaces(KvikError):
    code = 59  # VIR_ERR_MULTIPLE_INTERFACES
    domain = 26  # VIR_FROM_INTERFACE


class UnknownProcedure(NoSupport):
    """A procedure nobody here knows.

    Clients recognise this by code RPC, error domain RPC, level ERROR and the words "unknown procedure", and then fall
    back to an older call. With anything else even opening a connection fails in them.
    """

    code = 39  # VIR_ERR_RPC
    domain = 7  # VIR_FROM_RPC

    def __init__(self, procedure: int) -> None:
        super().__init__(f"unknown procedure: {procedure}")


def client_error(error: BaseException, what: str) -> KvikError:
    """The error to send for `error`; `what` names the call in the log. Logs what a client should not have caused."""
    if isinstance(error, KvikError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return OperationAborted(f"{what} was cancelled: the daemon is ending")
    if isinstance(error, TimeoutError) and not error.errno:
        return OperationTimeout(str(error) or f"{what} did not finish in time")
    if isinstance(error, OSError):
        number = error.errno or 0
        reason = error.strerror or (os.strerror(number) if number else str(error))
        where = f" '{error.filename}'" if error.filename else ""
        log.warning("%s: the host refused%s: %s", what, where, reason, exc_info=log.isEnabledFor(logging.DEBUG))
        return HostError(f"{what}: the host refused{where}: {reason}", errno=number)
    mark = secrets.token_hex(4)
    log.error("%s failed unexpectedly [%s]", what, mark, exc_info=error)
    return KvikError(
        f"internal error {mark} in {what} ({type(error).__name__})", remedy="the daemon's log has the details"
    )
