"""Every document of the corpus survives parse and format, and together they exercise every declared field."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.conf.codec import Element
from kvik.conf.devices_xml import devices_of, format_device, kind_of, parse_device
from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.tree import walk
from kvik.errors import ConfigError

CORPUS = sorted((Path(__file__).parents[2] / "data/conf").glob("*.xml"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_document_survives_parse_and_format(path: Path) -> None:
    domain = parse_domain(path.read_bytes())
    text = format_domain(domain, secure=True)
    assert parse_domain(text) == domain
    assert format_domain(parse_domain(text), secure=True) == text


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_copy_is_equal_and_shares_nothing(path: Path) -> None:
    domain = parse_domain(path.read_bytes())
    copy = domain.copy()
    assert copy == domain
    mine = {id(item) for item, _ in walk(domain, "")}
    assert not mine & {id(item) for item, _ in walk(copy, "")}


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 40


def all_models(model: type[Element], found: set[type[Element]]) -> set[type[Element]]:
    from kvik.conf.codec import STRUCT, plan_of

    if model not in found:
        found.add(model)
        for child in plan_of(model).children.values():
            if child.kind == STRUCT:
                all_models(child.model, found)
    return found


def test_every_declared_field_is_exercised_by_some_document() -> None:
    used: set[tuple[type, str]] = set()
    for path in CORPUS:
        for item, _ in walk(parse_domain(path.read_bytes()), ""):
            for field in item.__struct_fields__:
                value = getattr(item, field)
                if value is not None and value is not False and value != []:
                    used.add((type(item), field))
    declared = {
        (model, field) for model in all_models(Domain, set()) for field in model.__struct_fields__ if field != "unknown"
    }
    missing = sorted(f"{model.__name__}.{field}" for model, field in declared - used)
    assert not missing, missing


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_every_device_can_stand_alone(path: Path) -> None:
    for _, device in devices_of(parse_domain(path.read_bytes()).devices):
        kind, again = parse_device(format_device(device, secure=True))
        assert kind == kind_of(device)
        assert again == device


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match="<gadget> is not a device"):
        parse_device("<gadget/>")


def test_what_is_unknown_is_kept_and_named() -> None:
    domain = parse_domain((CORPUS[0].parent / "unknown.xml").read_bytes())
    text = format_domain(domain)
    assert "wobble='yes'" in text
    assert '<futurePlan level="3"><step n="1">first &amp; last</step></futurePlan>' in text
    assert '<other:data xmlns:other="urn:other">kept</other:data>' in text
    assert [line.partition(":")[0] for line in domain.warnings()] == [
        "/domain/futurePlan",
        "/domain/data",
        "/domain/devices/disk/@wobble",
        "/domain/devices/disk/newthing",
    ]


def test_secrets_and_live_facts_are_written_only_when_asked_for() -> None:
    domain = parse_domain((CORPUS[0].parent / "reference.xml").read_bytes())
    domain.id = 5
    assert "passwd" not in format_domain(domain)
    assert "passwd='x&amp;y'" in format_domain(domain, secure=True)
    assert " id='5'" in format_domain(domain)
    assert " id='5'" not in format_domain(domain, inactive=True)
