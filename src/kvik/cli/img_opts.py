"""kvik img --image-opts: an image named by options, as `driver=qcow2,file.filename=disk.qcow2`.

Of QEMU's block options those that say which file it is and of which format; what opens anything else is refused.
"""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.img import Arguments

__all__ = ["use_image_opts"]

FILE_DRIVERS = ("file", "host_device")
# what opens an encrypted image, and of which drivers it is an option
SECRETS = {
    "key-secret": (None, "luks"),
    "encrypt.format": (None, "qcow2"),
    "encrypt.key-secret": (None, "qcow2"),
}


def use_image_opts(name: str, arguments: Arguments) -> None:
    """Names and formats in place of the options. `UsageError`."""
    if arguments.flag("image-opts"):
        if arguments.flag("f") or (name == "compare" and arguments.flag("F")):
            raise UsageError("--image-opts and --format are mutually exclusive")
        _replace(arguments, _sources(name, len(arguments.files)))
    if arguments.flag("target-image-opts"):
        if not arguments.flag("n"):
            raise UsageError("--target-image-opts requires use of -n flag")
        if arguments.flag("O"):
            raise UsageError("--target-image-opts and -O are mutually exclusive")
        _replace(arguments, [(len(arguments.files) - 1, "O")])


def _sources(name: str, count: int) -> list[tuple[int, str]]:
    """Where in a command's words its sources are, and the option with each one's format."""
    if name == "compare":
        return [(0, "f"), (1, "F")]
    if name == "convert":
        return [(number, "f") for number in range(count - 1)]
    return [(0, "f")][:count]


def _replace(arguments: Arguments, places: list[tuple[int, str]]) -> None:
    for number, key in places:
        arguments.files[number], format = parse_image_opts(arguments.files[number])
        arguments.formats[number] = format
        if format is not None:
            arguments.add(key, format)


def parse_image_opts(text: str) -> tuple[str, str | None]:
    """(file name, format; None if it is not stated). A comma in a name is written twice."""
    values: dict[str, str] = {}
    for word in text.replace(",,", "\0").split(","):
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(
                f"Expected '=' after parameter '{key}' of --image-opts",
                remedy="driver=FORMAT,file.filename=FILE, such as driver=qcow2,file.filename=disk.qcow2",
            )
        values[key.strip()] = value.replace("\0", ",")
    driver = values.pop("driver", None)
    inner = values.pop("file.driver", None)
    name = values.pop("file.filename", None)
    if name is None and (driver is None or driver in FILE_DRIVERS):
        name = values.pop("filename", None)
    for key, drivers in SECRETS.items():  # whose they are, and whether they are needed, is found with the image
        if driver in drivers:
            values.pop(key, None)
    if inner not in (None, *FILE_DRIVERS):
        raise UsageError(
            f"file.driver={inner} is not opened by kvik img",
            remedy=f"one of: {', '.join(FILE_DRIVERS)}; a server's disk is copied by qemu-img",
        )
    if values:
        raise UsageError(
            f"--image-opts has '{next(iter(values))}', which is not known here",
            remedy="known: driver, file.driver, file.filename, key-secret, encrypt.format, encrypt.key-secret",
        )
    if not name:
        raise UsageError("--image-opts names no file", remedy="driver=qcow2,file.filename=disk.qcow2")
    return name, "raw" if driver in FILE_DRIVERS else driver
