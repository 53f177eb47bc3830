"""How often each cluster of a qcow2 image is referred to, as a check counts it."""

from __future__ import annotations

from array import array

__all__ = ["Counts", "last_used", "widen"]


class Counts:
    """Of `clusters` clusters from `start` on; of others nothing is kept. One byte each; the few with 255 and more in a
    dictionary. All numbers that callers see are those of clusters in the file."""

    def __init__(self, start: int, clusters: int) -> None:
        self.start = start
        self.bytes = bytearray(clusters)
        self.big: dict[int, int] = {}
        self._plus: dict[int, bytes] = {}

    @property
    def end(self) -> int:
        return self.start + len(self.bytes)

    def extend(self, end: int) -> None:
        self.bytes += bytes(max(0, end - self.end))

    def part(self, first: int, last: int) -> bytearray:
        """Of the clusters from `first` to `last`, as far as they are counted here."""
        return self.bytes[max(0, first - self.start) : max(0, last - self.start)]

    def add(self, first: int, count: int, weight: int) -> None:
        last = min(first + count, self.end) - self.start
        first = max(first, self.start) - self.start
        count = last - first
        if count <= 0:
            return
        if count == 1:
            value = self.bytes[first] + weight
            if value < 255:
                self.bytes[first] = value
            else:
                self._slowly(first, last, weight)
            return
        part = self.bytes[first:last]
        if weight + max(part) >= 255:
            self._slowly(first, last, weight)
            return
        table = self._plus.get(weight)
        if table is None:
            table = self._plus[weight] = bytes(min(255, i + weight) for i in range(256))
        self.bytes[first:last] = part.translate(table)

    def _slowly(self, first: int, last: int, weight: int) -> None:
        for cluster in range(first, last):
            value = self.get(self.start + cluster) + weight
            self.bytes[cluster] = min(value, 255)
            if value >= 255:
                self.big[cluster] = value

    def get(self, cluster: int) -> int:
        place = cluster - self.start
        value = self.bytes[place] if 0 <= place < len(self.bytes) else 0
        return self.big.get(place, value) if value == 255 else value


def last_used(block: bytearray | array[int]) -> int:
    """One more than the index of the last element that is not 0."""
    data = bytes(block) if isinstance(block, bytearray) else block.tobytes()
    size = 1 if isinstance(block, bytearray) else block.itemsize
    return (len(data.rstrip(b"\0")) + size - 1) // size


def widen(found: bytearray, like: bytearray | array[int]) -> bytearray | array[int]:
    """One byte each as the elements of a refcount block."""
    if isinstance(like, bytearray):
        return found
    wide = array(like.typecode, bytes(len(found) * like.itemsize))
    memoryview(wide).cast("B")[0 if LITTLE else like.itemsize - 1 :: like.itemsize] = found
    return wide


LITTLE = array("H", [1]).tobytes()[0] == 1
