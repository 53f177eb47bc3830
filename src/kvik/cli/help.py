"""`kvik help`, `kvik --help` and `kvik -V`."""

from __future__ import annotations

from kvik.cli.options import TEXT, Option, UsageError, Verb, describe
from kvik.cli.verbs import GROUPS, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def group_lines(group: str) -> list[str]:
    title, keyword = GROUPS[group]
    lines = [f" {title} (help keyword '{keyword}'):"]
    lines += [f"    {name:<30} {summary}" for name, (_, owner, summary) in VERBS.items() if owner == group]
    return lines


def overview() -> str:
    return "Grouped commands:\n\n" + "\n\n".join("\n".join(group_lines(group)) for group in GROUPS) + "\n"


def usage() -> str:
    from kvik.cli.main import GLOBALS

    lines = ["kvik [options]... [<command_string>]", "kvik [options]... <command> [args...]", "", "  options:"]
    for name, (short, value, text) in GLOBALS.items():
        left = (f"-{short} | " if short else "") + f"--{name}" + (f"={value}" if value else "")
        lines.append(f"    {left:<24} {text}")
    lines.append(f"    {'-V':<24} long version")
    lines += ["", "  With no command: an interactive shell. KVIK_URI names the connection when -c does not.", ""]
    lines += ["  commands (non interactive mode):", ""]
    return "\n".join(lines) + "\n" + "\n\n".join("\n".join(group_lines(group)) for group in GROUPS) + "\n"


def version(*, long: bool) -> str:
    from kvik import __version__

    if not long:
        return f"{__version__}\n"
    import platform

    return (
        f"kvik {__version__}, the KVM virtualization stack in Python\n"
        f"Running on Python {platform.python_version()}, Linux {platform.release()} {platform.machine()}\n"
        "\n"
        "Hypervisors: QEMU (KVM and software emulation), Test\n"
        "Protocol: libvirt RPC (remote program, version 1) over Unix sockets and ssh\n"
    )


def help_verb(ctx: Context, options: Options) -> int:
    name = options.text("command")
    if ctx.json:
        ctx.put(
            {
                verb: {"group": group, "help": summary}
                for verb, (_, group, summary) in VERBS.items()
                if name in (None, verb, GROUPS[group][1])
            }
        )
        return 0
    if name is None:
        ctx.write(overview())
        return 0
    for group, (_, keyword) in GROUPS.items():
        if name == keyword:
            ctx.write("\n".join(group_lines(group)) + "\n")
            return 0
    if name not in VERBS:
        from kvik.cli.suggest import nearest

        near = nearest(name, [*VERBS, *(keyword for _, keyword in GROUPS.values())])
        raise UsageError(
            f"command or command group '{name}' doesn't exist",
            remedy=f"did you mean '{near}'?" if near else "'kvik help' lists every command",
        )
    from kvik.cli.main import load

    ctx.write(describe(name, VERBS[name][2], load(name)))
    return 0


COMMANDS = {
    "help": Verb(
        help_verb,
        "Prints global help, command specific help, or help for a\ngroup of related commands",
        Option(
            "command",
            TEXT,
            "Prints global help, command specific help, or help for a group of related commands",
            complete="verb",
        ),
    )
}
