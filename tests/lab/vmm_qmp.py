"""Run in the lab: QMP commands to a kvik-vmm, and the events that follow.

    python vmm_qmp.py SOCKET JSON [EVENT [SECONDS]]

JSON is a list of commands; a descriptor to go with one is opened from the path in its member "fd". The replies and the
events so far, as one JSON list, go to standard output when all are answered and, if it is named, EVENT came.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> None:
    path, commands, *rest = sys.argv[1:]
    wanted, seconds = (*rest, "", "30")[:2] if rest else ("", "30")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(float(seconds))
    connection.connect(path)
    stream = connection.makefile("r")
    stream.readline()
    seen: list[dict[str, object]] = []
    for command in [{"execute": "qmp_capabilities"}, *json.loads(commands)]:
        opened = [os.open(command.pop("fd"), os.O_RDWR)] if "fd" in command else []
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
