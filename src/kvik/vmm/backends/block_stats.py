"""What a disk did, in the words of QMP's `query-blockstats` (QEMU's qapi/block-core.json, BlockDeviceStats)."""

from __future__ import annotations

import time

from kvik.vmm.backends.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES

__all__ = ["BlockStats"]

_NAMES = {READ: "rd", WRITE: "wr", FLUSH: "flush", DISCARD: "unmap"}
_KINDS = (READ, WRITE, FLUSH, DISCARD)


class BlockStats:
    """Counters since the machine's start. Zeroes that are written count as writes, as QEMU has it."""

    __slots__ = ("bytes", "failed", "invalid", "last", "nanoseconds", "operations", "wr_highest_offset")

    def __init__(self) -> None:
        self.operations = [0] * 5
        self.bytes = [0] * 5
        self.nanoseconds = [0] * 5
        self.failed = [0] * 5
        self.invalid = [0] * 5
        self.wr_highest_offset = 0
        self.last = time.monotonic_ns()

    def done(self, op: int, size: int, end: int, began: int) -> None:
        """`end`: offset behind the last byte. `began`: monotonic nanoseconds."""
        self.last = now = time.monotonic_ns()
        self.operations[op] += 1
        self.bytes[op] += size
        self.nanoseconds[op] += now - began
        if op == WRITE and end > self.wr_highest_offset:
            self.wr_highest_offset = end

    def burst(self, op: int, count: int, size: int, end: int, began: int) -> None:
        """`done` for `count` operations of together `size` bytes, one behind the other since `began`."""
        self.operations[op] += count - 1
        self.done(op, size, end, began)

    def report(self) -> dict[str, int | bool]:
        """Everything; times in nanoseconds."""
        out: dict[str, int | bool] = {}
        for op in _KINDS:
            name = _NAMES[op]
            extra = WRITE_ZEROES if op == WRITE else -1
            for suffix, table in (
                ("operations", self.operations),
                ("bytes", self.bytes),
                ("total_time_ns", self.nanoseconds),
            ):
                out[f"{name}_{suffix}"] = table[op] + (table[extra] if extra >= 0 else 0)
            out[f"failed_{name}_operations"] = self.failed[op] + (self.failed[extra] if extra >= 0 else 0)
            out[f"invalid_{name}_operations"] = self.invalid[op] + (self.invalid[extra] if extra >= 0 else 0)
            out[f"{name}_merged"] = 0
        del out["flush_bytes"]
        out["wr_highest_offset"] = self.wr_highest_offset
        out["idle_time_ns"] = time.monotonic_ns() - self.last
        out["account_invalid"] = out["account_failed"] = True
        return out
