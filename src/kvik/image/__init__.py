"""Files a machine starts from: disk images (raw, qcow2), kernels, initramfs archives.

What users of disk images need is here by its name; nothing is imported before it is asked for. No name here is that of
a module: `kvik.image.create` is always the module, `create_image` what it is for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.base import Extent as Extent
    from kvik.image.base import Image as Image
    from kvik.image.commit import commit as commit_image
    from kvik.image.commit import empty as empty_image
    from kvik.image.compare import Difference as Difference
    from kvik.image.compare import compare as compare_images
    from kvik.image.convert import convert as convert_image
    from kvik.image.create import CreateOptions as CreateOptions
    from kvik.image.create import create as create_image
    from kvik.image.info import Info as Info
    from kvik.image.info import info as image_info
    from kvik.image.measure import Measure as Measure
    from kvik.image.measure import measure as measure_image
    from kvik.image.opening import open_image as open_image
    from kvik.image.opening import probe_format as probe_format
    from kvik.image.qcow2.check import CheckResult as CheckResult
    from kvik.image.rebase import rebase as rebase_image
    from kvik.image.resize import resize as resize_image

__all__ = [
    "CheckResult",
    "CreateOptions",
    "Difference",
    "Extent",
    "Image",
    "Info",
    "Measure",
    "commit_image",
    "compare_images",
    "convert_image",
    "create_image",
    "empty_image",
    "image_info",
    "measure_image",
    "open_image",
    "probe_format",
    "rebase_image",
    "resize_image",
]

# name: (module, its name there)
_PLACES = {
    "CheckResult": ("qcow2.check", "CheckResult"),
    "CreateOptions": ("create", "CreateOptions"),
    "Difference": ("compare", "Difference"),
    "Extent": ("base", "Extent"),
    "Image": ("base", "Image"),
    "Info": ("info", "Info"),
    "Measure": ("measure", "Measure"),
    "commit_image": ("commit", "commit"),
    "compare_images": ("compare", "compare"),
    "convert_image": ("convert", "convert"),
    "create_image": ("create", "create"),
    "empty_image": ("commit", "empty"),
    "image_info": ("info", "info"),
    "measure_image": ("measure", "measure"),
    "open_image": ("opening", "open_image"),
    "probe_format": ("opening", "probe_format"),
    "rebase_image": ("rebase", "rebase"),
    "resize_image": ("resize", "resize"),
}


def __getattr__(name: str) -> object:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'kvik.image' has no attribute {name!r}")
    module = __import__(f"kvik.image.{place[0]}", fromlist=[place[1]])
    return getattr(module, place[1])
