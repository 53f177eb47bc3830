"""secret-*: passphrases and keys, in virsh's words. A value is read from a file or the terminal; on the command line,
where everybody on the host can see it, it is taken with a warning as virsh takes it."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.events import stamp, wait_for
from kvik.cli.options import DATA, FLAG, NUMBER, TEXT, Option, UsageError, Verb
from kvik.cli.table import Table
from kvik.client import secret as client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.events import AnyEvent

SECRET = Option("secret", DATA, "secret UUID", complete="secret")
VALUE_LIMIT = 65536  # bytes


def _find(ctx: Context, options: Options) -> client.Secret:
    key = options.data("secret")
    doing, ctx.doing = ctx.doing, f"failed to get secret '{key}'"
    found = client.lookup_secret(ctx.connection, key)
    ctx.doing = doing
    return found


def secret_define(ctx: Context, options: Options) -> int:
    path, _ = options.data("file"), options.flag("validate")  # documents are always checked
    text = ctx.read_file(path)
    ctx.doing = f"Failed to set attributes from {path}"
    made = client.define_secret(ctx.connection, text)
    ctx.say(f"Secret {made.uuid} created")
    return 0


def secret_dumpxml(ctx: Context, options: Options) -> int:
    return xml_verbs.show(ctx, options, _find(ctx, options).xml())


def secret_undefine(ctx: Context, options: Options) -> int:
    found = _find(ctx, options)
    ctx.doing = f"Failed to delete secret {found.uuid}"
    found.undefine()
    ctx.say(f"Secret {found.uuid} deleted")
    return 0


def secret_list(ctx: Context, options: Options) -> int:
    def wanted(name: str) -> bool | None:
        yes, no = options.flag(name), options.flag(f"no-{name}")
        return None if yes == no else yes

    listed = client.secrets(ctx.connection, ephemeral=wanted("ephemeral"), private=wanted("private"))
    table = Table("UUID", "Usage")
    for one in sorted(listed, key=lambda one: one.uuid):
        table.add(one.uuid, f"{one.usage_type} {one.usage_id}" if one.usage_id else "Unused")
    ctx.table(table)
    return 0


def secret_set_value(ctx: Context, options: Options) -> int:
    path, encoded = options.text("file"), options.text("base64")
    plain, interactive = options.flag("plain"), options.flag("interactive")
    for one, other, clash in (
        ("file", "base64", path is not None and encoded is not None),
        ("plain", "base64", plain and encoded is not None),
        ("interactive", "file", interactive and path is not None),
        ("interactive", "plain", interactive and plain),
        ("interactive", "base64", interactive and encoded is not None),
    ):
        if clash:
            raise UsageError(f"Options --{one} and --{other} are mutually exclusive")
    found = _find(ctx, options)
    if encoded is not None:
        ctx.warn("error: Passing secret value as command-line argument is insecure!")
        value = _decoded(encoded.encode())
    elif path is not None:
        data = _read(path)
        value = data if plain else _decoded(data)
    elif interactive:
        value = ctx.ask_secret("Enter new value for secret:").encode()
    else:
        raise UsageError("Input secret value is missing", remedy="--interactive, or --file PATH")
    ctx.doing = "Failed to set secret value"
    if not value:
        raise UsageError("the value is empty")
    found.set_value(value)
    ctx.say("Secret value set")
    return 0


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib costs 4 ms of start
            data = file.read(2 * VALUE_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"Failed to open file '{path}': {error.strerror}") from error
    if len(data) > 2 * VALUE_LIMIT:
        raise UsageError(f"File '{path}' is too large: a secret's value has at most {VALUE_LIMIT} bytes")
    return data


def _decoded(data: bytes) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise UsageError("the value is not base64", remedy="--file PATH --plain takes the file as it is") from error


def secret_get_value(ctx: Context, options: Options) -> int:
    found = _find(ctx, options)
    value = found.value()
    if options.flag("plain"):
        ctx.stdout.flush()
        ctx.stdout.buffer.write(value)
        ctx.stdout.buffer.flush()
        return 0
    import base64

    text = base64.b64encode(value).decode()
    if not ctx.put({"value": text}):
        ctx.write(text)
    return 0


def secret_event(ctx: Context, options: Options) -> int:
    from kvik.client.events import SECRET_EVENT_IDS, SecretEvent

    if options.flag("list"):
        if not ctx.put(list(SECRET_EVENT_IDS)):
            for known in SECRET_EVENT_IDS:
                ctx.line(known)
        return 0
    kind = options.text("event")
    if kind is None:
        raise UsageError("either --list or --event <type> is required")
    if kind not in SECRET_EVENT_IDS:
        raise UsageError(f"unknown event type {kind}", remedy=f"one of: {', '.join(SECRET_EVENT_IDS)}")
    seconds = options.number("timeout")
    if seconds is not None and seconds < 1:
        raise UsageError(f"invalid timeout '{seconds}'")
    timestamp = options.flag("timestamp")
    ctx.connection.register_secret(kind, _find(ctx, options) if options.text("secret") else None)

    def show(event: AnyEvent) -> None:
        if not isinstance(event, SecretEvent):
            return
        text, when = str(event), stamp() if timestamp else ""
        if ctx.json:  # one object a line: a stream has no end to close a list at
            import json

            facts = {"event": event.kind, "uuid": event.uuid_text, "detail": text}
            ctx.write(json.dumps(facts | ({"time": when.rstrip(": ")} if when else {})) + "\n")
        else:
            ctx.line(f"{when}event '{event.kind}' for secret {event.uuid_text}" + (f": {text}" if text else ""))
        ctx.stdout.flush()

    return wait_for(ctx, show, loop=options.flag("loop"), seconds=seconds)


COMMANDS: dict[str, Verb] = {
    "secret-define": Verb(
        secret_define,
        "Define or modify a secret.",
        Option("file", DATA, "file containing secret attributes in XML", complete="file"),
        Option("validate", FLAG, "validate the XML against the schema"),
    ),
    "secret-dumpxml": Verb(
        secret_dumpxml, "Output attributes of a secret as an XML dump to stdout.", SECRET, *xml_verbs.XPATH
    ),
    "secret-event": Verb(
        secret_event,
        "List event types, or wait for secret events to occur",
        Option("secret", TEXT, "filter by secret name or uuid", complete="secret", named_only=True),
        Option("event", TEXT, "which event type to wait for", complete=("lifecycle", "value-changed"), named_only=True),
        Option("loop", FLAG, "loop until timeout or interrupt, rather than one-shot"),
        Option("timeout", NUMBER, "timeout seconds", named_only=True),
        Option("list", FLAG, "list valid event types"),
        Option("timestamp", FLAG, "show timestamp for each printed event"),
    ),
    "secret-get-value": Verb(
        secret_get_value,
        "Output a secret value to stdout.",
        SECRET,
        Option("plain", FLAG, "get value without converting to base64"),
    ),
    "secret-list": Verb(
        secret_list,
        "Returns a list of secrets",
        Option("ephemeral", FLAG, "list ephemeral secrets"),
        Option("no-ephemeral", FLAG, "list non-ephemeral secrets"),
        Option("private", FLAG, "list private secrets"),
        Option("no-private", FLAG, "list non-private secrets"),
    ),
    "secret-set-value": Verb(
        secret_set_value,
        "Set a secret value.",
        SECRET,
        Option("file", TEXT, "read secret from file", complete="file", named_only=True),
        Option("plain", FLAG, "read the secret from file without converting from base64"),
        Option("interactive", FLAG, "read the secret from the terminal"),
        Option("base64", TEXT, "base64-encoded secret value"),
    ),
    "secret-undefine": Verb(secret_undefine, "Undefine a secret.", SECRET),
}
