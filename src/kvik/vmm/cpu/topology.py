"""Sockets, dies, cores, threads, and the APIC ids that say where a processor sits.

An APIC id is a string of fields, each wide enough for its level (Intel SDM vol. 3, 9.9.1; AMD APM vol. 3, E.5): with 3
cores and 2 threads a core takes 2 bits and a thread 1, so ids have gaps: 0 1 2 3 4 5, then 8.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class TopologyConfig(Protocol):
        """The part of the machine's processor configuration that says how many sit where; 0 means "work it out"."""

        count: int
        maximum: int
        sockets: int
        dies: int
        cores: int
        threads: int


MAX_CPUS = 1024


class Topology:
    """How many of each level one of the next holds. An index counts threads first, then cores, dies, sockets."""

    __slots__ = ("cores", "dies", "sockets", "threads")

    def __init__(self, sockets: int = 1, dies: int = 1, cores: int = 1, threads: int = 1) -> None:
        self.sockets, self.dies, self.cores, self.threads = sockets, dies, cores, threads

    @classmethod
    def of(cls, config: TopologyConfig) -> Topology:
        """What is not given follows: cores fill up the socket. Raises `InvalidArgument` if the numbers do not agree."""
        maximum = config.maximum or config.count
        if not 1 <= config.count <= maximum <= MAX_CPUS:
            raise InvalidArgument(
                f"{config.count} processors of at most {maximum} cannot be",
                remedy=f"1 to {MAX_CPUS} processors, no more than the maximum",
            )
        sockets, dies, threads = config.sockets or 1, config.dies or 1, config.threads or 1
        cores = config.cores or -(-maximum // (sockets * dies * threads))
        total = sockets * dies * cores * threads
        if min(sockets, dies, cores, threads) < 1 or total < maximum or total > MAX_CPUS:
            raise InvalidArgument(
                f"{sockets} sockets of {dies} dies of {cores} cores of {threads} threads are {total} processors, "
                f"the machine is to have {maximum}",
                remedy="make the product equal to the maximum number of processors",
            )
        return cls(sockets, dies, cores, threads)

    @property
    def core_shift(self) -> int:
        """Where the core's field begins in an APIC id."""
        return (self.threads - 1).bit_length()

    @property
    def die_shift(self) -> int:
        return self.core_shift + (self.cores - 1).bit_length()

    @property
    def socket_shift(self) -> int:
        return self.die_shift + (self.dies - 1).bit_length()

    @property
    def per_socket(self) -> int:
        return self.dies * self.cores * self.threads

    @property
    def largest_apic_id(self) -> int:
        return self.apic_id(self.sockets * self.per_socket - 1)

    def apic_id(self, index: int) -> int:
        index, thread = divmod(index, self.threads)
        index, core = divmod(index, self.cores)
        socket, die = divmod(index, self.dies)
        return socket << self.socket_shift | die << self.die_shift | core << self.core_shift | thread
