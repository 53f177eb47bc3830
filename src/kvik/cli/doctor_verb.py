"""doctor's place in the table of verbs: its options as every other verb declares them."""

from __future__ import annotations

from kvik.cli.options import FLAG, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def doctor(ctx: Context, options: Options) -> int:
    from kvik.cli.doctor import write
    from kvik.host.doctor import examine
    from kvik.paths import Paths

    report = examine(Paths.default(), fresh=options.flag("fresh"))
    explain = options.flag("all")
    if not ctx.put(report.as_dict()):
        write(report, ctx.stdout, explain_all=explain)
    return 0 if report.usable else 1


COMMANDS = {
    "doctor": Verb(
        doctor,
        "Says what this host can do, why, and how to fix what it cannot.\nExit code 0: machines can run.",
        Option("fresh", FLAG, "run the KVM probe again instead of using its last verdict"),
        Option("all", FLAG, "explain what is in order, too"),
    )
}
