"""exec: a command in the guest, through its agent; its output, its exit code."""

from __future__ import annotations

from kvik.cli.common import ACTIVE
from kvik.cli.options import FLAG, REST, TEXT, WORDS, Option, UsageError, Verb
from kvik.errors import AgentError, InvalidArgument, OperationInvalid, OperationTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

STDIN_MAX = 1 << 20  # the agent takes all of it in one request
# As shells and timeout(1) have it.
TIMED_OUT = 124
NOT_RUN = {"Permission denied": 126, "Exec format error": 126, "Is a directory": 126, "No such file or directory": 127}


def seconds(text: str | None, name: str = "timeout") -> float | None:
    """A positive number of seconds, or None if it was not given."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise UsageError(f"invalid value of --{name} '{text}'", remedy="write seconds, such as 30 or 0.5")
    return value


def run_in(
    ctx: Context, domain: Domain, argv: Sequence[str], *, timeout: float | None = None, stdin: bytes = b""
) -> int:
    """Run `argv` in the guest, pass its output on, return its exit code (128 + N for signal N, as a shell has it)."""
    try:
        result = domain.exec(argv, stdin=stdin, timeout=timeout)
    except OperationTimeout as error:
        error.exit_code = TIMED_OUT
        raise
    except AgentError as error:
        for why, code in NOT_RUN.items():
            if error.message.endswith(f"cannot be run in the guest: {why}"):
                error.exit_code = code
        raise
    code = 128 + result.signal if result.signal else result.exitcode
    if ctx.put(
        {
            "domain": domain.name,
            "exitcode": result.exitcode,
            "signal": result.signal,
            "stdout": result.stdout.decode(errors="replace"),
            "stderr": result.stderr.decode(errors="replace"),
            "truncated": result.truncated,
        }
    ):
        return code
    # Untouched, as ssh does: whoever runs a command in a machine asked for its bytes.
    ctx.stdout.flush()
    ctx.stdout.buffer.write(result.stdout)
    ctx.stdout.buffer.flush()
    ctx.stderr.flush()
    ctx.stderr.buffer.write(result.stderr)
    ctx.stderr.buffer.flush()
    if result.truncated:
        ctx.warn("warning: the output was longer than the guest agent keeps; its end is missing")
    return code


def exec_verb(ctx: Context, options: Options) -> int:
    argv = [*options.words("command"), *options.words("rest")]
    if not argv:
        raise UsageError("no command to run", remedy="kvik exec NAME -- COMMAND [ARGUMENT]...")
    timeout = seconds(options.text("timeout"))
    data = b""
    if options.flag("interactive"):
        data = ctx.stdin.buffer.read(STDIN_MAX + 1)
        if len(data) > STDIN_MAX:
            raise InvalidArgument(f"standard input is larger than {STDIN_MAX >> 20} MiB")
    domain = ctx.domain(options.data("domain"))
    if domain.id <= 0:
        raise OperationInvalid(f"domain '{domain.name}' is not running", remedy=f"'kvik start {domain.name}' starts it")
    ctx.doing = f"Failed to run '{argv[0]}' in domain '{domain.name}'"
    return run_in(ctx, domain, argv, timeout=timeout, stdin=data)


COMMANDS = {
    "exec": Verb(
        exec_verb,
        "Runs a command in a machine through its guest agent, prints what it prints\nand ends with its exit code.",
        ACTIVE,
        Option("timeout", TEXT, "seconds that the command may take", metavar="seconds", named_only=True),
        Option("interactive", FLAG, "give this standard input to the command", short="i"),
        Option("command", WORDS, "the command and its arguments"),
        Option("rest", REST, "the command and its arguments, however they look", metavar="command"),
    )
}
