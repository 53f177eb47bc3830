"""Which function answers which procedure, and who may call it: the one table of the daemon.

A handler that is a coroutine function waits and gets a task; any other answers at once from memory. Handlers take
`(connection, arguments)` or `(connection, arguments, call)`, the latter when they need the call's descriptors or open
a stream on it; they return the result's fields as a tuple, `None` for none, or `Files` to send descriptors.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from kvik.rpc import program as programs
from kvik.rpc.program import Procedure, Program

__all__ = ["Access", "Entry", "Files", "table"]

Handler = Callable[..., Any]


class Access(enum.IntEnum):
    """What a connection may do; each level includes those before it."""

    ANYONE = 0  # before CONNECT_OPEN
    READ = 1
    WRITE = 2
    ADMIN = 3


class Files(NamedTuple):
    """A result that is followed by descriptors; they are closed once sent."""

    values: tuple[Any, ...] | None
    files: tuple[int, ...]


class Entry:
    """One row of the table, ready for use."""

    __slots__ = ("abandonable", "access", "args", "handler", "name", "quick", "result", "with_call")

    def __init__(self, procedure: Procedure, access: Access, handler: Handler) -> None:
        self.name = procedure.name
        self.args = procedure.args
        self.result = procedure.result
        self.access = access
        self.handler = handler
        self.quick = not inspect.iscoroutinefunction(handler)
        self.with_call = len(inspect.signature(handler).parameters) == 3
        # Given up when the client hangs up: what only looks, and what only waits.
        self.abandonable = not self.quick and (access <= Access.READ or self.name in WAITS)


# Calls above READ that nobody but the caller needs.
WAITS = frozenset({"DOMAIN_EXEC", "DOMAIN_AGENT_COMMAND", "DOMAIN_GET_GUEST_INFO", "DOMAIN_GET_FSINFO"})

ANYONE, READ, WRITE, ADMIN = Access.ANYONE, Access.READ, Access.WRITE, Access.ADMIN
Rows = Mapping[str, tuple[Access, Handler]]


@cache
def table() -> dict[int, dict[int, Entry]]:
    """Program number -> procedure number -> entry."""
    return {
        program.number: {program[name].number: Entry(program[name], *row) for name, row in rows.items()}
        for program, rows in _programs()
    }


def _programs() -> list[tuple[Program, Rows]]:
    return [(programs.remote(), _remote()), (programs.qemu(), _qemu()), (programs.kvik(), _kvik())]


def _remote() -> Rows:
    from kvik.daemon.handlers import (
        block,
        block_tuning,
        checkpoints,
        connect,
        console,
        domain,
        domain_config,
        domain_stats,
        events,
        guest,
        interfaces,
        iothreads,
        network_ports,
        networks,
        node,
        nwfilters,
        others,
        pools,
        saved,
        secrets,
        snapshots,
        volumes,
    )

    return {
        # connection
        "AUTH_LIST": (ANYONE, connect.auth_list),
        "AUTH_SASL_INIT": (ANYONE, connect.auth_unavailable),
        "AUTH_SASL_START": (ANYONE, connect.auth_unavailable),
        "AUTH_SASL_STEP": (ANYONE, connect.auth_unavailable),
        "AUTH_POLKIT": (ANYONE, connect.auth_unavailable),
        "CONNECT_OPEN": (ANYONE, connect.open_connection),
        "CONNECT_CLOSE": (ANYONE, connect.close_connection),
        "CONNECT_SUPPORTS_FEATURE": (ANYONE, connect.supports_feature),
        "CONNECT_GET_TYPE": (READ, connect.get_type),
        "CONNECT_GET_VERSION": (READ, connect.get_version),
        "CONNECT_GET_LIB_VERSION": (READ, connect.get_library_version),
        "CONNECT_GET_HOSTNAME": (READ, connect.get_hostname),
        "CONNECT_GET_URI": (READ, connect.get_uri),
        "CONNECT_GET_SYSINFO": (READ, connect.get_sysinfo),
        "CONNECT_GET_MAX_VCPUS": (READ, connect.get_max_vcpus),
        "CONNECT_GET_CAPABILITIES": (READ, connect.get_capabilities),
        # It names a program that the daemon may run: not for those who may only look (CVE-2019-10167).
        "CONNECT_GET_DOMAIN_CAPABILITIES": (WRITE, connect.get_domain_capabilities),
        "CONNECT_GET_CPU_MODEL_NAMES": (READ, connect.get_cpu_model_names),
        "CONNECT_COMPARE_CPU": (READ, connect.compare_cpu),
        "CONNECT_COMPARE_HYPERVISOR_CPU": (WRITE, connect.compare_hypervisor_cpu),
        "CONNECT_BASELINE_CPU": (READ, connect.baseline_cpu),
        "CONNECT_BASELINE_HYPERVISOR_CPU": (WRITE, connect.baseline_hypervisor_cpu),
        "CONNECT_IS_SECURE": (READ, connect.is_secure),
        "CONNECT_DOMAIN_XML_TO_NATIVE": (WRITE, connect.domain_xml_to_native),
        "CONNECT_REGISTER_CLOSE_CALLBACK": (READ, connect.register_close_callback),
        "CONNECT_UNREGISTER_CLOSE_CALLBACK": (READ, connect.unregister_close_callback),
        # events
        "CONNECT_DOMAIN_EVENT_REGISTER": (READ, events.register_legacy),
        "CONNECT_DOMAIN_EVENT_DEREGISTER": (READ, events.deregister_legacy),
        "CONNECT_DOMAIN_EVENT_REGISTER_ANY": (READ, events.register_any_legacy),
        "CONNECT_DOMAIN_EVENT_DEREGISTER_ANY": (READ, events.deregister_any_legacy),
        "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY": (READ, events.register),
        "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY": (READ, events.deregister),
        "CONNECT_NETWORK_EVENT_REGISTER_ANY": (READ, networks.register),
        "CONNECT_NETWORK_EVENT_DEREGISTER_ANY": (READ, networks.deregister),
        "CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY": (READ, pools.register),
        "CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY": (READ, pools.deregister),
        "CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY": (READ, others.register),
        "CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY": (READ, others.deregister),
        "CONNECT_SECRET_EVENT_REGISTER_ANY": (READ, secrets.register),
        "CONNECT_SECRET_EVENT_DEREGISTER_ANY": (READ, secrets.deregister),
        # the host
        "NODE_GET_INFO": (READ, node.get_info),
        "NODE_GET_CPU_STATS": (READ, node.get_cpu_stats),
        "NODE_GET_MEMORY_STATS": (READ, node.get_memory_stats),
        "NODE_GET_FREE_MEMORY": (READ, node.get_free_memory),
        "NODE_GET_CELLS_FREE_MEMORY": (READ, node.get_cells_free_memory),
        "NODE_GET_CPU_MAP": (READ, node.get_cpu_map),
        "NODE_GET_FREE_PAGES": (READ, node.get_free_pages),
        "NODE_GET_SECURITY_MODEL": (READ, node.get_security_model),
        "NODE_GET_MEMORY_PARAMETERS": (READ, node.get_memory_parameters),
        "NODE_GET_SEV_INFO": (READ, node.get_sev_info),
        "NODE_SUSPEND_FOR_DURATION": (WRITE, node.suspend_for_duration),
        # machines: finding and looking
        "DOMAIN_LOOKUP_BY_NAME": (READ, domain.lookup_by_name),
        "DOMAIN_LOOKUP_BY_UUID": (READ, domain.lookup_by_uuid),
        "DOMAIN_LOOKUP_BY_ID": (READ, domain.lookup_by_id),
        "CONNECT_LIST_ALL_DOMAINS": (READ, domain.list_all_domains),
        "CONNECT_LIST_DOMAINS": (READ, domain.list_domains),
        "CONNECT_LIST_DEFINED_DOMAINS": (READ, domain.list_defined_domains),
        "CONNECT_NUM_OF_DOMAINS": (READ, domain.num_of_domains),
        "CONNECT_NUM_OF_DEFINED_DOMAINS": (READ, domain.num_of_defined_domains),
        "DOMAIN_IS_ACTIVE": (READ, domain.is_active),
        "DOMAIN_IS_PERSISTENT": (READ, domain.is_persistent),
        "DOMAIN_IS_UPDATED": (READ, domain.is_updated),
        "DOMAIN_GET_INFO": (READ, domain.get_info),
        "DOMAIN_GET_STATE": (READ, domain.get_state),
        "DOMAIN_GET_XML_DESC": (READ, domain.get_xml),
        "DOMAIN_GET_OS_TYPE": (READ, domain.get_os_type),
        "DOMAIN_GET_AUTOSTART": (READ, domain.get_autostart),
        "DOMAIN_GET_MAX_MEMORY": (READ, domain.get_max_memory),
        "DOMAIN_GET_CONTROL_INFO": (READ, domain.get_control_info),
        "DOMAIN_GET_MESSAGES": (READ, domain.get_messages),
        "DOMAIN_GET_JOB_INFO": (READ, domain.get_job_info),
        "DOMAIN_GET_JOB_STATS": (READ, domain.get_job_stats),
        "DOMAIN_ABORT_JOB": (WRITE, domain.abort_job),
        "DOMAIN_ABORT_JOB_FLAGS": (WRITE, domain.abort_job),
        "DOMAIN_GET_SECURITY_LABEL": (READ, domain.get_security_label),
        "DOMAIN_GET_SECURITY_LABEL_LIST": (READ, domain.get_security_label_list),
        "DOMAIN_GET_LAUNCH_SECURITY_INFO": (READ, domain.get_launch_security_info),
        # machines: life cycle
        "DOMAIN_DEFINE_XML": (WRITE, domain.define_xml),
        "DOMAIN_DEFINE_XML_FLAGS": (WRITE, domain.define_xml_flags),
        "DOMAIN_UNDEFINE": (WRITE, domain.undefine),
        "DOMAIN_UNDEFINE_FLAGS": (WRITE, domain.undefine_flags),
        "DOMAIN_CREATE": (WRITE, domain.create),
        "DOMAIN_CREATE_WITH_FLAGS": (WRITE, domain.create_with_flags),
        "DOMAIN_CREATE_WITH_FILES": (WRITE, domain.create_with_files),
        "DOMAIN_CREATE_XML": (WRITE, domain.create_xml),
        "DOMAIN_CREATE_XML_WITH_FILES": (WRITE, domain.create_xml_with_files),
        "DOMAIN_FD_ASSOCIATE": (WRITE, domain.fd_associate),
        "DOMAIN_DESTROY": (WRITE, domain.destroy),
        "DOMAIN_DESTROY_FLAGS": (WRITE, domain.destroy_flags),
        "DOMAIN_SHUTDOWN": (WRITE, domain.shutdown),
        "DOMAIN_SHUTDOWN_FLAGS": (WRITE, domain.shutdown_flags),
        "DOMAIN_REBOOT": (WRITE, domain.reboot),
        "DOMAIN_RESET": (WRITE, domain.reset),
        "DOMAIN_SUSPEND": (WRITE, domain.suspend),
        "DOMAIN_RESUME": (WRITE, domain.resume),
        "DOMAIN_RENAME": (WRITE, domain.rename),
        "DOMAIN_SET_AUTOSTART": (WRITE, domain.set_autostart),
        "DOMAIN_INJECT_NMI": (WRITE, domain.inject_nmi),
        "DOMAIN_SEND_KEY": (WRITE, domain.send_key),
        # machines: configuration
        "DOMAIN_SET_MEMORY": (WRITE, domain_config.set_memory),
        "DOMAIN_SET_MAX_MEMORY": (WRITE, domain_config.set_max_memory),
        "DOMAIN_SET_MEMORY_FLAGS": (WRITE, domain_config.set_memory_flags),
        "DOMAIN_SET_MEMORY_STATS_PERIOD": (WRITE, domain_config.set_memory_stats_period),
        "DOMAIN_GET_BLOCK_IO_TUNE": (READ, block_tuning.get_block_io_tune),
        "DOMAIN_SET_BLOCK_IO_TUNE": (WRITE, block_tuning.set_block_io_tune),
        "DOMAIN_GET_INTERFACE_PARAMETERS": (READ, domain_config.get_interface_parameters),
        "DOMAIN_SET_INTERFACE_PARAMETERS": (WRITE, domain_config.set_interface_parameters),
        "DOMAIN_SET_VCPUS": (WRITE, domain_config.set_vcpus),
        "DOMAIN_SET_VCPUS_FLAGS": (WRITE, domain_config.set_vcpus_flags),
        "DOMAIN_GET_VCPUS_FLAGS": (READ, domain_config.get_vcpus_flags),
        "DOMAIN_GET_MAX_VCPUS": (READ, domain_config.get_max_vcpus),
        "DOMAIN_GET_VCPUS": (READ, domain_config.get_vcpus),
        "DOMAIN_GET_VCPU_PIN_INFO": (READ, domain_config.get_vcpu_pin_info),
        "DOMAIN_GET_EMULATOR_PIN_INFO": (READ, domain_config.get_emulator_pin_info),
        "DOMAIN_GET_IOTHREAD_INFO": (READ, iothreads.get_iothread_info),
        "DOMAIN_PIN_IOTHREAD": (WRITE, iothreads.pin_iothread),
        "DOMAIN_ADD_IOTHREAD": (WRITE, iothreads.add_iothread),
        "DOMAIN_DEL_IOTHREAD": (WRITE, iothreads.del_iothread),
        "DOMAIN_SET_IOTHREAD_PARAMS": (WRITE, iothreads.set_iothread_params),
        "DOMAIN_GET_SCHEDULER_TYPE": (READ, domain_config.get_scheduler_type),
        "DOMAIN_GET_SCHEDULER_PARAMETERS": (READ, domain_config.get_scheduler_parameters),
        "DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS": (READ, domain_config.get_scheduler_parameters_flags),
        "DOMAIN_GET_MEMORY_PARAMETERS": (READ, domain_config.get_memory_parameters),
        "DOMAIN_GET_BLKIO_PARAMETERS": (READ, domain_config.get_blkio_parameters),
        "DOMAIN_GET_NUMA_PARAMETERS": (READ, domain_config.get_numa_parameters),
        "DOMAIN_ATTACH_DEVICE": (WRITE, domain_config.attach_device),
        "DOMAIN_ATTACH_DEVICE_FLAGS": (WRITE, domain_config.attach_device_flags),
        "DOMAIN_DETACH_DEVICE": (WRITE, domain_config.detach_device),
        "DOMAIN_DETACH_DEVICE_FLAGS": (WRITE, domain_config.detach_device_flags),
        "DOMAIN_DETACH_DEVICE_ALIAS": (WRITE, domain_config.detach_device_alias),
        "DOMAIN_UPDATE_DEVICE_FLAGS": (WRITE, domain_config.update_device_flags),
        "DOMAIN_GET_METADATA": (READ, domain_config.get_metadata),
        "DOMAIN_SET_METADATA": (WRITE, domain_config.set_metadata),
        # machines: figures
        "CONNECT_GET_ALL_DOMAIN_STATS": (READ, domain_stats.get_all_domain_stats),
        "DOMAIN_BLOCK_STATS": (READ, domain_stats.block_stats),
        "DOMAIN_BLOCK_STATS_FLAGS": (READ, domain_stats.block_stats_flags),
        "DOMAIN_GET_BLOCK_INFO": (READ, domain_stats.get_block_info),
        "DOMAIN_BLOCK_PULL": (WRITE, block.pull),
        "DOMAIN_BLOCK_REBASE": (WRITE, block.rebase),
        "DOMAIN_BLOCK_COPY": (WRITE, block.copy),
        "DOMAIN_BLOCK_COMMIT": (WRITE, block.commit),
        "DOMAIN_BLOCK_RESIZE": (WRITE, block.resize),
        "DOMAIN_SET_BLOCK_THRESHOLD": (WRITE, block.set_threshold),
        "DOMAIN_BLOCK_JOB_ABORT": (WRITE, block.abort),
        "DOMAIN_GET_BLOCK_JOB_INFO": (READ, block.info),
        "DOMAIN_BLOCK_JOB_SET_SPEED": (WRITE, block.set_speed),
        "DOMAIN_INTERFACE_STATS": (READ, domain_stats.interface_stats),
        "DOMAIN_INTERFACE_ADDRESSES": (READ, domain_stats.interface_addresses),
        "DOMAIN_MEMORY_STATS": (READ, domain_stats.memory_stats),
        "DOMAIN_GET_CPU_STATS": (READ, domain_stats.get_cpu_stats),
        "DOMAIN_GET_DISK_ERRORS": (READ, domain_stats.get_disk_errors),
        # machines: through the guest's agent. Asking it is acting on the guest (CVE-2019-3886).
        "DOMAIN_GET_TIME": (WRITE, guest.get_time),
        "DOMAIN_SET_TIME": (WRITE, guest.set_time),
        "DOMAIN_GET_HOSTNAME": (WRITE, guest.get_hostname),
        "DOMAIN_GET_FSINFO": (WRITE, guest.get_fsinfo),
        "DOMAIN_GET_GUEST_INFO": (WRITE, guest.get_guest_info),
        "DOMAIN_FSFREEZE": (WRITE, guest.freeze),
        "DOMAIN_FSTHAW": (WRITE, guest.thaw),
        "DOMAIN_FSTRIM": (WRITE, guest.trim),
        "DOMAIN_SET_USER_PASSWORD": (WRITE, guest.set_user_password),
        # machines: streams and descriptors
        "DOMAIN_OPEN_CONSOLE": (WRITE, console.open_console),
        "DOMAIN_OPEN_CHANNEL": (WRITE, console.open_channel),
        "DOMAIN_OPEN_GRAPHICS_FD": (WRITE, console.open_graphics_fd),
        "DOMAIN_SCREENSHOT": (WRITE, console.screenshot),
        # machines: saved states
        "DOMAIN_SAVE": (WRITE, saved.save),
        "DOMAIN_SAVE_FLAGS": (WRITE, saved.save_flags),
        "DOMAIN_SAVE_PARAMS": (WRITE, saved.save_params),
        "DOMAIN_RESTORE": (WRITE, saved.restore),
        "DOMAIN_RESTORE_FLAGS": (WRITE, saved.restore_flags),
        "DOMAIN_RESTORE_PARAMS": (WRITE, saved.restore_params),
        "DOMAIN_SAVE_IMAGE_GET_XML_DESC": (WRITE, saved.image_get_xml),
        "DOMAIN_SAVE_IMAGE_DEFINE_XML": (WRITE, saved.image_define_xml),
        "DOMAIN_MANAGED_SAVE": (WRITE, saved.managed_save),
        "DOMAIN_HAS_MANAGED_SAVE_IMAGE": (READ, saved.has_managed_save),
        "DOMAIN_MANAGED_SAVE_REMOVE": (WRITE, saved.managed_save_remove),
        "DOMAIN_MANAGED_SAVE_GET_XML_DESC": (READ, saved.managed_get_xml),
        "DOMAIN_MANAGED_SAVE_DEFINE_XML": (WRITE, saved.managed_define_xml),
        # machines: checkpoints and backups
        "DOMAIN_LIST_ALL_CHECKPOINTS": (READ, checkpoints.list_all),
        "DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN": (READ, checkpoints.list_all_children),
        "DOMAIN_CHECKPOINT_LOOKUP_BY_NAME": (READ, checkpoints.lookup),
        "DOMAIN_CHECKPOINT_GET_PARENT": (READ, checkpoints.get_parent),
        "DOMAIN_CHECKPOINT_GET_XML_DESC": (READ, checkpoints.get_xml),
        "DOMAIN_CHECKPOINT_CREATE_XML": (WRITE, checkpoints.create_xml),
        "DOMAIN_CHECKPOINT_DELETE": (WRITE, checkpoints.remove),
        "DOMAIN_BACKUP_BEGIN": (WRITE, checkpoints.backup_begin),
        "DOMAIN_BACKUP_GET_XML_DESC": (READ, checkpoints.backup_xml),
        # machines: snapshots
        "DOMAIN_SNAPSHOT_NUM": (READ, snapshots.num),
        "DOMAIN_SNAPSHOT_LIST_NAMES": (READ, snapshots.list_names),
        "DOMAIN_LIST_ALL_SNAPSHOTS": (READ, snapshots.list_all),
        "DOMAIN_SNAPSHOT_NUM_CHILDREN": (READ, snapshots.num_children),
        "DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES": (READ, snapshots.list_children_names),
        "DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN": (READ, snapshots.list_all_children),
        "DOMAIN_SNAPSHOT_LOOKUP_BY_NAME": (READ, snapshots.lookup),
        "DOMAIN_HAS_CURRENT_SNAPSHOT": (READ, snapshots.has_current),
        "DOMAIN_SNAPSHOT_CURRENT": (READ, snapshots.current),
        "DOMAIN_SNAPSHOT_IS_CURRENT": (READ, snapshots.is_current),
        "DOMAIN_SNAPSHOT_HAS_METADATA": (READ, snapshots.has_metadata),
        "DOMAIN_SNAPSHOT_GET_PARENT": (READ, snapshots.get_parent),
        "DOMAIN_SNAPSHOT_GET_XML_DESC": (READ, snapshots.get_xml),
        "DOMAIN_SNAPSHOT_CREATE_XML": (WRITE, snapshots.create_xml),
        "DOMAIN_REVERT_TO_SNAPSHOT": (WRITE, snapshots.revert_to),
        "DOMAIN_SNAPSHOT_DELETE": (WRITE, snapshots.remove),
        # networks
        "CONNECT_NUM_OF_NETWORKS": (READ, networks.num_of_active),
        "CONNECT_LIST_NETWORKS": (READ, networks.list_active),
        "CONNECT_NUM_OF_DEFINED_NETWORKS": (READ, networks.num_of_inactive),
        "CONNECT_LIST_DEFINED_NETWORKS": (READ, networks.list_inactive),
        "CONNECT_LIST_ALL_NETWORKS": (READ, networks.list_all),
        "NETWORK_LOOKUP_BY_NAME": (READ, networks.lookup_by_name),
        "NETWORK_LOOKUP_BY_UUID": (READ, networks.lookup_by_uuid),
        "NETWORK_GET_XML_DESC": (READ, networks.get_xml),
        "NETWORK_GET_BRIDGE_NAME": (READ, networks.get_bridge_name),
        "NETWORK_GET_AUTOSTART": (READ, networks.get_autostart),
        "NETWORK_IS_ACTIVE": (READ, networks.is_active),
        "NETWORK_IS_PERSISTENT": (READ, networks.is_persistent),
        "NETWORK_GET_DHCP_LEASES": (READ, networks.get_dhcp_leases),
        "NETWORK_GET_METADATA": (READ, networks.get_metadata),
        "NETWORK_LIST_ALL_PORTS": (READ, network_ports.list_all),
        "NETWORK_PORT_LOOKUP_BY_UUID": (READ, network_ports.lookup_by_uuid),
        "NETWORK_PORT_GET_XML_DESC": (READ, network_ports.get_xml),
        "NETWORK_PORT_GET_PARAMETERS": (READ, network_ports.get_parameters),
        "NETWORK_PORT_SET_PARAMETERS": (WRITE, network_ports.refuse),
        "NETWORK_PORT_CREATE_XML": (WRITE, network_ports.refuse),
        "NETWORK_PORT_DELETE": (WRITE, network_ports.refuse),
        "NETWORK_DEFINE_XML": (WRITE, networks.define_xml),
        "NETWORK_DEFINE_XML_FLAGS": (WRITE, networks.define_xml_flags),
        "NETWORK_CREATE_XML": (WRITE, networks.create_xml),
        "NETWORK_CREATE_XML_FLAGS": (WRITE, networks.create_xml_flags),
        "NETWORK_CREATE": (WRITE, networks.create),
        "NETWORK_DESTROY": (WRITE, networks.destroy),
        "NETWORK_UNDEFINE": (WRITE, networks.undefine),
        "NETWORK_SET_AUTOSTART": (WRITE, networks.set_autostart),
        "NETWORK_UPDATE": (WRITE, networks.update),
        "NETWORK_SET_METADATA": (WRITE, networks.set_metadata),
        # storage pools
        "CONNECT_NUM_OF_STORAGE_POOLS": (READ, pools.num_of_active),
        "CONNECT_LIST_STORAGE_POOLS": (READ, pools.list_active),
        "CONNECT_NUM_OF_DEFINED_STORAGE_POOLS": (READ, pools.num_of_inactive),
        "CONNECT_LIST_DEFINED_STORAGE_POOLS": (READ, pools.list_inactive),
        "CONNECT_LIST_ALL_STORAGE_POOLS": (READ, pools.list_all),
        "CONNECT_FIND_STORAGE_POOL_SOURCES": (WRITE, pools.find_pool_sources),
        "CONNECT_GET_STORAGE_POOL_CAPABILITIES": (READ, pools.get_capabilities),
        "STORAGE_POOL_LOOKUP_BY_NAME": (READ, pools.lookup_by_name),
        "STORAGE_POOL_LOOKUP_BY_UUID": (READ, pools.lookup_by_uuid),
        "STORAGE_POOL_LOOKUP_BY_VOLUME": (READ, pools.lookup_by_volume),
        "STORAGE_POOL_LOOKUP_BY_TARGET_PATH": (READ, pools.lookup_by_target_path),
        "STORAGE_POOL_GET_INFO": (READ, pools.get_info),
        "STORAGE_POOL_GET_XML_DESC": (READ, pools.get_xml),
        "STORAGE_POOL_GET_AUTOSTART": (READ, pools.get_autostart),
        "STORAGE_POOL_IS_ACTIVE": (READ, pools.is_active),
        "STORAGE_POOL_IS_PERSISTENT": (READ, pools.is_persistent),
        "STORAGE_POOL_DEFINE_XML": (WRITE, pools.define_xml),
        "STORAGE_POOL_CREATE_XML": (WRITE, pools.create_xml),
        "STORAGE_POOL_CREATE": (WRITE, pools.create),
        "STORAGE_POOL_BUILD": (WRITE, pools.build),
        "STORAGE_POOL_DESTROY": (WRITE, pools.destroy),
        "STORAGE_POOL_DELETE": (WRITE, pools.delete),
        "STORAGE_POOL_UNDEFINE": (WRITE, pools.undefine),
        "STORAGE_POOL_REFRESH": (WRITE, pools.refresh),
        "STORAGE_POOL_SET_AUTOSTART": (WRITE, pools.set_autostart),
        # storage volumes
        "STORAGE_POOL_NUM_OF_VOLUMES": (READ, volumes.num_of),
        "STORAGE_POOL_LIST_VOLUMES": (READ, volumes.list_names),
        "STORAGE_POOL_LIST_ALL_VOLUMES": (READ, volumes.list_all),
        "STORAGE_VOL_LOOKUP_BY_NAME": (READ, volumes.lookup_by_name),
        "STORAGE_VOL_LOOKUP_BY_KEY": (READ, volumes.lookup_by_key),
        "STORAGE_VOL_LOOKUP_BY_PATH": (READ, volumes.lookup_by_path),
        "STORAGE_VOL_GET_INFO": (READ, volumes.get_info),
        "STORAGE_VOL_GET_INFO_FLAGS": (READ, volumes.get_info_flags),
        "STORAGE_VOL_GET_PATH": (READ, volumes.get_path),
        "STORAGE_VOL_GET_XML_DESC": (READ, volumes.get_xml),
        "STORAGE_VOL_CREATE_XML": (WRITE, volumes.create_xml),
        "STORAGE_VOL_CREATE_XML_FROM": (WRITE, volumes.create_xml_from),
        "STORAGE_VOL_DELETE": (WRITE, volumes.delete),
        "STORAGE_VOL_RESIZE": (WRITE, volumes.resize),
        "STORAGE_VOL_WIPE": (WRITE, volumes.wipe),
        "STORAGE_VOL_WIPE_PATTERN": (WRITE, volumes.wipe_pattern),
        "STORAGE_VOL_DOWNLOAD": (WRITE, volumes.download),
        "STORAGE_VOL_UPLOAD": (WRITE, volumes.upload),
        # the host's interfaces
        "CONNECT_NUM_OF_INTERFACES": (READ, interfaces.num_of),
        "CONNECT_LIST_INTERFACES": (READ, interfaces.list_names),
        "CONNECT_NUM_OF_DEFINED_INTERFACES": (READ, interfaces.num_of_defined),
        "CONNECT_LIST_DEFINED_INTERFACES": (READ, interfaces.list_defined_names),
        "CONNECT_LIST_ALL_INTERFACES": (READ, interfaces.list_all),
        "INTERFACE_LOOKUP_BY_NAME": (READ, interfaces.lookup_by_name),
        "INTERFACE_LOOKUP_BY_MAC_STRING": (READ, interfaces.lookup_by_mac),
        "INTERFACE_GET_XML_DESC": (READ, interfaces.get_xml),
        "INTERFACE_IS_ACTIVE": (READ, interfaces.is_active),
        "INTERFACE_DEFINE_XML": (WRITE, interfaces.define_xml),
        "INTERFACE_UNDEFINE": (WRITE, interfaces.undefine),
        "INTERFACE_CREATE": (WRITE, interfaces.create),
        "INTERFACE_DESTROY": (WRITE, interfaces.destroy),
        "INTERFACE_CHANGE_BEGIN": (WRITE, interfaces.change_begin),
        "INTERFACE_CHANGE_COMMIT": (WRITE, interfaces.change_commit),
        "INTERFACE_CHANGE_ROLLBACK": (WRITE, interfaces.change_rollback),
        # secrets
        "CONNECT_NUM_OF_SECRETS": (READ, secrets.num_of),
        "CONNECT_LIST_SECRETS": (READ, secrets.list_uuids),
        "CONNECT_LIST_ALL_SECRETS": (READ, secrets.list_all),
        "SECRET_LOOKUP_BY_UUID": (READ, secrets.lookup_by_uuid),
        "SECRET_LOOKUP_BY_USAGE": (READ, secrets.lookup_by_usage),
        "SECRET_GET_XML_DESC": (READ, secrets.get_xml),
        "SECRET_DEFINE_XML": (WRITE, secrets.define_xml),
        "SECRET_UNDEFINE": (WRITE, secrets.undefine),
        "SECRET_SET_VALUE": (WRITE, secrets.set_value),
        "SECRET_GET_VALUE": (WRITE, secrets.get_value),
        # network filters
        "CONNECT_NUM_OF_NWFILTERS": (READ, nwfilters.num_of),
        "CONNECT_LIST_NWFILTERS": (READ, nwfilters.list_names),
        "CONNECT_LIST_ALL_NWFILTERS": (READ, nwfilters.list_all),
        "NWFILTER_LOOKUP_BY_NAME": (READ, nwfilters.lookup_by_name),
        "NWFILTER_LOOKUP_BY_UUID": (READ, nwfilters.lookup_by_uuid),
        "NWFILTER_GET_XML_DESC": (READ, nwfilters.get_xml),
        "NWFILTER_DEFINE_XML": (WRITE, nwfilters.define_xml),
        "NWFILTER_DEFINE_XML_FLAGS": (WRITE, nwfilters.define_xml_flags),
        "NWFILTER_UNDEFINE": (WRITE, nwfilters.undefine),
        "CONNECT_LIST_ALL_NWFILTER_BINDINGS": (READ, nwfilters.list_all_bindings),
        "NWFILTER_BINDING_LOOKUP_BY_PORT_DEV": (READ, nwfilters.lookup_binding),
        "NWFILTER_BINDING_GET_XML_DESC": (READ, nwfilters.get_binding_xml),
        "NWFILTER_BINDING_CREATE_XML": (WRITE, nwfilters.create_binding),
        "NWFILTER_BINDING_DELETE": (WRITE, nwfilters.delete_binding),
        # host devices: none yet
        "NODE_NUM_OF_DEVICES": (READ, others.none),
        "NODE_LIST_DEVICES": (READ, others.no_names),
        "CONNECT_LIST_ALL_NODE_DEVICES": (READ, others.empty_list),
        "NODE_DEVICE_LOOKUP_BY_NAME": (READ, others.no_node_device),
    }


def _qemu() -> Rows:
    from kvik.daemon.handlers import events, qemu

    return {
        "DOMAIN_MONITOR_COMMAND": (WRITE, qemu.monitor_command),
        "DOMAIN_AGENT_COMMAND": (WRITE, qemu.agent_command),
        "CONNECT_DOMAIN_MONITOR_EVENT_REGISTER": (WRITE, events.register_monitor),
        "CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER": (WRITE, events.deregister_monitor),
    }


def _kvik() -> Rows:
    from kvik.daemon.handlers import bridges, host_names, interfaces, kvik, networks, pools, snapshots

    return {
        "DOMAIN_WAIT_READY": (READ, kvik.wait_ready),
        "DOMAIN_EXEC": (WRITE, kvik.execute),
        "DOMAIN_STAGES": (READ, kvik.stages),
        "DOMAIN_SNAPSHOT_PLAN": (READ, snapshots.plan),
        "DAEMON_STATUS": (READ, kvik.status),
        "DOMAIN_OVERVIEW": (READ, kvik.overview),
        "NETWORK_MESSAGES": (READ, networks.messages),
        "DNS_STATUS": (READ, host_names.status),
        "DNS_ENABLE": (WRITE, host_names.enable),
        "DNS_DISABLE": (WRITE, host_names.disable),
        "STORAGE_POOL_MESSAGES": (READ, pools.messages),
        "DAEMON_SHUTDOWN": (ADMIN, kvik.shutdown),
        "BRIDGE_LIST": (READ, bridges.listing),
        "BRIDGE_SHOW": (READ, bridges.show),
        "BRIDGE_ADD": (WRITE, bridges.add),
        "BRIDGE_DELETE": (WRITE, bridges.delete),
        "BRIDGE_ADD_PORT": (WRITE, bridges.add_port),
        "BRIDGE_DELETE_PORT": (WRITE, bridges.delete_port),
        "BRIDGE_SET": (WRITE, bridges.change),
        "BRIDGE_SET_PORT": (WRITE, bridges.change_port),
        "BRIDGE_FDB": (READ, bridges.fdb),
        "BRIDGE_CHANGE_FDB": (WRITE, bridges.change_fdb),
        "BRIDGE_FLUSH_FDB": (WRITE, bridges.flush_fdb),
        "BRIDGE_VLAN": (READ, bridges.vlans),
        "BRIDGE_CHANGE_VLAN": (WRITE, bridges.change_vlan),
        "INTERFACE_BRIDGE": (WRITE, interfaces.bridge),
        "INTERFACE_UNBRIDGE": (WRITE, interfaces.unbridge),
        "INTERFACE_BEGIN": (WRITE, interfaces.begin),
        "INTERFACE_PENDING": (READ, interfaces.pending),
    }
