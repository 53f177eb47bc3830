"""kvikd: the command. Reads its options, becomes a daemon if asked to, runs the server on uvloop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import logging.handlers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvik import __version__
from kvik.errors import KvikError, ResourceBusy
from kvik.paths import Paths

__all__ = ["main"]

log = logging.getLogger("kvik.daemon")

SESSION_IDLE = 120.0  # seconds after which a session's daemon ends; machines outlive it
LOG_SIZE = 4 * 1024 * 1024  # bytes of kvikd.log before it is rotated, once
LOCK_PATIENCE = 5.0  # seconds to wait for a daemon that is just ending
FAILED = 1


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="kvikd", description="The daemon that manages kvik's machines.")
    scope = result.add_mutually_exclusive_group()
    scope.add_argument("--system", action="store_true", help="serve the host's machines (default for root)")
    scope.add_argument("--session", action="store_true", help="serve this user's machines (default for anyone else)")
    result.add_argument("--root", metavar="DIR", help="keep all state below DIR")
    result.add_argument("--socket", metavar="PATH", help="listen here instead of in the run directory")
    result.add_argument("--detach", action="store_true", help="return once the socket answers; go on in the background")
    result.add_argument(
        "--idle-timeout",
        type=float,
        metavar="S",
        help=f"end after S seconds without a client; 0: never (default: {SESSION_IDLE:g} in a session, else 0)",
    )
    result.add_argument(
        "--driver", choices=("qemu", "test"), default="qemu", help="test: machines exist in memory only"
    )
    result.add_argument(
        "--zygote",
        choices=("on", "off"),
        default="on",
        help="on: machines of kvik-vmm are forks of one process that is kept ready, and start sooner (default: on)",
    )
    result.add_argument(
        "--default-network",
        choices=("on", "off"),
        help="on: the network 'default' is made and started on first use (default: on for the host's own machines; "
        "off in a session, with --root and with KVIK_ROOT)",
    )
    result.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    result.add_argument("--version", action="version", version=f"kvikd {__version__}")
    return result


def scope_paths(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Paths:
    """The directories that the options mean."""
    session = options.session or (not options.system and os.geteuid() != 0)
    if not session:
        return Paths.system(options.root, environ)
    if options.root:
        root = Path(options.root).absolute()
        environ = {"HOME": str(root), "XDG_RUNTIME_DIR": str(root / "run")}
    return Paths.session(environ)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.idle_timeout is not None and not 0 <= options.idle_timeout < 1e9:
        parser().error("--idle-timeout must be 0 or more seconds")
    if options.root:
        options.root = str(Path(options.root).absolute())
    paths = scope_paths(options)
    os.umask(0o077)
    if not options.detach:
        return run(options, paths, lambda: None)
    return detach(lambda ready: run(options, paths, ready), paths)


# --- becoming a daemon ------------------------------------------------------------------------------------------------


def detach(serve: Callable[[Callable[[], None]], int], paths: Paths) -> int:
    """Run `serve` in the background. Returns in the caller's process when it is ready, or failed."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        if answer == b"ready":
            return 0
        sys.stderr.write(answer.decode(errors="replace") or "kvikd: error: ended before it was ready\n")
        return FAILED
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    status = FAILED
    try:
        paths.log.mkdir(mode=0o700, parents=True, exist_ok=True)
        null = os.open(os.devnull, os.O_RDWR)
        # Messages of the start go to whoever waits on the pipe as well as to the log.
        sys.stderr = _Tee(writer)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)

        def ready() -> None:
            with contextlib.suppress(BrokenPipeError):  # who waited had no more patience; the next one finds us
                os.write(writer, b"ready")
            os.close(writer)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the life of the process

        status = serve(ready)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.write(writer, f"kvikd: error: {error}\n".encode())
    finally:
        os._exit(status)


class _Tee:
    """Stands for stderr until the daemon is ready."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self.fd, text.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        pass


# --- running ----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, paths: Paths, ready: Callable[[], None]) -> int:
    """Serve until told to end. Returns the exit code."""
    start_logging(options, paths)
    raise_file_limit()
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options, paths, ready))
    except (KvikError, OSError) as error:
        log.error("cannot serve: %s", error)
        if options.detach:
            sys.stderr.write(f"kvikd: error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


async def serve(options: argparse.Namespace, paths: Paths, ready: Callable[[], None]) -> None:
    from kvik.daemon.server import Server
    from kvik.manager.drivers import make_drivers
    from kvik.manager.manager import Manager
    from kvik.manager.node import Node

    manager = Manager(
        paths,
        make_drivers(paths, options.driver, zygote=options.zygote == "on"),
        default_network=wants_default_network(options, paths),
    )
    idle = options.idle_timeout
    if idle is None:
        idle = SESSION_IDLE if paths.scope == "session" else 0.0
    server = Server(
        manager,
        paths,
        node=Node(manager),
        socket_path=Path(options.socket).absolute() if options.socket else None,
        idle_timeout=idle,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop, f"received {signal.Signals(number).name}")
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a closed terminal is no reason to end

    deadline = time.monotonic() + LOCK_PATIENCE

    def started() -> None:
        # What was made so far stays: keep the collector from walking it over and over.
        gc.collect()
        gc.freeze()
        # After freezing, the collector takes the heap for empty and would walk all of what comes next again and again
        # while machines are defined: a fifth of that time. Cycles are rare here, so it may look less often.
        gc.set_threshold(20_000, 20, 10)
        ready()

    while True:
        try:
            await server.run(started)
            return
        except ResourceBusy:
            # Perhaps a daemon that is ending: its socket is gone already, its lock goes last.
            if time.monotonic() > deadline or server.socket_path.exists():
                raise
            await asyncio.sleep(0.05)


def wants_default_network(options: argparse.Namespace, paths: Paths, environ: Mapping[str, str] = os.environ) -> bool:
    """Of the system's, only the host's own daemon takes an address range unasked; one that is kept elsewhere is a guest
    here. A session's network takes nothing of the host's."""
    if options.default_network is not None:
        return bool(options.default_network == "on")
    if paths.scope == "session":
        return True
    return os.geteuid() == 0 and not options.root and not environ.get("KVIK_ROOT")


def start_logging(options: argparse.Namespace, paths: Paths) -> None:
    """To stderr in the foreground, to kvikd.log (bounded, mode 0600) in the background."""
    logger = logging.getLogger("kvik")
    logger.setLevel(options.log_level.upper())
    handler: logging.Handler
    if options.detach:
        try:
            handler = logging.handlers.RotatingFileHandler(
                paths.log / "kvikd.log", maxBytes=LOG_SIZE, backupCount=1, encoding="utf-8", delay=True
            )
        except OSError:
            handler = logging.NullHandler()
    else:
        handler = logging.StreamHandler()
    logging.raiseExceptions = False  # a full disk must not stop the daemon, nor fill stderr
    handler.setFormatter(logging.Formatter("%(asctime)s kvikd[%(process)d] %(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False


def raise_file_limit() -> None:
    """As many descriptors as the host allows: every client and every machine takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
