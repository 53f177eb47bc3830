"""What every verb is given: global options, the connection (opened on first use), and the way to print."""

from __future__ import annotations

import os
import sys

from kvik.cli import term
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

    from kvik.client import Connection, Domain, Network


def connect(uri: str | None, readonly: bool) -> Connection:
    from kvik.client import connect as client_connect

    return client_connect(uri, readonly=readonly)


class Quit(Exception):
    """`quit` or `exit` was typed: the shell ends, and so does a command line of one such word."""


class Context:
    """One run of the command, or one interactive shell."""

    def __init__(
        self,
        *,
        uri: str | None = None,
        readonly: bool = False,
        quiet: bool = False,
        timing: bool = False,
        json: bool = False,
        colour: bool | None = None,
        escape: str = "^]",
        connector: Callable[[str | None, bool], Connection] = connect,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        stdin: TextIO | None = None,
    ) -> None:
        self.uri = uri
        self.readonly = readonly
        self.quiet = quiet
        self.timing = timing
        self.json = json
        self.escape = escape
        self.interactive = False
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.stdin = stdin or sys.stdin
        self.colour = term.wants_colour(self.stdout) if colour is None else colour
        # What the verb was doing: the first line of its error message ("Failed to start domain 'x'").
        self.doing = ""
        self._connector = connector
        self._connection: Connection | None = None
        # virsh ends a command with a blank line, but for those whose data ends with it.
        self.blank = True
        self._printed_json = False
        self._said: list[str] = []

    # connection

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = self._connector(self.uri, self.readonly)
        return self._connection

    def another_connection(self) -> Connection:
        """A read-only one beside the first, for what is asked while that waits; the caller closes it."""
        return self._connector(self.uri, True)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def reconnect(self, uri: str | None, readonly: bool) -> None:
        self.close()
        self.uri, self.readonly = uri, readonly
        self._connection = self._connector(uri, readonly)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def domain(self, key: str) -> Domain:
        """The machine that `key` (id, UUID or name) means; the error suggests a name that looks like it."""
        from kvik.errors import NoDomain

        try:
            return self.connection.domain(key)
        except NoDomain as error:
            from kvik.cli.suggest import nearest

            near = nearest(key, [domain.name for domain in self.connection.domains()])
            remedy = f"did you mean '{near}'?" if near else "'kvik list --all' shows every machine"
            raise NoDomain(f"failed to get domain '{key}'", remedy=remedy) from error

    def network(self, key: str, *, by_name: bool = False) -> Network:
        """The network that `key` (UUID or name) means; the error suggests a name that looks like it."""
        from kvik.errors import NoNetwork

        try:
            return self.connection.lookup_network_name(key) if by_name else self.connection.network(key)
        except NoNetwork as error:
            from kvik.cli.suggest import nearest

            near = nearest(key, [network.name for network in self.connection.networks()])
            remedy = f"did you mean '{near}'?" if near else "'kvik net-list --all' shows every network"
            self.doing = f"failed to get network '{key}'"
            raise NoNetwork(error.message, remedy=remedy) from error

    # output

    def write(self, text: str) -> None:
        self.stdout.write(text)

    def line(self, text: str = "") -> None:
        """One line of data, control characters shown as escapes."""
        self.stdout.write(term.neutralise(text, keep="\t") + "\n")

    def last(self, text: str) -> None:
        """A line of data, or several, that no blank line follows."""
        self.document(text)
        self.blank = False

    def document(self, text: str) -> None:
        """A document: untouched into a file or pipe; on a terminal its lines cannot drive it."""
        if term.is_terminal(self.stdout):
            text = term.neutralise(text, keep="\n\t")
        self.stdout.write(text if text.endswith("\n") or not text else text + "\n")

    def say(self, text: str) -> None:
        """What was done, for people: silent with `--quiet`; the `message` with `--json`."""
        if self.json:
            self._said.append(text)
        elif not self.quiet:
            self.line(text)

    def extra(self, text: str = "") -> None:
        """Decoration that `--quiet` and `--json` leave out."""
        if not self.quiet and not self.json:
            self.line(text)

    def put(self, data: Any) -> bool:
        """With `--json` print `data` and return True; else return False: the caller prints for people."""
        if not self.json:
            return False
        import json

        self._printed_json = True
        json.dump(data, self.stdout, indent=2, ensure_ascii=not self.stdout.encoding.lower().startswith("utf"))
        self.stdout.write("\n")
        return True

    def finish(self) -> None:
        """End of a verb: with `--json` and no data, what was done becomes the data."""
        if self.json and self._said and not self._printed_json:
            self.put({"message": "\n".join(self._said)})
        self._said.clear()
        self._printed_json = False

    def table(self, table: Table, *, colour: Callable[[int, str], str | None] | None = None) -> None:
        if self.put(table.dicts()):
            return
        self.write(
            table.render(
                header=not self.quiet,
                limit=term.columns(self.stdout),
                colour=(colour or (lambda column, text: None)) if self.colour else None,
            )
        )

    def pairs(self, pairs: list[tuple[str, object]], *, pad: int = 15) -> None:
        """`Name:           value` lines, as dominfo and its kin print them."""
        if self.put({key.lower().replace(" ", "_"): value for key, value in pairs}):
            return
        for key, value in pairs:
            self.line(f"{key + ':':<{pad}} {value}")

    def warn(self, text: str) -> None:
        self.stdout.flush()
        self.stderr.write(term.neutralise(text, keep="\n") + "\n")
        self.stderr.flush()

    def error(self, error: BaseException) -> None:
        """`error: what failed`, `error: why`, `hint: what to do`."""
        message = getattr(error, "message", None) or str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:  # without the number that Python puts in front
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        line, path = getattr(error, "line", 0), getattr(error, "path", "")
        where = ", ".join(part for part in (f"line {line}" if line else "", f"at {path}" if path else "") if part)
        remedy = str(getattr(error, "remedy", "") or "")
        if self.json:
            import json

            facts = {"error": message, "doing": self.doing, "line": line, "path": path, "hint": remedy}
            self.warn(json.dumps({key: value for key, value in facts.items() if value}))
            return
        shade = self.colour and term.is_terminal(self.stderr)
        label, hint = (term.paint("error:", "red"), term.paint("hint:", "cyan")) if shade else ("error:", "hint:")
        lines = [f"{label} {term.neutralise(self.doing)}"] if self.doing else []
        lines.append(f"{label} {term.neutralise(f'{where}: {message}' if where else message, keep=chr(10))}")
        if remedy:
            lines.append(f"{hint} {term.neutralise(remedy, keep=chr(10))}")
        limit = term.columns(self.stderr)
        if limit and not shade:
            lines = [term.wrap(text, limit, "  ") for line in lines for text in line.split("\n")]
        self.stdout.flush()
        self.stderr.write("\n".join(lines) + "\n")
        self.stderr.flush()

    def ask(self, question: str) -> str:
        """One line from the person at the terminal; empty at end of file."""
        self.stderr.write(question)
        self.stderr.flush()
        return self.stdin.readline().strip()

    def ask_secret(self, question: str) -> str:
        """One line that the terminal does not show while it is typed; without its end."""
        self.write(question)
        self.stdout.flush()
        if not term.is_terminal(self.stdin):
            return self.stdin.readline().rstrip("\n")
        import termios

        fd = self.stdin.fileno()
        before = termios.tcgetattr(fd)
        silent = termios.tcgetattr(fd)
        silent[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(fd, termios.TCSADRAIN, silent)
            return self.stdin.readline().rstrip("\n")
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
            self.line()

    # files

    def read_file(self, path: str) -> str:
        """A document from `path` (`-`: standard input), at most 10 MiB."""
        from kvik.errors import InvalidArgument

        bound = 10 << 20
        try:
            if path == "-":
                data = self.stdin.buffer.read(bound + 1)
            else:
                with open(path, "rb") as file:  # noqa: PTH123 - pathlib costs 4 ms of start
                    data = file.read(bound + 1)
        except OSError as error:
            raise InvalidArgument(
                f"Failed to open file '{path}': {error.strerror}",
                remedy="give the path of a readable file, or - for standard input",
            ) from error
        if len(data) > bound:
            raise InvalidArgument(f"File '{path}' is larger than {bound >> 20} MiB")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"File '{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from error


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - pathlib costs 4 ms of start
