"""kvik img: encrypted images (LUKS, and qcow2 with LUKS or AES inside), by a confined qemu-img.

Nothing here encrypts or decrypts. qemu-img is given the command as it is, passphrases as files in memory, and leave to
open the images of the chains that the command names, as they were opened here: no other file, and no network.
"""

from __future__ import annotations

import os
import re

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.cli.img_commands import Command
    from kvik.cli.img_progress import ImageProgress
    from kvik.image.base import Image

__all__ = ["run"]

NATIVE = ("bitmap", "info")  # need no key
NEW = ("convert", "create", "dd")  # make an image
SHOW_PROGRESS = ("amend", "commit", "compare", "convert", "rebase")
LONGEST = 256 << 20  # bytes of what qemu-img prints: maps are long
SLOWEST = 16 << 20  # bytes a second that it encrypts at the least
OURS = ("alone", "json", "no-color", "object", "p")
_SHARE = re.compile(rb" *\((\d+)\.(\d\d)/100%\)\r")


class _Files:
    """The files of a command, open, and which of them it may write."""

    def __init__(self, stack: ExitStack, *, share: bool, alone: bool) -> None:
        from kvik.image.opening import Opener

        self._stack = stack
        self._opener = Opener(lock=False, share=share, alone=alone)  # QEMU locks them
        self.readable: list[int] = []
        self.writable: list[int] = []
        self.encrypted = False
        self.size = 0  # bytes of all disks together

    def add(
        self, path: str, format: str | None, *, write: bool = False, write_layer: int = 0, chain: bool = True
    ) -> None:
        """An image with what is below it. With `write` it may be written, with `write_layer` also one so far below."""
        from kvik.image.luks import is_encrypted

        image = self._open(path, format, chain)
        self._stack.callback(image.release)
        for depth, layer in enumerate(image.chain()):
            wanted = self.writable if write and depth in (0, write_layer) else self.readable
            wanted += {layer.fd, layer.data_fd} - {-1}
            self.encrypted |= is_encrypted(layer)
            self.size += layer.size

    def _open(self, path: str, format: str | None, chain: bool) -> Image:
        from kvik.image.opening import FOREIGN, open_file, open_image, probe_format

        fd = open_file(path, writable=False)
        found = format or probe_format(fd)
        if found in FOREIGN:  # qemu-img reads them anyway
            return open_image(fd, format="raw", path=path)
        os.close(fd)
        return self._opener.open(path, found, chain=chain)

    def make(self, path: str) -> None:
        """A file that is to become an image; undone if it does not."""
        from kvik.image.fresh import Fresh

        self.fresh = self._stack.enter_context(Fresh(path, lock=False))
        self.writable.append(self.fresh.fd)


def run(ctx: Context, name: str, command: Command, given: Arguments, arguments: Arguments) -> int | None:
    """The exit code; None where nothing is encrypted, or the command needs no key. `given` are the arguments as they
    were given, `arguments` the same with names in place of options."""
    from contextlib import ExitStack

    from kvik.cli.img import makes_encrypted
    from kvik.cli.img_objects import lend, parse_secret

    if name in NATIVE or "help" in arguments.texts("o"):
        for text in arguments.texts("object"):
            parse_secret(text)
        return None
    with ExitStack() as stack:
        objects, keys = lend(arguments.texts("object"), stack)
        files = _Files(stack, share=arguments.flag("U"), alone=arguments.flag("alone"))
        files.encrypted = makes_encrypted(name, arguments)
        target = _add_files(files, name, arguments)
        if not files.encrypted:
            return None
        if name == "bench":
            raise UsageError("bench does not read encrypted images", remedy="measure what is on them in a machine")
        if target is not None:
            files.make(target)
        code = _run(ctx, [name, *objects, *_words(command, given)], arguments, files, keys)
        if not code and target is not None:
            files.fresh.keep()
    return code


def _add_files(files: _Files, name: str, arguments: Arguments) -> str | None:
    """All that the command reads and writes; the name of what it makes."""
    from kvik.image.create import parse_size
    from kvik.image.opening import beside

    text, names = arguments.text, arguments.files
    if name == "create":
        if len(names) > 1:
            files.size += parse_size(names[1])
        _add_backing(files, names[0], arguments, "b", look=not arguments.flag("u"))
        return names[0]
    if name == "measure":
        for one in names:
            files.add(one, text("f"))
        return None
    if name == "dd":
        words = dict(word.partition("=")[::2] for word in names)
        if not words.get("if") or not words.get("of"):
            return None
        from kvik.cli.img_opts import parse_image_opts

        opts = parse_image_opts(words["if"]) if arguments.flag("image-opts") else (words["if"], text("f"))
        files.add(*opts)
        return words["of"]
    if name == "compare":
        files.add(names[0], text("f"))
        files.add(names[1], text("F"))
        return None
    if name == "convert":
        for number, one in enumerate(names[:-1]):
            files.add(one, arguments.format(number))
        if arguments.flag("n"):
            files.add(names[-1], text("O"), write=True)
            return None
        _add_backing(files, names[-1], arguments, "B")
        return names[-1]
    writes = {"check": arguments.flag("r"), "map": False, "snapshot": not arguments.flag("l")}.get(name, True)
    layer = 0
    if name == "commit":
        from kvik.cli.img_layers import depth_of

        layer = depth_of(names[0], text("f"), text("b"))
    only_named = name == "rebase" and arguments.flag("u")
    files.add(names[0], text("f"), write=writes, write_layer=layer, chain=not only_named)
    if name == "resize":
        files.size += parse_size(names[1].lstrip("+-"))
    if name == "rebase" and text("b") and not only_named:
        files.add(beside(names[0], text("b") or ""), text("F"))
    return None


def _add_backing(files: _Files, path: str, arguments: Arguments, key: str, *, look: bool = True) -> None:
    from kvik.image.create import parse_size
    from kvik.image.opening import beside, plain_file

    options: dict[str, str] = {}
    for word in arguments.texts("o"):
        for one in word.replace(",,", "\0").split(","):
            option, _, value = one.replace("\0", ",").partition("=")
            options[option] = value
    if "data_file" in options:
        raise UsageError("an encrypted image with an external data file is not made here")
    if options.get("size"):
        files.size += parse_size(options["size"])
    name = arguments.text(key) or options.get("backing_file")
    if name is not None and look:
        format = arguments.text("F") or options.get("backing_fmt")
        files.add(beside(path, plain_file(name, "backing file", path)), format)


def _words(command: Command, given: Arguments) -> list[str]:
    """The command line again, without what qemu-img does not know."""
    words = []
    for key, value in given.order:
        if key in OURS:
            continue
        long, takes_value, _ = command.options[key]
        if len(key) == 1:
            words += [f"-{key}", value] if takes_value else [f"-{key}"]
        else:
            words.append(f"--{long}={value}" if takes_value else f"--{long}")
    return [*words, "--", *given.files]


def _run(ctx: Context, words: list[str], arguments: Arguments, files: _Files, keys: list[int]) -> int:
    from kvik.cli.img_progress import ImageProgress
    from kvik.host.jail import run_qemu_img

    name = words[0]
    options = ["--output=json"] if ctx.json and name in ("check", "map", "measure") else []
    told = name in SHOW_PROGRESS and not arguments.flag("q")
    with ImageProgress(ctx, arguments, name) as progress:
        done = run_qemu_img(
            [name, *options, *(["-p"] if told else []), *words[1:]],
            readable=files.readable,
            writable=files.writable,
            private=keys,
            seconds=120 + files.size // SLOWEST,
            size=2 * files.size + (256 << 20),  # with tables of either format
            limit=LONGEST,
            listen=_listener(progress) if told else None,
        )
        out = done.out
        if told:
            out = _SHARE.sub(b"", out)  # after the last of which QEMU begins a new line, wherever it says the rest
            out = out[1:] if out.startswith(b"\n") else out.removesuffix(b"\n")
    if out.strip():
        ctx.document(out.decode("utf-8", "surrogateescape"))
    for line in done.err.decode("utf-8", "replace").splitlines():
        if "deleting file" not in line:  # which is done here
            ctx.warn(f"error: {line.removeprefix('qemu-img: ')}" if line.startswith("qemu-img: ") else line)
    if done.code < 0:
        from kvik.errors import HostError
        from kvik.host.process import describe_exit

        raise HostError(f"qemu-img, which is run confined for encrypted images, failed ({describe_exit(done.code)})")
    return done.code


def _listener(progress: ImageProgress) -> Callable[[bytes], None]:
    def listen(data: bytes) -> None:
        for whole, rest in _SHARE.findall(data):
            progress(int(whole) * 100 + int(rest), 10000)

    return listen
