"""kvik img: qemu-img's commands and options, on kvik's own image formats. `kvik-img` is the same in one word.

The grammar is getopt's, as qemu-img has it: clustered short options, long options by any clear beginning, options and
files mixed freely. Exit codes are qemu-img's, too.
"""

from __future__ import annotations

from kvik.cli.options import ALL, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.errors import KvikError

# option: (long name, what its value is called or "", help)
HELP = {
    "f": ("", "FMT", "format of the image; by default it is looked at"),
    "F": ("", "FMT", "format of the second or backing image"),
    "O": ("", "FMT", "format of the output"),
    "o": ("", "OPTIONS", "options of the format, name=value,...; 'help' lists them"),
    "b": ("", "FILE", "backing file"),
    "B": ("", "FILE", "backing file of the output"),
    "U": ("force-share", "", "open an image that another process writes"),
    "q": ("", "", "print nothing but errors"),
    "t": ("", "CACHE", "as qemu-img's; what is written is on disk at the end in any case"),
    "T": ("", "CACHE", "as qemu-img's"),
    "p": ("", "", "show progress"),
    "image-opts": ("image-opts", "", "FILE is driver=FMT,file.filename=NAME instead of a name"),
    "alone": ("alone", "", "read nothing that an image refers to: an error where that is needed"),
    "h": ("help", "", "print this"),
    "output": ("output", "FORMAT", "human or json"),
    "json": ("json", "", "as --output=json"),
    "no-color": ("no-color", "", "never colour the output"),
}


class Command:
    """One command: where its handler is, and what it takes.

    `options` lists keys of `HELP`, or (key, long name, value's name, help) for those with a meaning of their own.
    """

    __slots__ = ("arguments", "least", "module", "most", "options", "summary")

    def __init__(
        self,
        module: str,
        summary: str,
        arguments: str,
        least: int,
        most: int | None,
        *options: str | tuple[str, str, str, str],
    ) -> None:
        self.module = module
        self.summary = summary
        self.arguments = arguments
        self.least = least
        self.most = most
        self.options: dict[str, tuple[str, str, str]] = {}
        for option in (*options, "h", "json", "no-color"):
            if isinstance(option, str):
                self.options[option] = HELP[option]
            else:
                self.options[option[0]] = option[1:]

    def usage(self, name: str) -> str:
        from textwrap import wrap

        lines = [f"usage: kvik img {name} [options] {self.arguments}", "", f"  {self.summary}", ""]
        for key, (long, value, text) in self.options.items():
            short = f"-{key}" if len(key) == 1 else ""
            left = ", ".join(part for part in (short, f"--{long}" if long else "") if part) + (
                f" {value}" if value else ""
            )
            first, *more = wrap(text, 51)
            lines.append(f"  {left:<26} {first}")
            lines += [" " * 29 + line for line in more]
        return "\n".join(lines) + "\n"


class Arguments:
    """Parsed words of one command."""

    __slots__ = ("files", "order", "values")

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}
        self.order: list[tuple[str, str]] = []  # options with their values, as they were given
        self.files: list[str] = []

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


COMMANDS_OF_IMG: dict[str, Command] = {
    "amend": Command(
        "img_amend",
        "change options of an image",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        "o",
        ("force", "force", "", "as qemu-img's: nothing here needs it"),
        "t",
        "p",
        "q",
    ),
    "bitmap": Command(
        "img_bitmap",
        "change persistent bitmaps, by one or several actions in their order",
        "FILE BITMAP",
        2,
        2,
        ("add", "add", "", "make it, and record writes in it"),
        ("remove", "remove", "", "take it away"),
        ("clear", "clear", "", "clear all its bits"),
        ("enable", "enable", "", "record writes in it"),
        ("disable", "disable", "", "record no more writes in it"),
        ("merge", "merge", "SOURCE", "add another bitmap's bits"),
        ("g", "granularity", "SIZE", "bytes a bit stands for, with --add"),
        ("b", "source-file", "FILE", "the image that has the SOURCE of --merge"),
        ("F", "source-format", "FMT", "the format of that image"),
        "f",
        "image-opts",
    ),
    "check": Command(
        "img_look",
        "look for inconsistencies, and repair them with -r",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        ("r", "repair", "WHAT", "leaks: only what wastes room; all: everything"),
        "T",
        "output",
        "q",
        "U",
    ),
    "commit": Command(
        "img_layers",
        "write what an image has into its backing file, and empty it",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        ("b", "", "FILE", "an image further down the chain, whose upper layers all are written into it; as with -d"),
        ("d", "", "", "leave the image as it is, not emptied"),
        ("r", "", "RATE", "bytes a second at most"),
        "t",
        "p",
        "q",
    ),
    "compare": Command(
        "img_size",
        "whether two images hold the same data",
        "FILE1 FILE2",
        2,
        2,
        "f",
        "image-opts",
        "alone",
        "T",
        ("F", "", "FMT", "format of the second image"),
        ("s", "", "", "strict: sizes and what is allocated must be the same, too"),
        "p",
        "q",
        "U",
    ),
    "convert": Command(
        "img_convert",
        "copy images into one of another format, several one after the other",
        "FILE [FILE2...] TARGET",
        2,
        None,
        ("f", "", "FMT", "format of the sources"),
        "image-opts",
        "alone",
        ("target-image-opts", "target-image-opts", "", "with -n: the target is named by such options, too"),
        "O",
        "o",
        ("c", "", "", "compress what is written"),
        ("S", "", "SIZE", "so many bytes of zeros become a hole (default 4k; 0: all is allocated)"),
        "B",
        ("F", "", "FMT", "format of the backing file"),
        (
            "l",
            "",
            "SNAPSHOT",
            "an internal snapshot of the source: its id or name, snapshot.id=, snapshot.name=; of an OVA: a disk",
        ),
        ("n", "", "", "write into a target that exists"),
        ("target-is-zero", "target-is-zero", "", "with -n: the target reads as zero"),
        ("C", "", "", "let the kernel copy"),
        ("m", "", "NUMBER", "threads that read and compress (1 to 16)"),
        ("W", "", "", "accepted: the order of writes is the writer's own affair"),
        ("r", "", "RATE", "write at most so many bytes a second"),
        ("t", "", "CACHE", "cache mode of the target: all but unsafe (the default) see the data on disk"),
        ("T", "", "CACHE", "cache mode of the sources"),
        ("salvage", "salvage", "", "go on where the source cannot be read, with zeros"),
        ("bitmaps", "bitmaps", "", "copy the source's bitmaps, too"),
        ("skip-broken-bitmaps", "skip-broken-bitmaps", "", "with --bitmaps: those that are consistent"),
        "p",
        "q",
        "U",
    ),
    "create": Command(
        "img_make",
        "make a new image",
        "FILE [SIZE]",
        1,
        2,
        "f",
        "b",
        "F",
        ("u", "", "", "do not look at the backing file"),
        "o",
        "q",
    ),
    "dd": Command(
        "img_dd",
        "copy part of an image into a new one",
        "[bs=SIZE] [count=N] [skip=N] if=FILE of=FILE",
        2,
        None,
        "f",
        "image-opts",
        "alone",
        "O",
        "U",
    ),
    "info": Command(
        "img_look",
        "what an image is",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        "alone",
        "output",
        ("backing-chain", "backing-chain", "", "all images of the chain"),
        ("l", "", "NAME", "of an OVA: which of its disks"),
        "U",
    ),
    "map": Command(
        "img_look",
        "where an image has data",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        "alone",
        "output",
        ("s", "start-offset", "OFFSET", "begin here"),
        ("l", "max-length", "LENGTH", "look at so much"),
        "U",
    ),
    "rebase": Command(
        "img_layers",
        "put an image on top of another backing file",
        "FILE",
        1,
        1,
        "f",
        "image-opts",
        ("b", "", "FILE", "the new backing file, as the image is to name it; '' for none"),
        "F",
        ("u", "", "", "unsafe: only change the name, whatever is in the files"),
        "t",
        "T",
        "p",
        "q",
        "U",
    ),
    "snapshot": Command(
        "img_snapshot",
        "list, make, apply or delete internal snapshots",
        "FILE",
        1,
        1,
        ("l", "", "", "list them (the default)"),
        ("c", "", "NAME", "make one"),
        ("a", "", "SNAPSHOT", "apply one, by id or name: the disk becomes what it was"),
        ("d", "", "SNAPSHOT", "delete one, by name or id"),
        "f",
        "image-opts",
        "output",
        "q",
        "U",
    ),
    "measure": Command(
        "img_size",
        "how much room an image will take",
        "[FILE]",
        0,
        1,
        "f",
        "image-opts",
        "alone",
        "O",
        "o",
        ("size", "size", "SIZE", "of a new image, instead of FILE"),
        ("l", "", "SNAPSHOT", "an internal snapshot of the image"),
        "output",
        "U",
    ),
    "resize": Command(
        "img_size",
        "make an image bigger or smaller",
        "FILE [+|-]SIZE",
        2,
        2,
        "f",
        "image-opts",
        ("shrink", "shrink", "", "let it become smaller: what is behind its new end is lost"),
        ("preallocation", "preallocation", "MODE", "room for the new part: off, metadata, falloc, full"),
        "q",
    ),
}


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
        module = __import__(f"kvik.cli.{command.module}", fromlist=["HANDLERS"])
        if name != "dd" and (arguments.flag("image-opts") or arguments.flag("target-image-opts")):
            from kvik.cli.img_opts import use_image_opts

            use_image_opts(name, arguments)
        code: int = module.HANDLERS[name](ctx, arguments) or 0
    except UsageError as error:
        if name != "compare":
            raise
        ctx.error(error)
        return 2  # 1 says that images differ
    except BrokenPipeError:
        raise
    except OSError as error:
        raise failed(name, error) from error
    finally:
        ctx.json = before
    return code


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
