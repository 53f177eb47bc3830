"""What a network card's driver asks to receive: modes, MAC addresses, VLANs (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

They are accepted and told, not applied: the device may deliver more than was asked for (5.1.6.5.1: "best-effort").
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State

__all__ = ["ReceiveFilter"]

# 5.1.6.5.1: bits of `modes`, in the order of the commands
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = (1 << number for number in range(6))
_MAX_MACS = 64  # kept; of a longer table these, and it has run over


class ReceiveFilter:
    """The commands answer False for what is unknown or malformed; then nothing has changed."""

    __slots__ = ("macs", "macs_ran_over", "modes", "vlans")

    def __init__(self) -> None:
        self.modes = PROMISC  # until the driver chooses, as in QEMU: older drivers never do
        self.macs: list[bytes] = []
        self.macs_ran_over = False
        self.vlans: set[int] = set()

    def set_mode(self, number: int, data: bytes) -> bool:
        """VIRTIO_NET_CTRL_RX: a mode on or off."""
        if 1 << number > NOBCAST or len(data) != 1:
            return False
        self.modes = self.modes | 1 << number if data[0] else self.modes & ~(1 << number)
        return True

    def set_macs(self, data: bytes) -> bool:
        """MAC_TABLE_SET: unicast, then multicast addresses, each list behind its count."""
        macs: list[bytes] = []
        for _ in range(2):
            if len(data) < 4:
                return False
            (count,) = struct.unpack_from("<I", data)
            data = data[4:]
            if count * 6 > len(data):
                return False
            macs += [data[at : at + 6] for at in range(0, 6 * count, 6)]
            data = data[6 * count :]
        self.macs, self.macs_ran_over = macs[:_MAX_MACS], len(macs) > _MAX_MACS
        return True

    def set_vlan(self, number: int, data: bytes) -> bool:
        """VIRTIO_NET_CTRL_VLAN: one is added (0) or taken away (1)."""
        if number > 1 or len(data) != 2:
            return False
        vlan = int.from_bytes(data, "little")
        if vlan > 4095:
            return False
        (self.vlans.add if number == 0 else self.vlans.discard)(vlan)
        return True

    def told(self, *, by_vlan: bool) -> State:
        """QMP's RxFilterInfo but for the card's name and address. `by_vlan`: the driver knows the command."""
        modes = self.modes

        def of(no: int, every: int) -> str:
            return "none" if modes & no else "all" if modes & every or self.macs_ran_over else "normal"

        return {
            "promiscuous": bool(modes & PROMISC),
            "multicast": of(NOMULTI, ALLMULTI),
            "unicast": of(NOUNI, ALLUNI),
            "vlan": "all" if not by_vlan else "normal" if self.vlans else "none",
            "broadcast-allowed": not modes & NOBCAST,
            "multicast-overflow": self.macs_ran_over,
            "unicast-overflow": self.macs_ran_over,
            "unicast-table": [mac.hex(":") for mac in self.macs if not mac[0] & 1],
            "multicast-table": [mac.hex(":") for mac in self.macs if mac[0] & 1],
            "vlan-table": sorted(self.vlans),
        }

    def state(self) -> State:
        return {
            "rx_modes": self.modes,
            "macs": list(self.macs),
            "macs_ran_over": self.macs_ran_over,
            "vlans": sorted(self.vlans),
        }

    def restore(self, state: State) -> None:
        self.modes, self.macs, self.vlans = int(state["rx_modes"]), list(state["macs"]), set(state["vlans"])
        self.macs_ran_over = bool(state.get("macs_ran_over", False))
