"""Numbers of libvirt's public interface that the verbs send (https://libvirt.org/html/index.html), by its names
without the `VIR_` prefix. Plain integers: an enum class costs start-up time that `kvik list` does not have."""

from __future__ import annotations

# virConnectListAllDomainsFlags
LIST_ACTIVE = 1 << 0
LIST_INACTIVE = 1 << 1
LIST_PERSISTENT = 1 << 2
LIST_TRANSIENT = 1 << 3
LIST_RUNNING = 1 << 4
LIST_PAUSED = 1 << 5
LIST_SHUTOFF = 1 << 6
LIST_OTHER = 1 << 7
LIST_MANAGEDSAVE = 1 << 8
LIST_NO_MANAGEDSAVE = 1 << 9
LIST_AUTOSTART = 1 << 10
LIST_NO_AUTOSTART = 1 << 11
LIST_HAS_SNAPSHOT = 1 << 12
LIST_NO_SNAPSHOT = 1 << 13
LIST_HAS_CHECKPOINT = 1 << 14
LIST_NO_CHECKPOINT = 1 << 15

# virDomainCreateFlags
START_PAUSED = 1 << 0
START_AUTODESTROY = 1 << 1
START_BYPASS_CACHE = 1 << 2
START_FORCE_BOOT = 1 << 3
START_VALIDATE = 1 << 4
START_RESET_NVRAM = 1 << 5

DEFINE_VALIDATE = 1 << 0

# virDomainUndefineFlagsValues
UNDEFINE_MANAGED_SAVE = 1 << 0
UNDEFINE_SNAPSHOTS_METADATA = 1 << 1
UNDEFINE_NVRAM = 1 << 2
UNDEFINE_KEEP_NVRAM = 1 << 3
UNDEFINE_CHECKPOINTS_METADATA = 1 << 4
UNDEFINE_TPM = 1 << 5
UNDEFINE_KEEP_TPM = 1 << 6

# virDomainDestroyFlagsValues
DESTROY_GRACEFUL = 1 << 0
DESTROY_REMOVE_LOGS = 1 << 1

# virDomainShutdownFlagValues and virDomainRebootFlagValues: the same bits
POWER_MODES = {"acpi": 1 << 0, "agent": 1 << 1, "initctl": 1 << 2, "signal": 1 << 3, "paravirt": 1 << 4}

# virDomainXMLFlags
XML_SECURE = 1 << 0
XML_INACTIVE = 1 << 1
XML_UPDATE_CPU = 1 << 2
XML_MIGRATABLE = 1 << 3

# virDomainModificationImpact, virDomainDeviceModifyFlags
AFFECT_CURRENT = 0
AFFECT_LIVE = 1 << 0
AFFECT_CONFIG = 1 << 1
DEVICE_MODIFY_FORCE = 1 << 2
MEM_MAXIMUM = 1 << 2
VCPU_MAXIMUM = 1 << 2
VCPU_GUEST = 1 << 3
VCPU_HOTPLUGGABLE = 1 << 4

# virDomainConsoleFlags
CONSOLE_FORCE = 1 << 0
CONSOLE_SAFE = 1 << 1

# virDomainMetadataType
METADATA_DESCRIPTION = 0
METADATA_TITLE = 1
METADATA_ELEMENT = 2

# virDomainStatsTypes
STATS = {
    "state": 1 << 0,
    "cpu-total": 1 << 1,
    "balloon": 1 << 2,
    "vcpu": 1 << 3,
    "interface": 1 << 4,
    "block": 1 << 5,
    "perf": 1 << 6,
    "iothread": 1 << 7,
    "memory": 1 << 8,
    "dirtyrate": 1 << 9,
    "vm": 1 << 10,
}

# virConnectGetAllDomainStatsFlags
STATS_LIST = {
    "list-active": LIST_ACTIVE,
    "list-inactive": LIST_INACTIVE,
    "list-persistent": LIST_PERSISTENT,
    "list-transient": LIST_TRANSIENT,
    "list-running": LIST_RUNNING,
    "list-paused": LIST_PAUSED,
    "list-shutoff": LIST_SHUTOFF,
    "list-other": LIST_OTHER,
}
STATS_NOWAIT = 1 << 29
STATS_BACKING = 1 << 30
STATS_ENFORCE = 1 << 31

# virDomainInterfaceAddressesSource, virDomainGetHostnameFlags
ADDRESSES = {"lease": 0, "agent": 1, "arp": 2}
HOSTNAMES = {"lease": 1 << 0, "agent": 1 << 1}

# virKeycodeSet
CODESETS = {
    "linux": 0,
    "xt": 1,
    "atset1": 2,
    "atset2": 3,
    "atset3": 4,
    "os_x": 5,
    "xt_kbd": 6,
    "usb": 7,
    "win32": 8,
    "qnum": 9,
    "rfb": 9,
}

# virDomainState
STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")
RUNNING, BLOCKED, PAUSED, SHUTDOWN, SHUTOFF, CRASHED, PMSUSPENDED = range(1, 8)

REASONS: dict[int, tuple[str, ...]] = {
    RUNNING: (
        "unknown",
        "booted",
        "migrated",
        "restored",
        "from snapshot",
        "unpaused",
        "migration canceled",
        "save canceled",
        "event wakeup",
        "crashed",
        "post-copy",
        "post-copy failed",
    ),
    PAUSED: (
        "unknown",
        "user",
        "migrating",
        "saving",
        "dumping",
        "I/O error",
        "watchdog",
        "from snapshot",
        "shutting down",
        "creating snapshot",
        "crashed",
        "starting up",
        "post-copy",
        "post-copy failed",
        "api error",
    ),
    SHUTDOWN: ("unknown", "user"),
    SHUTOFF: (
        "unknown",
        "shutdown",
        "destroyed",
        "crashed",
        "migrated",
        "saved",
        "failed",
        "from snapshot",
        "daemon",
    ),
    CRASHED: ("unknown", "panicked"),
}


def state_name(state: int) -> str:
    return STATES[state] if 0 <= state < len(STATES) else STATES[0]


def reason_name(state: int, reason: int) -> str:
    names = REASONS.get(state, ("unknown",))
    return names[reason] if 0 <= reason < len(names) else "unknown"
