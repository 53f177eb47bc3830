"""What a guest did wrong."""

from __future__ import annotations

__all__ = ["GuestFault"]


class GuestFault(Exception):
    """The guest gave an address, a length or a structure that no honest driver gives.

    Never a `KvikError`: nobody's user caused it and nobody's user can mend it. Memory and queue code raises it; the
    device it was meant for catches it, stops serving that guest's requests ("needs reset") and says so once.
    """
