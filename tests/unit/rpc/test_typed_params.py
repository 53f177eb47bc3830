"""Typed parameters: libvirt's types by name, and the fast encoder that must agree with the ordinary one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import RpcError
from kvik.rpc import typed_params as tp
from kvik.rpc.program import remote
from kvik.rpc.xdr import Codec
from kvik.rpc.xdr_types import TypedParam

LIST = Codec("params", "params:typed_param<262144>", {})
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20),
)
NAMES = st.sampled_from(
    [
        *sorted(tp._KNOWN.keys() - {"vcpu.*.halted"}),
        "cpu.time",
        "net.0.name",
        "vcpu.12.state",
        "block.3.rd.bytes",
        "a",
        "b",
        "",
    ]
)


def decode(data: bytes) -> list[TypedParam]:
    return LIST.decode(data, 0, len(data))[0]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=8), max_size=6))
def test_whatever_was_encoded_before_the_values_come_back(many: list[dict[str, tp.Value]]) -> None:
    for one in many:
        assert tp.to_dict(decode(tp.encode(one))) == one


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("state.state", 1, tp.INT),
        ("vcpu.current", 2, tp.UINT),
        ("vcpu.0.state", 1, tp.INT),
        ("vcpu.117.time", 1, tp.ULLONG),
        ("net.count", 1, tp.UINT),
        ("block.0.backingIndex", 1, tp.UINT),
        ("block.0.name", "vda", tp.STRING),
        ("cpu.time", 5, tp.ULLONG),
        ("anything", -5, tp.LLONG),
        ("anything", True, tp.BOOLEAN),
        ("anything", 0.5, tp.DOUBLE),
    ],
)
def test_types_are_those_that_clients_of_the_c_interface_check(name: str, value: tp.Value, kind: int) -> None:
    assert tp.from_dict({name: value}) == [TypedParam(name, kind, value)]
    assert decode(tp.encode({name: value})) == [TypedParam(name, kind, int(value) if kind == tp.BOOLEAN else value)]


def test_the_fast_encoder_writes_the_same_bytes() -> None:
    stats: dict[str, tp.Value] = {"state.state": 1, "cpu.time": 10**12, "net.0.name": "vnet0", "block.0.name": "vda"}
    for _ in range(2):
        assert tp.encode(stats) == LIST.encode((tp.from_dict(stats),))


def test_it_stands_where_a_list_is_wanted() -> None:
    result = remote()["CONNECT_GET_ALL_DOMAIN_STATS"].result
    dom = ("vm", bytes(16), 1)
    stats: dict[str, tp.Value] = {"state.state": 1, "net.0.name": "vnet0"}
    fast = result.encode(([(dom, tp.encode(stats)), (dom, tp.encode({}))],))
    assert fast == result.encode(([(dom, tp.from_dict(stats)), (dom, [])],))
    assert tp.to_dict(result.decode(fast, 0, len(fast)).retStats[0].params) == stats


def test_a_figure_that_leaves_its_first_type_finds_another() -> None:
    assert decode(tp.encode({"x": 1})) == [("x", tp.ULLONG, 1)]
    assert decode(tp.encode({"x": -1})) == [("x", tp.LLONG, -1)]
    assert decode(tp.encode({"y": -1})) == [("y", tp.LLONG, -1)]
    assert decode(tp.encode({"y": 2**63})) == [("y", tp.ULLONG, 2**63)]
    assert decode(tp.encode({"state.state": 2**40})) == [("state.state", tp.LLONG, 2**40)]


def test_what_fits_no_type_is_an_error() -> None:
    with pytest.raises(RpcError, match=r"cpu.time"):
        tp.encode({"cpu.time": 2**64})


def test_a_name_that_occurs_again_gives_a_list() -> None:
    disks = [TypedParam("migrate_disks", 7, name) for name in ("vda", "vdb", "vdc")]
    assert tp.to_dict(disks) == {"migrate_disks": ["vda", "vdb", "vdc"]}


def test_the_layout_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "_LAYOUTS_MAX", 10)
    for index in range(100):
        tp.encode({f"name{index}": "x" * index})
    assert len(tp._layouts) <= 10
    assert len(tp._string_packers) <= 10
