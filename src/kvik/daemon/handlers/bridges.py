"""The host's Linux bridges: our own procedures, since libvirt has none. On the interfaces' thread, as those are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.rpc.typed_params import to_dict

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

PORTS_MAX, FDB_MAX = 4096, 65536  # what fits into one answer, see rpc/kvik_program.py


def _machines(connection: Connection) -> dict[str, str]:
    """Tap -> the machine that it belongs to."""
    return {
        nic.target.dev: domain.name
        for domain in connection.manager.domains()
        if domain.run is not None and domain.run.live.devices is not None
        for nic in domain.run.live.devices.interfaces
        if nic.target is not None and nic.target.dev
    }


def _bridge(view: Any) -> tuple[Any, ...]:
    one, link = view.bridge, view.bridge.link
    return (
        one.name,
        link.mac,
        int(link.up),
        int(link.carrier),
        link.mtu,
        int(one.stp),
        one.priority,
        one.forward_delay,
        one.hello_time,
        one.max_age,
        one.ageing_time,
        int(one.vlan_filtering),
        one.vlan_default_pvid,
        int(one.multicast_snooping),
        one.bridge_id,
        one.root_id,
        one.root_port,
        one.root_path_cost,
        int(one.topology_change),
        one.fdb_learned,
        one.fdb_max_learned,
        view.addresses[:1024],
        [port.name for port in view.ports][:PORTS_MAX],
        *_counters(link),
    )


def _counters(link: Any) -> tuple[int, ...]:
    return (link.rx_bytes, link.rx_packets, link.rx_dropped, link.tx_bytes, link.tx_packets, link.tx_dropped)


def _port(port: Any, machines: dict[str, str]) -> tuple[Any, ...]:
    link = port.link
    return (
        port.name,
        link.mac,
        port.number,
        port.state,
        int(link.carrier),
        machines.get(port.name),
        port.cost,
        port.priority,
        int(port.isolated),
        int(port.learning),
        int(port.flood),
        int(port.hairpin),
        int(port.guard),
        int(port.fast_leave),
        int(port.neigh_suppress),
        port.designated_bridge,
        port.designated_port,
        port.designated_cost,
        *_counters(link),
    )


async def listing(connection: Connection, args: Any) -> tuple[list[Any]]:
    manager = connection.manager
    return ([_bridge(view) for view in await manager.interfaces.run(manager.bridges.listing)][:PORTS_MAX],)


async def show(connection: Connection, args: Any) -> tuple[Any, list[Any]]:
    manager = connection.manager
    view = await manager.interfaces.run(manager.bridges.show, args[0])
    machines = _machines(connection)
    return (_bridge(view), [_port(port, machines) for port in view.ports][:PORTS_MAX])


async def add(connection: Connection, args: Any) -> None:
    name, mac, settings = args
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.add, name, mac, to_dict(settings))


async def delete(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.delete, args[0], bool(args[1]))


async def add_port(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.add_port, *args)


async def delete_port(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.delete_port, *args)


async def change(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.change, args[0], to_dict(args[1]))


async def change_port(connection: Connection, args: Any) -> None:
    bridge, port, settings = args
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.change_port, bridge, port, to_dict(settings))


async def fdb(connection: Connection, args: Any) -> tuple[list[Any]]:
    manager = connection.manager
    rows = await manager.interfaces.run(manager.bridges.fdb, args[0])
    return ([(row.mac, row.port, row.vlan, row.kind, row.age) for row in rows[:FDB_MAX]],)


async def change_fdb(connection: Connection, args: Any) -> None:
    bridge, port, mac, vlan, remove = args
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.change_fdb, bridge, port, mac, vlan, bool(remove))


async def flush_fdb(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.interfaces.run(manager.bridges.flush_fdb, args[0])


async def vlans(connection: Connection, args: Any) -> tuple[list[Any]]:
    manager = connection.manager
    rows = await manager.interfaces.run(manager.bridges.vlans, args[0])
    return ([(row.port, row.first, row.last, int(row.pvid), int(row.untagged)) for row in rows[:FDB_MAX]],)


async def change_vlan(connection: Connection, args: Any) -> None:
    bridge, port, first, last, pvid, untagged, remove = args
    manager = connection.manager
    change = manager.bridges.VlanChange(first, last, bool(pvid), bool(untagged), bool(remove))
    await manager.interfaces.run(manager.bridges.change_vlan, bridge, port, change)
