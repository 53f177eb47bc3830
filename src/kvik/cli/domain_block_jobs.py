"""blockcopy, blockpull, blockcommit, blockjob, blockresize: work on the disks of a running machine."""

from __future__ import annotations

import time

from kvik.cli import document
from kvik.cli.common import ACTIVE, SUFFIXES, pretty_size, scaled
from kvik.cli.options import DATA, FLAG, NUMBER, TEXT, Option, UsageError, Verb
from kvik.errors import OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.domain import Domain

# virDomainBlockRebaseFlags, virDomainBlockCopyFlags, virDomainBlockCommitFlags, virDomainBlockJobAbortFlags
REBASE_RELATIVE, REBASE_BYTES = 1 << 4, 1 << 6
COPY_FLAGS = {"shallow": 1 << 0, "reuse-external": 1 << 1, "transient-job": 1 << 2, "synchronous-writes": 1 << 3}
COMMIT_FLAGS = {
    "shallow": 1 << 0, "delete": 1 << 1, "active": 1 << 2, "keep-relative": 1 << 3, "bytes": 1 << 4,
}  # fmt: skip
COMMIT_ACTIVE = 1 << 2
ABORT_ASYNC, ABORT_PIVOT = 1 << 0, 1 << 1
IN_BYTES = 1
RESIZE_BYTES = 1
UINT, ULLONG = 2, 4  # virTypedParameterType
MIB = 1 << 20

COMPLETED, FAILED, CANCELED, READY = range(4)  # virConnectDomainEventBlockJobStatus
LABELS = ("Unknown job", "Block Pull", "Block Copy", "Block Commit", "Active Block Commit", "Backup")
POLL = 0.1  # seconds between two looks at a job
LOST = 5.0  # seconds from a job's end until its event is given up


class Watch:
    """Waits for a job of one disk, from before it is started so that no event of its end is missed."""

    def __init__(self, ctx: Context, domain: Domain, disk: str, options: Options, label: str) -> None:
        seconds = options.number("timeout")
        if seconds is not None and not 0 < seconds < 1 << 31:
            raise UsageError("invalid timeout")
        self.blocking = options.flag("wait") or seconds is not None
        self.verbose = options.flag("verbose")
        self.asynchronous = options.flag("async")
        self._seconds = seconds
        self._ctx, self._domain, self._disk, self._label = ctx, domain, disk, label
        self._target = disk

    def force(self, *options: bool) -> None:
        """What implies --wait."""
        self.blocking = self.blocking or any(options)
        if self.blocking:
            root = document.parse(self._domain.xml())
            disks = document.disks(root)
            self._target = next((item.target for item in disks if self._disk in (item.target, item.source)), self._disk)
            self._ctx.connection.register("block-job-2", self._domain)
        elif self.verbose or self.asynchronous:
            name = "verbose" if self.verbose else "async"
            raise UsageError(f"missing --wait option: --{name} is for waiting")

    def wait(self) -> int:
        """A virConnectDomainEventBlockJobStatus. An interrupt, or the time being over, aborts the job."""
        from kvik.cli.progress import Progress

        end = None if self._seconds is None else time.monotonic() + self._seconds
        lost = 0.0
        with Progress(self._ctx.stderr, quiet=not self.verbose) as progress:
            while True:
                try:
                    status = self._heard(POLL)
                    if status is not None:
                        if status in (COMPLETED, READY):
                            progress.bar(self._label, 1, 1)
                        return status
                    found, _, _, cur, total = self._ctx.connection.call(
                        "DOMAIN_GET_BLOCK_JOB_INFO", self._domain.ref, self._disk, 0
                    )
                    now = time.monotonic()
                    if found:
                        progress.bar(self._label, cur, total, is_bytes=True)
                        if end is not None and now > end:
                            end = None
                            self._abort()
                    else:
                        lost = lost or now
                        if now - lost > LOST:
                            raise OperationFailed("the job is over, and how it ended was not told")
                except KeyboardInterrupt:
                    self._abort()

    def _abort(self) -> None:
        self._ctx.connection.call(
            "DOMAIN_BLOCK_JOB_ABORT", self._domain.ref, self._disk, ABORT_ASYNC if self.asynchronous else 0
        )

    def _heard(self, seconds: float) -> int | None:
        from kvik.client.events import ConnectionClosed, DomainEvent

        event = self._ctx.connection.next_event(seconds)
        if isinstance(event, ConnectionClosed):
            raise OperationFailed("the daemon ended; the job goes on in the machine", remedy="look: kvik blockjob")
        if isinstance(event, DomainEvent) and event.kind == "block-job-2" and event.fields.get("dst") == self._target:
            return int(event.fields["status"])
        return None


def end_badly(ctx: Context, status: int, what: str) -> int:
    """Says of a job that it was aborted, and returns the exit code. Raises `OperationFailed` if it failed."""
    if status != CANCELED:
        raise OperationFailed(f"{what} failed", remedy="see the machine's log")
    ctx.extra()
    ctx.extra(f"{what} aborted")
    return 1


def settle(ctx: Context, domain: Domain, disk: str, *, pivot: bool, finish: bool, words: tuple[str, str, str]) -> None:
    """A job that is ready is told how to end; `words`: pivoted, finished, left as it is."""
    if pivot or finish:
        ctx.doing = f"failed to {'pivot' if pivot else 'finish'} job for disk {disk}"
        ctx.connection.call("DOMAIN_BLOCK_JOB_ABORT", domain.ref, disk, ABORT_PIVOT if pivot else 0)
    said(ctx, words[0] if pivot else words[1] if finish else words[2])


def said(ctx: Context, text: str) -> None:
    ctx.extra()
    ctx.say(text)


def bandwidth_of(options: Options) -> int:
    """As it was given; with --bytes a scaled number of bytes a second."""
    text = options.text("bandwidth")
    if text is None:
        return 0
    if options.flag("bytes"):
        return scaled(text, "bandwidth", 1)
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise UsageError(f"Scaled numeric value '{text}' for <--bandwidth> option is malformed or out of range")
    return int(text)


def blockcopy(ctx: Context, options: Options) -> int:
    domain, disk = ctx.domain(options.data("domain")), options.data("path")
    destination, file = options.text("dest"), options.text("xml")
    pivot, finish = options.flag("pivot"), options.flag("finish")
    if (destination is None) == (file is None):
        raise UsageError(
            "Options --dest and --xml are mutually exclusive" if file else "need either destination or xml"
        )
    if pivot and finish:
        raise UsageError("Options --pivot and --finish are mutually exclusive")
    kind, block = options.text("format"), options.flag("blockdev")
    if file is not None:
        if kind is not None or block:
            raise UsageError(f"Options --xml and --{'format' if kind else 'blockdev'} are mutually exclusive")
        text = ctx.read_file(file)
    else:
        text = _destination(destination or "", kind or _format_of(domain, disk, options), block=block)
    bits = sum(bit for name, bit in COPY_FLAGS.items() if options.flag(name))
    given = bandwidth_of(options)
    params: list[tuple[str, int, int]] = []
    if given:
        params.append(("bandwidth", ULLONG, given if options.flag("bytes") else given * MIB))
    granularity, buffer = options.number("granularity"), options.number("buf-size")
    if granularity is not None:
        params.append(("granularity", UINT, granularity))
    if buffer is not None:
        params.append(("buf-size", ULLONG, buffer))
    if options.flag("print-xml"):
        ctx.document(text)
        return 0
    watch = Watch(ctx, domain, disk, options, "Block Copy")
    watch.force(pivot, finish)
    ctx.connection.call("DOMAIN_BLOCK_COPY", domain.ref, disk, text, params, bits)
    if not watch.blocking:
        ctx.say("Block Copy started")
        return 0
    status = watch.wait()
    if status not in (READY, COMPLETED):
        return end_badly(ctx, status, "Copy")
    words = ("Successfully pivoted", "Successfully copied", "Now in mirroring phase")
    settle(ctx, domain, disk, pivot=pivot, finish=finish, words=words)
    return 0


def _format_of(domain: Domain, disk: str, options: Options) -> str | None:
    """Of a copy that is made: the disk's own. What is reused must be told: formats are never guessed."""
    if options.flag("reuse-external"):
        return "raw" if options.flag("blockdev") else None
    for item in document.disks(document.parse(domain.xml())):
        if disk in (item.target, item.source):
            return document.attribute(item.element, "driver", "type") or None
    return None


def _destination(path: str, kind: str | None, *, block: bool) -> str:
    source = document.tag("source", dev=path) if block else document.tag("source", file=path)
    driver = f"  {document.tag('driver', type=kind)}\n" if kind else ""
    return f"{document.open_tag('disk', type='block' if block else 'file')}\n  {source}\n{driver}</disk>\n"


def blockcommit(ctx: Context, options: Options) -> int:
    domain, disk = ctx.domain(options.data("domain")), options.data("path")
    pivot, keep = options.flag("pivot"), options.flag("keep-overlay")
    if pivot and keep:
        raise UsageError("Options --pivot and --keep-overlay are mutually exclusive")
    bits = sum(bit for name, bit in COMMIT_FLAGS.items() if options.flag(name))
    active = options.flag("active") or pivot or keep
    if active:
        bits |= COMMIT_ACTIVE
    watch = Watch(ctx, domain, disk, options, "Block commit")
    watch.force(pivot, keep)
    ctx.connection.call(
        "DOMAIN_BLOCK_COMMIT",
        domain.ref,
        disk,
        options.text("base"),
        options.text("top"),
        bandwidth_of(options),
        bits,
    )
    if not watch.blocking:
        ctx.say("Active Block Commit started" if active else "Block Commit started")
        return 0
    status = watch.wait()
    if status not in (READY, COMPLETED):
        return end_badly(ctx, status, "Commit")
    if active:
        words = ("Successfully pivoted", "Commit complete, overlay image kept", "Now in synchronized phase")
        settle(ctx, domain, disk, pivot=pivot, finish=keep, words=words)
    else:
        said(ctx, "Commit complete")
    return 0


def blockpull(ctx: Context, options: Options) -> int:
    domain, disk = ctx.domain(options.data("domain")), options.data("path")
    base = options.text("base")
    bits = (REBASE_RELATIVE if options.flag("keep-relative") else 0) | (REBASE_BYTES if options.flag("bytes") else 0)
    watch = Watch(ctx, domain, disk, options, "Block Pull")
    watch.force()
    given = bandwidth_of(options)
    if base is None and not options.flag("keep-relative"):
        ctx.connection.call("DOMAIN_BLOCK_PULL", domain.ref, disk, given, bits)
    else:
        ctx.connection.call("DOMAIN_BLOCK_REBASE", domain.ref, disk, base, given, bits)
    if not watch.blocking:
        ctx.say("Block Pull started")
        return 0
    status = watch.wait()
    if status != COMPLETED:
        return end_badly(ctx, status, "Pull")
    said(ctx, "Pull complete")
    return 0


def blockjob(ctx: Context, options: Options) -> int:
    domain, disk = ctx.domain(options.data("domain")), options.data("path")
    raw, in_bytes, pivot = options.flag("raw"), options.flag("bytes"), options.flag("pivot")
    later = options.flag("async")
    end = options.flag("abort") or later or pivot
    given = options.text("bandwidth")
    modes = [name for name, on in (("abort", end), ("info", options.flag("info") or raw), ("bandwidth", given)) if on]
    if len(modes) > 1:
        raise UsageError("conflict between abort, info, and bandwidth modes")
    if in_bytes and end:
        raise UsageError("--bytes requires info or bandwidth mode")
    if end:
        bits = (ABORT_ASYNC if later else 0) | (ABORT_PIVOT if pivot else 0)
        ctx.connection.call("DOMAIN_BLOCK_JOB_ABORT", domain.ref, disk, bits)
        return 0
    if given is not None:
        ctx.connection.call(
            "DOMAIN_BLOCK_JOB_SET_SPEED", domain.ref, disk, bandwidth_of(options), IN_BYTES if in_bytes else 0
        )
        return 0
    found, kind, bandwidth, cur, total = ctx.connection.call(
        "DOMAIN_GET_BLOCK_JOB_INFO", domain.ref, disk, IN_BYTES if in_bytes else 0
    )
    label = LABELS[kind] if 0 <= kind < len(LABELS) else LABELS[0]
    facts = {"type": label, "bandwidth": bandwidth, "cur": cur, "end": total} if found else {}
    if ctx.put(facts):
        return 0
    if not found:
        if not raw and not ctx.quiet:
            ctx.last(f"No current block job for {disk}")
        return 0
    if raw:
        for name, value in facts.items():
            ctx.line(f" {name}={value}")
        return 0
    done = 100 if cur == total else min(99, cur * 100 // total if total else 0)
    text = f"{label}: [{done:3} %]"
    if bandwidth:
        rate = bandwidth if in_bytes else bandwidth * MIB
        text += f"    Bandwidth limit: {rate} bytes/s ({pretty_size(rate)}/s)"
    ctx.line(text)
    return 0


def blockresize(ctx: Context, options: Options) -> int:
    domain, disk = ctx.domain(options.data("domain")), options.data("path")
    text, full = options.text("size"), options.flag("capacity")
    if (text is None) == (not full):
        raise UsageError("Options --size and --capacity are mutually exclusive" if full else "either is required: "
                         "<size>, or --capacity")  # fmt: skip
    size = scaled(text, "size", SUFFIXES["k"]) if text is not None else 0
    bits = RESIZE_BYTES | (2 if full else 0)
    ctx.connection.call("DOMAIN_BLOCK_RESIZE", domain.ref, disk, size, bits)
    ctx.say(f"Block device '{disk}' is resized")
    return 0


PATH = Option("path", DATA, "fully-qualified path of disk", complete="disk")
BANDWIDTH = Option("bandwidth", TEXT, "bandwidth limit in MiB/s", metavar="number")
WAITING = (
    Option("wait", FLAG, "wait for job to finish"),
    Option("verbose", FLAG, "with --wait, display the progress"),
    Option("timeout", NUMBER, "implies --wait, abort if it exceeds timeout (in seconds)"),
)
ASYNC = Option("async", FLAG, "with --wait, don't wait for cancel to finish")
BYTES = Option("bytes", FLAG, "the bandwidth limit is in bytes/s rather than MiB/s")
RELATIVE = Option("keep-relative", FLAG, "keep the backing chain relatively referenced")

COMMANDS = {
    "blockcopy": Verb(
        blockcopy,
        "Copy a disk backing image chain to dest.\n"
        "With --pivot the machine then runs on the copy: its disk has moved, and it never stopped.",
        ACTIVE,
        Option("path", DATA, "fully-qualified path of source disk", complete="disk"),
        Option("dest", TEXT, "path of the copy to create", complete="file"),
        BANDWIDTH,
        Option("shallow", FLAG, "make the copy share a backing chain"),
        Option("reuse-external", FLAG, "reuse existing destination"),
        Option("blockdev", FLAG, "copy destination is block device instead of regular file"),
        *WAITING,
        Option("pivot", FLAG, "implies --wait, pivot when mirroring starts"),
        Option("finish", FLAG, "implies --wait, quit when mirroring starts"),
        ASYNC,
        Option("xml", TEXT, "filename containing XML description of the copy destination", complete="file"),
        Option("format", TEXT, "format of the destination file", complete=("raw", "qcow2")),
        Option("granularity", NUMBER, "power-of-two granularity to use during the copy"),
        Option("buf-size", NUMBER, "maximum amount of in-flight data during the copy"),
        BYTES,
        Option("transient-job", FLAG, "the copy job is not persisted if VM is turned off"),
        Option(
            "synchronous-writes",
            FLAG,
            "the copy job forces guest writes to be synchronously written to the destination",
        ),
        Option("print-xml", FLAG, "print the XML used to start the copy job instead of starting the job"),
    ),
    "blockcommit": Verb(
        blockcommit,
        "Commit changes from a snapshot down to its backing image.",
        ACTIVE,
        PATH,
        BANDWIDTH,
        Option("base", TEXT, "path of base file to commit into (default bottom of chain)"),
        Option("shallow", FLAG, "use backing file of top as base"),
        Option("top", TEXT, "path of top file to commit from (default top of chain)"),
        Option("active", FLAG, "trigger two-stage active commit of top file"),
        Option("delete", FLAG, "delete files that were successfully committed"),
        *WAITING,
        Option("pivot", FLAG, "implies --active --wait, pivot when commit is synced"),
        Option("keep-overlay", FLAG, "implies --active --wait, quit when commit is synced"),
        ASYNC,
        RELATIVE,
        BYTES,
    ),
    "blockpull": Verb(
        blockpull,
        "Populate a disk from its backing image.",
        ACTIVE,
        PATH,
        BANDWIDTH,
        Option("base", TEXT, "path of backing file in chain for a partial pull"),
        *WAITING,
        ASYNC,
        RELATIVE,
        BYTES,
    ),
    "blockjob": Verb(
        blockjob,
        "Query, adjust speed, or cancel active block operations.",
        ACTIVE,
        PATH,
        Option("abort", FLAG, "abort the active job on the specified disk"),
        Option("async", FLAG, "implies --abort; request but don't wait for job end"),
        Option("pivot", FLAG, "implies --abort; conclude and pivot a copy or commit job"),
        Option("info", FLAG, "get active job information for the specified disk"),
        Option("bytes", FLAG, "get/set bandwidth in bytes rather than MiB/s"),
        Option("raw", FLAG, "implies --info; output details rather than human summary"),
        Option("bandwidth", TEXT, "set the bandwidth limit in MiB/s", metavar="number"),
    ),
    "blockresize": Verb(
        blockresize,
        "Resize block device of domain.",
        ACTIVE,
        Option("path", DATA, "Fully-qualified path of block device", complete="disk"),
        Option("size", TEXT, "New size of the block device, as scaled integer (default KiB)", metavar="number"),
        Option("capacity", FLAG, "resize to capacity of source (block device)"),
    ),
}
