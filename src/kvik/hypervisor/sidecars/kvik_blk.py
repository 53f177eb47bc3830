"""kvik-blk (`kvik.vmm.blk`): a disk's images in a process of their own, by our own reader and writer.

    <disk type='file'><driver name='qemu' type='qcow2'/>...        qcow2, on qcow2 and raw images
    <disk type='file'><driver name='kvik-blk' type='raw'/>...      raw, on request

It gets every image of the chain as a descriptor and opens nothing itself. What it cannot do (other formats, finding
zeroes in what is written) is qemu-storage-daemon's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvik
from kvik.conf.devices.disk import Disk, IoTune
from kvik.hypervisor.layers import layers
from kvik.hypervisor.names import alias_of, image_name
from kvik.hypervisor.sidecars.group import Command

__all__ = ["FORMATS", "KIND", "blk_command", "serves", "throttle"]

KIND = "kvik-blk"
FORMATS = frozenset({"raw", "qcow2"})
_PROGRAM = Path(kvik.__file__).parent / "vmm" / "blk" / "__main__.py"
_SWITCHED_OFF = (None, "off")


def serves(disk: Disk) -> bool:
    """Whether it can serve this one, as far as the document tells: below an image that names no others lies what its
    header says, which is known when it was opened."""
    driver = disk.driver
    if driver is None or driver.name not in (None, "qemu", KIND):
        return False
    if driver.detect_zeroes not in _SWITCHED_OFF or driver.copy_on_read:
        return False
    if disk.iotune is not None and disk.iotune.size_iops_sec:
        return False
    return all(layer.format in FORMATS and layer.source.slices is None for layer in layers(disk))


def blk_command(
    disk: Disk,
    images: Mapping[str, int],
    *,
    life: int,
    monitor: int,
    export: int,
    redo: int,
    queues: int,
    node: str = "",
) -> Command:
    """`images`: by `image_name`. `life`: its end of the life line. `monitor`, `export`: sockets on which it listens;
    the VMM's connection waits on `export`. `redo`: the file where it notes what the one after it must know. `node`:
    what the first image is called, if it came on top while the machine ran."""
    alias, driver = alias_of(disk), disk.driver
    cached = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    argv = [sys.executable, "-I", "-S", *cached, str(_PROGRAM), f"--id={alias}"]
    chain = list(layers(disk))
    argv += [f"--image={images[image_name(alias, layer.number)]},{layer.format}" for layer in chain]
    argv += [f"--socket={export}", f"--monitor={monitor}", f"--life={life}", f"--redo={redo}", f"--queues={queues}"]
    if node:
        argv.append(f"--node={node}")
    if disk.serial:
        argv.append(f"--serial={disk.serial}")
    if driver is not None and driver.queue_size:
        argv.append(f"--queue-size={driver.queue_size}")
    if driver is not None and driver.cache not in (None, "default"):
        argv.append(f"--cache={driver.cache}")
    if disk.blockio is not None and disk.blockio.logical_block_size:
        argv.append(f"--block-size={disk.blockio.logical_block_size}")
    flags = {
        "--read-only": chain[0].read_only,
        "--no-discard": driver is not None and driver.discard == "ignore",
        "--no-lock": bool(disk.shareable) and chain[0].format == "raw",
    }
    argv += [flag for flag, wanted in flags.items() if wanted]
    return Command(KIND, alias, argv, (*images.values(), life, monitor, export, redo))


def throttle(disk: Disk, tune: IoTune | None) -> dict[str, Any]:
    """Arguments of block_set_io_throttle (qapi/block-core.json); 0 is no limit."""
    found: dict[str, Any] = {"id": alias_of(disk)}
    for way, theirs in (("total", ""), ("read", "_rd"), ("write", "_wr")):
        for kind, name in (("bytes", "bps"), ("iops", "iops")):
            found[f"{name}{theirs}"] = getattr(tune, f"{way}_{kind}_sec", None) or 0
            most = getattr(tune, f"{way}_{kind}_sec_max", None)
            if most:
                found[f"{name}{theirs}_max"] = most
    return found
