"""send-key, inject-nmi, screenshot: what a person at the machine would do."""

from __future__ import annotations

from kvik.cli import flags, term
from kvik.cli.common import ACTIVE, choice
from kvik.cli.options import NUMBER, SOME, TEXT, Option, UsageError, Verb
from kvik.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

MAX_KEYS = 16  # VIR_DOMAIN_SEND_KEY_MAX_KEYS
EXTENSIONS = {"image/png": ".png", "image/x-portable-pixmap": ".ppm", "image/bmp": ".bmp"}


def keycode(word: str, codeset: str) -> int:
    """A key's code from its name (Linux's code set only) or number."""
    from kvik.cli.keycodes import LINUX

    if codeset == "linux" and word.upper() in LINUX:
        return LINUX[word.upper()]
    try:
        code = int(word, 0)
    except ValueError:
        code = -1
    if not 0 < code < 1 << 16:
        from kvik.cli.suggest import nearest

        near = nearest(word.upper(), LINUX)
        raise UsageError(f"invalid keycode: '{word}'", remedy=f"did you mean {near}?" if near else "")
    return code


def send_key(ctx: Context, options: Options) -> int:
    codeset = options.text("codeset") or "linux"
    number = choice(codeset, flags.CODESETS, "codeset")
    holdtime = options.number("holdtime") or 0
    if holdtime < 0:
        raise UsageError(f"invalid value of --holdtime '{holdtime}'")
    words = options.words("keycode")
    if len(words) > MAX_KEYS:
        raise UsageError(f"too many keycodes: at most {MAX_KEYS} at once")
    codes = [keycode(word, codeset) for word in words]
    ctx.domain(options.data("domain")).send_key(codes, number, holdtime)
    return 0


def inject_nmi(ctx: Context, options: Options) -> int:
    ctx.domain(options.data("domain")).inject_nmi()
    return 0


def screenshot(ctx: Context, options: Options) -> int:
    from time import strftime

    path, screen = options.text("file"), options.number("screen") or 0
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"could not take a screenshot of {domain.name}"
    mime, image = domain.screenshot(screen)
    if path is None:
        # A machine's name has no slash (the daemon refuses one), but it may begin with a dot or dash: keep it below.
        stem = term.neutralise(domain.name).replace("/", "_")
        path = f"./{stem}-{strftime('%Y-%m-%d-%H:%M:%S')}{EXTENSIONS.get(mime, '')}"
    try:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(image)
    except OSError as error:
        raise HostError(f"cannot write '{path}': {error.strerror}", errno=error.errno or 0) from error
    if not ctx.put({"file": path, "mime": mime, "bytes": len(image)}):
        ctx.line(f"Screenshot saved to {path.removeprefix('./')}, with type of {mime}")
    return 0


COMMANDS = {
    "send-key": Verb(
        send_key,
        "Send keycodes (integers or symbolic names) to the guest",
        ACTIVE,
        Option(
            "codeset", TEXT, "the codeset of keycodes, default:linux", complete=tuple(flags.CODESETS), named_only=True
        ),
        Option("holdtime", NUMBER, "the time (in milliseconds) how long the keys will be held", named_only=True),
        Option("keycode", SOME, "the key code", complete="key"),
    ),
    "inject-nmi": Verb(inject_nmi, "Inject NMI to the guest domain.", ACTIVE),
    "screenshot": Verb(
        screenshot,
        "screenshot of a current domain console",
        ACTIVE,
        Option("file", TEXT, "where to store the screenshot", complete="file"),
        Option("screen", NUMBER, "ID of a screen to take screenshot of"),
    ),
}
