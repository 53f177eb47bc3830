"""What a platform device needs of a machine, without KVM: buses, a loop that a test turns, lines that remember."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvik.vmm.bus import Bus
from kvik.vmm.config import MachineConfig
from kvik.vmm.loop import EventLoop


class Line:
    def __init__(self) -> None:
        self.level, self.rises = False, 0

    def set(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level

    def pulse(self) -> None:
        self.set(True)
        self.set(False)


class FakeMachine:
    def __init__(self) -> None:
        self.config = MachineConfig()
        self.ports, self.mmio = Bus("port", 0x1_0000), Bus("memory", 1 << 52)
        self.loop = EventLoop()
        self.lines: dict[int, Line] = {}
        self.interrupts = SimpleNamespace(line=lambda gsi: self.lines.setdefault(gsi, Line()))
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.calls: list[str] = []
        self.vcpus: list[Any] = []
        self.exit_code = 0
        self.still = False
        self.log_lines: list[str] = []

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        self.events.append((name, data or {}))

    def log(self, text: str) -> None:
        self.log_lines.append(text)

    def hold_caller(self) -> None:
        self.calls.append("hold")

    def request_stop(self, status: str, event: str = "", data: dict[str, Any] | None = None) -> None:
        self.emit(event, data)
        self.calls.append(f"stop {status}")

    def request_shutdown(self, reason: str = "guest-shutdown") -> None:
        self.calls.append(f"shutdown {reason}")

    def reset(self, reason: str) -> None:
        self.calls.append(f"reset {reason}")

    def powerdown(self) -> None:
        self.calls.append("powerdown")

    def quit(self, reason: str) -> None:
        self.calls.append(f"quit {reason}")

    def pause(self, status: str) -> None:
        self.calls.append(f"pause {status}")

    def turn(self, rounds: int = 5) -> None:
        """Let the loop do what is due."""
        for _ in range(rounds):
            self.loop.run_once(0)
