"""A process that takes kvik-vmm's command line and plays its monitor: what the driver does is seen without a guest.

Every command goes, as a line of JSON, into the file `commands` in its HOME, the machine's directory. The kernel's
command line can make it fail: "die" (with a message), "silent"; "old": it lacks kvik's own commands.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from kvik.vmm.options import parse


class Fake:
    def __init__(self, arguments: list[str]) -> None:
        self.config = parse(arguments)
        self.status = "prelaunch"
        self.plugged = [disk.id for disk in self.config.disks] + [nic.id for nic in self.config.nets]
        self.fdsets: list[dict[str, Any]] = []
        self.balloon = self.config.memory.size
        self.peer: socket.socket | None = None
        self.said = Path(os.environ["HOME"]) / "commands"

    def serve(self) -> None:
        listener = socket.socket(fileno=int(self.config.qmp[0].removeprefix("fd=")))
        while True:
            self.peer, _ = listener.accept()
            version = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "kvik-vmm"}
            self.send({"QMP": {"version": version, "capabilities": ["oob"]}})
            self.converse()

    def send(self, value: dict[str, Any]) -> None:
        assert self.peer is not None
        self.peer.sendall(json.dumps(value).encode() + b"\r\n")

    def event(self, name: str, **data: Any) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    def converse(self) -> None:
        assert self.peer is not None
        buffer = b""
        while True:
            data, control, _, _ = self.peer.recvmsg(65536, 4096)
            for _, _, packed in control:
                for fd in array.array("i", packed):
                    os.close(fd)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if line.strip():
                    self.answer(json.loads(line), len(control))

    def answer(self, request: dict[str, Any], fds: int) -> None:
        command, arguments = request["execute"], request.get("arguments", {})
        with self.said.open("a") as file:
            file.write(json.dumps([command, arguments, fds]) + "\n")
        if command.startswith("x-kvik-") and "old" in self.config.boot.cmdline.split():
            self.send({"error": {"class": "CommandNotFound", "desc": "not found"}, "id": request.get("id")})
            return
        method = getattr(self, command.replace("-", "_"), None)
        try:
            reply = method(**{key.replace("-", "_"): value for key, value in arguments.items()}) if method else {}
            self.send({"return": {} if reply is None else reply, "id": request.get("id")})
        except ValueError as error:
            self.send({"error": {"class": "GenericError", "desc": str(error)}, "id": request.get("id")})
        if command in ("quit", "system_powerdown"):
            sys.exit(0)
        if command == "device_del":
            self.plugged.remove(arguments["id"])
            self.event("DEVICE_DELETED", device=arguments["id"], path=f"/machine/peripheral/{arguments['id']}")

    def query_status(self) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def query_chardev(self) -> Any:
        lines = [*self.config.serials, *self.config.consoles, *self.config.channels]
        names = {line.id: "pty:/dev/pts/99" if line.backend == "pty" else line.backend for line in lines}
        return [{"label": f"char{name}", "filename": name_, "frontend-open": False} for name, name_ in names.items()]

    def query_cpus_fast(self) -> Any:
        return [{"cpu-index": number, "thread-id": os.getpid()} for number in range(self.config.cpus.count)]

    def query_balloon(self) -> Any:
        return {"actual": self.balloon}

    def query_blockstats(self) -> Any:
        stats = {"rd_operations": 3, "rd_bytes": 1536, "wr_operations": 1, "wr_bytes": 512}
        return [{"qdev": f"/machine/peripheral/{disk.id}", "stats": stats} for disk in self.config.disks]

    def query_named_block_nodes(self, flat: bool = False) -> Any:
        return []

    def query_fdsets(self) -> Any:
        return self.fdsets

    def qom_list(self, path: str) -> Any:
        return [{"name": "type", "type": "string"}, *({"name": name, "type": "child"} for name in self.plugged)]

    def stop(self) -> None:
        self.status = "paused"
        self.event("STOP")

    def cont(self) -> None:
        self.status = "running"
        self.event("RESUME")

    def system_reset(self) -> None:
        self.event("RESET", guest=False, reason="host-qmp-system-reset")

    def system_powerdown(self) -> None:
        self.event("POWERDOWN")
        self.event("SHUTDOWN", guest=True, reason="guest-shutdown")

    def add_fd(self, opaque: str) -> Any:
        self.fdsets.append({"fdset-id": len(self.fdsets), "fds": [{"fd": 50, "opaque": opaque}]})
        return {"fdset-id": len(self.fdsets) - 1, "fd": 50}

    def device_add(self, driver: str, id: str, **props: Any) -> None:
        if "refuse" in str(props.get("serial", "")):
            raise ValueError("no room for it")
        self.plugged.append(id)

    def balloon_(self, value: int) -> None:
        self.balloon = value


MODELS = """host         usable: all
x86-64-v2    usable
EPYC         usable, nearest to this host
Nehalem      unusable: it is GenuineIntel's
"""


def main() -> None:
    if sys.argv[1:] == ["--cpu", "help"]:
        print(MODELS, end="")
        return
    fake = Fake(sys.argv[1:])
    if "die" in fake.config.boot.cmdline:
        sys.exit("kvik-vmm: the kernel is no kernel")
    if "silent" in fake.config.boot.cmdline:
        import time

        time.sleep(60)
    fake.serve()


if __name__ == "__main__":
    main()
