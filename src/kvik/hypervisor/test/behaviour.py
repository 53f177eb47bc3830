"""How a machine of the in-memory driver behaves: a good guest unless told otherwise."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvik.errors import AgentError

AgentReply = Any | Callable[[Mapping[str, Any]], Any] | Exception


@dataclass(slots=True)
class Behaviour:
    """Faults on demand. Times are seconds; None means never."""

    start_delay: float = 0.0
    fail_start: str = ""  # start raises with this text
    fail_after: int = 0  # ... but only from this start on (0: from the first)
    output_delay: float = 0.0  # from the first instruction to the first output
    agent_delay: float = 0.0  # from the first output to the agent
    has_agent: bool = True  # if the document has the channel
    ignores_acpi: bool = False
    poweroff_delay: float = 0.0  # what a good guest takes to power off
    refuses_unplug: bool = False
    refuses_snapshot: str = ""  # putting images on top fails with this text
    refuses_save: str = ""  # sending its state fails with this text
    stands_still: str = ""  # it cannot be saved while its guest goes on, for this reason
    command_delay: float = 0.0  # every command takes this long
    command_deadline: float = 5.0  # a command to a hung VMM fails after this long
    dies_after: float | None = None  # the VMM ends, unasked
    panics_after: float | None = None  # the guest panics, after every boot
    death_text: str = "terminated by signal 9 (Killed)"
    banner: bytes = b"\r\nkvik test machine\r\nlogin: "
    replies: dict[str, AgentReply] = field(default_factory=dict)  # agent command -> value, function or exception
    addresses: list[tuple[str, int]] = field(default_factory=lambda: [("192.0.2.10", 24)])


class GuestAgent:
    """A small guest behind the agent: answers what the scripts do not, and runs a few commands."""

    def __init__(self, behaviour: Behaviour, mac: str, poweroff: Callable[[str], None]) -> None:
        self._behaviour = behaviour
        self._mac = mac
        self._poweroff = poweroff
        self._finished: dict[int, dict[str, Any]] = {}
        self._next_pid = 1000

    def answer(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command in self._behaviour.replies:
            reply = self._behaviour.replies[command]
            if isinstance(reply, Exception):
                raise reply
            return reply(arguments) if callable(reply) else reply
        handler = getattr(self, "_" + command.replace("-", "_"), None)
        if handler is None:
            raise AgentError(f"The command {command} has not been found")
        return handler(arguments)

    def _guest_ping(self, arguments: Mapping[str, Any]) -> Any:
        return {}

    def _guest_info(self, arguments: Mapping[str, Any]) -> Any:
        names = sorted(name[1:].replace("_", "-") for name in dir(self) if name.startswith("_guest_"))
        return {
            "version": "7.2.0",
            "supported_commands": [{"name": name, "enabled": True, "success-response": True} for name in names],
        }

    def _guest_get_host_name(self, arguments: Mapping[str, Any]) -> Any:
        return {"host-name": "test"}

    def _guest_get_osinfo(self, arguments: Mapping[str, Any]) -> Any:
        return {"id": "test", "name": "kvik test guest", "kernel-release": "6.1.0"}

    def _guest_network_get_interfaces(self, arguments: Mapping[str, Any]) -> Any:
        loopback = {"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}
        addresses = [
            {"ip-address-type": "ipv6" if ":" in text else "ipv4", "ip-address": text, "prefix": prefix}
            for text, prefix in self._behaviour.addresses
        ]
        return [
            {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [loopback]},
            {"name": "eth0", "hardware-address": self._mac, "ip-addresses": addresses},
        ]

    def _guest_shutdown(self, arguments: Mapping[str, Any]) -> Any:
        self._poweroff(str(arguments.get("mode", "powerdown")))
        return {}

    def _guest_exec(self, arguments: Mapping[str, Any]) -> Any:
        argv = [str(arguments.get("path", "")), *map(str, arguments.get("arg", ()))]
        stdin = base64.b64decode(arguments.get("input-data", ""))
        name = argv[0].rsplit("/", 1)[-1]
        code, out, err = 0, b"", b""
        match name:
            case "echo":
                out = " ".join(argv[1:]).encode() + b"\n"
            case "uname":
                out = b"Linux test 6.1.0 #1 SMP x86_64 GNU/Linux\n"
            case "cat":
                out = stdin
            case "true":
                pass
            case "false":
                code = 1
            case "sleep":
                pass
            case _:
                raise AgentError(f"Guest agent command failed, error was 'Failed to execute child process “{name}”'")
        self._next_pid += 1
        status: dict[str, Any] = {"exited": True, "exitcode": code}
        if name == "sleep":
            status = {"exited": False}
        if arguments.get("capture-output"):
            status |= {"out-data": base64.b64encode(out).decode()} if out else {}
            status |= {"err-data": base64.b64encode(err).decode()} if err else {}
        self._finished[self._next_pid] = status
        return {"pid": self._next_pid}

    def _guest_exec_status(self, arguments: Mapping[str, Any]) -> Any:
        pid = int(arguments.get("pid", 0))
        if pid not in self._finished:
            raise AgentError(f"PID {pid} does not exist")
        status = self._finished[pid]
        return self._finished.pop(pid) if status["exited"] else status
