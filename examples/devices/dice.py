"""A port device: reading port 0x5F0 throws a die, writing to it says how many sides the die has."""

import random
from typing import Any

from kvik.vmm.device import PortDevice


class Dice(PortDevice):
    kind, base, size = "dice", 0x5F0, 1

    def reset(self) -> None:
        self.sides = 6
        self.throws = 0

    def read(self, offset: int, size: int) -> int:
        self.throws += 1
        return random.randint(1, self.sides)

    def write(self, offset: int, size: int, value: int) -> None:
        self.sides = max(value & 0xFF, 1)  # the guest may write anything, 0 too

    def state(self) -> dict[str, Any]:
        return {"sides": self.sides}

    def restore(self, state: dict[str, Any]) -> None:
        self.sides = int(state["sides"])

    def stats(self) -> dict[str, int]:
        return {"throws": self.throws}
