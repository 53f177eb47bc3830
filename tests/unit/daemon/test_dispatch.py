"""The table: what is in it, and who may call what."""

from __future__ import annotations

import pytest

from kvik.daemon.dispatch import Access, Entry, table
from kvik.rpc.program import kvik, qemu, remote

ROWS = [entry for procedures in table().values() for entry in procedures.values()]

# What virsh's life cycle, virt-install's import and virt-manager's start need.
NEEDED = """AUTH_LIST CONNECT_OPEN CONNECT_CLOSE CONNECT_SUPPORTS_FEATURE CONNECT_GET_TYPE CONNECT_GET_VERSION
CONNECT_GET_LIB_VERSION CONNECT_GET_HOSTNAME CONNECT_GET_URI CONNECT_GET_CAPABILITIES CONNECT_GET_DOMAIN_CAPABILITIES
CONNECT_LIST_ALL_DOMAINS CONNECT_REGISTER_CLOSE_CALLBACK CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY
CONNECT_GET_ALL_DOMAIN_STATS CONNECT_LIST_ALL_NETWORKS CONNECT_LIST_ALL_STORAGE_POOLS CONNECT_LIST_ALL_NODE_DEVICES
CONNECT_NETWORK_EVENT_REGISTER_ANY CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY
CONNECT_NUM_OF_NETWORKS CONNECT_LIST_NETWORKS NODE_NUM_OF_DEVICES NODE_LIST_DEVICES NODE_GET_INFO
NODE_GET_SECURITY_MODEL DOMAIN_LOOKUP_BY_NAME DOMAIN_LOOKUP_BY_UUID DOMAIN_LOOKUP_BY_ID DOMAIN_DEFINE_XML
DOMAIN_DEFINE_XML_FLAGS DOMAIN_CREATE DOMAIN_CREATE_WITH_FLAGS DOMAIN_CREATE_XML DOMAIN_DESTROY DOMAIN_DESTROY_FLAGS
DOMAIN_SHUTDOWN DOMAIN_SHUTDOWN_FLAGS DOMAIN_REBOOT DOMAIN_RESET DOMAIN_SUSPEND DOMAIN_RESUME DOMAIN_UNDEFINE
DOMAIN_UNDEFINE_FLAGS DOMAIN_GET_XML_DESC DOMAIN_GET_INFO DOMAIN_GET_STATE DOMAIN_GET_AUTOSTART DOMAIN_SET_AUTOSTART
DOMAIN_IS_ACTIVE DOMAIN_IS_PERSISTENT DOMAIN_GET_OS_TYPE DOMAIN_OPEN_CONSOLE DOMAIN_SCREENSHOT DOMAIN_SNAPSHOT_NUM
DOMAIN_HAS_MANAGED_SAVE_IMAGE DOMAIN_LIST_ALL_SNAPSHOTS DOMAIN_OPEN_GRAPHICS_FD DOMAIN_GET_MESSAGES""".split()  # noqa: SIM905

# Calls that only look; everything else that a machine can be asked must be refused to a read-only connection.
LOOKS = (
    "GET_",
    "LOOKUP_",
    "LIST_",
    "NUM_OF_",
    "IS_",
    "HAS_",
    "SUPPORTS_",
    "COMPARE_",
    "BASELINE_",
    "REGISTER",
    "DEREG",
)


@pytest.mark.parametrize("name", NEEDED)
def test_what_common_clients_need_is_answered(name: str) -> None:
    assert remote()[name].number in table()[remote().number]


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: entry.name)
def test_only_calls_that_look_are_open_to_readers(entry: Entry) -> None:
    if entry.access == Access.READ:
        looks = any(part in entry.name for part in LOOKS) or entry.name.endswith(("_STATS", "_STATS_FLAGS"))
        others = {
            "DOMAIN_INTERFACE_ADDRESSES",
            "DOMAIN_SNAPSHOT_NUM",
            "DOMAIN_SNAPSHOT_NUM_CHILDREN",
            "DOMAIN_SNAPSHOT_PLAN",
            "DOMAIN_SNAPSHOT_CURRENT",
            "CONNECT_UNREGISTER_CLOSE_CALLBACK",
            "DOMAIN_WAIT_READY",
            "DOMAIN_STAGES",
            "DAEMON_STATUS",
            "DOMAIN_OVERVIEW",
            "NETWORK_MESSAGES",
            "STORAGE_POOL_MESSAGES",
            "BRIDGE_LIST",
            "BRIDGE_SHOW",
            "BRIDGE_FDB",
            "BRIDGE_VLAN",
            "INTERFACE_PENDING",
            "DNS_STATUS",
        }
        assert looks or entry.name in others


def test_before_opening_little_is_allowed() -> None:
    names = {entry.name for entry in ROWS if entry.access == Access.ANYONE}
    assert {name for name in names if not name.startswith("AUTH_")} == {
        "CONNECT_OPEN",
        "CONNECT_CLOSE",
        "CONNECT_SUPPORTS_FEATURE",
    }


def test_every_handler_has_the_arguments_of_a_handler() -> None:
    for program in (remote(), qemu(), kvik()):
        for number, entry in table()[program.number].items():
            procedure = program[number]
            assert procedure.name == entry.name
            assert not procedure.event
            if procedure.stream:
                assert entry.with_call, f"{entry.name} opens a stream on its call"


def test_the_calls_that_wait_for_nobody_else_are_given_up_with_their_client() -> None:
    by_name = {entry.name: entry for entry in ROWS}
    assert by_name["DOMAIN_WAIT_READY"].abandonable
    assert by_name["DOMAIN_EXEC"].abandonable
    assert not by_name["DOMAIN_CREATE"].abandonable
    assert not by_name["DOMAIN_DEFINE_XML"].abandonable
