"""Our own program, for what libvirt has no call for: same framing, same notation (see `kvik.rpc.xdr`).

Numbers are never reused; a new field means a new procedure. From 100 on: events.

- DOMAIN_WAIT_READY: waits until the machine is ready (booted, address known, agent answering) or `timeout` ms passed
  (0: the daemon's own limit); result: the stages so far and whether it is ready.
- DOMAIN_EXEC: runs a command in the guest through its agent, for at most `timeout` ms (0: without limit). `signal` is 0
  if the command exited by itself.
- DOMAIN_SNAPSHOT_PLAN: what deleting a snapshot with these flags (virDomainSnapshotDeleteFlags) would do, a line each;
  nothing is done.
- DOMAIN_OVERVIEW: everything that `list`, `ps` and `top` show, in one call. Flags are virConnectListAllDomainsFlags;
  `uptime` is in seconds, 0 while the machine is off.
- NETWORK_MESSAGES: what is to be said of a network: what its document says and nobody here understands, what was found
  since it was started (another rule set that drops its packets, a DHCP server that ended).
- BRIDGE_*: the host's Linux bridges. A port's `state` is the kernel's word ("forwarding"), `machine` whose tap it is;
  times are seconds; settings are typed parameters with the kernel's names. BRIDGE_FDB's `age` is seconds since a frame
  came from there. In BRIDGE_CHANGE_FDB and _VLAN `remove` 1 takes away.
- INTERFACE_BRIDGE and _UNBRIDGE move the host's address to a bridge and back; undone after `seconds` unless committed
  by libvirt's INTERFACE_CHANGE_COMMIT (0: for good at once). INTERFACE_BEGIN is libvirt's INTERFACE_CHANGE_BEGIN with
  such a time. INTERFACE_PENDING: `state` is "" (nothing), "open", "kept" (what to write could not be written) or
  "reverted".
- DNS_*: names of machines on the host (kvik dns). `resolver` is who answers the host's questions, "" for nobody who
  could be told; a zone without servers is not known to it, and `why` says the reason.
- A stage is {name, seconds since the start, state}: state is 0 waiting, 1 done, 2 stalled, 3 not expected,
  4 failed (it will not come: a kernel panic, nothing to boot); `detail` says why.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

NUMBER: Final = 0x6B76696B  # "kvik"
VERSION: Final = 1

STRUCTS: dict[str, str] = {
    "domain": "name:string uuid:opaque[16] id:int",
    "network": "name:string uuid:opaque[16]",
    "storage_pool": "name:string uuid:opaque[16]",
    "stage": "name:string seconds:double state:int detail:string",
    "overview_row": (
        "name:string uuid:opaque[16] id:int state:int reason:int accelerator:string vcpus:uint mem_kib:uhyper "
        "cpu_time:uhyper address:string? ready:int persistent:int autostart:int title:string? uptime:double"
    ),
    "bridge": (
        "name:string mac:string up:int carrier:int mtu:uint stp:int priority:uint forward_delay:double "
        "hello_time:double max_age:double ageing_time:double vlan_filtering:int vlan_default_pvid:uint "
        "multicast_snooping:int bridge_id:string root_id:string root_port:uint root_path_cost:uint "
        "topology_change:int fdb_learned:uint fdb_max_learned:uint addresses:string<1024> ports:string<4096> "
        "rx_bytes:uhyper rx_packets:uhyper rx_dropped:uhyper tx_bytes:uhyper tx_packets:uhyper tx_dropped:uhyper"
    ),
    "bridge_port": (
        "name:string mac:string number:uint state:string carrier:int machine:string? cost:uint priority:uint "
        "isolated:int learning:int flood:int hairpin:int guard:int fast_leave:int neigh_suppress:int "
        "designated_bridge:string designated_port:uint designated_cost:uint rx_bytes:uhyper rx_packets:uhyper "
        "rx_dropped:uhyper tx_bytes:uhyper tx_packets:uhyper tx_dropped:uhyper"
    ),
    "bridge_fdb": "mac:string port:string vlan:uint kind:string age:double",
    "bridge_vlan": "port:string first:uint last:uint pvid:int untagged:int",
    "dns_zone": "network:string domain:string servers:string<1024> why:string",
    "exec_result": "exitcode:int signal:int stdout:opaque<16777216> stderr:opaque<8388608> truncated:int",
}

PROCEDURES: dict[int, tuple[str, str, str, str]] = {
    1: ("DOMAIN_WAIT_READY", "dom:domain timeout:uint", "ready:int stages:stage<64>", ""),
    2: (
        "DOMAIN_EXEC",
        "dom:domain argv:string<4096> environment:string<4096> stdin:opaque<8388608> timeout:uint",
        "result:exec_result",
        "",
    ),
    3: ("DOMAIN_STAGES", "dom:domain", "ready:int stages:stage<64>", "h"),
    4: (
        "DAEMON_STATUS",
        "",
        "version:string pid:int scope:string uptime:double machines:uint running:uint clients:uint "
        "hypervisors:string<16>",
        "h",
    ),
    # 5 was an overview without `uptime`.
    6: ("DAEMON_SHUTDOWN", "", "", "h"),
    7: ("DOMAIN_OVERVIEW", "flags:uint", "rows:overview_row<16384>", "h"),
    8: ("DOMAIN_SNAPSHOT_PLAN", "dom:domain name:string flags:uint", "steps:string<16384>", ""),
    20: ("BRIDGE_LIST", "", "bridges:bridge<4096>", ""),
    21: ("BRIDGE_SHOW", "name:string", "bridge:bridge ports:bridge_port<4096>", ""),
    22: ("BRIDGE_ADD", "name:string mac:string? settings:typed_param<64>", "", ""),
    23: ("BRIDGE_DELETE", "name:string force:int", "", ""),
    24: ("BRIDGE_ADD_PORT", "bridge:string port:string", "", ""),
    25: ("BRIDGE_DELETE_PORT", "bridge:string port:string", "", ""),
    26: ("BRIDGE_SET", "name:string settings:typed_param<64>", "", ""),
    27: ("BRIDGE_SET_PORT", "bridge:string port:string settings:typed_param<64>", "", ""),
    28: ("BRIDGE_FDB", "name:string", "entries:bridge_fdb<65536>", ""),
    29: ("BRIDGE_CHANGE_FDB", "bridge:string port:string mac:string vlan:uint remove:int", "", ""),
    30: ("BRIDGE_FLUSH_FDB", "name:string", "", ""),
    31: ("BRIDGE_VLAN", "name:string", "vlans:bridge_vlan<65536>", ""),
    32: (
        "BRIDGE_CHANGE_VLAN",
        "bridge:string port:string first:uint last:uint pvid:int untagged:int remove:int",
        "",
        "",
    ),
    40: (
        "INTERFACE_BRIDGE",
        "interface:string bridge:string stp:int delay:double start:int seconds:uint",
        "messages:string<16>",
        "",
    ),
    41: ("INTERFACE_UNBRIDGE", "bridge:string start:int seconds:uint", "messages:string<16>", ""),
    42: ("INTERFACE_BEGIN", "seconds:uint", "", ""),
    43: ("INTERFACE_PENDING", "", "state:string what:string seconds:double outcome:string", ""),
    50: ("NETWORK_MESSAGES", "net:network", "messages:string<256>", "h"),
    51: ("DNS_STATUS", "", "enabled:int resolver:string file:string zones:dns_zone<16384>", ""),
    52: ("DNS_ENABLE", "", "resolver:string", ""),
    53: ("DNS_DISABLE", "", "was:int", ""),
    60: ("STORAGE_POOL_MESSAGES", "pool:storage_pool", "messages:string<256>", "h"),
    100: ("DOMAIN_EVENT_STAGE", "dom:domain stage:stage", "", "e"),
}
