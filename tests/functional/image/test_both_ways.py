"""Random operations by kvik and QEMU's tools in turn on one chain: what is read, and that it is whole, by both.

`KVIK_TEST_EXAMPLES` sets how many sequences are tried.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from functional.image.conftest import assert_clean, kvik_img, qemu_img, qemu_io
from kvik.image.opening import Opener
from kvik.image.qcow2.reader import Qcow2Reader

EXAMPLES = int(os.environ.get("KVIK_TEST_EXAMPLES", "6"))
UNIT = 65536  # what is discarded is whole clusters of every kind
SIZES = (8 * UNIT, 8 * UNIT + 512, 20 * UNIT, 3 * UNIT)

changes = st.tuples(
    st.sampled_from(("write", "write", "zero", "discard")),
    st.integers(0, 20 * 128),  # in sectors
    st.sampled_from((1, 8, 128, 200)),
    st.integers(1, 255),
)
steps = st.tuples(
    st.booleans(),  # by us
    st.one_of(
        st.lists(changes, min_size=1, max_size=5),
        st.sampled_from(("snapshot", "apply", "delete", "commit", "rebase", "rebase", "detach", "resize")),
    ),
    st.integers(0, 3),
)


class Chain:
    """top -> base or other, and what top and its snapshots read."""

    def __init__(self, directory: Path, options: str, bottom: str) -> None:
        self.top, self.bottom = directory / "top", bottom
        for name in ("base", "other"):
            assert qemu_img("create", "-f", bottom, directory / name, str(10 * UNIT)).code == 0
        qemu_io(directory / "base", f"write -P 201 0 {5 * UNIT + 512}", format=bottom)
        qemu_io(directory / "other", f"write -P 202 {3 * UNIT} {6 * UNIT}", format=bottom)
        words = ("-o", options, "-b", "base", "-F", bottom)
        assert kvik_img("create", "-q", "-f", "qcow2", *words, self.top, str(SIZES[0])).code == 0
        self.disk = bytearray(b"\xc9" * (5 * UNIT + 512) + bytes(SIZES[0] - 5 * UNIT - 512))
        self.snapshots: dict[str, bytes] = {}
        self.made = 0
        self.below: str | None = "base"

    def change(self, by_us: bool, wanted: list[tuple[str, int, int, int]]) -> None:
        commands = []
        with Opener().open(str(self.top), "qcow2", writable=by_us) as image:
            for what, sector, sectors, pattern in wanted:
                offset = sector * 512 % (len(self.disk) - 512)
                length = min(sectors * 512, len(self.disk) - offset)
                if what == "discard":
                    offset &= -UNIT
                    length = min(UNIT, len(self.disk) - offset)
                self.disk[offset : offset + length] = bytes([pattern if what == "write" else 0]) * length
                if not by_us:
                    text = {"write": f"write -P {pattern}", "zero": "write -z", "discard": "discard"}[what]
                    commands.append(f"{text} {offset} {length}")
                elif what == "write":
                    image.write(offset, bytes([pattern]) * length)
                elif what == "zero":
                    image.write_zeroes(offset, length)
                else:
                    image.discard(offset, length)
        if commands:
            qemu_io(self.top, *commands)

    def do(self, by_us: bool, what: str, number: int) -> None:
        words: list[str] = []
        if what == "snapshot":
            self.made += 1
            words = ["snapshot", "-c", f"s{self.made}"]
            self.snapshots[f"s{self.made}"] = bytes(self.disk)
        elif what in {"apply", "delete"} and self.snapshots:
            name = sorted(self.snapshots)[number % len(self.snapshots)]
            words = ["snapshot", "-a" if what == "apply" else "-d", name]
            if what == "apply":
                self.disk[:] = self.snapshots[name]
            else:
                del self.snapshots[name]
        elif what == "resize":
            size = SIZES[number]
            words = ["resize", "-q", "-f", "qcow2", "--shrink"]
            self.disk[:] = self.disk[:size] + bytes(max(0, size - len(self.disk)))
            self.run(by_us, [*words, str(self.top), str(size)])
            return
        elif self.snapshots:  # which QEMU would change, and we refuse to
            return
        elif what == "commit" and self.below is not None:
            words = ["commit", "-q"]
        elif what == "rebase":
            self.below = ("base", "other")[number % 2]
            words = ["rebase", "-q", "-b", self.below, "-F", self.bottom]
        elif what == "detach":
            self.below = None
            words = ["rebase", "-q", "-b", ""]
        if words:
            self.run(by_us, [*words, str(self.top)])

    @staticmethod
    def run(by_us: bool, words: list[str]) -> None:
        done = (kvik_img if by_us else qemu_img)(*words)
        assert done.code == 0, (by_us, words, done.err)

    def look(self) -> None:
        """As we see it."""
        with Opener().open(str(self.top), "qcow2") as image:
            assert isinstance(image, Qcow2Reader)
            assert image.read(0, image.size) == self.disk
            for snapshot in image.snapshots:
                image.use_snapshot(snapshot)
                assert image.read(0, image.size) == self.snapshots[snapshot.name]
        done = kvik_img("check", "-q", self.top)
        assert done.code == 0, done.err

    def look_as_qemu(self) -> None:
        out = self.top.with_suffix(".contents")
        assert qemu_img("convert", "-O", "raw", self.top, out).code == 0
        assert out.read_bytes() == self.disk
        for name, data in self.snapshots.items():
            assert qemu_img("convert", "-l", name, "-O", "raw", self.top, out).code == 0
            size = min(len(data), len(self.disk))  # QEMU shows a snapshot as long as the disk is now
            assert out.read_bytes()[:size] == data[:size]
        assert_clean(self.top)
        for path in (self.top.parent / "base", self.top.parent / "other"):
            if self.bottom == "qcow2":
                assert_clean(path)


@pytest.mark.parametrize(
    ("options", "bottom"),
    [("cluster_size=64k", "qcow2"), ("cluster_size=4k,lazy_refcounts=on", "raw"), ("extended_l2=on", "qcow2")],
)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.generate,),
)
@given(wanted=st.lists(steps, min_size=3, max_size=9))
def test_random_operations(options: str, bottom: str, wanted: list[tuple[bool, object, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        chain = Chain(Path(directory), options, bottom)
        for by_us, what, number in wanted:
            if isinstance(what, list):
                chain.change(by_us, what)
            else:
                assert isinstance(what, str)
                chain.do(by_us, what, number)
            chain.look()
        chain.look_as_qemu()
