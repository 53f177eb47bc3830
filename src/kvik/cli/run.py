"""run: a machine with one command. Says which acceleration and why, makes what is missing, shows each stage."""

from __future__ import annotations

import os

from kvik.cli import term
from kvik.cli.common import scaled
from kvik.cli.guest_exec import STDIN_MAX, run_in, seconds
from kvik.cli.needs import ensure_packages, ensure_passt
from kvik.cli.options import FLAG, NUMBER, REST, TEXT, Option, UsageError, Verb
from kvik.cli.progress import Progress
from kvik.errors import AlreadyExists, ConfigError, InvalidArgument, KvikError, NotFound, OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.cli.run_document import Machine
    from kvik.client import Connection, Domain
    from kvik.client.domain import Readiness
    from kvik.host.probe import Verdict
    from kvik.paths import Paths

READY_TIMEOUT = 120.0  # seconds; a tiny machine needs 2 under emulation, but a host may be busy
TINY_MEMORY_KIB = 256 << 10
OWN_MEMORY_KIB = 2 << 20
NAME_TRIES = 50
AUTODESTROY = 2
BACKLOG = 2048  # bytes of console output shown when the console is attached
UNDEFINE_NVRAM = 4
OURS = "kvik-vmm"  # the emulator that --vmm kvik names


def local_paths(ctx: Context) -> Paths:
    """The directories of the daemon that will run the machine; it must be on this host, for the images are."""
    from kvik.client.transport import paths_of
    from kvik.client.uri import default_uri, parse_uri

    address = parse_uri(ctx.uri or default_uri())
    if address.transport == "ssh":
        raise InvalidArgument(
            "'kvik run' makes its machine from files of this host",
            remedy=f"run it over there: ssh {address.host} kvik run",
        )
    return paths_of(address.scope)


def acceleration(paths: Paths) -> Verdict:
    from kvik.host.probe import kvm_verdict

    return kvm_verdict(paths.cache)


def acceleration_line(verdict: Verdict) -> str:
    """One sentence: what runs the guest's instructions, and why."""
    if verdict.usable:
        return f"Acceleration: {verdict.reason}."
    return f"Acceleration: software emulation, because {verdict.reason} ('kvik doctor' says more)."


def use_tiny(machine: Machine, paths: Paths, progress: Progress, append: str | None) -> None:
    from kvik.guest.tiny import kernel_arguments, tiny

    labels = {"lists": "fetching package lists", "packages": "fetching packages", "image": "making the tiny image"}

    def report(stage: str, done: int, total: int) -> None:
        progress.bar(labels.get(stage, stage), done, total, is_bytes=stage == "packages")

    image = tiny(paths, report)
    machine.kernel, machine.initrd = str(image.kernel), str(image.initrd)
    words = kernel_arguments("kvm" if machine.accelerated else "tcg", hostname=machine.name)
    machine.append = f"{words} {append}" if append else words


def build(ctx: Context, options: Options, paths: Paths, verdict: Verdict, progress: Progress) -> tuple[Machine, bool]:
    """The machine that the options describe, and whether it is the tiny one. Named `` until `name_it`."""
    from kvik.cli import run_document as doc

    image = options.text("image")
    kernel, initrd, append = options.text("kernel"), options.text("initrd"), options.text("append")
    disks, cdrom = options.words("disk"), options.text("cdrom")
    if image not in (None, "tiny"):
        assert image is not None
        if not os.path.exists(os.path.expanduser(image)) and "/" not in image:  # noqa: PTH110, PTH111
            raise NotFound(
                f"there is no image '{image}'",
                remedy=f"'tiny' is made for you, and a path is a disk image; a command comes after '--': "
                f"kvik run --rm -- {image}",
            )
        disks = [image, *disks]
    if image == "tiny" and (kernel is not None or cdrom is not None):
        raise UsageError("--image tiny brings its own kernel", remedy="leave out --image, or --kernel and --cdrom")
    is_tiny = image == "tiny" or (kernel is None and cdrom is None and not disks)
    if initrd is not None and kernel is None:
        raise UsageError("--initrd needs --kernel")
    if append is not None and kernel is None and not is_tiny:
        raise UsageError("--append needs --kernel", remedy="a disk's own boot loader has its own arguments")
    machine = doc.Machine("", accelerated=verdict.usable)
    machine.disks = [doc.disk(text) for text in disks]
    machine.cdrom = doc.existing(cdrom, "CD image") if cdrom is not None else None
    machine.kernel = doc.existing(kernel, "kernel") if kernel is not None else None
    machine.initrd = doc.existing(initrd, "initramfs") if initrd is not None else None
    machine.append = append
    machine.graphics = not is_tiny and machine.kernel is None
    machine.memory_kib = TINY_MEMORY_KIB if is_tiny else OWN_MEMORY_KIB
    size = options.text("memory")
    if size is not None:
        machine.memory_kib = scaled(size, "memory", 1 << 20) >> 10
    vcpus = options.number("vcpus")
    machine.vcpus = 1 if vcpus is None else vcpus
    if machine.vcpus < 1 or not 1 << 10 <= machine.memory_kib < 1 << 42:
        raise UsageError("a machine has at least one vCPU and 1 MiB of memory, and less than 4 PiB")
    machine.cpu = options.text("cpu")
    machine.machine = options.text("machine") or "q35"
    machine.firmware = options.text("firmware") or "bios"
    if machine.firmware not in ("bios", "uefi"):
        raise UsageError(f"no firmware '{machine.firmware}'", remedy="one of: bios, uefi")
    choose_vmm(options, machine, verdict, boots_disk=bool(disks) and machine.kernel is None and not is_tiny)
    name = options.text("network")
    network = doc.network_xml(name, {} if name in ("none", "user") else known_networks(ctx))
    machine.network = doc.allow_names(network, options.words("allow"))
    for disk in machine.disks:
        progress.line(f"disk {disk.path}: {disk.format}, {disk.why}")
    return machine, is_tiny


def known_networks(ctx: Context) -> dict[str, bool]:
    """The daemon's virtual networks, and whether each is active."""
    try:
        return {row.name: row.active for row in ctx.connection.network_facts()}
    except KvikError:  # a daemon that has none
        return {}


def choose_vmm(options: Options, machine: Machine, verdict: Verdict, *, boots_disk: bool) -> None:
    """QEMU unless told otherwise; what kvik-vmm cannot do is said before anything is fetched or written."""
    vmm = options.text("vmm") or "qemu"
    if vmm not in ("qemu", "kvik"):
        raise UsageError(f"no VMM '{vmm}'", remedy="one of: qemu, kvik")
    if vmm == "qemu":
        return
    if not verdict.usable:
        raise InvalidArgument(
            f"kvik-vmm needs KVM, which cannot be used here: {verdict.reason}",
            remedy="'kvik doctor' says what is wrong; without --vmm, QEMU emulates",
        )
    if boots_disk:
        if options.text("firmware") == "bios":
            raise InvalidArgument("kvik-vmm has no BIOS", remedy="leave --firmware out: it has UEFI")
        machine.firmware = "uefi"
    machine.emulator = OURS
    machine.machine = options.text("machine") or "kvik"
    machine.graphics = False


def free_name(connection: Connection, stem: str) -> str:
    """`tiny-1`, or the first number that is free."""
    used = {domain.name for domain in connection.domains()}
    number = 1
    while f"{stem}-{number}" in used:
        number += 1
    return f"{stem}-{number}"


def stem_of(machine: Machine, *, is_tiny: bool) -> str:
    if is_tiny:
        return "tiny"
    source = machine.disks[0].path if machine.disks else machine.cdrom or machine.kernel or "machine"
    base = os.path.basename(source).split(".")[0]  # noqa: PTH119
    return "".join(char if char.isalnum() and char.isascii() else "-" for char in base).strip("-")[:40] or "machine"


def start(ctx: Context, options: Options, machine: Machine, paths: Paths, finish: Finisher) -> Domain:
    """Define and start it under its name, or under the next free one if somebody else just took it."""
    from kvik.cli.run_document import domain_xml

    connection = ctx.connection
    asked = options.text("name")
    remove, keep_alive = options.flag("rm"), options.flag("detach")
    stem = stem_of(machine, is_tiny=finish.is_tiny)
    for attempt in range(NAME_TRIES):
        machine.name = asked or free_name(connection, stem)
        finish.prepare(machine)
        logs = paths.domain_logs
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        machine.log = str(logs / f"{machine.name}-serial.log")
        xml = domain_xml(machine)
        ctx.doing = f"Failed to start '{machine.name}'"
        try:
            if remove:
                # Transient, and tied to this connection: gone even if this process is killed.
                return connection.create(xml, 0 if keep_alive else AUTODESTROY)
            domain = connection.define(xml)
        except ConfigError as error:
            # The document is ours: its lines and paths tell the user nothing.
            raise InvalidArgument(error.message, remedy=error.remedy) from error
        except AlreadyExists:
            if asked or attempt == NAME_TRIES - 1:
                raise
            continue
        try:
            domain.start()
        except BaseException:
            # Nobody asked for a definition that cannot start: leave nothing behind.
            undefine(domain, machine)
            raise
        return domain
    raise AssertionError


class Finisher:
    """What depends on the machine's name: the tiny image's kernel arguments hold its host name."""

    def __init__(self, paths: Paths, progress: Progress, append: str | None, *, is_tiny: bool) -> None:
        self.paths = paths
        self.progress = progress
        self.append = append
        self.is_tiny = is_tiny

    def prepare(self, machine: Machine) -> None:
        if self.is_tiny:
            use_tiny(machine, self.paths, self.progress, self.append)


def undefine(domain: Domain, machine: Machine) -> None:
    try:
        domain.undefine(UNDEFINE_NVRAM if machine.firmware == "uefi" else 0)
    except KvikError:
        pass


def remove_machine(domain: Domain) -> None:
    """End of `--rm`. It is transient: destroyed is gone. It may have ended by itself."""
    try:
        domain.destroy()
    except KvikError:
        pass


def check_name(ctx: Context, name: str | None) -> None:
    """A name that is taken is told at once, not after packages were fetched and an image made."""
    if name is None or name not in {domain.name for domain in ctx.connection.domains()}:
        return
    raise AlreadyExists(
        f"there is a machine '{name}' already",
        remedy=f"choose another --name; or 'kvik start {name}' starts it, 'kvik undefine {name}' removes it",
    )


def run(ctx: Context, options: Options) -> int:
    from kvik.cli.run_stages import DoesNotBoot

    command = options.words("command")
    wanted_console, detach, remove = options.flag("console"), options.flag("detach"), options.flag("rm")
    if wanted_console and (detach or command):
        raise UsageError("--console does not go with --detach or a command")
    if detach and command:
        raise UsageError("--detach does not go with a command", remedy="'kvik exec NAME -- COMMAND' comes after it")
    limit = seconds(options.text("timeout"))
    stdin = b""
    if options.flag("interactive"):
        stdin = ctx.stdin.buffer.read(STDIN_MAX + 1)
        if len(stdin) > STDIN_MAX:
            raise InvalidArgument(f"standard input is larger than {STDIN_MAX >> 20} MiB")
    with Progress(ctx.stderr, quiet=ctx.quiet) as progress:
        paths = local_paths(ctx)
        verdict = acceleration(paths)
        # Before anything is installed, downloaded or written: what the user gave must make sense.
        machine, is_tiny = build(ctx, options, paths, verdict, progress)
        check_name(ctx, options.text("name"))
        if not machine.emulator:
            ensure_packages(ctx, progress, uefi=machine.firmware == "uefi", yes=options.flag("yes"))
        elif "type='user'" in machine.network:
            ensure_passt(ctx, progress, yes=options.flag("yes"))
        progress.line(acceleration_line(verdict))
        finisher = Finisher(paths, progress, options.text("append"), is_tiny=is_tiny)
        domain = start(ctx, options, machine, paths, finisher)
        ctx.doing = ""
        try:
            expect = is_tiny or bool(command) or limit is not None
            readiness = wait(domain, progress, limit or READY_TIMEOUT, expect=expect)
        except KeyboardInterrupt:
            progress.clear()
            leave(ctx, domain, remove=remove)
            raise
        except KvikError as error:
            progress.clear()
            if isinstance(error, (OperationFailed, DoesNotBoot)):
                show_log(ctx, machine)
            leave(ctx, domain, remove=remove)
            raise
    return use(ctx, domain, readiness, machine, verdict, options=options, command=command, stdin=stdin)


def wait(domain: Domain, progress: Progress, timeout: float, *, expect: bool) -> Readiness | None:
    """Stages until ready. A machine that nobody said would have an agent has only to have started."""
    from kvik.cli.run_stages import check_alive, follow

    if expect:
        return follow(domain, progress, timeout)
    check_alive(domain, None)
    return None


def use(
    ctx: Context,
    domain: Domain,
    readiness: Readiness | None,
    machine: Machine,
    verdict: Verdict,
    *,
    options: Options,
    command: list[str],
    stdin: bytes,
) -> int:
    """The machine runs: the command, the console, or the ready line."""
    remove, detach = options.flag("rm"), options.flag("detach")
    try:
        if command:
            ctx.doing = f"Failed to run '{command[0]}' in '{domain.name}'"
            return run_in(ctx, domain, command, timeout=seconds(options.text("timeout")), stdin=stdin)
        report(ctx, domain, readiness, machine, verdict)
        if options.flag("console") or (term.is_terminal(ctx.stdin) and not detach and not ctx.json):
            from kvik.cli.console import attach

            return attach(ctx, domain, backlog=last_output(machine) if readiness else b"")
        return 0
    finally:
        if remove and not detach:
            remove_machine(domain)


def report(ctx: Context, domain: Domain, readiness: Readiness | None, machine: Machine, verdict: Verdict) -> None:
    """The ready line, or the same as data."""
    from kvik.cli.run_stages import state_word

    address = address_of(ctx, domain)
    took = max((stage.seconds for stage in readiness.stages if stage.state == 1), default=0.0) if readiness else None
    if ctx.put(
        {
            "name": domain.name,
            "uuid": domain.uuid,
            "ready": readiness is not None and readiness.ready,
            "seconds": round(took, 3) if took is not None else None,
            "address": address or None,
            "acceleration": "kvm" if machine.accelerated else "emulation",
            "reason": verdict.reason,
            "stages": [{**stage._asdict(), "state": state_word(stage)} for stage in readiness.stages]
            if readiness
            else [],
        }
    ):
        return
    if readiness is None:
        ctx.line(f"{domain.name} is running; 'kvik console {domain.name}' connects to its serial console")
        return
    where = f", address {address}" if address else ""
    how = "kvm" if machine.accelerated else "emulation"
    ctx.line(f"{domain.name} is ready after {took:.2f} s ({how}{where})")


def address_of(ctx: Context, domain: Domain) -> str:
    rows = ctx.connection.overview(1)
    return next((row.address or "" for row in rows if row.uuid == domain.uuid), "")


def leave(ctx: Context, domain: Domain, *, remove: bool) -> None:
    if remove:
        remove_machine(domain)
        ctx.warn(f"{domain.name} was removed")
    else:
        ctx.warn(
            f"{domain.name} was kept: 'kvik console {domain.name}' looks at it, 'kvik destroy {domain.name}' stops it"
        )


def last_output(machine: Machine) -> bytes:
    """What the console showed while nobody was attached: the prompt that the user would otherwise not see."""
    try:
        with open(machine.log or "", "rb") as file:  # noqa: PTH123
            file.seek(max(0, os.fstat(file.fileno()).st_size - BACKLOG))
            return file.read()
    except OSError:
        return b""


def show_log(ctx: Context, machine: Machine) -> None:
    """The last lines that the machine printed: they say more than we can."""
    if machine.log is None:
        return
    try:
        with open(machine.log, "rb") as file:  # noqa: PTH123
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2048))
            tail = file.read().decode(errors="replace").splitlines()[-8:]
    except OSError:
        return
    for line in tail:
        ctx.warn("  " + term.neutralise(line.rstrip("\r")))


COMMANDS = {
    "run": Verb(
        run,
        "Boots a machine: the tiny one, made from Debian packages on first use, or\n"
        "from the kernel, disks or CD given. With a COMMAND: runs it in the machine,\n"
        "prints its output and ends with its exit code. On a terminal: attaches the\n"
        "console (Ctrl-] leaves).",
        Option("image", TEXT, "'tiny' (default without disks), or the path of a disk image", complete="file"),
        Option("name", TEXT, "name of the machine (default: tiny-1, tiny-2, ...)", named_only=True),
        Option("memory", TEXT, "memory, as scaled integer (default MiB)", short="m", metavar="size", named_only=True),
        Option("vcpus", NUMBER, "number of virtual CPUs", named_only=True),
        Option("cpu", TEXT, "CPU model, or host, host-model, max", named_only=True, complete=("host", "max")),
        Option("vmm", TEXT, "what runs it: qemu, or kvik (kvik-vmm)", named_only=True, complete=("qemu", "kvik")),
        Option("machine", TEXT, "machine type", named_only=True, complete=("q35", "pc", "microvm")),
        Option("firmware", TEXT, "bios or uefi", named_only=True, complete=("bios", "uefi")),
        Option(
            "network",
            TEXT,
            "none, user, or a virtual network or bridge of this host (default: the network 'default' if it is active, "
            "else user)",
            named_only=True,
            complete="run-network",
        ),
        Option(
            "allow",
            TEXT,
            "DNS name that the machine may reach, with all below it; nothing else then",
            named_only=True,
            repeat=True,
            metavar="name",
        ),
        Option("kernel", TEXT, "kernel to boot directly", named_only=True, complete="file", metavar="file"),
        Option("initrd", TEXT, "its initramfs", named_only=True, complete="file", metavar="file"),
        Option("append", TEXT, "its arguments; for the tiny image: more of them", named_only=True),
        Option(
            "disk",
            TEXT,
            "disk: FILE, or path=FILE with [,format=raw|qcow2] [,bus=virtio|sata|scsi] [,readonly]",
            named_only=True,
            repeat=True,
            complete="file",
            metavar="disk",
        ),
        Option("cdrom", TEXT, "CD image", named_only=True, complete="file", metavar="file"),
        Option("console", FLAG, "attach the console"),
        Option("detach", FLAG, "do not attach the console", short="d"),
        Option("rm", FLAG, "remove the machine at the end"),
        Option("interactive", FLAG, "give this standard input to the command", short="i"),
        Option(
            "timeout", TEXT, "seconds until it must be ready, and for the command", metavar="seconds", named_only=True
        ),
        Option("yes", FLAG, "install missing packages without asking", short="y"),
        Option("command", REST, "command to run in the machine"),
    )
}
