"""kvik img: what its commands are called and what they take, as qemu-img 7.2 has it."""

from __future__ import annotations

__all__ = ["COMMANDS_OF_IMG", "Command"]

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
    "object": ("object", "OBJECT", "secret,id=NAME,file=FILE: the passphrase of an encrypted image"),
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
        for option in (*options, "object", "h", "json", "no-color"):
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
    "bench": Command(
        "img_bench",
        "how fast requests to an image are",
        "FILE",
        1,
        1,
        ("c", "", "COUNT", "so many requests (default 75000)"),
        ("d", "", "DEPTH", "so many at once (default 64)"),
        "f",
        ("flush-interval", "flush-interval", "COUNT", "with -w: flush after so many requests"),
        ("i", "", "AIO", "as qemu-img's: threads, native or io_uring"),
        "image-opts",
        ("n", "", "", "as -i native"),
        ("no-drain", "no-drain", "", "as qemu-img's: do not wait for the others before a flush"),
        ("o", "", "OFFSET", "of the first request"),
        ("pattern", "pattern", "BYTE", "with -w: what is written (default 0)"),
        "q",
        ("s", "", "SIZE", "bytes of a request (default 4k)"),
        ("S", "", "SIZE", "from one request to the next (default: as -s)"),
        "t",
        ("w", "", "", "write, instead of reading"),
        "U",
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
