"""capabilities, domcapabilities, cpu-models, freecell, hostname, maxvcpus, sysinfo, uri, version."""

from __future__ import annotations

from kvik.cli.options import DATA, FLAG, NUMBER, TEXT, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def show_xml(ctx: Context, text: str, end: str = "") -> int:
    if not ctx.put({"xml": text}):
        ctx.document(text + end)
    return 0


def capabilities(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get capabilities"
    return show_xml(ctx, ctx.connection.capabilities(), "\n")


def domcapabilities(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get emulator capabilities"
    return show_xml(
        ctx,
        ctx.connection.domain_capabilities(
            options.text("emulatorbin"), options.text("arch"), options.text("machine"), options.text("virttype")
        ),
        "\n",
    )


def sysinfo(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get sysinfo"
    return show_xml(ctx, ctx.connection.sysinfo())


def cpu_models(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get CPU model names"
    emulator = options.text("emulatorbin")
    if emulator:
        from kvik.cli.document import parse

        document = parse(ctx.connection.domain_capabilities(emulator, options.data("arch")))
        listed = document.iterfind("cpu/mode[@name='custom']/model")
        models = [model.text or "" for model in listed if model.get("usable") != "no"]
    else:
        models = list(ctx.connection.call("CONNECT_GET_CPU_MODEL_NAMES", options.data("arch"), 1, 0)[0])
    if ctx.put(models):
        return 0
    if not models:
        ctx.line("all CPU models are accepted")
    for model in models:
        ctx.line(model)
    return 0


MAX_CELLS = 1024  # REMOTE_NODE_MAX_CELLS


def freecell(ctx: Context, options: Options) -> int:
    cell, every = options.number("cellno"), options.flag("all")
    if every and cell is not None:
        raise UsageError("Options --all and --cellno are mutually exclusive")
    ctx.doing = "failed to get NUMA free memory"
    if cell is None and not every:
        free = ctx.connection.free_memory() // 1024
        if not ctx.put({"total_kib": free}):
            ctx.line(f"Total: {free} KiB")
        return 0
    if cell is not None:
        if cell < 0:
            raise UsageError(f"cell number {cell} is out of range")
        kib = ctx.connection.call("NODE_GET_CELLS_FREE_MEMORY", cell, 1)[0][0] // 1024
        if not ctx.put({"cell": cell, "free_kib": kib}):
            ctx.line(f"{cell}: {kib} KiB")
        return 0
    cells = [value // 1024 for value in ctx.connection.call("NODE_GET_CELLS_FREE_MEMORY", 0, MAX_CELLS)[0]]
    if ctx.put({"cells_kib": cells, "total_kib": sum(cells)}):
        return 0
    for number, kib in enumerate(cells):
        ctx.line(f"{number:>5}: {kib:>10} KiB")
    ctx.line("-" * 20)
    ctx.line(f"{'Total':>5}: {sum(cells):>10} KiB")
    return 0


def hostname(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get hostname"
    name = ctx.connection.hostname()
    if not ctx.put({"hostname": name}):
        ctx.line(name)
    return 0


def maxvcpus(ctx: Context, options: Options) -> int:
    count = ctx.connection.max_vcpus(options.text("type"))
    if not ctx.put({"max_vcpus": count}):
        ctx.line(str(count))
    return 0


def uri(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get URI"
    text = ctx.connection.uri()
    if not ctx.put({"uri": text}):
        ctx.line(text)
    return 0


def version(ctx: Context, options: Options) -> int:
    from kvik import __version__
    from kvik.errors import OperationUnsupported

    ctx.doing = "failed to get the version"
    connection = ctx.connection
    kind, hypervisor = connection.type(), connection.version()
    facts = {"library": f"kvik {__version__}", "api": f"{kind} {__version__}", "hypervisor": f"{kind} {hypervisor}"}
    lines = [
        f"Compiled against library: libvirt {connection.lib_version()}",
        f"Using library: {facts['library']}",
        f"Using API: {facts['api']}",
        f"Running hypervisor: {facts['hypervisor']}",
    ]
    if options.flag("daemon"):
        try:
            facts["daemon"] = f"kvikd {connection.status().version}"
        except OperationUnsupported:
            facts["daemon"] = f"libvirt {connection.lib_version()}"
        lines.append(f"Running against daemon: {facts['daemon'].split()[-1]}")
    facts["protocol"] = f"libvirt {connection.lib_version()}"
    if ctx.put(facts):
        return 0
    for line in lines:
        ctx.line(line)
    return 0


COMMANDS = {
    "capabilities": Verb(capabilities, "Returns capabilities of hypervisor/driver."),
    "domcapabilities": Verb(
        domcapabilities,
        "Returns capabilities of emulator with respect to host and hypervisor.",
        Option("virttype", TEXT, "virtualization type (/domain/@type)", complete=("kvm", "qemu")),
        Option("emulatorbin", TEXT, "path to emulator binary (/domain/devices/emulator)", complete="file"),
        Option("arch", TEXT, "domain architecture (/domain/os/type/@arch)"),
        Option("machine", TEXT, "machine type (/domain/os/type/@machine)", complete=("q35", "pc", "microvm")),
    ),
    "cpu-models": Verb(
        cpu_models,
        "Get the CPU models for an arch.",
        Option("arch", DATA, "architecture", complete=("x86_64", "i686", "aarch64")),
        Option("emulatorbin", TEXT, "those that machines on this emulator can have here", complete="file"),
    ),
    "freecell": Verb(
        freecell,
        "display available free memory for the NUMA cell.",
        Option("cellno", NUMBER, "NUMA cell number"),
        Option("all", FLAG, "show free memory for all NUMA cells"),
    ),
    "hostname": Verb(hostname, "Print the host name of the hypervisor."),
    "maxvcpus": Verb(
        maxvcpus,
        "Show maximum number of virtual CPUs for guests on this connection.",
        Option("type", TEXT, "domain type", complete=("kvm", "qemu")),
    ),
    "sysinfo": Verb(sysinfo, "output an XML string for the hypervisor sysinfo, if available"),
    "uri": Verb(uri, "Print the hypervisor canonical URI."),
    "version": Verb(
        version,
        "Display the system version information.",
        Option("daemon", FLAG, "report daemon version too"),
    ),
}
