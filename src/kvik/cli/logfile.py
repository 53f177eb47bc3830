"""`-d NUM` and `-l FILE`: where the client's own debug messages go, and how many."""

from __future__ import annotations

import logging

from kvik.errors import HostError, InvalidArgument

LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)  # virsh: 0 is the most


def configure(name: str, value: str) -> None:
    root = logging.getLogger("kvik")
    if name == "debug":
        if value not in ("0", "1", "2", "3", "4"):
            raise InvalidArgument(f"option -d takes a numeric argument from 0 to 4, not '{value}'")
        root.setLevel(LEVELS[int(value)])
        return
    try:
        handler = logging.FileHandler(value, encoding="utf-8")
    except OSError as error:
        raise HostError(
            f"failed to open the log file '{value}': {error.strerror}",
            errno=error.errno or 0,
            remedy="give the path of a file that you may write",
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    if root.level == logging.NOTSET:
        root.setLevel(logging.DEBUG)
