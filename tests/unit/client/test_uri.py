"""Connection URIs: what they mean, and what is said about bad ones."""

from __future__ import annotations

import os

import pytest

from kvik.client.uri import Address, default_uri, parse_uri
from kvik.errors import InvalidArgument


@pytest.mark.parametrize(
    ("uri", "address", "name"),
    [
        ("kvik:///system", Address("kvik", "unix", "system", path="system"), "kvik:///system"),
        ("kvik:///session", Address("kvik", "unix", "session", path="session"), "kvik:///session"),
        ("qemu:///system/", Address("qemu", "unix", "system", path="system"), "qemu:///system"),
        (
            "qemu+unix:///system?socket=/run/a%20b.sock",
            Address("qemu", "unix", "system", socket="/run/a b.sock", path="system"),
            "qemu:///system",
        ),
        (
            "kvik+unix:///session?mode=direct&socket=/x",
            Address("kvik", "unix", "session", socket="/x", path="session"),
            "kvik:///session",
        ),
        ("kvik+ssh://host/system", Address("kvik", "ssh", "system", "host", path="system"), "kvik:///system"),
        (
            "qemu+ssh://me@host:2222/session",
            Address("qemu", "ssh", "session", "host", "me", 2222, path="session"),
            "qemu:///session",
        ),
        ("kvik+ssh://[fe80::1]:22/system", Address("kvik", "ssh", "system", "fe80::1", "", 22, path="system"), None),
    ],
)
def test_good_uris(uri: str, address: Address, name: str | None) -> None:
    assert parse_uri(uri) == address
    assert name is None or parse_uri(uri).name == name


def test_the_in_memory_driver_is_another_daemon() -> None:
    with pytest.raises(InvalidArgument, match="--driver test"):
        parse_uri("test:///default")
    assert parse_uri("test+unix:///default?socket=/s").name == "test:///default"  # somebody's, where they say


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("", "there is no '://'"),
        ("kvik:/system", "there is no '://'"),
        ("xen:///system", "the scheme 'xen'"),
        ("kvik+tls://host/system", "the transport 'tls'"),
        ("kvik+://host/system", "the transport ''"),
        ("kvik://host/system", "needs a transport"),
        ("kvik+unix://host/system", "no host"),
        ("kvik+ssh:///system", "there is no host"),
        ("kvik+ssh://@host/system", "no user"),
        ("kvik+ssh://host:0/system", "not a port"),
        ("kvik+ssh://host:65536/system", "not a port"),
        ("kvik+ssh://host:/system", "not a port"),
        ("kvik+ssh://host:²/system", "not a port"),
        ("kvik+ssh://[::1/system", "IPv6"),
        ("kvik+ssh://-oProxyCommand=x/system", "begin with '-'"),
        ("kvik+ssh://%2doProxyCommand=x/system", "begin with '-'"),
        ("kvik+ssh://-l@host/system", "begin with '-'"),
        ("kvik:///", "the path"),
        ("kvik://", "the path is missing"),
        ("kvik:///elsewhere", "the path"),
        ("kvik:///system?socket=relative", "absolute"),
        ("kvik:///system?sockt=/x", "unknown parameter 'sockt'"),
        ("kvik:///sys tem", "blanks"),
        ("kvik:///system\n", "blanks"),
    ],
)
def test_bad_uris_say_which_part_is_wrong_and_how_to_write_it(uri: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_uri(uri)
    assert complaint in str(caught.value)
    assert "kvik:///system" in str(caught.value)


def test_without_a_uri_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_uri({"KVIK_URI": "kvik+ssh://h/system"}) == "kvik+ssh://h/system"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_uri({}) == "kvik:///system"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_uri({"KVIK_URI": ""}) == "kvik:///session"
