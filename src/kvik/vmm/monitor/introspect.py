"""What the monitor can do: its commands, events and their types.

Reference: QEMU's qapi/introspect.json, qapi/control.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm.monitor import cpus, devices, events
from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Bool, Introspection, List, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MACHINE_TYPE = "kvik"


def query_commands(context: Context, arguments: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in ("qmp_capabilities", *context.server.commands)]


def query_qmp_schema(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    schema = Introspection()
    schema.command("qmp_capabilities", Struct({"*enable": List(TEXT)}), NOTHING, out_of_band=False)
    for command in context.server.commands.values():
        schema.command(command.name, command.arguments, command.returns, out_of_band=command.out_of_band)
    for name, data in events.SCHEMA.items():
        schema.event(name, data)
    return schema.entries


def query_machines(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return [
        {
            "name": MACHINE_TYPE,
            "is-default": True,
            "cpu-max": 64,
            "hotpluggable-cpus": True,
            "numa-mem-supported": True,
            "deprecated": False,
            "default-cpu-type": cpus.TYPE,
        }
    ]


def query_cpu_definitions(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    from kvik.vmm.cpu.models import MODELS

    return [
        {"name": name, "typename": f"{name}-x86_64-cpu", "static": name != "host", "migration-safe": name != "host"}
        for name in dict.fromkeys(["host", *sorted(MODELS)])
    ]


def query_command_line_options(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    from kvik.vmm.options import OPTIONS
    from kvik.vmm.settings import fields_of

    wanted = arguments.get("option")
    if wanted is not None and wanted not in OPTIONS:
        raise QmpError(f"invalid option name: {wanted[:80]}")
    return [
        {
            "option": name,
            "parameters": [
                {"name": key.replace("_", "-"), "type": "string"}
                for key in (fields_of(option.made) if option.made is not None else ())
            ],
        }
        for name, option in OPTIONS.items()
        if wanted in (None, name)
    ]


def _types(context: Context, arguments: Arguments) -> list[dict[str, str]]:
    wanted = arguments.get("implements")
    if wanted in (None, "device"):
        return [{"name": name, "parent": "device"} for name in devices.DRIVERS]
    if wanted == "user-creatable":
        return [{"name": name, "parent": "object"} for name in devices.OBJECTS]
    return []


def _properties(context: Context, arguments: Arguments) -> list[dict[str, str]]:
    driver = devices.DRIVERS.get(arguments["typename"])
    if driver is None:
        raise QmpError(f"Device '{arguments['typename'][:80]}' not found", "DeviceNotFound")
    return [{"name": name, "type": "str"} for name in driver.properties]


def _none(context: Context, arguments: Arguments) -> list[Any]:
    return []


COMMANDS: Sequence[Command] = (
    Command("query-commands", query_commands, summary="the names of all commands"),
    Command("query-qmp-schema", query_qmp_schema, summary="commands, events and types, made from these tables"),
    Command("query-machines", query_machines, summary="the one machine type"),
    Command("query-cpu-definitions", query_cpu_definitions, summary="CPU models"),
    Command("query-command-line-options", query_command_line_options, Struct({"*option": ID})),
    Command(
        "qom-list-types", _types, Struct({"*implements": ID, "*abstract": Bool()}), summary="drivers, object types"
    ),
    Command("device-list-properties", _properties, Struct({"typename": ID}), summary="what device_add takes"),
    Command("query-tpm-models", _none, summary="none"),
    Command("query-tpm-types", _none, summary="none"),
)
