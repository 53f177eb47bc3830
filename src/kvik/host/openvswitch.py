"""Ports of Open vSwitch's bridges, by its own tool (ovs-vsctl(8), ovs-vswitchd.conf.db(5)).

One call is one transaction on the switch's database. Its records stay until they are deleted, also when a tap is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from kvik.errors import HostError
from kvik.host import tools
from kvik.host.netlink_attributes import check_name
from kvik.host.process import find_program

__all__ = ["VlanMode", "add_port", "delete_port", "is_bridge"]

TIMEOUT = 5  # seconds for the switch to do what its database says
NOT_THERE = 2  # the exit code of br-exists for a bridge that is not
VlanMode = Literal["access", "trunk", "native-tagged", "native-untagged"]


def is_bridge(name: str) -> bool:
    """Whether Open vSwitch has a bridge of that name. Raises `HostError` where it cannot be asked."""
    done = _vsctl("br-exists", check_name(name), may_fail=True)
    return done == 0


def add_port(
    bridge: str,
    port: str,
    *,
    vlan_mode: VlanMode | None = None,
    tag: int | None = None,
    trunks: Sequence[int] = (),
    external_ids: Mapping[str, str] | None = None,
) -> None:
    """Make an interface a port of a bridge, with its VLANs, in one transaction; a record left over is replaced.

    `external_ids` are the interface's, such as iface-id, by which a controller knows it. Raises `HostError`.
    """
    settings = []
    if vlan_mode is not None:
        settings.append(f"vlan_mode={vlan_mode}")
    if tag is not None:
        settings.append(f"tag={tag}")
    if trunks:
        settings.append("trunks=" + ",".join(map(str, trunks)))
    check_name(port)
    words = ["--if-exists", "del-port", port, "--", "add-port", check_name(bridge), port, *settings]
    if external_ids:
        quoted = [f'external-ids:{key}="{_escape(value)}"' for key, value in external_ids.items()]
        words += ["--", "set", "Interface", port, *quoted]
    _vsctl(*words)


def delete_port(port: str) -> None:
    """Of whichever bridge has it; no error if none has."""
    _vsctl("--if-exists", "del-port", check_name(port))


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _vsctl(*words: str, may_fail: bool = False) -> int:
    if find_program("ovs-vsctl") is None:
        raise HostError("cannot use Open vSwitch: ovs-vsctl is missing", remedy="apt install openvswitch-switch")
    done = tools.run(["ovs-vsctl", f"--timeout={TIMEOUT}", *words], timeout=TIMEOUT + 5, check=False)
    if done.code == 0 or (may_fail and done.code == NOT_THERE):
        return done.code or 0
    said = done.err.decode("utf-8", "replace").strip().splitlines()
    reason = said[-1][:300] if said else f"exit code {done.code}"
    raise HostError(
        f"Open vSwitch refused {' '.join(words[:4])}: {reason}",
        remedy="start it: service openvswitch-switch start" if "database connection failed" in reason else "",
    )
