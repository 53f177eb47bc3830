"""Our own program, for what libvirt has no call for: same framing, same notation (see `kvik.rpc.xdr`).

Numbers are never reused; a new field means a new procedure. From 100 on: events.

- DOMAIN_WAIT_READY: waits until the machine is ready (booted, address known, agent answering) or `timeout` ms passed
  (0: the daemon's own limit); result: the stages so far and whether it is ready.
- DOMAIN_EXEC: runs a command in the guest through its agent, for at most `timeout` ms (0: without limit). `signal` is 0
  if the command exited by itself.
- DOMAIN_OVERVIEW: everything that `list`, `ps` and `top` show, in one call. Flags are virConnectListAllDomainsFlags;
  `uptime` is in seconds, 0 while the machine is off.
- NETWORK_MESSAGES: what is to be said of a network: what its document says and nobody here understands, what was found
  since it was started (another rule set that drops its packets, a DHCP server that ended).
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
    "stage": "name:string seconds:double state:int detail:string",
    "overview_row": (
        "name:string uuid:opaque[16] id:int state:int reason:int accelerator:string vcpus:uint mem_kib:uhyper "
        "cpu_time:uhyper address:string? ready:int persistent:int autostart:int title:string? uptime:double"
    ),
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
    40: ("NETWORK_MESSAGES", "net:network", "messages:string<256>", "h"),
    100: ("DOMAIN_EVENT_STAGE", "dom:domain stage:stage", "", "e"),
}
