"""The XDR codec: round trips of every structure, agreement with an oracle, refusal of everything hostile."""

from __future__ import annotations

import random
import struct
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import RpcError
from kvik.rpc.program import admin, kvik, lxc, qemu, remote
from kvik.rpc.xdr import Codec
from kvik.rpc.xdr_types import Encoded, TypedParam, parse_struct

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xdrlib = pytest.importorskip("xdrlib", reason="the oracle is gone from Python 3.13 on")

DOMAIN = {"domain": "name:string uuid:opaque[16] id:int"}
ALL = [procedure for make in (remote, qemu, lxc, admin, kvik) for procedure in make()]


def codec(text: str) -> Codec:
    return Codec("test", text, DOMAIN)


def whole(one: Codec, data: bytes) -> Any:
    return one.decode(data, 0, len(data))


RANGES = {
    "i": st.integers(-(2**31), 2**31 - 1),
    "I": st.integers(0, 2**32 - 1),
    "q": st.integers(-(2**63), 2**63 - 1),
    "Q": st.integers(0, 2**64 - 1),
    "d": st.floats(allow_nan=False),
}
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)


def values_of(kind: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    match kind:
        case ("prim", fmt):
            return RANGES[fmt]
        case ("string",):
            return TEXT
        case ("opaque", limit):
            return st.binary(max_size=min(limit, 40))
        case ("bytes", count):
            return st.binary(min_size=count, max_size=count)
        case ("optional", inner):
            return st.none() | values_of(inner)
        case ("list", element, limit):
            return st.lists(values_of(element), max_size=min(limit, 4))
        case ("vector", element, count):
            return st.lists(values_of(element), min_size=count, max_size=count)
        case ("struct", _, fields):
            return st.tuples(*(values_of(field) for _, field in fields))
        case ("typed_param",):
            return st.one_of(
                *(
                    st.tuples(TEXT, st.just(kind), RANGES[fmt]).map(lambda triple: TypedParam(*triple))
                    for kind, fmt in enumerate("iIqQdi", 1)
                ),
                st.tuples(TEXT, st.just(7), TEXT).map(lambda triple: TypedParam(*triple)),
            )
    raise AssertionError(kind)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_structure_of_every_program_survives_a_round_trip(data: st.DataObject) -> None:
    procedure = data.draw(st.sampled_from(ALL))
    one = data.draw(st.sampled_from([procedure.args, procedure.result]))
    values = data.draw(values_of(parse_struct(one.name, one._text, one._structs)))
    encoded = one.encode(values)
    assert len(encoded) % 4 == 0
    assert whole(one, encoded) == values
    # Wherever it lies in a larger buffer.
    assert one.decode(b"xyz" + encoded + b"tail", 3, 3 + len(encoded)) == values


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_truncated_or_extended_data_is_refused_and_never_anything_but_an_rpc_error(data: st.DataObject) -> None:
    procedure = data.draw(st.sampled_from(ALL))
    one = data.draw(st.sampled_from([procedure.args, procedure.result]))
    encoded = one.encode(data.draw(values_of(parse_struct(one.name, one._text, one._structs))))
    with pytest.raises(RpcError):
        whole(one, encoded + b"\0\0\0\0")
    if encoded:
        cut = data.draw(st.integers(0, len(encoded) - 1))
        with pytest.raises(RpcError):
            whole(one, encoded[:cut])
        with pytest.raises(RpcError):  # the rest is there, but belongs to the next message
            one.decode(encoded + encoded, 0, cut)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(ALL), st.binary(max_size=200))
def test_random_bytes_decode_or_raise_rpc_error(procedure: Any, noise: bytes) -> None:
    for one in (procedure.args, procedure.result):
        try:
            whole(one, noise)
        except RpcError:
            pass


def test_every_codec_compiles_in_both_directions() -> None:
    assert len(ALL) == 453 + 7 + 1 + 20 + len(kvik())
    for procedure in ALL:
        for one in (procedure.args, procedure.result):
            with pytest.raises(RpcError):
                one.decode(b"\xff" * 3, 0, 3)
            with pytest.raises(RpcError):
                one.encode((object(),) * 99)


def test_bytes_agree_with_the_standard_library() -> None:
    one = codec("a:int b:uint c:hyper d:uhyper e:double f:string g:opaque<99> h:opaque[5] i:int<9> j:domain? k:string?")
    values = (
        -1,
        2**32 - 1,
        -(2**63),
        2**64 - 1,
        1.5,
        "grün",
        b"abcde",
        b"12345",
        [1, -2, 3],
        ("n", b"u" * 16, 7),
        None,
    )
    oracle = xdrlib.Packer()
    oracle.pack_int(-1)
    oracle.pack_uint(2**32 - 1)
    oracle.pack_hyper(-(2**63))
    oracle.pack_uhyper(2**64 - 1)
    oracle.pack_double(1.5)
    oracle.pack_string("grün".encode())
    oracle.pack_opaque(b"abcde")
    oracle.pack_fopaque(5, b"12345")
    oracle.pack_array([1, -2, 3], oracle.pack_int)
    oracle.pack_bool(True)
    oracle.pack_string(b"n")
    oracle.pack_fopaque(16, b"u" * 16)
    oracle.pack_int(7)
    oracle.pack_bool(False)
    assert one.encode(values) == oracle.get_buffer()
    assert whole(one, oracle.get_buffer()) == values


def test_decoded_structures_have_named_fields() -> None:
    record = whole(codec("dom:domain from:int"), codec("dom:domain from:int").encode((("vm", bytes(16), 3), 4)))
    assert record.dom.name == "vm"
    assert record.dom.id == 3
    assert record.from_ == 4
    assert record.asdict()["from_"] == 4
    assert "name='vm'" in repr(record)
    with pytest.raises(AttributeError):
        _ = record.nothing


@pytest.mark.parametrize("flag", [1, 0x01000000, 0xFFFFFFFF])
def test_any_non_zero_flag_means_present(flag: int) -> None:
    """go-libvirt writes the flag of an optional string in the wrong byte order."""
    one = codec("name:string?")
    assert whole(one, struct.pack(">II4s", flag, 2, b"ab")) == ("ab",)
    assert whole(one, bytes(4)) == (None,)


@pytest.mark.parametrize(
    ("text", "data", "complaint"),
    [
        ("s:string", struct.pack(">I", 4194305), "test.s: length 4194305 exceeds the protocol's limit of 4194304"),
        ("s:string", struct.pack(">I", 0xFFFFFFFF), "test.s: length 4294967295 exceeds"),
        ("s:string", struct.pack(">I4s", 100, b"ab"), "test.s: data ends early"),
        ("s:string", struct.pack(">I4s", 2, b"\xff\xfe"), "not UTF-8"),
        ("s:string", struct.pack(">I4s", 2, b"a\0"), "NUL"),
        ("o:opaque<8>", struct.pack(">I12s", 9, b"x" * 9), "test.o: length 9 exceeds the protocol's limit of 8"),
        ("l:int<3>", struct.pack(">I4i", 4, 1, 2, 3, 4), "test.l: length 4 exceeds the protocol's limit of 3"),
        ("l:domain<16384>", struct.pack(">I", 16384) + bytes(100), "test.l: data ends early"),
        ("l:typed_param<9>", struct.pack(">II4sIi", 1, 1, b"a", 8, 1), "unknown type 8"),
        ("l:typed_param<9>", struct.pack(">II4sII", 1, 1, b"a", 7, 4194305), "exceeds"),
        ("i:int", bytes(8), "4 bytes of garbage after the last field"),
        ("", bytes(4), "4 bytes of garbage"),
    ],
)
def test_what_is_wrong_is_said(text: str, data: bytes, complaint: str) -> None:
    with pytest.raises(RpcError) as caught:
        whole(codec(text), data)
    assert complaint in str(caught.value)


def test_a_long_list_that_is_not_there_is_refused_before_anything_is_allocated() -> None:
    import tracemalloc

    one = codec("l:uint<100000000>")
    one.decode(bytes(4), 0, 4)
    tracemalloc.start()
    with pytest.raises(RpcError):
        whole(one, struct.pack(">I", 99_999_999) + bytes(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("i:int", (2**31,)),
        ("i:uint", (-1,)),
        ("i:int", ("1",)),
        ("i:int", (1, 2)),
        ("s:string", (None,)),
        ("s:string", ("\ud800",)),
        ("s:string", ("x" * 4194305,)),
        ("o:opaque[16]", (b"short",)),
        ("o:opaque<2>", (b"abc",)),
        ("l:int<2>", ([1, 2, 3],)),
        ("l:int[2]", ([1],)),
        ("d:domain", (("n", b"u" * 15, 1),)),
        ("p:typed_param<2>", ([("n", 1, "text")],)),
        ("p:typed_param<2>", ([("n", 7, 1)],)),
        ("p:typed_param<2>", ([("n", 9, 1)],)),
        ("", (1,)),
    ],
)
def test_values_that_do_not_fit_are_rpc_errors(text: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(RpcError):
        codec(text).encode(values)


def test_a_list_may_be_given_encoded() -> None:
    one = codec("l:domain<3> n:int")
    ready = one.encode(([("a", bytes(16), 1)], 5))
    assert one.encode((Encoded(ready[:-4]), 5)) == ready


@pytest.mark.parametrize("length", [0, 1, 3, 4, 255, 256, 257, 70000])
def test_strings_of_any_length_are_padded(length: int) -> None:
    one = codec("a:int s:string b:int t:string")
    values = (1, "x" * length, 2, "y" * (length + 1))
    encoded = one.encode(values)
    assert len(encoded) == 16 + (length + 3 & ~3) + (length + 4 & ~3)
    assert whole(one, encoded) == values


def test_decoding_random_corruption_never_crashes() -> None:
    one = remote()["CONNECT_GET_ALL_DOMAIN_STATS"].result
    params = [TypedParam("cpu.time", 4, 1), TypedParam("net.0.name", 7, "vnet0"), TypedParam("x", 5, 0.5)]
    good = one.encode(([(("vm", bytes(16), 1), params)] * 3,))
    chance = random.Random(1)
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        try:
            whole(one, bytes(bad))
        except RpcError:
            pass
