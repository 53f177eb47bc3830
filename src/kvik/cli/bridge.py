"""kvik bridge: the host's Linux bridges as a switch, looked at and changed as with brctl and bridge(8)."""

from __future__ import annotations

import time

from kvik.cli import term
from kvik.cli.guest_exec import seconds
from kvik.cli.options import DATA, FLAG, NUMBER, TEXT, WORDS, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.bridge import Bridge, BridgePort, Bridges

    Action = Callable[[Context, Bridges, Options, list[str]], None]

SAMPLE = 0.5  # seconds before the first rates of --watch
# action: (its arguments, what it does, the options it takes)
ACTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "list": ("", "all bridges with their ports", ()),
    "show": ("BRIDGE", "one bridge: spanning tree, ports, counters", ("watch", "delay", "iterations")),
    "add": ("BRIDGE [SETTING=VALUE]...", "make a bridge", ()),
    "del": ("BRIDGE", "delete a bridge", ("force",)),
    "addif": ("BRIDGE INTERFACE", "make an interface a port", ()),
    "delif": ("BRIDGE INTERFACE", "take a port out", ()),
    "set": ("BRIDGE SETTING=VALUE...", "change a bridge's settings", ()),
    "port": ("BRIDGE PORT SETTING=VALUE...", "change a port's settings", ()),
    "stp": ("BRIDGE [on|off] [SETTING=VALUE]...", "spanning tree: show, switch, tune", ()),
    "fdb": ("BRIDGE [add|del MAC PORT [VLAN]|flush]", "which MAC address is behind which port", ()),
    "vlan": ("BRIDGE [on|off|add|del PORT VLANS]", "VLAN filtering, and the VLANs of ports", ("pvid", "untagged")),
}
BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def bridge(ctx: Context, options: Options) -> int:
    from kvik.client.bridge import Bridges

    action, words = options.data("action"), options.words("arguments")
    if action not in ACTIONS:
        raise UsageError(f"unknown action '{action}'", remedy="one of: " + ", ".join(ACTIONS))
    allowed = ACTIONS[action][2]
    for name in options.given() - {"action", "arguments", "json", "no-color"}:
        if name not in allowed:
            raise UsageError(f"'bridge {action}' doesn't support option --{name}", remedy="see 'kvik help bridge'")
    if action != "list" and not words:
        raise _usage(action)
    HANDLERS[action](ctx, Bridges(ctx.connection), options, words)
    return 0


def _usage(action: str) -> UsageError:
    return UsageError(f"usage: kvik bridge {action} {ACTIONS[action][0]}".rstrip(), remedy="see 'kvik help bridge'")


def _take(action: str, words: list[str], least: int, most: int) -> list[str | None]:
    if not least <= len(words) <= most:
        raise _usage(action)
    return [*words, *[None] * (most - len(words))]


def settings_of(words: Sequence[str]) -> dict[str, bool | int | float | str]:
    """`stp=on`, `priority=4096`, `forward_delay=2.5` as values of the types that they look like."""
    found: dict[str, bool | int | float | str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise UsageError(f"'{word}' is no setting", remedy="write NAME=VALUE, such as ageing_time=300")
        key = name.replace("-", "_")
        if key in found:
            raise UsageError(f"'{key}' is given twice")
        if text.lower() in BOOLEANS:
            found[key] = BOOLEANS[text.lower()]
            continue
        try:
            found[key] = int(text)
        except ValueError:
            try:
                found[key] = float(text)
            except ValueError:
                found[key] = text
    return found


# Looking ----------------------------------------------------------------------------------------------------------


def _list(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    _take("list", words, 0, 0)
    found = bridges.all()
    if ctx.put([one._asdict() for one in found]):
        return
    table = Table("Name", "State", "STP", "VLANs", "Bridge ID", "Address", "Ports")
    for one in found:
        table.add(
            one.name,
            state(one),
            "on" if one.stp else "off",
            "on" if one.vlan_filtering else "off",
            one.bridge_id,
            one.addresses[0] + (f" +{len(one.addresses) - 1}" if len(one.addresses) > 1 else "")
            if one.addresses
            else "-",
            ", ".join(one.ports) or "-",
        )
    ctx.table(table, colour=_shade)


def state(one: Bridge) -> str:
    return "down" if not one.up else "up" if one.carrier else "no carrier"


def _shade(column: int, text: str) -> str | None:
    return {"up": "green", "forwarding": "green", "down": "red", "disabled": "red", "blocking": "yellow"}.get(text)


def _show(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name = _take("show", words, 1, 1)[0] or ""
    if options.flag("watch"):
        _watch(ctx, bridges, name, options)
        return
    for option in ("delay", "iterations"):
        if option in options.given():
            raise UsageError(f"--{option} goes with --watch")
    one, ports = bridges.show(name)
    if ctx.put({**one._asdict(), "ports": [port._asdict() for port in ports]}):
        return
    ctx.write(picture(one, ports, None, 0.0, ctx))


def _pairs(one: Bridge) -> list[tuple[str, str]]:
    root = "this bridge" if one.root_id == one.bridge_id else one.root_id
    if one.root_port:
        root += f" by port {one.root_port}, cost {one.root_path_cost}"
    learned = f"{one.fdb_learned}" + (f" of at most {one.fdb_max_learned}" if one.fdb_max_learned else "")
    return [
        ("Name", one.name),
        ("State", state(one)),
        ("MAC", one.mac),
        ("MTU", str(one.mtu)),
        ("Address", ", ".join(one.addresses) or "-"),
        ("Bridge ID", one.bridge_id),
        ("STP", "on" + (", topology changing" if one.topology_change else "") if one.stp else "off"),
        ("Root", root),
        ("Timers", f"hello {one.hello_time:g} s, max age {one.max_age:g} s, forward delay {one.forward_delay:g} s"),
        ("Ageing", f"{one.ageing_time:g} s, {learned} learned"),
        ("VLANs", f"filtered, default PVID {one.vlan_default_pvid}" if one.vlan_filtering else "not filtered"),
        ("Multicast", "snooped" if one.multicast_snooping else "flooded"),
    ]


def flags_of(port: BridgePort) -> str:
    """What is not as usual at a port."""
    words = [name for name in ("isolated", "hairpin", "guard", "fast_leave", "neigh_suppress") if getattr(port, name)]
    words += [f"no {name}" for name in ("learning", "flood") if not getattr(port, name)]
    return ", ".join(words) or "-"


def amount(value: float) -> str:
    """`12.3M`: three figures at least, powers of ten as networks count."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.0f}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError


def picture(one: Bridge, ports: list[BridgePort], before: list[BridgePort] | None, elapsed: float, ctx: Context) -> str:
    """The bridge and its ports; with `before`, rates over the `elapsed` seconds instead of totals."""
    old = {port.name: port for port in before or []}
    per = "/s" if before is not None else ""
    headers = ("No", "Port", "Machine", "State", "Cost", f"In B{per}", f"In pkt{per}", f"Out B{per}", f"Out pkt{per}")
    table = Table(*headers, "Dropped", "Flags")
    for port in ports:
        counters = (port.rx_bytes, port.rx_packets, port.tx_bytes, port.tx_packets)
        shown: list[str] = [amount(value) for value in counters]
        if before is not None:
            last = old.get(port.name)
            if last is None or elapsed <= 0:
                shown = ["-"] * 4
            else:
                past = (last.rx_bytes, last.rx_packets, last.tx_bytes, last.tx_packets)
                shown = [amount(max(0, now - then) / elapsed) for now, then in zip(counters, past, strict=True)]
        table.add(
            port.number,
            port.name,
            port.machine or "-",
            port.state if port.carrier or port.state == "disabled" else f"{port.state}, no carrier",
            port.cost,
            *shown,
            amount(port.rx_dropped + port.tx_dropped),
            flags_of(port),
        )
    head = "".join(f"{key + ':':<15} {term.neutralise(value)}\n" for key, value in _pairs(one))
    limit = term.columns(ctx.stdout)
    return f"{head}\n{table.render(limit=limit, colour=_shade if ctx.colour else None)}"


def _watch(ctx: Context, bridges: Bridges, name: str, options: Options) -> None:
    """Counters as rates, again and again; off a terminal one picture, or as many as --iterations says."""
    delay = seconds(options.text("delay"), "delay") or 1.0
    frames = options.number("iterations")
    if frames is not None and frames < 1:
        raise UsageError(f"invalid value of --iterations '{frames}'")
    _, before = bridges.show(name)
    since = time.monotonic()
    live = term.is_terminal(ctx.stdout) and term.is_terminal(ctx.stdin) and not ctx.json
    if not live:
        for number in range(frames or 1):
            time.sleep(delay if number else SAMPLE)
            one, ports = bridges.show(name)
            now = time.monotonic()
            if not ctx.put({**one._asdict(), "ports": [port._asdict() for port in ports]}):
                ctx.write(("\n" if number else "") + picture(one, ports, before, now - since, ctx))
            before, since = ports, now
        return
    from kvik.cli.overview import LEAVE
    from kvik.cli.screen import Screen

    with Screen(ctx.stdin, ctx.stdout) as screen:
        key = screen.wait(SAMPLE)
        while key not in LEAVE:
            one, ports = bridges.show(name)
            now = time.monotonic()
            screen.draw(picture(one, ports, before, now - since, ctx) + "\nq quits\n")
            before, since = ports, now
            frames = frames - 1 if frames is not None else None
            if frames == 0:
                break
            key = screen.wait(delay)


# Changing ---------------------------------------------------------------------------------------------------------


def _add(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, settings = words[0], settings_of(words[1:])
    mac = settings.pop("mac", None)
    ctx.doing = f"Failed to make bridge {name}"
    bridges.add(name, str(mac) if mac is not None else None, **settings)
    ctx.say(f"Bridge {name} created")


def _delete(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name = _take("del", words, 1, 1)[0] or ""
    ctx.doing = f"Failed to delete bridge {name}"
    bridges.delete(name, force=options.flag("force"))
    ctx.say(f"Bridge {name} deleted")


def _addif(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, port = (word or "" for word in _take("addif", words, 2, 2))
    ctx.doing = f"Failed to put {port} into bridge {name}"
    bridges.add_port(name, port)
    ctx.say(f"{port} is a port of bridge {name}")


def _delif(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, port = (word or "" for word in _take("delif", words, 2, 2))
    ctx.doing = f"Failed to take {port} out of bridge {name}"
    bridges.delete_port(name, port)
    ctx.say(f"{port} is no longer a port of bridge {name}")


def _set(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    if len(words) < 2:
        raise _usage("set")
    ctx.doing = f"Failed to change bridge {words[0]}"
    bridges.set(words[0], **settings_of(words[1:]))
    ctx.say(f"Bridge {words[0]} changed")


def _port(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    if len(words) < 3:
        raise _usage("port")
    ctx.doing = f"Failed to change port {words[1]} of bridge {words[0]}"
    bridges.set_port(words[0], words[1], **settings_of(words[2:]))
    ctx.say(f"Port {words[1]} of bridge {words[0]} changed")


def _stp(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, rest = words[0], words[1:]
    switch = {"stp": BOOLEANS[rest.pop(0)]} if rest and rest[0] in ("on", "off") else {}
    changes = {**settings_of(rest), **switch}
    if changes:
        ctx.doing = f"Failed to change the spanning tree of bridge {name}"
        bridges.set(name, **changes)
        ctx.say(f"Spanning tree of bridge {name} changed")
        return
    one, ports = bridges.show(name)
    if ctx.put({**one._asdict(), "ports": [port._asdict() for port in ports]}):
        return
    for key, value in _pairs(one):
        if key in ("Bridge ID", "STP", "Root", "Timers"):
            ctx.line(f"{key + ':':<15} {value}")
    ctx.line(f"{'Priority:':<15} {one.priority}")
    ctx.line()
    table = Table("No", "Port", "State", "Priority", "Cost", "Designated bridge", "Port there", "Cost to root")
    for port in ports:
        there = f"{port.designated_port & 0xFFF}" if port.designated_bridge else "-"
        table.add(
            port.number, port.name, port.state, port.priority, port.cost, port.designated_bridge or "-", there,
            port.designated_cost,
        )  # fmt: skip
    ctx.table(table, colour=_shade)


def _fdb(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, action, *rest = [*_take("fdb", words, 1, 5), None]
    assert name is not None
    if action == "flush":
        bridges.flush_fdb(name)
        ctx.say(f"Learned addresses of bridge {name} forgotten")
        return
    if action in ("add", "del"):
        mac, port, vlan = rest[:3]
        if mac is None or port is None:
            raise _usage("fdb")
        tag = vlan_range(vlan)[0] if vlan is not None else 0
        ctx.doing = f"Failed to change the addresses of bridge {name}"
        bridges.change_fdb(name, port, mac, vlan=tag, remove=action == "del")
        ctx.say(f"{mac} {'added to' if action == 'add' else 'removed from'} port {port}")
        return
    if action is not None:
        raise _usage("fdb")
    found = bridges.fdb(name)
    if ctx.put([entry._asdict() for entry in found]):
        return
    table = Table("MAC Address", "Port", "VLAN", "Kind", "Age")
    for entry in found:
        table.add(
            entry.mac,
            entry.port,
            entry.vlan or "-",
            entry.kind,
            "-" if entry.kind != "dynamic" else f"{entry.age:.0f}s",
        )
    ctx.table(table)


def vlan_range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise UsageError(f"'{text}' is no VLAN", remedy="write 1 to 4094, or a range such as 100-199")
    return int(first), int(last or first)


def _vlan(ctx: Context, bridges: Bridges, options: Options, words: list[str]) -> None:
    name, action, port, vlans = _take("vlan", words, 1, 4)
    assert name is not None
    ctx.doing = f"Failed to change the VLANs of bridge {name}"
    if action in ("on", "off"):
        bridges.set(name, vlan_filtering=action == "on")
        ctx.say(f"VLAN filtering of bridge {name} is {action}")
        return
    pvid, untagged = options.flag("pvid"), options.flag("untagged")
    if action in ("add", "del"):
        if port is None or vlans is None:
            raise _usage("vlan")
        first, last = vlan_range(vlans)
        remove = action == "del"
        bridges.change_vlan(name, port, first, last, pvid=pvid, untagged=untagged, remove=remove)
        ctx.say(f"{port} is {'no longer ' if remove else ''}in VLAN {vlans}")
        return
    if action is not None:
        raise _usage("vlan")
    ctx.doing = ""
    found = bridges.vlans(name)
    if ctx.put([entry._asdict() for entry in found]):
        return
    table = Table("Port", "VLANs", "PVID", "Leaves")
    for entry in found:
        numbers = str(entry.first) if entry.first == entry.last else f"{entry.first}-{entry.last}"
        table.add(entry.port, numbers, "yes" if entry.pvid else "-", "untagged" if entry.untagged else "tagged")
    ctx.table(table)


HANDLERS: dict[str, Action] = {
    "list": _list,
    "show": _show,
    "add": _add,
    "del": _delete,
    "addif": _addif,
    "delif": _delif,
    "set": _set,
    "port": _port,
    "stp": _stp,
    "fdb": _fdb,
    "vlan": _vlan,
}
DESCRIPTION = "Shows and changes the host's Linux bridges. Actions and their arguments:\n" + "\n".join(
    f"  {name} {arguments}".rstrip() + f"\n      {what}" for name, (arguments, what, _) in ACTIONS.items()
)

COMMANDS = {
    "bridge": Verb(
        bridge,
        DESCRIPTION,
        Option("action", DATA, "what to do, see above", complete=tuple(ACTIONS)),
        Option("arguments", WORDS, "a bridge, then what the action takes"),
        Option("watch", FLAG, "show: counters as rates, again and again; q quits"),
        Option("delay", TEXT, "watch: seconds between two pictures", metavar="seconds", named_only=True),
        Option("iterations", NUMBER, "watch: how many pictures", named_only=True),
        Option("force", FLAG, "del: also with ports and addresses"),
        Option("pvid", FLAG, "vlan add: frames that come untagged belong to it"),
        Option("untagged", FLAG, "vlan add: its frames leave without a tag"),
    ),
}
