"""Every verb with every option: what it asks of the daemon, what it prints, how it ends.

`CASES` is also the proof that no declared option goes untested: the last tests compare it with the declarations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik.cli.main import load
from kvik.cli.options import COMMON, REST, Options, parse
from kvik.cli.verbs import GROUPS, VERBS

A = object()  # "no matter what"

# (command line, the one call that matters or None, text that the output has)
CASES: list[tuple[str, tuple[Any, ...] | None, str]] = [
    # machines' names on the host
    ("dns enable", ("call_kvik", "DNS_ENABLE"), "Names of machines resolve on this host, by dnsmasq\n"),
    ("dns disable", ("call_kvik", "DNS_DISABLE"), "no longer resolve"),
    (
        "dns status",
        ("call_kvik", "DNS_STATUS"),
        " lan       *.lab   10.0.0.1, fd00::1\n lab       -       it is not active\n",
    ),
    ("--json dns status", ("call_kvik", "DNS_STATUS"), '"file": "/etc/dnsmasq.d/kvik.conf"'),
    # the host's bridges
    ("bridge list", ("call_kvik", "BRIDGE_LIST"), " br0    up      on    on      8000.525400000001   192.0.2.1/24"),
    ("bridge show br0", ("call_kvik", "BRIDGE_SHOW", "br0"), "isolated, guard, no flood"),
    ("bridge show br0 --watch --delay 1 --iterations 2", ("call_kvik", "BRIDGE_SHOW", "br0"), "In B/s"),
    (
        "bridge add br1 stp=on forward-delay=2.5 mac=52:54:00:00:00:05",
        ("call_kvik", "BRIDGE_ADD", "br1", "52:54:00:00:00:05", [("stp", 6, True), ("forward_delay", 5, 2.5)]),
        "Bridge br1 created\n",
    ),
    ("bridge del br0", ("call_kvik", "BRIDGE_DELETE", "br0", 0), "Bridge br0 deleted\n"),
    ("bridge del br0 --force", ("call_kvik", "BRIDGE_DELETE", "br0", 1), ""),
    ("bridge addif br0 eth1", ("call_kvik", "BRIDGE_ADD_PORT", "br0", "eth1"), "eth1 is a port of bridge br0\n"),
    ("bridge delif br0 eth1", ("call_kvik", "BRIDGE_DELETE_PORT", "br0", "eth1"), "no longer a port"),
    ("bridge set br0 ageing_time=60", ("call_kvik", "BRIDGE_SET", "br0", [("ageing_time", 4, 60)]), "changed\n"),
    (
        "bridge port br0 vnet0 isolated=on cost=10",
        ("call_kvik", "BRIDGE_SET_PORT", "br0", "vnet0", [("isolated", 6, True), ("cost", 4, 10)]),
        "Port vnet0 of bridge br0 changed\n",
    ),
    ("bridge stp br0", ("call_kvik", "BRIDGE_SHOW", "br0"), "Root:           1000.525400000009 by port 1, cost 100\n"),
    (
        "bridge stp br0 on priority=4096",
        ("call_kvik", "BRIDGE_SET", "br0", [("priority", 4, 4096), ("stp", 6, True)]),
        "changed",
    ),
    ("bridge fdb br0", ("call_kvik", "BRIDGE_FDB", "br0"), " 52:54:00:00:00:07   vnet0   -      dynamic   12s\n"),
    (
        "bridge fdb br0 add 52:54:00:00:00:08 vnet0 10",
        ("call_kvik", "BRIDGE_CHANGE_FDB", "br0", "vnet0", "52:54:00:00:00:08", 10, 0),
        "added to port vnet0",
    ),
    (
        "bridge fdb br0 del 52:54:00:00:00:08 vnet0",
        ("call_kvik", "BRIDGE_CHANGE_FDB", "br0", "vnet0", "52:54:00:00:00:08", 0, 1),
        "removed from port vnet0",
    ),
    ("bridge fdb br0 flush", ("call_kvik", "BRIDGE_FLUSH_FDB", "br0"), "forgotten"),
    ("bridge vlan br0", ("call_kvik", "BRIDGE_VLAN", "br0"), " vnet0   100-199   -      tagged\n"),
    ("bridge vlan br0 on", ("call_kvik", "BRIDGE_SET", "br0", [("vlan_filtering", 6, True)]), "is on\n"),
    (
        "bridge vlan br0 add vnet0 10 --pvid --untagged",
        ("call_kvik", "BRIDGE_CHANGE_VLAN", "br0", "vnet0", 10, 10, 1, 1, 0),
        "vnet0 is in VLAN 10\n",
    ),
    (
        "bridge vlan br0 del vnet0 100-199",
        ("call_kvik", "BRIDGE_CHANGE_VLAN", "br0", "vnet0", 100, 199, 0, 0, 1),
        "vnet0 is no longer in VLAN 100-199\n",
    ),
    # the host's interfaces
    ("iface-list", ("call", "CONNECT_LIST_ALL_INTERFACES", 1, 2), " br0    active   52:54:00:00:00:01\n"),
    ("iface-list --inactive", ("call", "CONNECT_LIST_ALL_INTERFACES", 1, 1), "inactive"),
    ("iface-list --all", ("call", "CONNECT_LIST_ALL_INTERFACES", 1, 3), "active"),
    ("iface-dumpxml br0", ("call", "INTERFACE_GET_XML_DESC", A, 0), "<bridge/>"),
    ("iface-dumpxml br0 --inactive --xpath //bridge --wrap", ("call", "INTERFACE_GET_XML_DESC", A, 1), "<nodes>"),
    ("iface-define @xml --validate", ("call", "INTERFACE_DEFINE_XML", "<domain/>", 1), "Interface br0 defined from"),
    ("iface-undefine br0", ("call", "INTERFACE_UNDEFINE", A), "Interface br0 undefined\n"),
    ("iface-start br0", ("call", "INTERFACE_CREATE", A, 0), "Interface br0 started\n"),
    ("iface-destroy br0", ("call", "INTERFACE_DESTROY", A, 0), "Interface br0 destroyed\n"),
    ("iface-name 52:54:00:00:00:01", ("call", "INTERFACE_LOOKUP_BY_MAC_STRING", "52:54:00:00:00:01"), "br0\n"),
    ("iface-mac br0", ("call", "INTERFACE_LOOKUP_BY_NAME", "br0"), "52:54:00:00:00:01\n"),
    ("iface-begin", ("call", "INTERFACE_CHANGE_BEGIN", 0), ""),
    ("iface-begin --timeout 90", ("call_kvik", "INTERFACE_BEGIN", 90), "undone in 90 s unless"),
    ("iface-commit", ("call", "INTERFACE_CHANGE_COMMIT", 0), "Kept: eth0 into bridge br0\n"),
    ("iface-rollback", ("call", "INTERFACE_CHANGE_ROLLBACK", 0), "Undone: eth0 into bridge br0\n"),
    ("iface-pending", ("call_kvik", "INTERFACE_PENDING"), "Pending: eth0 into bridge br0 (undone in 60 s)\n"),
    (
        "iface-bridge eth0 br0 --no-stp",
        ("call_kvik", "INTERFACE_BRIDGE", "eth0", "br0", 0, 0, 1, 60),
        "Undone in 60 s unless you say: kvik iface-commit\n",
    ),
    (
        "iface-bridge eth0 br0 --stp --delay 2 --no-start --timeout 0",
        ("call_kvik", "INTERFACE_BRIDGE", "eth0", "br0", 1, 2, 0, 0),
        "Created bridge br0 with attached device eth0\n",
    ),
    ("iface-unbridge br0 --timeout 30", ("call_kvik", "INTERFACE_UNBRIDGE", "br0", 1, 30), "un-attached from bridge"),
    ("iface-unbridge br0 --no-start", ("call_kvik", "INTERFACE_UNBRIDGE", "br0", 0, 60), "un-attached"),
    # life cycle
    ("start web", ("start", "web", 0), "Domain 'web' started\n\n"),
    (
        "start web --paused --autodestroy --bypass-cache --force-boot --reset-nvram",
        ("start", "web", 1 | 2 | 4 | 8 | 32),
        "started",
    ),
    ("create @xml", ("create", "<domain/>", 0), "Domain 'tiny-1' created from"),
    (
        "create @xml --paused --autodestroy --validate --reset-nvram",
        ("create", "<domain/>", 1 | 2 | 16 | 32),
        "created",
    ),
    ("shutdown tiny-1", ("shutdown", "tiny-1", 0), "Domain 'tiny-1' is being shutdown\n"),
    ("shutdown tiny-1 --mode acpi,agent", ("shutdown", "tiny-1", 3), "being shutdown"),
    ("reboot tiny-1 --mode agent", ("reboot", "tiny-1", 2), "Domain 'tiny-1' is being rebooted\n"),
    ("reset tiny-1", ("reset", "tiny-1"), "Domain 'tiny-1' was reset\n"),
    ("destroy tiny-1 --graceful --remove-logs", ("destroy", "tiny-1", 3), "Domain 'tiny-1' destroyed\n"),
    ("suspend tiny-1", ("suspend", "tiny-1"), "Domain 'tiny-1' suspended\n"),
    ("resume --domain tiny-1", ("resume", "tiny-1"), "Domain 'tiny-1' resumed\n"),
    # configuration
    ("define @xml", ("define", "<domain/>", 0), "Domain 'web' defined from"),
    ("define --file @xml --validate", ("define", "<domain/>", 1), "defined"),
    ("undefine web", ("undefine", "web", 0), "Domain 'web' has been undefined\n"),
    ("undefine web --managed-save --snapshots-metadata --nvram --tpm", ("undefine", "web", 1 | 2 | 4 | 32), ""),
    ("undefine web --checkpoints-metadata --keep-nvram --keep-tpm", ("undefine", "web", 16 | 8 | 64), ""),
    ("autostart web", ("set_autostart", "web", True), "Domain 'web' marked as autostarted\n"),
    ("autostart web --disable", ("set_autostart", "web", False), "Domain 'web' unmarked as autostarted\n"),
    ("domrename web other", ("rename", "web", "other"), "Domain successfully renamed\n"),
    ("domrename --new-name other --domain web", ("rename", "web", "other"), ""),
    # documents
    ("dumpxml tiny-1", ("xml", "tiny-1", 0), "<name>tiny-1</name>"),
    ("dumpxml tiny-1 --inactive --security-info --update-cpu --migratable", ("xml", "tiny-1", 15), "<domain"),
    ("dumpxml tiny-1 --xpath //name --wrap", None, "<nodes>\n  <name>tiny-1</name>\n</nodes>\n"),
    ("domxml-to-native qemu-argv --domain tiny-1", ("domxml_to_native", A, "qemu-argv"), "qemu-system-x86_64 -S"),
    ("domxml-to-native --format qemu-argv --xml @xml", ("domxml_to_native", "<domain/>", "qemu-argv"), "qemu"),
    # words
    ("desc tiny-1", ("metadata", "tiny-1", 0, None, 0), "words\n"),
    ("desc tiny-1 --title --live", ("metadata", "tiny-1", 1, None, 1), "words\n"),
    ("desc tiny-1 --config a new text", ("set_metadata", "tiny-1", 0, "a new text", None, None, 2), "updated"),
    ("desc tiny-1 --current --new-desc x", ("set_metadata", "tiny-1", 0, "x", None, None, 0), "updated"),
    ("metadata tiny-1 http://x", ("metadata", "tiny-1", 2, "http://x", 0), "words\n"),
    (
        "metadata --domain tiny-1 --uri http://x --key k --set <a/> --live",
        ("set_metadata", "tiny-1", 2, "<a/>", "k", "http://x", 1),
        "Metadata modified",
    ),
    ("metadata tiny-1 u --remove --config", ("set_metadata", "tiny-1", 2, None, None, "u", 2), "Metadata removed"),
    ("metadata tiny-1 u --current", ("metadata", "tiny-1", 2, "u", 0), "words"),
    # looks
    ("dominfo tiny-1", ("info", "tiny-1"), "CPU time:       1.5s\n"),
    ("domstate tiny-1", ("state", "tiny-1"), "running\n"),
    ("domstate tiny-1 --reason", ("state", "tiny-1"), "running (booted)\n"),
    ("domcontrol tiny-1", ("control_info", "tiny-1"), "ok\n"),
    ("domid tiny-1", ("domain", "tiny-1"), "3\n"),
    ("domid web", ("domain", "web"), "-\n"),
    ("domname 3", ("domain", "3"), "tiny-1\n"),
    ("domuuid tiny-1", ("domain", "tiny-1"), "11111111-2222-3333-4444-555555555555\n"),
    ("list", ("overview", 1), " Id   Name     State      Acceleration\n"),
    ("list --all --table", ("overview", 3), " -    web      shut off   -\n"),
    ("list --inactive", ("overview", 2), ""),
    ("list --name --uuid --id", ("overview", 1), "11111111-2222-3333-4444-555555555555 tiny-1 3\n"),
    ("list --all --title --managed-save", ("overview", 3), "saved     The web   -"),
    (
        "list --transient --persistent --with-snapshot --without-snapshot --with-checkpoint --without-checkpoint",
        ("overview", 1 | 4 | 8 | 4096 | 8192 | 16384 | 32768),
        "",
    ),
    ("list --state-running --state-paused --state-other", ("overview", 1 | 16 | 32 | 128), ""),
    ("list --state-shutoff", ("overview", 2 | 64), ""),
    (
        "list --autostart --no-autostart --with-managed-save --without-managed-save",
        ("overview", 1 | 1024 | 2048 | 256 | 512),
        "",
    ),
    # statistics
    ("domstats", ("all_stats", [], 0, 0), "Domain: 'tiny-1'\n  state.state=1\n  state.on=yes\n\n"),
    ("domstats --raw tiny-1", ("all_stats", A, 0, 0), "  state.on=True\n"),
    (
        "domstats --state --cpu-total --balloon --vcpu --interface --block --perf --iothread --memory --dirtyrate --vm",
        ("all_stats", [], 2047, 0),
        "",
    ),
    (
        "domstats --list-active --list-inactive --list-persistent --list-transient --list-running --list-paused "
        "--list-shutoff --list-other",
        ("all_stats", [], 0, 255),
        "",
    ),
    ("domstats --enforce --backing --nowait --domain web", ("all_stats", A, 0, 0b111 << 29), ""),
    # disks
    ("domblklist tiny-1", ("xml", "tiny-1", 0), " vda      /images/a.qcow2\n"),
    ("domblklist tiny-1 --details --inactive", ("xml", "tiny-1", 2), " file   cdrom    sdb      -\n"),
    ("domblkinfo tiny-1 vda", ("block_info", "tiny-1", "vda"), "Capacity:       1073741824\n"),
    ("domblkinfo tiny-1 --device vda --human", ("block_info", "tiny-1", "vda"), "Capacity:       1.000 GiB\n"),
    ("domblkinfo tiny-1 --all", ("block_info", "tiny-1", "sda"), " sdb      -            -            -\n"),
    ("domblkstat tiny-1 vda", ("stats", "tiny-1", 32), "vda rd_req 10\nvda rd_bytes 5120\n"),
    (
        "domblkstat tiny-1 --device /images/a.qcow2 --human",
        ("stats", "tiny-1", 32),
        "Device: vda\n number of read operations:      10\n",
    ),
    ("domblkstat tiny-1", ("stats", "tiny-1", 32), "rd_req 10\n"),
    (
        "domblkthreshold tiny-1 vda[2] --threshold 1M",
        ("call", "DOMAIN_SET_BLOCK_THRESHOLD", A, "vda[2]", 1 << 20, 0),
        "",
    ),
    ("domblkerror tiny-1", ("call", "DOMAIN_GET_DISK_ERRORS", A, A, A), "vda: no space\n"),
    # interfaces
    ("domiflist tiny-1", ("xml", "tiny-1", 0), " vnet0       bridge   br0      virtio   52:54:00:aa:bb:cc\n"),
    ("domiflist tiny-1 --inactive", ("xml", "tiny-1", 2), " -           user     -        -        52:54:00"),
    ("domifstat tiny-1 vnet0", ("interface_stats", "tiny-1", "vnet0"), "vnet0 rx_bytes 1\nvnet0 rx_packets 2\n"),
    ("domifstat --domain tiny-1 --interface vnet0", ("interface_stats", "tiny-1", "vnet0"), "tx_drop 8\n"),
    (
        "domiftune tiny-1 vnet0",
        ("interface_parameters", "tiny-1", "vnet0", 0),
        "inbound.average: 100\ninbound.peak   : 0\noutbound.average: 50\n",
    ),
    ("domiftune --domain tiny-1 --interface vnet0 --current", ("interface_parameters", A, "vnet0", 0), ""),
    ("domiftune tiny-1 vnet0 --config", ("interface_parameters", A, "vnet0", 2), ""),
    (
        "domiftune tiny-1 vnet0 --inbound 100,200,300,50 --outbound 0 --live",
        (
            "set_interface_parameters",
            A,
            "vnet0",
            {
                f"inbound.{name}": value
                for name, value in zip(("average", "peak", "burst", "floor"), (100, 200, 300, 50))
            }
            | {"outbound.average": 0},
            1,
        ),
        "",
    ),
    (
        "domifaddr tiny-1",
        ("interface_addresses", "tiny-1", 0),
        " eth0       52:54:00:aa:bb:cc    ipv4         10.0.2.15/24\n"
        " -          -                    ipv6         fe80::1/64\n",
    ),
    (
        "domifaddr tiny-1 --full --source agent --interface eth0",
        ("interface_addresses", "tiny-1", 1),
        " eth0       52:54:00:aa:bb:cc    ipv6         fe80::1/64\n",
    ),
    ("domif-getlink tiny-1 vnet0", ("xml", "tiny-1", 0), "vnet0 up\n"),
    ("domif-getlink tiny-1 --interface 52:54:00:AA:bb:cd --config", ("xml", "tiny-1", 2), "down\n"),
    (
        "domif-setlink tiny-1 vnet0 down",
        ("update_device", "tiny-1", A, 0),
        "Device updated successfully\n",
    ),
    ("domif-setlink tiny-1 --interface vnet0 --state up --config", ("update_device", "tiny-1", A, 2), ""),
    ("domif-setlink tiny-1 vnet0 down --print-xml", ("xml", "tiny-1", 0), '<link state="down"/></interface>'),
    ("ip tiny-1", ("interface_addresses", "tiny-1", 2), "10.0.2.15\n"),
    ("ip --domain tiny-1 --all --source agent", ("interface_addresses", "tiny-1", 1), "10.0.2.15\nfe80::1\n"),
    # CPUs and memory
    ("vcpucount tiny-1", ("vcpus", "tiny-1", 6), "maximum      config         2\n"),
    ("vcpucount tiny-1 --maximum --live", ("vcpus", "tiny-1", 5), "2\n"),
    ("vcpucount tiny-1 --active --config", ("vcpus", "tiny-1", 2), "2\n"),
    ("vcpucount tiny-1 --current --maximum", ("vcpus", "tiny-1", 4), "2\n"),
    ("vcpucount tiny-1 --guest", ("vcpus", "tiny-1", 8), "2\n"),
    ("vcpuinfo tiny-1", ("vcpu_info", "tiny-1", 2), "CPU Affinity:   yy\n"),
    ("vcpuinfo tiny-1 --pretty", ("vcpu_info", "tiny-1", 2), "CPU Affinity:   0-1 (out of 2)\n"),
    ("setvcpus tiny-1 3", ("set_vcpus", "tiny-1", 3, 0), ""),
    ("setvcpus tiny-1 --count 3 --maximum --config", ("set_vcpus", "tiny-1", 3, 2 | 4), ""),
    ("setvcpus tiny-1 3 --guest --live", ("set_vcpus", "tiny-1", 3, 1 | 8), ""),
    ("setvcpus tiny-1 3 --current --hotpluggable", ("set_vcpus", "tiny-1", 3, 16), ""),
    ("setmem tiny-1 2048 --live --config", ("set_memory", "tiny-1", 2048, 3), ""),
    ("setmem tiny-1 --size 512MiB --current", ("set_memory", "tiny-1", 512 << 10, 0), ""),
    ("setmaxmem tiny-1 1G --config", ("set_memory", "tiny-1", 1 << 20, 2 | 4), ""),
    ("setmaxmem tiny-1 --size 1G --live", ("set_memory", "tiny-1", 1 << 20, 1 | 4), ""),
    ("setmaxmem tiny-1 1G --current", ("set_memory", "tiny-1", 1 << 20, 4), ""),
    ("dommemstat tiny-1", ("memory_stats", "tiny-1"), "actual 1048576\nrss 4096\n"),
    ("dommemstat tiny-1 --period 5 --live", ("call", "DOMAIN_SET_MEMORY_STATS_PERIOD", A, 5, 1), ""),
    ("dommemstat tiny-1 --period 5 --config", ("call", "DOMAIN_SET_MEMORY_STATS_PERIOD", A, 5, 2), ""),
    ("dommemstat tiny-1 --period 5 --current", ("call", "DOMAIN_SET_MEMORY_STATS_PERIOD", A, 5, 0), ""),
    ("schedinfo tiny-1", ("scheduler_parameters", "tiny-1", 0), "Scheduler      : posix\ncpu_shares     : 1024\n"),
    (
        "schedinfo tiny-1 --live cpu_shares=5 --set vcpu_quota=-1",
        ("set_scheduler_parameters", "tiny-1", {"cpu_shares": 5, "vcpu_quota": -1}, 1),
        "",
    ),
    ("schedinfo tiny-1 --weight 1 --cap 2 --config", ("set_scheduler_parameters", A, {"weight": 1, "cap": 2}, 2), ""),
    ("schedinfo tiny-1 --current", ("scheduler_parameters", "tiny-1", 0), ""),
    # devices
    ("attach-device tiny-1 @xml", ("attach_device", "tiny-1", "<domain/>", 0), "Device attached successfully\n"),
    ("attach-device tiny-1 --file @xml --persistent", ("attach_device", "tiny-1", A, 3), ""),
    ("attach-device web @xml --persistent", ("attach_device", "web", A, 2), ""),
    ("attach-device tiny-1 @xml --live --config", ("attach_device", "tiny-1", A, 3), ""),
    ("attach-device tiny-1 @xml --current", ("attach_device", "tiny-1", A, 0), ""),
    ("detach-device tiny-1 @xml --persistent", ("detach_device", "tiny-1", A, 3), "Device detached successfully\n"),
    ("detach-device tiny-1 --file @xml --live --config", ("detach_device", "tiny-1", A, 3), ""),
    ("detach-device tiny-1 @xml --current", ("detach_device", "tiny-1", A, 0), ""),
    ("update-device tiny-1 @xml --force --live", ("update_device", "tiny-1", A, 5), "Device updated successfully\n"),
    ("update-device tiny-1 --file @xml --persistent", ("update_device", "tiny-1", A, 3), ""),
    ("update-device tiny-1 @xml --current", ("update_device", "tiny-1", A, 0), ""),
    ("update-device tiny-1 @xml --config", ("update_device", "tiny-1", A, 2), ""),
    ("detach-device-alias tiny-1 ua-x --live", ("detach_device_alias", "tiny-1", "ua-x", 1), "request sent"),
    ("detach-device-alias tiny-1 --alias ua-x --config", ("detach_device_alias", "tiny-1", "ua-x", 2), ""),
    ("detach-device-alias tiny-1 ua-x --current", ("detach_device_alias", "tiny-1", "ua-x", 0), ""),
    ("detach-disk tiny-1 vda --live", ("detach_device", "tiny-1", A, 1), "Disk detached successfully\n"),
    ("detach-disk tiny-1 --target vda --persistent", ("detach_device", "tiny-1", A, 3), ""),
    ("detach-disk tiny-1 vda --config", ("detach_device", "tiny-1", A, 2), ""),
    ("detach-disk tiny-1 vda --current --print-xml", ("xml", "tiny-1", 0), '<source file="/images/a.qcow2"/>'),
    ("detach-interface tiny-1 bridge --live", ("detach_device", "tiny-1", A, 1), "Interface detached successfully\n"),
    ("detach-interface tiny-1 --type user --mac 52:54:00:aa:bb:cd --config", ("detach_device", "tiny-1", A, 2), ""),
    ("detach-interface tiny-1 user --persistent", ("detach_device", "tiny-1", A, 3), ""),
    ("detach-interface tiny-1 user --current --print-xml", ("xml", "tiny-1", 0), '<link state="down"/>'),
    ("attach-disk tiny-1 /tmp/x vdb", ("attach_device", "tiny-1", A, 0), "Disk attached successfully\n"),
    ("attach-disk --domain tiny-1 --source /x --target vdb --live --config", ("attach_device", "tiny-1", A, 3), ""),
    ("attach-disk tiny-1 /x vdb --persistent", ("attach_device", "tiny-1", A, 3), ""),
    (
        "attach-disk tiny-1 /x vdb --current --targetbus virtio --driver qemu --subdriver qcow2 --iothread 1 "
        "--cache none --io native --type disk --mode readonly --sourcetype block --serial s --wwn 5000c50015ea71ad "
        "--alias ua-x --rawio --address pci:0000.00.0a.0 --multifunction --print-xml",
        None,
        "<disk type='block' device='disk' rawio='yes'>\n"
        "  <driver name='qemu' type='qcow2' iothread='1' cache='none' io='native'/>\n"
        "  <source dev='/x'/>\n  <target dev='vdb' bus='virtio'/>\n  <alias name='ua-x'/>\n  <readonly/>\n"
        "  <serial>s</serial>\n  <wwn>5000c50015ea71ad</wwn>\n"
        "  <address type='pci' domain='0x0000' bus='0x00' slot='0x0a' function='0x0' multifunction='on'/>\n</disk>\n",
    ),
    (
        "attach-disk tiny-1 vol vdb --sourcetype network --source-protocol nbd --source-host-name h "
        "--source-host-transport tcp --source-host-socket /s --print-xml",
        None,
        "  <source protocol='nbd' name='vol'>\n    <host transport='tcp' socket='/s' name='h'/>\n  </source>\n",
    ),
    ("attach-interface tiny-1 bridge br0", ("attach_device", "tiny-1", A, 0), "Interface attached successfully\n"),
    ("attach-interface tiny-1 --type bridge --source br0 --live --config", ("attach_device", "tiny-1", A, 3), ""),
    ("attach-interface tiny-1 bridge br0 --persistent", ("attach_device", "tiny-1", A, 3), ""),
    (
        "attach-interface tiny-1 direct eth0 --current --target vnet7 --mac 52:54:00:00:00:01 --script /s "
        "--model virtio --alias ua-n --inbound 100,200,300 --outbound 50 --source-mode bridge --print-xml",
        None,
        "<interface type='direct'>\n  <source dev='eth0' mode='bridge'/>\n  <target dev='vnet7'/>\n"
        "  <mac address='52:54:00:00:00:01'/>\n  <script path='/s'/>\n  <model type='virtio'/>\n"
        "  <alias name='ua-n'/>\n  <bandwidth>\n    <inbound average='100' peak='200' burst='300'/>\n"
        "    <outbound average='50'/>\n  </bandwidth>\n</interface>\n",
    ),
    ("attach-interface tiny-1 hostdev 0000:00:03.0 --managed --print-xml", None, "<interface type='hostdev' managed"),
    ("change-media tiny-1 sda --eject --live", ("update_device", "tiny-1", A, 1), "Successfully ejected media.\n"),
    ("change-media tiny-1 sdb /new.iso --insert --force", ("update_device", "tiny-1", A, 4), "inserted media."),
    (
        "change-media tiny-1 --path sda --source /dev/sr0 --update --block --print-xml --config --current",
        None,
        "",
    ),
    ("change-media tiny-1 sda /new.iso --config", ("update_device", "tiny-1", A, 2), "Successfully updated media.\n"),
    ("change-media tiny-1 sda /n --update --block --print-xml", None, '<source dev="/n"/>'),
    # displays and lines
    ("ttyconsole tiny-1", ("xml", "tiny-1"), "/dev/pts/7\n"),
    ("vncdisplay tiny-1", ("xml", "tiny-1"), "127.0.0.1:1\n"),
    ("domdisplay tiny-1", ("xml", "tiny-1", 0), "vnc://127.0.0.1:1\n"),
    (
        "domdisplay tiny-1 --all --include-password",
        ("xml", "tiny-1", 1),
        "vnc://:pw@127.0.0.1:1\nspice://localhost:5902?tls-port=5903\n",
    ),
    ("domdisplay tiny-1 --type spice", ("xml", "tiny-1", 0), "spice://localhost:5902?tls-port=5903\n"),
    # the guest
    ("domfsinfo tiny-1", ("call", "DOMAIN_GET_FSINFO", A, 0), " /            vda1   ext4   vda\n"),
    ("domhostname tiny-1 --source agent", ("hostname", "tiny-1", 2), "guest-1\n"),
    ("guestinfo tiny-1", ("guest_info", "tiny-1", 0), "os.name             : Debian\n"),
    (
        "guestinfo tiny-1 --user --os --timezone --hostname --filesystem --disk --interface",
        ("guest_info", "tiny-1", 127),
        "",
    ),
    ("domtime tiny-1", ("time", "tiny-1"), "Time: 0\n"),
    ("domtime tiny-1 --pretty", ("time", "tiny-1"), "Time: 1970-01-01 00:00:00\n"),
    ("domtime tiny-1 --time 5", ("set_time", "tiny-1", 5, 0, 0), ""),
    ("domtime tiny-1 --sync", ("set_time", "tiny-1", 0, 0, 1), ""),
    ("domtime tiny-1 --now", ("set_time", "tiny-1", A, 0, 0), ""),
    ("send-key tiny-1 KEY_LEFTCTRL KEY_ALT 0x1", None, ""),
    ("send-key tiny-1 KEY_LEFTCTRL key_a 0x1", ("send_key", "tiny-1", [29, 30, 1], 0, 0), ""),
    ("send-key tiny-1 --codeset usb --holdtime 100 --keycode 4", ("send_key", "tiny-1", [4], 7, 100), ""),
    ("inject-nmi tiny-1", ("inject_nmi", "tiny-1"), ""),
    ("screenshot tiny-1 @out --screen 1", ("screenshot", "tiny-1", 1), "with type of image/png\n"),
    ("screenshot tiny-1 --file @out", ("screenshot", "tiny-1", 0), "Screenshot saved to"),
    (
        "qemu-monitor-command tiny-1 query-status",
        ("monitor_command", "tiny-1", '{"execute": "query-status"}', False),
        "return",
    ),
    ("qemu-monitor-command tiny-1 --hmp --cmd info", ("monitor_command", "tiny-1", "info", True), ""),
    ("qemu-monitor-command tiny-1 x --pretty --return-value", None, '{\n  "status": "running"\n}\n'),
    ("qemu-agent-command tiny-1 guest-ping", ("agent_command", "tiny-1", '{"execute": "guest-ping"}', -2), "return"),
    (
        "qemu-agent-command tiny-1 --timeout 5 --pretty --cmd x",
        ("agent_command", "tiny-1", A, 5),
        '{\n  "return": {}\n}',
    ),
    ("qemu-agent-command tiny-1 x --async", ("agent_command", "tiny-1", A, 0), ""),
    ("qemu-agent-command tiny-1 x --block", ("agent_command", "tiny-1", A, -2), ""),
    ("domjobinfo tiny-1", ("job_stats", "tiny-1", 0), "Job type:         None        \n"),
    ("domjobinfo tiny-1 --completed --keep-completed --anystats", ("job_stats", "tiny-1", 3), ""),
    ("domjobinfo tiny-1 --rawstats", ("job_stats", "tiny-1", 0), "Job type: 0\n"),
    ("domjobabort tiny-1", ("abort_job", "tiny-1"), ""),
    ("domjobabort tiny-1 --postcopy", ("call", "DOMAIN_ABORT_JOB_FLAGS", A, 1), ""),
    ("exec tiny-1 -- uname -a", ("exec", "tiny-1", ["uname", "-a"], b"", None), "out\n"),
    ("exec tiny-1 --timeout 2.5 -i true", ("exec", "tiny-1", ["true"], b"", 2.5), "out\n"),
    ("exec --domain tiny-1 --command ls --interactive", ("exec", "tiny-1", ["ls"], b"", None), "out\n"),
    # networks
    ("net-list", ("network_facts", 2), " Name   State      Autostart   Persistent\n"),
    ("net-list --all --table", ("network_facts", 3), " lab    inactive   no          yes\n"),
    ("net-list --inactive", ("network_facts", 1), ""),
    ("net-list --persistent --transient --autostart --no-autostart", ("network_facts", 2 | 4 | 8 | 16 | 32), ""),
    ("net-list --all --name", ("networks", 3), "lab\nlan\n"),
    ("net-list --uuid", ("networks", 2), "11111111-2222-3333-4444-555555555555\n"),
    ("net-info lan", ("net_bridge_name", "lan"), "Persistent:     no\nAutostart:      yes\nBridge:         virbr7\n"),
    ("net-name 11111111-2222-3333-4444-555555555555", ("lookup_network_uuid", A), "lan\n"),
    ("net-uuid lan", ("lookup_network_name", "lan"), "11111111-2222-3333-4444-555555555555\n"),
    ("net-define @xml", ("define_network", "<domain/>", 0), "Network lan defined from"),
    ("net-define --file @xml --validate", ("define_network", "<domain/>", 1), ""),
    ("net-create @xml", ("create_network", "<domain/>", 0), "Network lan created from"),
    ("net-create --file @xml --validate", ("create_network", "<domain/>", 1), ""),
    ("net-start lab", ("net_start", "lab"), "Network lab started\n"),
    ("net-destroy --network lan", ("net_destroy", "lan"), "Network lan destroyed\n"),
    ("net-undefine lab", ("net_undefine", "lab"), "Network lab has been undefined\n"),
    ("net-autostart lan", ("net_set_autostart", "lan", True), "Network lan marked as autostarted\n"),
    ("net-autostart lan --disable", ("net_set_autostart", "lan", False), "Network lan unmarked as autostarted\n"),
    ("nwfilter-list", ("call", "CONNECT_LIST_ALL_NWFILTERS", 1, 0), "00010203-0405-0607-0809-0a0b0c0d0e0f   mail"),
    ("nwfilter-dumpxml mail", ("call", "NWFILTER_LOOKUP_BY_NAME", "mail"), "<filter name='mail'>"),
    ("nwfilter-dumpxml --nwfilter mail --xpath //rule/@action --wrap", None, "<nodes>\n"),
    ("nwfilter-define @xml", ("call", "NWFILTER_DEFINE_XML", "<domain/>"), "Network filter mail defined from"),
    ("nwfilter-define --file @xml --validate", ("call", "NWFILTER_DEFINE_XML", "<domain/>"), ""),
    (
        "nwfilter-undefine mail",
        ("call", "NWFILTER_UNDEFINE", ("mail", bytes(range(16)))),
        "Network filter mail undefined\n",
    ),
    ("nwfilter-binding-list", None, " vnet0      mail"),
    ("nwfilter-binding-dumpxml vnet0", ("call", "NWFILTER_BINDING_LOOKUP_BY_PORT_DEV", "vnet0"), "<filterbinding>"),
    ("nwfilter-binding-dumpxml vnet0 --xpath //portdev --wrap", None, "<portdev name="),
    (
        "nwfilter-binding-create @xml",
        ("call", "NWFILTER_BINDING_CREATE_XML", "<domain/>", 0),
        "binding on vnet0 created",
    ),
    ("nwfilter-binding-create @xml --validate", ("call", "NWFILTER_BINDING_CREATE_XML", "<domain/>", 0), ""),
    (
        "nwfilter-binding-delete vnet0",
        ("call", "NWFILTER_BINDING_DELETE", ("vnet0", "mail")),
        "binding on vnet0 deleted",
    ),
    ("net-dumpxml lan", ("net_xml", "lan", 0), "<name>lan</name>"),
    ("net-dumpxml lan --inactive", ("net_xml", "lan", 1), "<network>"),
    ("net-dumpxml lan --xpath //name --wrap", None, "<nodes>\n  <name>lan</name>\n</nodes>\n"),
    (
        "net-update lan add ip-dhcp-host <host/>",
        ("net_update", "lan", "add", "ip-dhcp-host", "<host/>", -1, 0),
        "Updated network lan live state\n",
    ),
    (
        "net-update --network lan --command delete --section dns-host --xml @xml --parent-index 1 --live --config",
        ("net_update", "lan", "delete", "dns-host", "<domain/>", 1, 3),
        "Updated network lan persistent config and live state\n",
    ),
    (
        "net-update lan modify portgroup <portgroup/> --config",
        ("net_update", "lan", "modify", "portgroup", "<portgroup/>", -1, 2),
        "Updated network lan persistent config\n",
    ),
    ("net-update lan add-first dns-txt <txt/> --current", ("net_update", "lan", A, A, A, -1, 0), "live state\n"),
    ("net-desc lan", ("net_metadata", "lan", 0, None, 0), "words\n"),
    ("net-desc lan --title --live", ("net_metadata", "lan", 1, None, 1), "words\n"),
    (
        "net-desc lan --config a text",
        ("net_set_metadata", "lan", 0, "a text", None, None, 2),
        "Network description updated successfully\n",
    ),
    ("net-desc lan --current --new-desc x", ("net_set_metadata", "lan", 0, "x", None, None, 0), ""),
    ("net-metadata lan http://x --current", ("net_metadata", "lan", 2, "http://x", 0), "words\n"),
    (
        "net-metadata --network lan --uri u --key k --set <a/> --live",
        ("net_set_metadata", "lan", 2, "<a/>", "k", "u", 1),
        "Metadata modified\n",
    ),
    ("net-metadata lan u --remove --config", ("net_set_metadata", "lan", 2, None, None, "u", 2), "removed"),
    ("net-dhcp-leases lan", ("net_leases", "lan", None), " never                 52:54:00:00:00:09   ipv6"),
    ("net-dhcp-leases lan --mac 52:54:00:00:00:01", ("net_leases", "lan", "52:54:00:00:00:01"), "10.0.0.5/24"),
    ("net-event --list", None, "lifecycle\nmetadata-change\n"),
    ("net-event --network lan --event lifecycle --timeout 1 --timestamp", ("register_network", A, A), ""),
    ("net-event --event metadata-change --loop --timeout 1", ("register_network", "metadata-change", None), ""),
    ("net-port-list lan", ("net_ports", "lan"), " UUID\n"),
    ("net-port-list lan --table", ("net_ports", "lan"), " 99999999-8888-7777-6666-555555555555\n"),
    ("net-port-list lan --uuid", ("net_ports", "lan"), "99999999-8888-7777-6666-555555555555\n"),
    ("net-port-create lan @xml", ("net_create_port", "lan", "<domain/>", 0), "created from"),
    ("net-port-create --network lan --file @xml --validate", ("net_create_port", "lan", "<domain/>", 2), ""),
    ("net-port-dumpxml lan 99999999-8888-7777-6666-555555555555", ("net_port", "lan", A), "<networkport>"),
    (
        "net-port-dumpxml --network lan --port 99999999888877776666555555555555 --xpath //uuid --wrap",
        None,
        "<nodes>\n  <uuid>x</uuid>\n</nodes>\n",
    ),
    (
        "net-port-delete lan 99999999-8888-7777-6666-555555555555",
        ("port_delete", "99999999-8888-7777-6666-555555555555"),
        "Network port 99999999-8888-7777-6666-555555555555 deleted\n",
    ),
    # events
    ("event --list", None, "lifecycle\nreboot\n"),
    ("event lifecycle --timeout 1", None, ""),
    ("event --domain tiny-1 --event lifecycle --timeout 1 --timestamp", ("register", "lifecycle", A), "timed out"),
    ("event --all --loop --timeout 1", ("register", "watchdog", None), "events received: 0\n"),
    # the host
    ("capabilities", ("capabilities",), "<capabilities/>\n"),
    (
        "domcapabilities --virttype kvm --emulatorbin /q --arch x86_64 --machine q35",
        ("domain_capabilities", "/q", "x86_64", "q35", "kvm"),
        "</domainCapabilities>",
    ),
    ("cpu-models x86_64", ("call", "CONNECT_GET_CPU_MODEL_NAMES", "x86_64", 1, 0), "486\nqemu64\n"),
    ("cpu-models x86_64 --emulatorbin kvik-vmm", ("domain_capabilities", "kvik-vmm", "x86_64"), "b\n"),
    ("cpu-models --arch x86_64", ("call", "CONNECT_GET_CPU_MODEL_NAMES", "x86_64", 1, 0), ""),
    ("freecell", ("free_memory",), "Total: 1024 KiB\n"),
    ("freecell --cellno 0", ("call", "NODE_GET_CELLS_FREE_MEMORY", 0, 1), "0: 2048 KiB\n"),
    (
        "freecell --all",
        None,
        "    0:       2048 KiB\n    1:       1024 KiB\n--------------------\nTotal:       3072 KiB\n",
    ),
    ("hostname", ("hostname",), "guest-1\n"),
    ("maxvcpus --type kvm", ("max_vcpus", "kvm"), "288\n"),
    ("sysinfo", ("sysinfo",), "<sysinfo/>"),
    ("uri", ("uri",), "kvik:///session\n"),
    ("version", ("version",), "Running hypervisor: QEMU 7.2.0\n"),
    ("version --daemon", ("status",), "Running against daemon: 0.1.0\n"),
    ("nodeinfo", ("node_info",), "CPU model:           x86_64\nCPU(s):              2\n"),
    ("nodecpustats", ("cpu_stats", -1), "user:                              2\nsystem:                            1\n"),
    ("nodecpustats --cpu 1", ("cpu_stats", 1), ""),
    ("nodecpustats --percent", ("cpu_stats", -1), "usage:            0.0%\n"),
    ("nodememstats --cell 0", ("memory_stats", 0), "total  :                  100 KiB\n"),
    # kvik itself
    ("help", None, " Domain Management (help keyword 'domain'):\n"),
    ("help list", None, "    list - list domains\n"),
    ("help --command host", None, "    nodeinfo                       node information\n"),
    ("completion bash", None, "complete -F _kvik_complete kvik"),
    ("completion --shell zsh", None, "#compdef kvik"),
    ("pwd", None, "/"),
    ("img create -q @out 1M", None, ""),
    ("echo --shell a b", None, "a b\n"),
    ("echo --xml --string <a>", None, "&lt;a&gt;\n"),
    ("echo --split a,b", None, "a b\n"),
    ("connect", ("uri",), ""),
    ("connect --name kvik:///session --readonly", ("uri",), ""),
    ("ps", ("overview", 1), " tiny-1   ready      emulation   2       1.0G     0.0    10.0.2.15   1m"),
    ("ps --all", ("overview", 3), " web      shut off"),
    ("top --sort memory --delay 0.1 --iterations 1 --active", ("overview", 1), "1 running of 2"),
    ("top -n 2 -d 0.05", ("overview", 3), "by cpu\n"),
]

# Verbs and options that need more than a line: each has its own tests in the file named.
ELSEWHERE = {
    "run": "test_run.py",
    "ssh": "test_ssh.py",
    "doctor": "test_doctor_verb.py",
    "edit": "test_edit.py",
    "net-edit": "test_edit.py",
    "iface-edit": "test_edit.py",
    "nwfilter-edit": "test_edit.py",
    "console": "test_console.py",
    "proxy": "test_proxy.py",
    "cd": "test_shell.py",
    "quit": "test_shell.py",
    "exit": "test_shell.py",
}
ELSEWHERE |= {
    name: "test_storage.py" for name in VERBS if name.startswith(("pool-", "vol-", "find-storage-pool-sources"))
}
ELSEWHERE |= {name: "test_secret.py" for name in VERBS if name.startswith("secret-")}
ELSEWHERE |= dict.fromkeys(("blockcommit", "blockcopy", "blockjob", "blockpull", "blockresize"), "test_block_jobs.py")
ELSEWHERE |= {name: "test_snapshots.py" for name in VERBS if name.startswith("snapshot-")}
ELSEWHERE |= {name: "test_checkpoints.py" for name in VERBS if name.startswith(("checkpoint-", "backup-"))}
ELSEWHERE |= {name: "test_saved.py" for name in VERBS if name.startswith(("save", "managedsave", "restore"))}
ELSEWHERE["blkdeviotune"] = "test_block_tune.py"
ELSEWHERE |= {name: "test_iothreads.py" for name in VERBS if name.startswith("iothread")}
ELSEWHERE_OPTIONS = {
    ("desc", "edit"): "test_edit.py",
    ("metadata", "edit"): "test_edit.py",
    ("net-desc", "edit"): "test_edit.py",
    ("net-metadata", "edit"): "test_edit.py",
    ("start", "console"): "test_console.py",
    ("create", "console"): "test_console.py",
    ("echo", "err"): "test_output.py",
}
ELSEWHERE_OPTIONS |= {
    ("undefine", name): "test_undefine.py"
    for name in ("storage", "remove-all-storage", "delete-storage-volume-snapshots", "wipe-storage")
}
FAILS = {"send-key tiny-1 KEY_LEFTCTRL KEY_ALT 0x1", "event lifecycle --timeout 1"}
FAILS |= {"change-media tiny-1 --path sda --source /dev/sr0 --update --block --print-xml --config --current"}
CODES = {
    "exec tiny-1 -- uname -a": 3,
    "exec tiny-1 --timeout 2.5 -i true": 3,
    "exec --domain tiny-1 --command ls --interactive": 3,
    "event --domain tiny-1 --event lifecycle --timeout 1 --timestamp": 1,
    "event --all --loop --timeout 1": 1,
    "event lifecycle --timeout 1": 1,
    "net-event --network lan --event lifecycle --timeout 1 --timestamp": 1,
    "net-event --event metadata-change --loop --timeout 1": 1,
}


def matches(call: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    return len(call) == len(wanted) and all(w is A or c == w for c, w in zip(call, wanted, strict=True))


@pytest.mark.parametrize(("line", "call", "text"), CASES, ids=[case[0] for case in CASES])
def test_verb(kvik: Any, tmp_path: Path, line: str, call: tuple[Any, ...] | None, text: str) -> None:
    document = tmp_path / "d.xml"
    document.write_text("<domain/>")
    words = [word.replace("@xml", str(document)).replace("@out", str(tmp_path / "shot.png")) for word in line.split()]
    code = kvik(*words)
    if line in FAILS:
        assert code == 1
        return
    assert code == CODES.get(line, 0), kvik.err
    assert text in kvik.out
    if call is not None:
        assert any(matches(made, call) for made in kvik.connection.calls), kvik.connection.calls


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bridge rename br0", "unknown action 'rename'"),
        ("bridge show", "usage: kvik bridge show BRIDGE"),
        ("bridge list --force", "doesn't support option --force"),
        ("bridge show br0 --delay 1", "--delay goes with --watch"),
        ("bridge set br0 stp", "'stp' is no setting"),
        ("bridge set br0 stp=on stp=off", "given twice"),
        ("bridge fdb br0 add 52:54:00:00:00:08", "usage: kvik bridge fdb"),
        ("bridge vlan br0 add vnet0 ten", "'ten' is no VLAN"),
        ("iface-bridge eth0 br0 --stp --no-stp", "mutually exclusive"),
        ("iface-bridge eth0 br0 --timeout 100000", "0 to 3600"),
    ],
)
def test_a_wrong_bridge_command_is_explained_and_nothing_is_done(kvik: Any, line: str, words: str) -> None:
    assert kvik(*line.split()) == 1
    assert words in kvik.err
    assert not [call for call in kvik.connection.calls if call[0] in ("call", "call_kvik")]


@pytest.mark.parametrize(
    ("answer", "call", "said"),
    [("y\n", "INTERFACE_CHANGE_COMMIT", "Kept."), ("\n", "INTERFACE_CHANGE_ROLLBACK", "Undone.")],
)
def test_who_sits_at_a_terminal_is_asked(kvik: Any, answer: str, call: str, said: str) -> None:
    assert kvik("iface-bridge", "eth0", "br0", typed=answer) == 0
    assert "Keep this? It is undone in 60 s otherwise" in kvik.err
    assert ("call", call, 0) in kvik.connection.calls
    assert said in kvik.out


JSON_LESS = {"completion", "console", "connect"}


@pytest.mark.parametrize(
    "line", [c[0] for c in CASES if c[0] not in FAILS and c[0] not in CODES and "send" not in c[0]]
)
def test_every_verb_that_prints_prints_json(kvik: Any, tmp_path: Path, line: str) -> None:
    import json

    document = tmp_path / "d.xml"
    document.write_text("<domain/>")
    words = [word.replace("@xml", str(document)).replace("@out", str(tmp_path / "shot.png")) for word in line.split()]
    assert kvik("--json", *words) == 0, kvik.err
    if kvik.out:
        # `top -n 2` and events print one document after the other.
        decoder, rest = json.JSONDecoder(), kvik.out.strip()
        while rest:
            _, end = decoder.raw_decode(rest)
            rest = rest[end:].strip()


def test_every_verb_has_a_group_help_and_options_with_help() -> None:
    for name, (module, group, summary) in VERBS.items():
        assert group in GROUPS
        assert summary
        verb = load(name)
        assert verb.description, name
        for option in verb.options:
            assert option.help, (name, option.name)
        assert len({option.name for option in (*verb.options, *COMMON)}) == len(verb.options) + len(COMMON), name
        assert module


def test_every_module_declares_only_verbs_of_the_table() -> None:
    for name, (module, _, _) in VERBS.items():
        commands = __import__(f"kvik.cli.{module}", fromlist=["COMMANDS"]).COMMANDS
        assert name in commands
        assert {VERBS[other][0] for other in commands} == {module}


def declared() -> set[tuple[str, str]]:
    return {(name, option.name) for name in VERBS for option in load(name).options}


def exercised() -> set[tuple[str, str]]:
    found = set()
    for line, _, _ in CASES:
        name, *words = line.split()
        if name.startswith("-"):
            continue
        found |= {(name, option) for option in parse(name, load(name), words).given()}
    return found


def test_every_declared_option_is_exercised() -> None:
    missing = declared() - exercised() - set(ELSEWHERE_OPTIONS)
    missing = {(verb, option) for verb, option in missing if verb not in ELSEWHERE}
    assert not missing


def test_the_tests_elsewhere_name_the_options_they_promise() -> None:
    here = Path(__file__).parent
    for verb, file in ELSEWHERE.items():
        text = (here / file).read_text()
        for option in load(verb).options:
            if option.name == "domain":
                continue
            given = '"--"' if option.kind == REST else f"--{option.name}"
            assert given in text, (verb, option.name, file)
    for (_, option_name), file in ELSEWHERE_OPTIONS.items():
        assert f"--{option_name}" in (here / file).read_text()


def test_every_declared_option_is_read_by_its_verb(kvik: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that nobody reads is a lie in the help."""
    read: set[tuple[str, str]] = set()
    names = {id(load(name).handler): name for name in VERBS}
    original = Options._get

    def spy(self: Options, name: str, kinds: tuple[str, ...]) -> Any:
        read.add((names[id(self.verb.handler)], name))
        return original(self, name, kinds)

    monkeypatch.setattr(Options, "_get", spy)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    document = tmp_path / "d.xml"
    document.write_text("<domain/>")
    for line, _, _ in CASES:
        words = [w.replace("@xml", str(document)).replace("@out", str(tmp_path / "shot.png")) for w in line.split()]
        kvik(*words)
    unread = {(verb, option) for verb, option in declared() - read if verb not in ELSEWHERE}
    # quit and exit share a handler, as a word
    assert not unread
