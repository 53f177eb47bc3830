"""kvik img -o help: the options of formats, as qemu-img lists them."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context

__all__ = ["list_amendments", "list_options"]

# name: (type, help)
LUKS = {
    "cipher-alg": (str, "Name of encryption cipher algorithm"),
    "cipher-mode": (str, "Name of encryption cipher mode"),
    "hash-alg": (str, "Name of encryption hash algorithm"),
    "iter-time": (int, "Time to spend in PBKDF in milliseconds"),
    "ivgen-alg": (str, "Name of IV generator algorithm"),
    "ivgen-hash-alg": (str, "Name of IV generator hash algorithm"),
    "key-secret": (str, "ID of the secret that provides the passphrase"),
}
LUKS_AMENDMENTS = {
    "iter-time": (int, "Time to spend in PBKDF in milliseconds"),
    "keyslot": (int, "The one keyslot that is changed"),
    "new-secret": (str, "ID of the new secret of the keyslots; empty to erase them"),
    "old-secret": (str, "ID of a secret: the keyslots that it opens are changed"),
    "state": (str, "New state of the keyslots (active/inactive)"),
}
ENCRYPTION = {"encrypt.format": (str, "Encrypt the image, format choices: 'aes', 'luks'")}
SIZES = ("size", "cluster_size")
VALUES: dict[type, str] = {str: "str", bool: "bool (on/off)", int: "num"}


def list_options(ctx: Context, format: str) -> int:
    """Those of `create` and `convert`."""
    from kvik.image.create import OPTIONS, RAW_OPTIONS

    known = {name: (kind, text) for name, (_, kind, text) in OPTIONS.items() if format != "raw" or name in RAW_OPTIONS}
    if format == "luks":
        known = LUKS | {"size": known["size"]}
    elif format == "qcow2":
        known |= ENCRYPTION | _inside(LUKS)
    return _print(ctx, f"Supported {format} options:", known)


def list_amendments(ctx: Context, format: str) -> int:
    from kvik.image.create import OPTIONS
    from kvik.image.qcow2.amend import AMENDABLE

    if format == "luks":
        return _print(ctx, "Amend options for 'luks':", LUKS_AMENDMENTS)
    if format != "qcow2":
        raise UsageError(f"Format driver '{format}' does not support option amendment")
    known = {
        name: (kind, text)
        for name, (attribute, kind, text) in OPTIONS.items()
        if attribute in AMENDABLE or name == "size"
    }
    return _print(ctx, "Amend options for 'qcow2':", known | _inside(LUKS_AMENDMENTS))


def _inside(options: dict[str, tuple[type, str]]) -> dict[str, tuple[type, str]]:
    return {f"encrypt.{name}": found for name, found in options.items()}


def _print(ctx: Context, heading: str, known: dict[str, tuple[type, str]]) -> int:
    ctx.line(heading)
    for name, (kind, text) in sorted(known.items()):
        value = "size" if name in SIZES else VALUES[kind]
        ctx.line(f"  {f'{name}=<{value}>':<22} - {text}")
    return 0
