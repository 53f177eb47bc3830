"""kvik img: qemu-img's commands and options, on kvik's own image formats. `kvik-img` is the same in one word.

The grammar is getopt's, as qemu-img has it: clustered short options, long options by any clear beginning, options and
files mixed freely. Exit codes are qemu-img's, too.
"""

from __future__ import annotations

from kvik.cli.img_commands import COMMANDS_OF_IMG, Command
from kvik.cli.options import ALL, Option, UsageError, Verb
from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options


class Arguments:
    """Parsed words of one command."""

    __slots__ = ("files", "formats", "order", "values")

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}
        self.order: list[tuple[str, str]] = []  # options with their values, as they were given
        self.files: list[str] = []
        self.formats: dict[int, str | None] = {}  # of those files that --image-opts names

    def format(self, number: int, key: str = "f") -> str | None:
        """That of the file with that number, by the option `key`."""
        return self.formats.get(number, self.text(key))

    def copy(self) -> Arguments:
        """As they are now, whatever is done to these."""
        other = Arguments()
        other.values = {key: [*values] for key, values in self.values.items()}
        other.order, other.files = [*self.order], [*self.files]
        return other

    def flag(self, key: str) -> bool:
        return key in self.values

    def add(self, key: str, value: str) -> None:
        self.values.setdefault(key, []).append(value)
        self.order.append((key, value))

    def text(self, key: str) -> str | None:
        """The last value given."""
        return self.values[key][-1] if key in self.values else None

    def texts(self, key: str) -> list[str]:
        return self.values.get(key, [])


def parse(name: str, command: Command, words: Sequence[str]) -> Arguments:
    """`UsageError` for what the command does not take."""
    found = Arguments()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":
            found.files += words[index:]
            break
        if word.startswith("--"):
            long, equals, value = word[2:].partition("=")
            key = _long(name, command, long)
            if command.options[key][1] and not equals:
                if index >= len(words):
                    raise UsageError(f"option '{word}' requires an argument", remedy=f"see 'kvik img {name} --help'")
                value = words[index]
                index += 1
            elif equals and not command.options[key][1]:
                raise UsageError(f"option '--{long}' takes no value")
            found.add(key, value)
        elif word.startswith("-") and len(word) > 1 and not (name == "resize" and word[1].isdigit()):
            at = 1
            while at < len(word):
                key = word[at]
                at += 1
                if key not in command.options:
                    raise UsageError(f"'img {name}' has no option '-{key}'", remedy=f"see 'kvik img {name} --help'")
                if not command.options[key][1]:
                    found.add(key, "")
                    continue
                value = word[at:]
                if not value:
                    if index >= len(words):
                        raise UsageError(
                            f"option '-{key}' requires an argument", remedy=f"see 'kvik img {name} --help'"
                        )
                    value = words[index]
                    index += 1
                found.add(key, value)
                break
        else:
            found.files.append(word)
    if not found.flag("h"):
        count = len(found.files)
        listing = "help" in found.texts("o")
        if (count < command.least and not listing) or (command.most is not None and count > command.most):
            raise UsageError(
                f"usage: kvik img {name} [options] {command.arguments}", remedy=f"see 'kvik img {name} --help'"
            )
    return found


def _long(name: str, command: Command, word: str) -> str:
    matches = [key for key, (long, _, _) in command.options.items() if long and long.startswith(word)]
    exact = [key for key in matches if command.options[key][0] == word]
    if exact or len(matches) == 1:
        return (exact or matches)[0]
    from kvik.cli.suggest import nearest

    near = nearest(word, [long for long, _, _ in command.options.values() if long])
    raise UsageError(
        f"'img {name}' has no option '--{word}'",
        remedy=f"did you mean --{near}?" if near else f"see 'kvik img {name} --help'",
    )


def overview() -> str:
    lines = ["usage: kvik img COMMAND [options] FILE...", ""]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS_OF_IMG.items()]
    return "\n".join([*lines, "", "  'kvik img COMMAND --help' tells the options of one."]) + "\n"


def img(ctx: Context, options: Options) -> int:
    words = options.words("arguments")
    if not words or words[0] in ("-h", "--help", "help"):
        ctx.write(overview())
        return 0 if words else 1
    if words[0] in ("-V", "--version"):
        from kvik import __version__

        ctx.line(f"kvik-img {__version__}")
        return 0
    name = words[0]
    command = COMMANDS_OF_IMG.get(name)
    if command is None:
        from kvik.cli.suggest import nearest

        near = nearest(name, COMMANDS_OF_IMG)
        raise UsageError(
            f"img has no command '{name}'", remedy=f"did you mean '{near}'?" if near else "'kvik img help' lists all"
        )
    arguments = parse(name, command, words[1:])
    if arguments.flag("h"):
        ctx.write(command.usage(name))
        return 0
    output = arguments.text("output")
    if output not in (None, "human", "json"):
        raise UsageError("--output must be used with human or json as argument.")
    before = ctx.json
    ctx.json = before or arguments.flag("json") or output == "json"
    try:
        code = _run(ctx, name, command, arguments)
    except BrokenPipeError:
        raise
    except (KvikError, OSError) as error:
        said = failed(name, error) if isinstance(error, OSError) else error
        if name == "compare":
            said.exit_code = 2  # 1 says that images differ
        if said is error:
            raise
        raise said from error
    finally:
        ctx.json = before
    return code


def _run(ctx: Context, name: str, command: Command, arguments: Arguments) -> int:
    module = __import__(f"kvik.cli.{command.module}", fromlist=["HANDLERS"])
    given = arguments.copy()
    if name != "dd" and (arguments.flag("image-opts") or arguments.flag("target-image-opts")):
        from kvik.cli.img_opts import use_image_opts

        use_image_opts(name, arguments)
    if arguments.flag("object") or makes_encrypted(name, arguments):
        from kvik.cli import img_encrypted

        code = img_encrypted.run(ctx, name, command, given, arguments)
        if code is not None:
            return code
    code = module.HANDLERS[name](ctx, arguments)
    return code or 0


def makes_encrypted(name: str, arguments: Arguments) -> bool:
    """Whether the options say so; what is in the images is another question."""
    format = arguments.text("f" if name == "create" else "O")
    return format == "luks" or any("encrypt" in one for one in arguments.texts("o"))


def failed(name: str, error: OSError) -> KvikError:
    """What the kernel refused, as an error that says what it was about."""
    import errno

    from kvik.errors import HostError

    remedies = {
        errno.ENOSPC: "make room, or choose another place",
        errno.EDQUOT: "make room within the quota, or choose another place",
        errno.EFBIG: "the limit on file sizes is too low (ulimit -f), or the file system has no files of this size",
        errno.ENOENT: "see whether its name is right",
        errno.EACCES: "its mode, or that of a directory above it, keeps you out: ls -l shows it",
        errno.EIO: "look into the kernel's log for the device; convert --salvage goes on where a source is unreadable",
    }
    what = f" {error.filename!r}" if error.filename else ""
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EROFS):
        name = "open"
    return HostError(
        f"cannot {name}{what}: {error.strerror or error}",
        errno=error.errno or 0,
        remedy=remedies.get(error.errno or 0, ""),
    )


def main() -> int:
    """The command `kvik-img`."""
    import sys

    from kvik.cli.main import main as kvik

    sys.argv[1:1] = ["img"]
    return kvik()


COMMANDS = {
    "img": Verb(
        img,
        "Disk images, with the commands and options of qemu-img: "
        + ", ".join(COMMANDS_OF_IMG)
        + ".\n'kvik img COMMAND --help' tells the options of one. Also as kvik-img.",
        Option("arguments", ALL, "a command of qemu-img with its options", metavar="argument"),
    )
}
