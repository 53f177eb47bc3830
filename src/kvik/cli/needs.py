"""Packages that a verb turns out to need: named, installed by root, and the verb is done after all."""

from __future__ import annotations

from kvik.cli import term
from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from kvik.cli.context import Context
    from kvik.cli.progress import Progress
    from kvik.guest.packages import Need

    Result = TypeVar("Result")


def ensure_packages(ctx: Context, progress: Progress, *, uefi: bool, yes: bool) -> None:
    """QEMU (and firmware): installed by root after being named; for anybody else the command, and exit code 77."""
    from kvik.guest.packages import QEMU, UEFI

    _ensure(ctx, progress, [QEMU, UEFI] if uefi else [QEMU], yes=yes)


def ensure_passt(ctx: Context, progress: Progress, *, yes: bool) -> None:
    """What a machine on kvik-vmm needs for user networking."""
    from kvik.guest.packages import PASST

    _ensure(ctx, progress, [PASST], yes=yes)


def _ensure(ctx: Context, progress: Progress, needs: list[Need], *, yes: bool) -> None:
    from kvik.guest.packages import ensure

    def ask(question: str) -> bool:
        progress.clear()
        return ctx.ask(f"{question} [Y/n] ").lower() in ("", "y", "yes")

    interactive = term.is_terminal(ctx.stdin) and not yes
    ensure(needs, say=progress.line, ask=ask if interactive else None)


def with_qemu(ctx: Context, action: Callable[[], Result]) -> Result:
    """`action`; if it fails on a host that has no QEMU, QEMU is seen to and it is tried once more."""
    try:
        return action()
    except KvikError:
        if not _lacks_qemu(ctx):
            raise
    from kvik.cli.progress import Progress

    with Progress(ctx.stderr, quiet=ctx.quiet) as progress:
        ensure_packages(ctx, progress, uefi=False, yes=False)
    return action()


def _lacks_qemu(ctx: Context) -> bool:
    """Whether the daemon's host is this one and has no QEMU."""
    from kvik.client.uri import default_uri, parse_uri
    from kvik.guest.packages import QEMU, missing

    return parse_uri(ctx.uri or default_uri()).transport != "ssh" and bool(missing([QEMU]))
