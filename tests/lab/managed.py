"""Machines under our daemon in the lab: the tiny image in its place, nothing left behind. The fixture is `managed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, NotFound
from kvik.guest.tiny import TinyImage, tiny
from kvik.paths import Paths
from lab.harness import Lab
from lab.kernel import cache_directory

IMAGES = "/var/lib/kvik/images"
STATE = "/etc/kvik /var/lib/kvik /var/cache/kvik /var/log/kvik /run/kvik"
NO_NETWORK = "/var/lib/kvik/network"  # as if `default` had been undefined: making it takes seconds in the lab
VMMS = ("qemu-system-x86", "kvik-vmm")


def host_image() -> tuple[Paths, TinyImage]:
    """The tiny image, made on the host: the lab has no network, and unpacking packages there would take a minute."""
    paths = Paths.system(cache_directory() / "root")
    try:
        return paths, tiny(paths)
    except (HostError, NotFound) as error:
        pytest.skip(f"no tiny image: {error}")


def put_image(lab: Lab, paths: Paths) -> None:
    """For root, and for nobody's session."""
    lab.sh(
        f"""
        mkdir -p {IMAGES} /var/cache/kvik /tmp/nobody/run /tmp/nobody/.local/share/kvik/images
        cp -a /run/lower{paths.images}/tiny {IMAGES}/
        cp -a /run/lower{paths.cache}/kernels /var/cache/kvik/
        ln -sfn {IMAGES}/tiny /tmp/nobody/.local/share/kvik/images/tiny
        chmod 755 /var/lib/kvik {IMAGES}
        chown -R nobody /tmp/nobody
        """
    )


def clear(lab: Lab) -> None:
    """No daemon, no machine and no state is left. All of it is the lab's own."""
    kill = "\n".join(f"pkill -KILL -x {name} || true" for name in VMMS)
    lab.sh(
        f"""
        {kill}
        pkill -KILL -f [k]vik.daemon || true
        find {STATE} -mindepth 1 -delete || true
        mkdir -p {NO_NETWORK} && touch {NO_NETWORK}/default-made
        rm -rf /tmp/nobody
        """
    )


def in_lab(path: Path, paths: Paths) -> str:
    """Where a file of the host's image is in the lab."""
    return f"{IMAGES}/{path.relative_to(paths.images)}"


def row(lab: Lab, name: str) -> dict[str, Any]:
    """What `kvik list` tells of a machine."""
    rows = json.loads(lab.kvik("list", "--all", "--json").check().stdout)
    return next(row for row in rows if row["name"] == name)
