"""Machines on a Linux bridge that filters VLANs and on the kernel's Open vSwitch, with vhost-net, and
links that are slow. One boot, two machines, shared by all."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lab.harness import REPOSITORY, Lab
from lab.managed import clear
from lab.test_vmm_net_live import NET
from lab.vmm_guest import initramfs
from lab.vmm_net_live import SHELL

pytestmark = pytest.mark.lab(deadline=280)

MODULES = ("bridge", "8021q", "veth", "tun", "vhost_net", "openvswitch", "sch_netem", "nf_tables", "af_packet")
LEASED = '#!/bin/sh\n[ "$1" = bound ] && ip addr add $ip/24 dev $interface\n'


def play(lab: Lab, scenario: str, *words: str) -> str:
    """Run a scenario inside the lab."""
    tree = f"PYTHONPATH={REPOSITORY}/src:{REPOSITORY}/tests"
    done = lab.run(["env", tree, sys.executable, "-m", "lab.switched", scenario, *words], timeout=240)
    assert done.code == 0 and f"{scenario}: well" in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def switched(labs) -> Iterator[Lab]:
    lab = labs.get()
    lab.load(*MODULES)
    (lab.share / "switched.initrd").write_bytes(initramfs(SHELL, (*NET, "8021q"), {"leased": LEASED.encode()}))
    play(lab, "set_up", str(lab.kernel.image))
    yield lab
    if lab.alive:
        clear(lab)


def test_machines_of_a_vlan_reach_each_other_and_no_other(switched: Lab) -> None:
    play(switched, "vlans")


def test_vlans_are_refused_where_the_bridge_is_not_ours_and_does_not_filter(switched: Lab) -> None:
    play(switched, "walls")


def test_static_addresses_stay_at_their_port(switched: Lab) -> None:
    play(switched, "static")


def test_the_same_on_the_kernels_open_vswitch(switched: Lab) -> None:
    play(switched, "openvswitch")


def test_bridged_machines_have_vhost_net(switched: Lab) -> None:
    play(switched, "vhost")


def test_dhcp_and_the_probe_survive_a_slow_link(switched: Lab) -> None:
    play(switched, "slow")
