"""A program of the wire protocol: a number, a version, and procedures whose codecs are compiled on first use.

    REMOTE["DOMAIN_GET_INFO"].args.encode((dom,))        -> bytes
    REMOTE[16].result.decode(data, start, end)           -> Record(state, maxMem, memory, nrVirtCpu, cpuTime)
    remote().structs["domain"]                           -> Codec of the structure itself

Programs are loaded on demand: `remote()`, `qemu()`, `lxc()`, `admin()`, `kvik()`; `program(number)` finds any of them.
"""

from __future__ import annotations

from functools import cache

from kvik.errors import NoSupport
from kvik.rpc.xdr import Codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Final

REMOTE_NUMBER: Final = 0x20008086
QEMU_NUMBER: Final = 0x20008087
LXC_NUMBER: Final = 0x00068000
ADMIN_NUMBER: Final = 0x06900690
KVIK_NUMBER: Final = 0x6B76696B
KEEPALIVE_NUMBER: Final = 0x6B656570
VERSION: Final = 1  # of every program


class Procedure:
    """One procedure. `args` and `result` are codecs; an event's body is `args`."""

    __slots__ = ("args", "event", "high_priority", "name", "number", "program", "result", "stream")

    def __init__(self, program: Program, number: int, row: tuple[str, str, str, str]) -> None:
        self.program = program
        self.number = number
        self.name, args, result, flags = row
        self.high_priority = "h" in flags
        self.event = "e" in flags
        self.stream = "read" if "r" in flags else "write" if "w" in flags else ""
        self.args = Codec(self.name, args, program.struct_texts)
        self.result = Codec(self.name + " result", result, program.struct_texts)

    def __repr__(self) -> str:
        return f"<{self.program.name} procedure {self.number} {self.name}>"


class Program:
    """A program's procedures, by number or name. Unknown ones raise NoSupport with the text that clients look for."""

    def __init__(
        self,
        name: str,
        number: int,
        structs: Mapping[str, str],
        procedures: Mapping[int, tuple[str, str, str, str]],
    ) -> None:
        self.name = name
        self.number = number
        self.struct_texts = structs
        self._rows = procedures
        self._numbers: dict[str, int] = {}
        self._procedures: dict[int | str, Procedure] = {}
        self._structs: dict[str, Codec] = {}

    def __getitem__(self, key: int | str) -> Procedure:
        found = self._procedures.get(key)
        return found if found is not None else self._load(key)

    def _load(self, key: int | str) -> Procedure:
        if not self._numbers:
            self._numbers = {row[0]: number for number, row in self._rows.items()}
        number = self._numbers.get(key) if isinstance(key, str) else key
        row = self._rows.get(number) if number is not None else None
        if number is None or row is None:
            raise NoSupport(f"unknown procedure: {key}")
        procedure = self._procedures.get(number) or Procedure(self, number, row)
        self._procedures[number] = self._procedures[procedure.name] = procedure
        return procedure

    def __contains__(self, key: int | str) -> bool:
        try:
            self[key]
        except NoSupport:
            return False
        return True

    def __iter__(self) -> Iterator[Procedure]:
        return (self[number] for number in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def struct(self, name: str) -> Codec:
        """The codec of a named structure, for parts that are encoded once and sent many times (`xdr.Encoded`)."""
        if name not in self._structs:
            self._structs[name] = Codec(name, self.struct_texts[name], self.struct_texts)
        return self._structs[name]


_MODULES: Final = {
    REMOTE_NUMBER: ("remote", "kvik.rpc.tables.remote"),
    QEMU_NUMBER: ("qemu", "kvik.rpc.tables.qemu"),
    LXC_NUMBER: ("lxc", "kvik.rpc.tables.lxc"),
    ADMIN_NUMBER: ("admin", "kvik.rpc.tables.admin"),
    KVIK_NUMBER: ("kvik", "kvik.rpc.kvik_program"),
}


@cache
def program(number: int) -> Program:
    """The program of a number; NoSupport if it is none of ours."""
    if number not in _MODULES:
        raise NoSupport(f"unknown program: 0x{number:x}")
    name, module = _MODULES[number]
    tables: Any = __import__(module, fromlist=["PROCEDURES"])  # importlib costs a command 0.5 ms
    return Program(name, number, tables.STRUCTS, tables.PROCEDURES)


def remote() -> Program:
    return program(REMOTE_NUMBER)


def qemu() -> Program:
    return program(QEMU_NUMBER)


def lxc() -> Program:
    return program(LXC_NUMBER)


def admin() -> Program:
    return program(ADMIN_NUMBER)


def kvik() -> Program:
    return program(KVIK_NUMBER)
