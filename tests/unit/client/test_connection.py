"""Connection and domains against a daemon that answers from a table."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from fake_daemon import DOM, OFF, UUID, FakeDaemon

from kvik.client.connection import Connection, version_text
from kvik.client.domain import Domain
from kvik.client.handle import uuid_bytes
from kvik.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectError,
    InvalidArgument,
    NoDomain,
    NoSupport,
    OperationTimeout,
    RpcError,
)
from kvik.rpc import message as m
from kvik.rpc.program import remote
from kvik.rpc.typed_params import from_dict

Make = Callable[..., FakeDaemon]


def test_opening_sequence(daemon: Make) -> None:
    fake = daemon()
    with fake.connect():
        assert fake.calls == [("AUTH_LIST", ()), ("CONNECT_OPEN", ("kvik:///session", 0))]
    fake.thread.join(5)
    assert fake.calls[-1] == ("CONNECT_CLOSE", ())


def test_a_daemon_that_wants_a_password_is_refused_clearly(daemon: Make) -> None:
    with pytest.raises(AuthenticationFailed, match="authentication"):
        daemon(AUTH_LIST=([1],)).connect()


def test_errors_come_back_as_themselves(daemon: Make) -> None:
    fake = daemon(DOMAIN_DEFINE_XML_FLAGS=ConfigError("no <name>", line=3, path="/domain", remedy="add one"))
    with fake.connect() as connection, pytest.raises(ConfigError) as caught:
        connection.define("<domain/>")
    assert (caught.value.line, caught.value.path, caught.value.remedy) == (3, "/domain", "add one")


def test_a_call_that_is_not_answered_times_out_and_the_connection_goes_on(daemon: Make) -> None:
    held: list[m.Call] = []
    fake = daemon(CONNECT_GET_TYPE=lambda _, call: held.append(call), CONNECT_GET_HOSTNAME=("host",))
    with fake.connect() as connection:
        with pytest.raises(OperationTimeout, match="CONNECT_GET_TYPE"):
            connection.call("CONNECT_GET_TYPE", timeout=0.05)
        fake.send(m.reply(held[0], ("QEMU",)))  # too late: nobody may take it for another's answer
        assert connection.hostname() == "host"
        assert connection.link._replies == {}
        assert connection.link._abandoned == set()


def test_answers_in_any_order(daemon: Make) -> None:
    held: list[m.Call] = []

    def last_first(fake: FakeDaemon, call: m.Call) -> None:
        held.append(call)
        if len(held) == 3:
            fake.send(b"".join(m.reply(one, (f"<domain>{one.serial}</domain>",)) for one in reversed(held)))

    fake = daemon(DOMAIN_GET_XML_DESC=last_first)
    with fake.connect() as connection:
        results = connection.call_many("DOMAIN_GET_XML_DESC", [(DOM, 0)] * 3)
        assert [one.xml for one in results] == [f"<domain>{n}</domain>" for n in (2, 3, 4)]


def test_the_end_of_the_daemon_is_a_connect_error(daemon: Make) -> None:
    fake = daemon(CONNECT_GET_TYPE=lambda daemon, _: daemon.socket.shutdown(2))
    connection = fake.connect()
    with pytest.raises(ConnectError, match="closed the connection"):
        connection.type()
    with pytest.raises(ConnectError, match="is closed"):
        connection.type()
    connection.close()


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2, struct.pack(">7I", 28, 1, 1, 1, 9, 0, 0)]
)
def test_garbage_ends_the_connection(daemon: Make, garbage: bytes) -> None:
    connection = daemon(CONNECT_GET_TYPE=lambda fake, _: fake.send(garbage)).connect()
    with pytest.raises(RpcError):
        connection.type()
    assert connection.link.closed


def test_an_answer_to_something_else_is_refused(daemon: Make) -> None:
    def wrong(fake: FakeDaemon, call: m.Call) -> None:
        fake.send(m.frame((call.program, 99, call.serial), m.REPLY, m.OK))

    with daemon(CONNECT_GET_TYPE=wrong).connect() as connection, pytest.raises(RpcError, match="answers"):
        connection.type()


def test_pings_are_answered_while_waiting(daemon: Make) -> None:
    def ping_first(fake: FakeDaemon, call: m.Call) -> None:
        fake.send(m.PING_BYTES + m.reply(call, ("QEMU",)))

    fake = daemon(CONNECT_GET_TYPE=ping_first)
    with fake.connect() as connection:
        assert connection.type() == "QEMU"
        fake.wait_for(lambda: any(isinstance(one, m.Pong) for one in fake.received))


# --- the host ---


def test_host_wide_calls(daemon: Make) -> None:
    model = [*b"x86_64", *[0] * 26]
    fake = daemon(
        CONNECT_GET_VERSION=(7002000,),
        CONNECT_GET_LIB_VERSION=(9000001,),
        CONNECT_GET_URI=("kvik:///session",),
        CONNECT_GET_CAPABILITIES=("<capabilities/>",),
        CONNECT_GET_DOMAIN_CAPABILITIES=("<domainCapabilities/>",),
        CONNECT_GET_SYSINFO=("<sysinfo/>",),
        CONNECT_GET_MAX_VCPUS=(288,),
        NODE_GET_INFO=(model, 24 << 20, 2, 2500, 1, 1, 2, 1),
        NODE_GET_CPU_STATS=lambda f, c: f.send(m.reply(c, ([("user", 5)] if c.decode().nparams else [], 4))),
        NODE_GET_MEMORY_STATS=lambda f, c: f.send(m.reply(c, ([("total", 9)] if c.decode().nparams else [], 4))),
        NODE_GET_FREE_MEMORY=(2**33,),
        CONNECT_DOMAIN_XML_TO_NATIVE=("qemu -S",),
        CONNECT_SUPPORTS_FEATURE=(1,),
    )
    with fake.connect() as connection:
        assert connection.version() == "7.2.0"
        assert connection.lib_version() == "9.0.1"
        assert connection.uri() == "kvik:///session"
        assert connection.capabilities() == "<capabilities/>"
        assert connection.domain_capabilities(virttype="kvm") == "<domainCapabilities/>"
        assert connection.sysinfo() == "<sysinfo/>"
        assert connection.max_vcpus() == 288
        info = connection.node_info()
        assert (info.model, info.memory, info.cpus, info.threads) == ("x86_64", 24 << 20, 2, 1)
        assert connection.cpu_stats() == {"user": 5}
        assert connection.memory_stats() == {"total": 9}
        assert connection.free_memory() == 2**33
        assert connection.domxml_to_native("<domain/>") == "qemu -S"
        assert connection.supports_feature(14)
    assert fake.args("NODE_GET_CPU_STATS") == [(-1, 0, 0), (-1, 4, 0)]
    assert fake.args("CONNECT_GET_DOMAIN_CAPABILITIES") == [(None, None, None, "kvm", 0)]
    assert version_text(11003000) == "11.3.0"


def test_status_and_shutdown_of_the_daemon(daemon: Make) -> None:
    fake = daemon(DAEMON_STATUS=("0.1", 77, "session", 1.5, 3, 1, 2, ["qemu", "test"]), DAEMON_SHUTDOWN=())
    with fake.connect() as connection:
        status = connection.status()
        connection.shutdown_daemon()
    assert (status.pid, status.scope, status.running, status.hypervisors) == (77, "session", 1, ["qemu", "test"])


# --- domains ---


def test_lists_and_statistics(daemon: Make) -> None:
    stats = {"state.state": 1, "cpu.time": 5, "net.0.name": "vnet0"}
    fake = daemon(CONNECT_LIST_ALL_DOMAINS=([DOM, OFF], 2), CONNECT_GET_ALL_DOMAIN_STATS=([(DOM, from_dict(stats))],))
    with fake.connect() as connection:
        one, two = connection.domains(3)
        assert (one.name, one.id, one.uuid) == ("tiny-1", 1, "c7a5fdbd-cdaf-9455-926a-d65c16db1809")
        assert (two.name, two.id) == ("other", -1)
        assert one != two
        assert connection.all_stats()[0].stats == stats
        assert one.stats(1) == stats
    assert fake.args("CONNECT_LIST_ALL_DOMAINS") == [(1, 3)]
    assert fake.args("CONNECT_GET_ALL_DOMAIN_STATS") == [([], 0, 0), ([DOM], 1, 0)]


ROW = ("tiny-1", UUID, 1, 1, 1, "tcg", 2, 1 << 20, 10**9, "10.0.2.15", 1, 1, 0, None, 61.5)


def test_overview_in_one_call(daemon: Make) -> None:
    with (fake := daemon(DOMAIN_OVERVIEW=([ROW],))).connect() as connection:
        (row,) = connection.overview(1)
    assert (row.name, row.uuid, row.accelerator) == ("tiny-1", "c7a5fdbd-cdaf-9455-926a-d65c16db1809", "tcg")
    assert (row.vcpus, row.mem_kib, row.cpu_time, row.address) == (2, 1 << 20, 10**9, "10.0.2.15")
    assert (row.ready, row.persistent, row.autostart, row.title) == (True, True, False, None)
    assert row.uptime == 61.5
    assert fake.args("DOMAIN_OVERVIEW") == [(1,)]


def test_overview_from_a_daemon_that_is_not_ours(daemon: Make) -> None:
    fake = daemon(
        CONNECT_LIST_ALL_DOMAINS=([DOM, OFF], 2),
        DOMAIN_GET_STATE=(1, 2),
        DOMAIN_GET_INFO=(1, 2048, 1024, 3, 99),
        DOMAIN_IS_PERSISTENT=(1,),
    )
    with fake.connect() as connection:
        rows = connection.overview()
    assert [(row.name, row.id, row.state, row.reason) for row in rows] == [("tiny-1", 1, 1, 2), ("other", -1, 1, 2)]
    assert [(row.vcpus, row.mem_kib, row.cpu_time, row.persistent) for row in rows] == [(3, 1024, 99, True)] * 2


@pytest.mark.parametrize(
    ("key", "tried"),
    [
        ("web", ["NAME"]),
        ("7", ["ID", "NAME"]),
        (7, ["ID", "NAME"]),
        ("c7a5fdbd-cdaf-9455-926a-d65c16db1809", ["UUID", "NAME"]),
        ("12345678901234567890", ["NAME"]),
    ],
)
def test_a_domain_is_looked_up_by_id_then_uuid_then_name(daemon: Make, key: Any, tried: list[str]) -> None:
    missing = NoDomain("none")
    fake = daemon(DOMAIN_LOOKUP_BY_ID=missing, DOMAIN_LOOKUP_BY_UUID=missing, DOMAIN_LOOKUP_BY_NAME=(DOM,))
    with fake.connect() as connection:
        assert connection.domain(key).name == "tiny-1"
        looked_up = [name for name, _ in fake.calls if "LOOKUP" in name]
    assert looked_up == [f"DOMAIN_LOOKUP_BY_{one}" for one in tried]


def test_uuids_as_people_write_them() -> None:
    assert uuid_bytes("C7A5FDBD-cdaf-9455-926a-d65c16db1809") == UUID
    assert uuid_bytes(UUID.hex()) == UUID
    for bad in ("", "c7a5", "g" * 32, "²" * 32, " " * 32):
        assert uuid_bytes(bad) is None


# method -> (procedure, what the daemon answers, what the method returns, the call's arguments after the domain)
SIMPLE: list[tuple[Callable[[Domain], Any], str, tuple[Any, ...], Any, tuple[Any, ...]]] = [
    (lambda d: d.start(1), "DOMAIN_CREATE_WITH_FLAGS", (DOM,), None, (1,)),
    (lambda d: d.shutdown(2), "DOMAIN_SHUTDOWN_FLAGS", (), None, (2,)),
    (lambda d: d.reboot(1), "DOMAIN_REBOOT", (), None, (1,)),
    (lambda d: d.reset(), "DOMAIN_RESET", (), None, (0,)),
    (lambda d: d.suspend(), "DOMAIN_SUSPEND", (), None, ()),
    (lambda d: d.resume(), "DOMAIN_RESUME", (), None, ()),
    (lambda d: d.destroy(1), "DOMAIN_DESTROY_FLAGS", (), None, (1,)),
    (lambda d: d.undefine(4), "DOMAIN_UNDEFINE_FLAGS", (), None, (4,)),
    (lambda d: d.rename("new"), "DOMAIN_RENAME", (0,), None, ("new", 0)),
    (lambda d: d.xml(2), "DOMAIN_GET_XML_DESC", ("<d/>",), "<d/>", (2,)),
    (lambda d: d.info(), "DOMAIN_GET_INFO", (1, 4, 3, 2, 9), (1, 4, 3, 2, 9), ()),
    (lambda d: d.state(), "DOMAIN_GET_STATE", (1, 5), (1, 5), (0,)),
    (lambda d: d.is_active(), "DOMAIN_IS_ACTIVE", (1,), True, ()),
    (lambda d: d.is_persistent(), "DOMAIN_IS_PERSISTENT", (0,), False, ()),
    (lambda d: d.is_updated(), "DOMAIN_IS_UPDATED", (1,), True, ()),
    (lambda d: d.has_managed_save(), "DOMAIN_HAS_MANAGED_SAVE_IMAGE", (0,), False, (0,)),
    (lambda d: d.os_type(), "DOMAIN_GET_OS_TYPE", ("hvm",), "hvm", ()),
    (lambda d: d.control_info(), "DOMAIN_GET_CONTROL_INFO", (0, 0, 5), (0, 0, 5), (0,)),
    (lambda d: d.messages(), "DOMAIN_GET_MESSAGES", (["tainted"],), ["tainted"], (0,)),
    (lambda d: d.autostart(), "DOMAIN_GET_AUTOSTART", (1,), True, ()),
    (lambda d: d.set_autostart(True), "DOMAIN_SET_AUTOSTART", (), None, (1,)),
    (lambda d: d.metadata(1), "DOMAIN_GET_METADATA", ("t",), "t", (1, None, 0)),
    (lambda d: d.set_metadata(2, None, "k", "u", 3), "DOMAIN_SET_METADATA", (), None, (2, None, "k", "u", 3)),
    (lambda d: d.vcpus(4), "DOMAIN_GET_VCPUS_FLAGS", (8,), 8, (4,)),
    (lambda d: d.set_vcpus(3, 1), "DOMAIN_SET_VCPUS_FLAGS", (), None, (3, 1)),
    (lambda d: d.max_vcpus(), "DOMAIN_GET_MAX_VCPUS", (8,), 8, ()),
    (lambda d: d.max_memory(), "DOMAIN_GET_MAX_MEMORY", (4096,), 4096, ()),
    (lambda d: d.set_memory(2**40, 2), "DOMAIN_SET_MEMORY_FLAGS", (), None, (2**40, 2)),
    (lambda d: d.set_max_memory(5, 2), "DOMAIN_SET_MEMORY_FLAGS", (), None, (5, 6)),
    (lambda d: d.attach_device("<a/>", 3), "DOMAIN_ATTACH_DEVICE_FLAGS", (), None, ("<a/>", 3)),
    (lambda d: d.detach_device("<a/>", 3), "DOMAIN_DETACH_DEVICE_FLAGS", (), None, ("<a/>", 3)),
    (lambda d: d.detach_device_alias("net0"), "DOMAIN_DETACH_DEVICE_ALIAS", (), None, ("net0", 0)),
    (lambda d: d.update_device("<a/>"), "DOMAIN_UPDATE_DEVICE_FLAGS", (), None, ("<a/>", 0)),
    (lambda d: d.send_key([29, 56, 111]), "DOMAIN_SEND_KEY", (), None, (0, 0, [29, 56, 111], 0)),
    (lambda d: d.inject_nmi(), "DOMAIN_INJECT_NMI", (), None, (0,)),
    (lambda d: d.block_info("vda"), "DOMAIN_GET_BLOCK_INFO", (1, 2, 3), (2, 1, 3), ("vda", 0)),
    (lambda d: d.block_stats("vda"), "DOMAIN_BLOCK_STATS", (1, 2, 3, 4, -1), (1, 2, 3, 4, -1), ("vda",)),
    (lambda d: d.interface_stats("vnet0"), "DOMAIN_INTERFACE_STATS", tuple(range(8)), tuple(range(8)), ("vnet0",)),
    (
        lambda d: d.memory_stats(),
        "DOMAIN_MEMORY_STATS",
        ([(6, 1024), (7, 99), (40, 1)],),
        {"actual": 1024, "rss": 99, "tag40": 1},
        (13, 0),
    ),
    (
        lambda d: d.interface_addresses(1),
        "DOMAIN_INTERFACE_ADDRESSES",
        ([("eth0", "52:54:00:00:00:01", [(0, "10.0.0.2", 24), (1, "fe80::1", 64)]), ("lo", None, [])],),
        [
            ("eth0", "52:54:00:00:00:01", "ipv4", "10.0.0.2", 24),
            ("eth0", "52:54:00:00:00:01", "ipv6", "fe80::1", 64),
        ],
        (1, 0),
    ),
    (lambda d: d.job_info(), "DOMAIN_GET_JOB_INFO", tuple(range(12)), tuple(range(12)), ()),
    (lambda d: d.job_stats(), "DOMAIN_GET_JOB_STATS", (2, from_dict({"x": 1})), (2, {"x": 1}), (0,)),
    (lambda d: d.abort_job(), "DOMAIN_ABORT_JOB", (), None, ()),
    (lambda d: d.agent_command("{}", 5), "DOMAIN_AGENT_COMMAND", ('{"return":{}}',), '{"return":{}}', ("{}", 5, 0)),
    (lambda d: d.monitor_command("info", hmp=True), "DOMAIN_MONITOR_COMMAND", ("ok",), "ok", ("info", 1)),
    (lambda d: d.hostname(), "DOMAIN_GET_HOSTNAME", ("guest",), "guest", (0,)),
    (lambda d: d.time(), "DOMAIN_GET_TIME", (10, 500_000_000), 10.5, (0,)),
    (lambda d: d.set_time(10), "DOMAIN_SET_TIME", (), None, (10, 0, 0)),
    (
        lambda d: d.guest_info(1),
        "DOMAIN_GET_GUEST_INFO",
        (from_dict({"os.id": "debian"}),),
        {"os.id": "debian"},
        (1, 0),
    ),
    (lambda d: d.set_user_password("root", "x"), "DOMAIN_SET_USER_PASSWORD", (), None, ("root", "x", 0)),
    (
        lambda d: d.set_scheduler_parameters({"cpu_shares": 5, "vcpu_quota": -1}),
        "DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS",
        (),
        None,
        ([("cpu_shares", 4, 5), ("vcpu_quota", 3, -1)], 0),
    ),
    (
        lambda d: d.iothreads(2),
        "DOMAIN_GET_IOTHREAD_INFO",
        ([(1, b"\x03"), (5, b"\x01")], 2),
        [(1, b"\x03"), (5, b"\x01")],
        (2,),
    ),
    (lambda d: d.add_iothread(5, 2), "DOMAIN_ADD_IOTHREAD", (), None, (5, 2)),
    (lambda d: d.delete_iothread(5, 1), "DOMAIN_DEL_IOTHREAD", (), None, (5, 1)),
    (lambda d: d.pin_iothread(5, b"\x02", 1), "DOMAIN_PIN_IOTHREAD", (), None, (5, b"\x02", 1)),
    (
        lambda d: d.set_iothread(5, {"poll_max_ns": 9, "poll_grow": 2, "thread_pool_min": 1}, 1),
        "DOMAIN_SET_IOTHREAD_PARAMS",
        (),
        None,
        (5, [("poll_max_ns", 4, 9), ("poll_grow", 2, 2), ("thread_pool_min", 1, 1)], 1),
    ),
    (
        lambda d: d.exec(["uname", "-a"], stdin=b"in", timeout=1.5),
        "DOMAIN_EXEC",
        ((3, 0, b"out", b"err", 0),),
        (3, 0, b"out", b"err", False),
        (["uname", "-a"], [], b"in", 1500),
    ),
    (
        lambda d: d.wait_ready(2.0),
        "DOMAIN_WAIT_READY",
        (1, [("kernel", 0.5, 1, "")]),
        (True, [("kernel", 0.5, 1, "")]),
        (2000,),
    ),
    (lambda d: d.stages(), "DOMAIN_STAGES", (0, []), (False, []), ()),
]


@pytest.mark.parametrize("case", SIMPLE, ids=lambda case: case[1])
def test_each_verb_is_one_call(daemon: Make, case: Any) -> None:
    method, procedure, answer, result, arguments = case
    fake = daemon(**{procedure: answer})
    with fake.connect() as connection:
        assert method(Domain(connection, *DOM)) == result
    assert fake.args(procedure) == [(DOM, *arguments)]


def test_every_public_method_of_a_domain_is_exercised() -> None:
    names = {name for name in vars(Domain) if not name.startswith("_")} - {"connection", "id", "name", "uuid_bytes"}
    used = {name for method, *_ in SIMPLE for name in method.__code__.co_names}
    elsewhere = {"uuid", "ref", "stats", "screenshot", "console", "channel", "vcpu_info", "scheduler_parameters"}
    elsewhere |= {"interface_parameters", "set_interface_parameters", "block_io_tune", "set_block_io_tune"}
    assert names - used - elsewhere == set()


def test_start_and_destroy_keep_the_id_current(daemon: Make) -> None:
    fake = daemon(DOMAIN_CREATE_WITH_FLAGS=((OFF[0], OFF[1], 9),), DOMAIN_DESTROY_FLAGS=(), DOMAIN_RENAME=(0,))
    with fake.connect() as connection:
        domain = Domain(connection, *OFF)
        domain.start()
        assert domain.id == 9
        domain.rename("else")
        domain.destroy()
        assert (domain.id, domain.name) == (-1, "else")
    assert fake.args("DOMAIN_DESTROY_FLAGS") == [(("else", OFF[1], 9), 0)]


def test_vcpus_with_their_affinity(daemon: Make) -> None:
    fake = daemon(
        DOMAIN_GET_INFO=(1, 4, 3, 2, 9),
        DOMAIN_GET_VCPUS=([(0, 1, 5, 0), (1, 1, 6, 1)], b"\x01\x02"),
        DOMAIN_GET_SCHEDULER_TYPE=("posix", 2),
        DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS=(from_dict({"cpu_shares": 1024}),),
    )
    with fake.connect() as connection:
        domain = Domain(connection, *DOM)
        assert domain.vcpu_info(2) == [(0, 1, 5, 0, b"\x01"), (1, 1, 6, 1, b"\x02")]
        assert domain.scheduler_parameters() == {"cpu_shares": 1024}


def test_the_limits_of_a_disk(daemon: Make) -> None:
    fake = daemon(
        DOMAIN_GET_BLOCK_IO_TUNE=(from_dict({"total_bytes_sec": 100, "group_name": "g"}), 2),
        DOMAIN_SET_BLOCK_IO_TUNE=(),
    )
    with fake.connect() as connection:
        domain = Domain(connection, *DOM)
        assert domain.block_io_tune("vda") == {"total_bytes_sec": 100, "group_name": "g"}
        domain.set_block_io_tune("vda", {"read_iops_sec": 7, "group_name": "h"}, 1)
    (dom, disk, params, flags), *_ = fake.args("DOMAIN_SET_BLOCK_IO_TUNE")
    assert (dom, disk, flags) == (DOM, "vda", 1)
    assert [(one.name, one.value) for one in params] == [("read_iops_sec", 7), ("group_name", "h")]


def test_the_bandwidth_of_an_interface(daemon: Make) -> None:
    fake = daemon(
        DOMAIN_GET_INTERFACE_PARAMETERS=(from_dict({"inbound.average": 100}), 1),
        DOMAIN_SET_INTERFACE_PARAMETERS=(),
    )
    with fake.connect() as connection:
        domain = Domain(connection, *DOM)
        assert domain.interface_parameters("vnet0") == {"inbound.average": 100}
        domain.set_interface_parameters("vnet0", {"outbound.peak": 7})
    (dom, interface, params, flags), *_ = fake.args("DOMAIN_SET_INTERFACE_PARAMETERS")
    assert (dom, interface, flags) == (DOM, "vnet0", 0)
    assert [(one.name, one.value) for one in params] == [("outbound.peak", 7)]


def test_stages_of_a_daemon_that_is_not_ours(daemon: Make) -> None:
    with daemon().connect() as connection:
        assert Domain(connection, *DOM).stages() == (False, [])
        with pytest.raises(NoSupport):
            Domain(connection, *DOM).wait_ready(1)


# --- descriptors ---


def test_descriptors_go_both_ways(daemon: Make) -> None:
    def answer(fake: FakeDaemon, call: m.Call) -> None:
        assert call.fds
        fake.send(m.reply(call, ("ok",), fds=1))
        import socket
        from array import array

        fake.socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", call.fds))])

    fake = daemon(DOMAIN_MONITOR_COMMAND_WITH_FILES=answer)
    reader, writer = os.pipe()
    try:
        with fake.connect() as connection:
            from kvik.rpc.program import qemu

            procedure = qemu()["DOMAIN_MONITOR_COMMAND_WITH_FILES"]
            reply = connection.link.wait(connection.link.send(procedure, (DOM, "x", 0), fds=[writer]), 5)
            (back,) = reply.fds
            os.write(back, b"through")
            os.close(back)
            assert os.read(reader, 100) == b"through"
            assert reply.decode().result == "ok"
    finally:
        os.close(reader)
        os.close(writer)


# --- events ---


def test_events_that_arrive_during_a_call_are_kept(daemon: Make) -> None:
    def interrupted(fake: FakeDaemon, call: m.Call) -> None:
        fake.event("DOMAIN_EVENT_CALLBACK_LIFECYCLE", 4, (DOM, 2, 0))
        fake.event("NODE_DEVICE_EVENT_LIFECYCLE", 1, ("card0",), 0, 0)  # nobody here asks for these
        fake.event("DOMAIN_EVENT_CALLBACK_TRAY_CHANGE", 4, (DOM, "cdrom0", 1))
        fake.event("CONNECT_EVENT_CONNECTION_CLOSED", 1)
        fake.send(m.reply(call, ("QEMU",)))

    with daemon(CONNECT_GET_TYPE=interrupted).connect() as connection:
        assert connection.type() == "QEMU"
        first, second, third = (connection.next_event(0) for _ in range(3))
        assert (first.kind, first.domain.name, first.callback, str(first)) == (
            "lifecycle",
            "tiny-1",
            4,
            "Started Booted",
        )
        assert (second.kind, second.fields) == ("tray-change", {"devAlias": "cdrom0", "reason": 1})
        assert third.reason == 1
        assert connection.next_event(0.01) is None


def test_events_of_our_own_and_of_the_monitor(daemon: Make) -> None:
    from kvik.rpc.program import kvik, qemu

    fake = daemon()
    with fake.connect() as connection:
        fake.send(m.event(kvik()["DOMAIN_EVENT_STAGE"], (DOM, ("kernel", 0.25, 1, ""))))
        fake.send(m.event(qemu()["DOMAIN_MONITOR_EVENT"], (1, DOM, "STOP", 5, 6, None)))
        stage, monitor = connection.next_event(5), connection.next_event(5)
    assert (stage.kind, stage.fields["stage"]["name"], stage.fields["stage"]["seconds"]) == ("stage", "kernel", 0.25)
    assert (monitor.kind, monitor.fields["event"]) == ("monitor", "STOP")


def test_the_iterator_registers_and_deregisters(daemon: Make) -> None:
    def register(fake: FakeDaemon, call: m.Call) -> None:
        fake.send(m.reply(call, (call.decode().eventID + 10,)))
        fake.event("DOMAIN_EVENT_CALLBACK_REBOOT", 11, (DOM,))

    fake = daemon(CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY=register, CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY=())
    with fake.connect() as connection:
        seen = [event.kind for event in connection.events(["lifecycle", "reboot"], timeout=0.05)]
        assert seen == ["reboot", "reboot"]
        with pytest.raises(InvalidArgument, match="unknown kind"):
            connection.register("weather")
    assert fake.args("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY") == [(0, None), (1, None)]
    assert fake.args("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY") == [(10,), (11,)]


def test_every_kind_of_domain_event_has_its_procedure() -> None:
    from kvik.client.events import DOMAIN_EVENTS, lifecycle_text

    for _, procedure in DOMAIN_EVENTS.values():
        assert remote()[procedure].event
    assert lifecycle_text(5, 2) == ("Stopped", "Crashed")
    assert lifecycle_text(99, 1) == ("event 99", "detail 1")
    assert lifecycle_text(0, 99) == ("Defined", "detail 99")


def test_import_stays_cheap() -> None:
    import subprocess
    import sys

    code = "import sys, kvik.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "lxml", "msgspec", "subprocess", "ssl", "dataclasses", "tempfile", "kvik.rpc.tables.remote"}
    assert not heavy & set(done.stdout.split())


def test_connections_close_twice(daemon: Make) -> None:
    connection: Connection = daemon().connect()
    connection.close()
    connection.close()
