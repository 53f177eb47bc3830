"""Numbers of libvirt's public API (9.0), without the vir prefix: what the wire and every client mean by an int.

Plain ints in plain classes (`kvik.numbers`): importing them costs a third of what IntEnum and IntFlag cost (3 against
11 ms for all of these), and `flags & DomainXMLFlags.SECURE` is an int operation in the daemon's hottest path.
"""

from __future__ import annotations

from kvik.numbers import Numbers


class DomainDiskErrorCode(Numbers):
    NONE = 0
    UNSPEC = 1
    NO_SPACE = 2


class DomainState(Numbers):
    NOSTATE = 0
    RUNNING = 1
    BLOCKED = 2
    PAUSED = 3
    SHUTDOWN = 4
    SHUTOFF = 5
    CRASHED = 6
    PMSUSPENDED = 7


class DomainRunningReason(Numbers):
    UNKNOWN = 0
    BOOTED = 1
    MIGRATED = 2
    RESTORED = 3
    FROM_SNAPSHOT = 4
    UNPAUSED = 5
    MIGRATION_CANCELED = 6
    SAVE_CANCELED = 7
    WAKEUP = 8
    CRASHED = 9
    POSTCOPY = 10
    POSTCOPY_FAILED = 11


class DomainPausedReason(Numbers):
    UNKNOWN = 0
    USER = 1
    MIGRATION = 2
    SAVE = 3
    DUMP = 4
    IOERROR = 5
    WATCHDOG = 6
    FROM_SNAPSHOT = 7
    SHUTTING_DOWN = 8
    SNAPSHOT = 9
    CRASHED = 10
    STARTING_UP = 11
    POSTCOPY = 12
    POSTCOPY_FAILED = 13


class DomainShutdownReason(Numbers):
    UNKNOWN = 0
    USER = 1


class DomainShutoffReason(Numbers):
    UNKNOWN = 0
    SHUTDOWN = 1
    DESTROYED = 2
    CRASHED = 3
    MIGRATED = 4
    SAVED = 5
    FAILED = 6
    FROM_SNAPSHOT = 7
    DAEMON = 8


class DomainCrashedReason(Numbers):
    UNKNOWN = 0
    PANICKED = 1


class DomainPMSuspendedReason(Numbers):
    UNKNOWN = 0


class DomainControlState(Numbers):
    OK = 0
    JOB = 1
    OCCUPIED = 2
    ERROR = 3


class DomainEventID(Numbers):
    LIFECYCLE = 0
    REBOOT = 1
    RTC_CHANGE = 2
    WATCHDOG = 3
    IO_ERROR = 4
    GRAPHICS = 5
    IO_ERROR_REASON = 6
    CONTROL_ERROR = 7
    BLOCK_JOB = 8
    DISK_CHANGE = 9
    TRAY_CHANGE = 10
    PMWAKEUP = 11
    PMSUSPEND = 12
    BALLOON_CHANGE = 13
    PMSUSPEND_DISK = 14
    DEVICE_REMOVED = 15
    BLOCK_JOB_2 = 16
    TUNABLE = 17
    AGENT_LIFECYCLE = 18
    DEVICE_ADDED = 19
    MIGRATION_ITERATION = 20
    JOB_COMPLETED = 21
    DEVICE_REMOVAL_FAILED = 22
    METADATA_CHANGE = 23
    BLOCK_THRESHOLD = 24
    MEMORY_FAILURE = 25
    MEMORY_DEVICE_SIZE_CHANGE = 26


class DomainEventType(Numbers):
    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6
    PMSUSPENDED = 7
    CRASHED = 8


class DomainEventDefinedDetailType(Numbers):
    ADDED = 0
    UPDATED = 1
    RENAMED = 2
    FROM_SNAPSHOT = 3


class DomainEventUndefinedDetailType(Numbers):
    REMOVED = 0
    RENAMED = 1


class DomainEventStartedDetailType(Numbers):
    BOOTED = 0
    MIGRATED = 1
    RESTORED = 2
    FROM_SNAPSHOT = 3
    WAKEUP = 4


class DomainEventSuspendedDetailType(Numbers):
    PAUSED = 0
    MIGRATED = 1
    IOERROR = 2
    WATCHDOG = 3
    RESTORED = 4
    FROM_SNAPSHOT = 5
    API_ERROR = 6
    POSTCOPY = 7
    POSTCOPY_FAILED = 8


class DomainEventResumedDetailType(Numbers):
    UNPAUSED = 0
    MIGRATED = 1
    FROM_SNAPSHOT = 2
    POSTCOPY = 3
    POSTCOPY_FAILED = 4


class DomainEventStoppedDetailType(Numbers):
    SHUTDOWN = 0
    DESTROYED = 1
    CRASHED = 2
    MIGRATED = 3
    SAVED = 4
    FAILED = 5
    FROM_SNAPSHOT = 6


class DomainEventShutdownDetailType(Numbers):
    FINISHED = 0
    GUEST = 1
    HOST = 2


class DomainEventPMSuspendedDetailType(Numbers):
    MEMORY = 0
    DISK = 1


class DomainEventCrashedDetailType(Numbers):
    PANICKED = 0
    CRASHLOADED = 1


class DomainEventWatchdogAction(Numbers):
    NONE = 0
    PAUSE = 1
    RESET = 2
    POWEROFF = 3
    SHUTDOWN = 4
    DEBUG = 5
    INJECTNMI = 6


class DomainEventIOErrorAction(Numbers):
    NONE = 0
    PAUSE = 1
    REPORT = 2


class DomainEventGraphicsPhase(Numbers):
    CONNECT = 0
    INITIALIZE = 1
    DISCONNECT = 2


class DomainEventGraphicsAddressType(Numbers):
    IPV4 = 0
    IPV6 = 1
    UNIX = 2


class ConnectDomainEventDiskChangeReason(Numbers):
    CHANGE_MISSING_ON_START = 0
    DROP_MISSING_ON_START = 1


class DomainEventTrayChangeReason(Numbers):
    OPEN = 0
    CLOSE = 1


class ConnectDomainEventAgentLifecycleState(Numbers):
    CONNECTED = 1
    DISCONNECTED = 2


class ConnectDomainEventAgentLifecycleReason(Numbers):
    UNKNOWN = 0
    DOMAIN_STARTED = 1
    CHANNEL = 2


class DomainModificationImpact(Numbers):
    CURRENT = 0
    LIVE = 1
    CONFIG = 2


class DomainXMLFlags(Numbers):
    SECURE = 1
    INACTIVE = 2
    UPDATE_CPU = 4
    MIGRATABLE = 8


class DomainDefineFlags(Numbers):
    VALIDATE = 1


class DomainCreateFlags(Numbers):
    NONE = 0
    START_PAUSED = 1
    START_AUTODESTROY = 2
    START_BYPASS_CACHE = 4
    START_FORCE_BOOT = 8
    START_VALIDATE = 16
    START_RESET_NVRAM = 32


class DomainDestroyFlags(Numbers):
    DEFAULT = 0
    GRACEFUL = 1
    REMOVE_LOGS = 2


class DomainUndefineFlags(Numbers):
    MANAGED_SAVE = 1
    SNAPSHOTS_METADATA = 2
    NVRAM = 4
    KEEP_NVRAM = 8
    CHECKPOINTS_METADATA = 16
    TPM = 32
    KEEP_TPM = 0x40


class DomainShutdownFlags(Numbers):
    DEFAULT = 0
    ACPI_POWER_BTN = 1
    GUEST_AGENT = 2
    INITCTL = 4
    SIGNAL = 8
    PARAVIRT = 16


class DomainRebootFlags(Numbers):
    DEFAULT = 0
    ACPI_POWER_BTN = 1
    GUEST_AGENT = 2
    INITCTL = 4
    SIGNAL = 8
    PARAVIRT = 16


class DomainLifecycle(Numbers):
    POWEROFF = 0
    REBOOT = 1
    CRASH = 2


class DomainLifecycleAction(Numbers):
    DESTROY = 0
    RESTART = 1
    RESTART_RENAME = 2
    PRESERVE = 3
    COREDUMP_DESTROY = 4
    COREDUMP_RESTART = 5


class DomainSaveRestoreFlags(Numbers):
    BYPASS_CACHE = 1
    RUNNING = 2
    PAUSED = 4
    RESET_NVRAM = 8


class DomainCoreDumpFlags(Numbers):
    CRASH = 1
    LIVE = 2
    BYPASS_CACHE = 4
    RESET = 8
    MEMORY_ONLY = 16


class DomainVcpuFlags(Numbers):
    CURRENT = 0
    LIVE = 1
    CONFIG = 2
    MAXIMUM = 4
    GUEST = 8
    HOTPLUGGABLE = 16


class DomainMemoryModFlags(Numbers):
    CURRENT = 0
    LIVE = 1
    CONFIG = 2
    MAXIMUM = 4


class DomainDeviceModifyFlags(Numbers):
    CURRENT = 0
    LIVE = 1
    CONFIG = 2
    FORCE = 4


class DomainMetadataType(Numbers):
    DESCRIPTION = 0
    TITLE = 1
    ELEMENT = 2


class DomainConsoleFlags(Numbers):
    FORCE = 1
    SAFE = 2


class DomainChannelFlags(Numbers):
    FORCE = 1


class DomainInterfaceAddressesSource(Numbers):
    LEASE = 0
    AGENT = 1
    ARP = 2


class DomainGuestInfoTypes(Numbers):
    USERS = 1
    OS = 2
    TIMEZONE = 4
    HOSTNAME = 8
    FILESYSTEM = 16
    DISKS = 32
    INTERFACES = 0x40


class DomainGetHostnameFlags(Numbers):
    LEASE = 1
    AGENT = 2


class DomainSetTimeFlags(Numbers):
    SYNC = 1


class DomainMemoryStatTags(Numbers):
    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULT = 2
    MINOR_FAULT = 3
    UNUSED = 4
    AVAILABLE = 5
    ACTUAL_BALLOON = 6
    RSS = 7
    USABLE = 8
    LAST_UPDATE = 9
    DISK_CACHES = 10
    HUGETLB_PGALLOC = 11
    HUGETLB_PGFAIL = 12


class DomainBlockJobType(Numbers):
    UNKNOWN = 0
    PULL = 1
    COPY = 2
    COMMIT = 3
    ACTIVE_COMMIT = 4
    BACKUP = 5


class ConnectDomainEventBlockJobStatus(Numbers):
    COMPLETED = 0
    FAILED = 1
    CANCELED = 2
    READY = 3


class DomainBlockJobAbortFlags(Numbers):
    ASYNC = 1 << 0
    PIVOT = 1 << 1


class DomainBlockRebaseFlags(Numbers):
    SHALLOW = 1 << 0
    REUSE_EXT = 1 << 1
    COPY_RAW = 1 << 2
    COPY = 1 << 3
    RELATIVE = 1 << 4
    COPY_DEV = 1 << 5
    BANDWIDTH_BYTES = 1 << 6


class DomainBlockCopyFlags(Numbers):
    SHALLOW = 1 << 0
    REUSE_EXT = 1 << 1
    TRANSIENT_JOB = 1 << 2
    SYNCHRONOUS_WRITES = 1 << 3


class DomainBlockCommitFlags(Numbers):
    SHALLOW = 1 << 0
    DELETE = 1 << 1
    ACTIVE = 1 << 2
    RELATIVE = 1 << 3
    BANDWIDTH_BYTES = 1 << 4


class DomainBlockResizeFlags(Numbers):
    BYTES = 1 << 0
    CAPACITY = 1 << 1


class DomainJobType(Numbers):
    NONE = 0
    BOUNDED = 1
    UNBOUNDED = 2
    COMPLETED = 3
    FAILED = 4
    CANCELLED = 5


class DomainJobOperation(Numbers):
    UNKNOWN = 0
    START = 1
    SAVE = 2
    RESTORE = 3
    MIGRATION_IN = 4
    MIGRATION_OUT = 5
    SNAPSHOT = 6
    SNAPSHOT_REVERT = 7
    DUMP = 8
    BACKUP = 9
    SNAPSHOT_DELETE = 10


class DomainGetJobStatsFlags(Numbers):
    COMPLETED = 1
    KEEP_COMPLETED = 2


class ConnectCloseReason(Numbers):
    ERROR = 0
    EOF = 1
    KEEPALIVE = 2
    CLIENT = 3


class ConnectListAllDomainsFlags(Numbers):
    ACTIVE = 1
    INACTIVE = 2
    PERSISTENT = 4
    TRANSIENT = 8
    RUNNING = 16
    PAUSED = 32
    SHUTOFF = 0x40
    OTHER = 0x80
    MANAGEDSAVE = 0x100
    NO_MANAGEDSAVE = 0x200
    AUTOSTART = 0x400
    NO_AUTOSTART = 0x800
    HAS_SNAPSHOT = 0x1000
    NO_SNAPSHOT = 0x2000
    HAS_CHECKPOINT = 0x4000
    NO_CHECKPOINT = 0x8000


class ConnectGetAllDomainStatsFlags(Numbers):
    ACTIVE = 1
    INACTIVE = 2
    PERSISTENT = 4
    TRANSIENT = 8
    RUNNING = 16
    PAUSED = 32
    SHUTOFF = 0x40
    OTHER = 0x80
    NOWAIT = 0x20000000
    BACKING = 0x40000000
    ENFORCE_STATS = 0x80000000


class DomainStatsTypes(Numbers):
    STATE = 1
    CPU_TOTAL = 2
    BALLOON = 4
    VCPU = 8
    INTERFACE = 16
    BLOCK = 32
    PERF = 0x40
    IOTHREAD = 0x80
    MEMORY = 0x100
    DIRTYRATE = 0x200
    VM = 0x400


class KeycodeSet(Numbers):
    LINUX = 0
    XT = 1
    ATSET1 = 2
    ATSET2 = 3
    ATSET3 = 4
    OSX = 5
    XT_KBD = 6
    USB = 7
    WIN32 = 8
    QNUM = 9


class TypedParameterType(Numbers):
    INT = 1
    UINT = 2
    LLONG = 3
    ULLONG = 4
    DOUBLE = 5
    BOOLEAN = 6
    STRING = 7


class TypedParameterFlags(Numbers):
    STRING_OKAY = 4


class VcpuState(Numbers):
    OFFLINE = 0
    RUNNING = 1
    BLOCKED = 2


class StreamFlags(Numbers):
    NONBLOCK = 1


class IPAddrType(Numbers):
    IPV4 = 0
    IPV6 = 1


class DomainQemuMonitorCommandFlags(Numbers):
    DEFAULT = 0
    HMP = 1


class DomainQemuAgentCommandTimeout(Numbers):
    BLOCK = -2
    MIN = -2
    DEFAULT = -1
    NOWAIT = 0
    SHUTDOWN = 60


class ConnectListAllNetworksFlags(Numbers):
    INACTIVE = 1
    ACTIVE = 2
    PERSISTENT = 4
    TRANSIENT = 8
    AUTOSTART = 16
    NO_AUTOSTART = 32


class NetworkXMLFlags(Numbers):
    INACTIVE = 1


class NetworkCreateFlags(Numbers):
    VALIDATE = 1


class NetworkDefineFlags(Numbers):
    VALIDATE = 1


class NetworkUpdateCommand(Numbers):
    NONE = 0
    MODIFY = 1
    DELETE = 2
    ADD_LAST = 3
    ADD_FIRST = 4


class NetworkUpdateSection(Numbers):
    NONE = 0
    BRIDGE = 1
    DOMAIN = 2
    IP = 3
    IP_DHCP_HOST = 4
    IP_DHCP_RANGE = 5
    FORWARD = 6
    FORWARD_INTERFACE = 7
    FORWARD_PF = 8
    PORTGROUP = 9
    DNS_HOST = 10
    DNS_TXT = 11
    DNS_SRV = 12


class NetworkUpdateFlags(Numbers):
    CURRENT = 0
    LIVE = 1
    CONFIG = 2


class NetworkEventID(Numbers):
    LIFECYCLE = 0
    METADATA_CHANGE = 1


class NetworkEventLifecycleType(Numbers):
    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    STOPPED = 3


class NetworkMetadataType(Numbers):
    DESCRIPTION = 0
    TITLE = 1
    ELEMENT = 2


class NetworkPortCreateFlags(Numbers):
    RECLAIM = 1
    VALIDATE = 2


class ConnectListAllStoragePoolsFlags(Numbers):
    INACTIVE = 1
    ACTIVE = 2
    PERSISTENT = 4
    TRANSIENT = 8
    AUTOSTART = 16
    NO_AUTOSTART = 32
    DIR = 64
    FS = 128
    NETFS = 256
    LOGICAL = 512
    DISK = 1024
    ISCSI = 2048
    SCSI = 4096
    MPATH = 8192
    RBD = 16384
    SHEEPDOG = 32768
    GLUSTER = 65536
    ZFS = 131072
    VSTORAGE = 262144
    ISCSI_DIRECT = 524288


class StoragePoolState(Numbers):
    INACTIVE = 0
    BUILDING = 1
    RUNNING = 2
    DEGRADED = 3
    INACCESSIBLE = 4


class StoragePoolBuildFlags(Numbers):
    NEW = 0
    REPAIR = 1
    RESIZE = 2
    NO_OVERWRITE = 4
    OVERWRITE = 8


class StoragePoolCreateFlags(Numbers):
    NORMAL = 0
    WITH_BUILD = 1
    WITH_BUILD_OVERWRITE = 2
    WITH_BUILD_NO_OVERWRITE = 4


class StoragePoolDefineFlags(Numbers):
    VALIDATE = 1


class StoragePoolDeleteFlags(Numbers):
    NORMAL = 0
    ZEROED = 1


class StoragePoolEventLifecycleType(Numbers):
    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    STOPPED = 3
    CREATED = 4
    DELETED = 5


class StoragePoolEventID(Numbers):
    LIFECYCLE = 0
    REFRESH = 1


class StorageXMLFlags(Numbers):
    INACTIVE = 1


class StorageVolType(Numbers):
    FILE = 0
    BLOCK = 1
    DIR = 2
    NETWORK = 3
    NETDIR = 4
    PLOOP = 5


class StorageVolCreateFlags(Numbers):
    PREALLOC_METADATA = 1
    REFLINK = 2
    VALIDATE = 4


class StorageVolDeleteFlags(Numbers):
    NORMAL = 0
    ZEROED = 1
    WITH_SNAPSHOTS = 2


class StorageVolDownloadFlags(Numbers):
    SPARSE_STREAM = 1


class StorageVolUploadFlags(Numbers):
    SPARSE_STREAM = 1


class StorageVolInfoFlags(Numbers):
    USE_ALLOCATION = 0
    GET_PHYSICAL = 1


class StorageVolResizeFlags(Numbers):
    ALLOCATE = 1
    DELTA = 2
    SHRINK = 4


class StorageVolWipeAlgorithm(Numbers):
    ZERO = 0
    NNSA = 1
    DOD = 2
    BSI = 3
    GUTMANN = 4
    SCHNEIER = 5
    PFITZNER7 = 6
    PFITZNER33 = 7
    RANDOM = 8
    TRIM = 9


class DomainSnapshotXMLFlags(Numbers):
    SECURE = 1


class DomainSnapshotCreateFlags(Numbers):
    REDEFINE = 1
    CURRENT = 2
    NO_METADATA = 4
    HALT = 8
    DISK_ONLY = 16
    REUSE_EXT = 32
    QUIESCE = 0x40
    ATOMIC = 0x80
    LIVE = 0x100
    VALIDATE = 0x200


class DomainSnapshotListFlags(Numbers):
    """ROOTS means DESCENDANTS where the children of a snapshot are listed."""

    ROOTS = 1
    METADATA = 2
    LEAVES = 4
    NO_LEAVES = 8
    NO_METADATA = 16
    INACTIVE = 32
    ACTIVE = 0x40
    DISK_ONLY = 0x80
    INTERNAL = 0x100
    EXTERNAL = 0x200
    TOPOLOGICAL = 0x400


class DomainSnapshotRevertFlags(Numbers):
    RUNNING = 1
    PAUSED = 2
    FORCE = 4
    RESET_NVRAM = 8


class DomainSnapshotDeleteFlags(Numbers):
    CHILDREN = 1
    METADATA_ONLY = 2
    CHILDREN_ONLY = 4


class DomainCheckpointXMLFlags(Numbers):
    SECURE = 1
    NO_DOMAIN = 2
    SIZE = 4


class DomainCheckpointCreateFlags(Numbers):
    REDEFINE = 1
    QUIESCE = 2
    REDEFINE_VALIDATE = 4


class DomainCheckpointListFlags(Numbers):
    """ROOTS means DESCENDANTS where the children of a checkpoint are listed."""

    ROOTS = 1
    TOPOLOGICAL = 2
    LEAVES = 4
    NO_LEAVES = 8


class DomainCheckpointDeleteFlags(Numbers):
    CHILDREN = 1
    METADATA_ONLY = 2
    CHILDREN_ONLY = 4


class DomainBackupBeginFlags(Numbers):
    REUSE_EXTERNAL = 1
