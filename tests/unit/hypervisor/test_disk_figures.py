"""What is told of a disk: where the last write ended is an offset of the image's file, not of the guest."""

from __future__ import annotations

from typing import Any

from kvik.hypervisor.stats import disk_figures

SIZES = {"virtual-size": 1 << 30, "actual-size": 17 << 20}


def node(offset: int, **more: Any) -> dict[str, Any]:
    return {"stats": {"rd_operations": 3, "wr_highest_offset": offset}, **more}


def test_of_a_qcow2_image_the_node_at_the_bottom_knows() -> None:
    """As QEMU 7.2 answers, with a filter between device and format."""
    device = node(900 << 20, parent=node(900 << 20, parent=node(18 << 20)), backing=node(5))
    figures = disk_figures("block.0", device, {**SIZES, "format": "qcow2"})
    assert figures["block.0.allocation"] == 18 << 20
    assert figures["block.0.rd.reqs"] == 3 and figures["block.0.physical"] == 17 << 20


def test_without_it_only_a_raw_images_offsets_are_those_of_its_file() -> None:
    assert disk_figures("block.0", node(4096), {**SIZES, "format": "raw"})["block.0.allocation"] == 4096
    assert "block.0.allocation" not in disk_figures("block.0", node(4096), {**SIZES, "format": "qcow2"})
    assert disk_figures("block.0", {}, {}) == {}
