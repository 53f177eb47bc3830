"""Run in the lab: QMP commands to a kvik-vmm, and the events that follow.

    python vmm_qmp.py SOCKET JSON [EVENT [SECONDS]]

JSON is a list of commands; a descriptor to go with one is opened from the path in its member "fd" (tap:NAME: a tap).
The replies and the events, as one JSON list, go to standard output when all are answered and EVENT, if named, came.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path


def descriptor(place: str) -> int:
    if not place.startswith("tap:"):
        return os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
    fd = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", place[4:].encode(), flags))  # TUNSETIFF
    return fd


def main() -> None:
    path, commands, *rest = sys.argv[1:]
    wanted, seconds = (*rest, "", "30")[:2] if rest else ("", "30")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(float(seconds))
    end = time.monotonic() + 30
    while not Path(path).exists() and time.monotonic() < end:  # the machine is still on its way
        time.sleep(0.1)
    connection.connect(path)
    stream = connection.makefile("r")
    stream.readline()
    seen: list[dict[str, object]] = []
    for command in [{"execute": "qmp_capabilities"}, *json.loads(commands)]:
        opened = [descriptor(command.pop("fd"))] if "fd" in command else []
        socket.send_fds(connection, [json.dumps(command).encode() + b"\n"], opened)
        while True:
            message = json.loads(stream.readline())
            seen.append(message)
            if "event" not in message:
                break
    try:
        while wanted and all(message.get("event") != wanted for message in seen):
            seen.append(json.loads(stream.readline()))
    except TimeoutError:
        pass
    print(json.dumps(seen[1:]))


main()
