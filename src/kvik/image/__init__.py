"""Files a machine starts from: disk images (raw, qcow2), kernels, initramfs archives.

What users of disk images need is here by its name; nothing is imported before it is asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.base import Extent as Extent
    from kvik.image.base import Image as Image
    from kvik.image.create import CreateOptions as CreateOptions
    from kvik.image.create import create as create
    from kvik.image.info import Info as Info
    from kvik.image.opening import open_image as open_image
    from kvik.image.opening import probe_format as probe_format
    from kvik.image.qcow2.check import CheckResult as CheckResult

# name: module
_PLACES = {
    "CheckResult": "qcow2.check",
    "CreateOptions": "create",
    "Extent": "base",
    "Image": "base",
    "Info": "info",
    "create": "create",
    "open_image": "opening",
    "probe_format": "opening",
}


def __getattr__(name: str) -> object:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'kvik.image' has no attribute {name!r}")
    module = __import__(f"kvik.image.{place}", fromlist=[name])
    return getattr(module, name)
