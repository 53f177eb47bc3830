"""Properties over documents nobody wrote."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.conf.cpuset import format_cpuset, parse_cpuset
from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.os import Os, OsType
from kvik.errors import ConfigError

# What XML 1.0 can hold; a carriage return survives as a reference.
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0xFFFD, exclude_categories=("Cs",)), max_size=40)


@given(name=TEXT, title=TEXT, value=TEXT, memory=st.integers(0, 2**50))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_a_round_trip(name: str, title: str, value: str, memory: int) -> None:
    domain = Domain(type="kvm", name=name, title=title or None, memory=memory, os=Os(type=OsType(machine=value)))
    again = parse_domain(format_domain(domain))
    assert (again.name, again.title or "", again.os.type.machine, again.memory) == (name, title, value, memory)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_document_or_a_config_error(data: bytes) -> None:
    try:
        parse_domain(data)
    except ConfigError as error:
        assert error.message


@given(st.sets(st.integers(0, 300), min_size=1))
def test_sets_survive_a_round_trip(members: set[int]) -> None:
    assert parse_cpuset(format_cpuset(members)) == members


@given(st.sampled_from(["<", ">", "&", "'", '"', "/", "=", "a", "domain", " ", "type", "<name>", "<os>", "</"]).flatmap(
    lambda first: st.lists(st.sampled_from(["<", ">", "'", "domain", "<os>", "<type>", "/>", "x", "="]), max_size=12).map(  # noqa: E501
        lambda rest: first + "".join(rest))))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_near_documents_never_raise_anything_else(text: str) -> None:
    try:
        parse_domain(text)
    except ConfigError:
        pass
