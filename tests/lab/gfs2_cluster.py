"""GFS2 on a disk that two labs have, locked by DLM: corosync tells who is there, dlm_controld carries that to the
kernel and, between the hosts, the locks on bytes of files. A host that is gone is fenced before anybody takes its locks
or its journal over: `AGENT` asks the test, which has its power, and believes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

MODULES = ("dlm", "gfs2")
TOOLS = ("corosync", "dlm_controld", "mkfs.gfs2")
CLUSTER = "kvik"
CONFIGURATION = Path("/etc/corosync/kvik.conf")
NODE = "    node {{\n        nodeid: {number}\n        name: {name}\n        ring0_addr: {address}\n    }}\n"
# Of a token that is lost 10 s are waited for: labs stand still for seconds at a time. Real-time priority would let the
# only CPU do nothing else.
TEXT = """
totem {{
    version: 2
    cluster_name: {cluster}
    transport: udpu
    token: 10000
    crypto_cipher: none
    crypto_hash: none
}}
nodelist {{
{nodes}}}
quorum {{
    provider: corosync_votequorum
    two_node: 1
}}
system {{
    sched_rr: no
    move_to_root_cgroup: no
}}
logging {{
    to_logfile: yes
    logfile: /run/lab/corosync.log
    to_syslog: no
}}
"""

AGENT = Path("/run/kvik-fence")
FENCE, FENCED = "/run/lab/fence", "/run/lab/fenced"  # asked for; done
AGENT_TEXT = f"""#!/bin/sh
cat >{FENCE}.args; mv {FENCE}.args {FENCE}
until test -e {FENCED}; do sleep 0.2; done
"""

Shell = Callable[[str], str]


def join(sh: Shell, addresses: Sequence[tuple[str, str]]) -> None:
    """This host in the cluster of these, by (name, address): back when the kernel's DLM is looked after."""
    nodes = "".join(NODE.format(number=n, name=name, address=a) for n, (name, a) in enumerate(addresses, 1))
    CONFIGURATION.write_text(TEXT.format(cluster=CLUSTER, nodes=nodes))
    AGENT.write_text(AGENT_TEXT)
    AGENT.chmod(0o755)
    # The links are udev's work elsewhere.
    sh(
        f"""
        mkdir -p /dev/misc /run/corosync /var/lib/corosync
        for each in dlm-control dlm-monitor dlm_plock; do ln -s ../$each /dev/misc/$each; done
        corosync -c {CONFIGURATION}
        until corosync-cmapctl -g totem.cluster_name >/dev/null 2>&1; do sleep 0.1; done
        mkdir -p /etc/dlm
        echo fence_all {AGENT} >/etc/dlm/dlm.conf
        dlm_controld --enable_startup_fencing 0 --post_join_delay 0 --protocol tcp --debug_logfile 0
        """
    )


def make(sh: Shell, device: str) -> None:
    sh(f"mkfs.gfs2 -O -q -K -p lock_dlm -t {CLUSTER}:shared -j 2 -J 8 {device}")
