"""What both roles of QMP share."""

from __future__ import annotations

import enum

__all__ = ["MAX_LINE", "State"]

# query-qmp-schema, the longest honest reply, is about 0.25 MB; a reply ten times that is an attack or a fault.
MAX_LINE = 8 * 1024 * 1024


class State(enum.Enum):
    GREETING = "greeting"
    NEGOTIATING = "negotiating"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"
