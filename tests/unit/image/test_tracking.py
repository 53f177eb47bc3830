"""Bits of changed chunks: the next one that is set is found wherever pages of them begin and end."""

from __future__ import annotations

import random

import pytest

from kvik.image.qcow2.tracking import first_bit, set_bits


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 9000])
def test_the_first_bit_is_found_from_any_byte_on(size: int) -> None:
    rng = random.Random(size)
    for _ in range(50):
        bits = bytearray(size)
        for _ in range(rng.choice((0, 1, 3)) if size else 0):
            bits[rng.randrange(size)] |= 1 << rng.randrange(8)
        start = rng.randrange(size + 2)
        expected = next((at * 8 + bit for at in range(start, size) for bit in range(8) if bits[at] >> bit & 1), -1)
        assert first_bit(bits, start) == expected


def test_bits_that_are_set_together_are_found_one_after_the_other() -> None:
    bits = bytearray(1000)
    set_bits(bits, 4093, 4099)
    found = []
    while (bit := first_bit(bits, found[-1] >> 3 if found else 0)) >= 0:
        found.append(bit)
        bits[bit >> 3] &= ~(1 << (bit & 7))
    assert found == [*range(4093, 4099)]
