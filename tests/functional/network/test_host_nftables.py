"""nftables: transactions in the kernel, each whole or not at all."""

from __future__ import annotations

import errno
import threading

import pytest

from kvik.errors import HostError
from kvik.host import nftables
from kvik.host.nftables import Command
from netns import in_namespace, new_namespace

TABLE = {"family": "inet", "name": "kvik"}
CHAIN = {"family": "inet", "table": "kvik", "name": "forward"}


def need_library() -> None:
    try:
        nftables.run([{"list": {"tables": None}}])
    except HostError as error:
        pytest.skip(f"nftables cannot be used here: {error}")


def tables() -> list[str]:
    return [found["table"]["name"] for found in nftables.run([{"list": {"tables": None}}])]


@in_namespace
def test_a_table_with_a_chain_a_set_and_a_rule_is_made_and_listed() -> None:
    need_library()
    names = {"family": "inet", "table": "kvik", "name": "allowed", "type": "ipv4_addr", "flags": ["interval"]}
    match = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@allowed"}}
    made = nftables.run(
        [
            {"add": {"table": TABLE}},
            {"add": {"chain": CHAIN | {"type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}}},
            {"add": {"set": names}},
            {"add": {"element": names | {"elem": [{"prefix": {"addr": "192.0.2.0", "len": 24}}]}}},
            {
                "add": {
                    "rule": {"family": "inet", "table": "kvik", "chain": "forward", "expr": [match, {"accept": None}]}
                }
            },
        ],
        echo=True,
    )
    rule = next(item["add"]["rule"] for item in made if "rule" in item.get("add", {}))
    assert rule["handle"] > 0
    listed = {kind: item[kind] for item in nftables.run([{"list": {"table": TABLE}}]) for kind in item}
    assert set(listed) == {"table", "chain", "set", "rule"}
    assert listed["chain"]["policy"] == "drop"
    assert listed["set"]["elem"] == [{"prefix": {"addr": "192.0.2.0", "len": 24}}]
    gone = {"family": "inet", "table": "kvik", "chain": "forward", "handle": rule["handle"]}
    nftables.run([{"delete": {"rule": gone}}])
    assert not [item for item in nftables.run([{"list": {"table": TABLE}}]) if "rule" in item]
    nftables.run([{"delete": {"table": TABLE}}])
    assert nftables.run([{"list": {"ruleset": None}}]) == []


@in_namespace
def test_a_transaction_with_one_bad_command_changes_nothing_and_names_it() -> None:
    need_library()
    good: list[Command] = [{"add": {"table": {"family": "ip", "name": f"t{number}"}}} for number in range(20)]
    bad = {"add": {"chain": {"family": "ip", "table": "missing", "name": "lost"}}}
    for place in (0, 7, 20):
        with pytest.raises(HostError, match=r"lost.*No such file or directory") as raised:
            nftables.run([*good[:place], bad, *good[place:]])
        assert raised.value.errno == errno.ENOENT
        assert tables() == []


@in_namespace
def test_what_the_library_cannot_read_is_refused_with_its_words() -> None:
    need_library()
    with pytest.raises(HostError, match="Unknown object"):
        nftables.run([{"add": {"tabel": TABLE}}])
    with pytest.raises(HostError, match="nftables refused"):
        nftables.run([{"add": {"table": {"family": "klingon", "name": "x"}}}])
    assert nftables.run([]) == []


@in_namespace
def test_a_check_has_no_effect() -> None:
    need_library()
    nftables.check([{"add": {"table": TABLE}}])
    assert tables() == []
    with pytest.raises(HostError, match="No such file"):
        nftables.check([{"add": {"chain": CHAIN}}])


@in_namespace
def test_every_thread_acts_in_its_own_namespace() -> None:
    need_library()
    errors: list[BaseException] = []

    def body(name: str) -> None:
        for _ in range(30):
            nftables.run([{"add": {"table": {"family": "ip", "name": name}}}])
            assert tables() == [name]
            nftables.run([{"delete": {"table": {"family": "ip", "name": name}}}])

    def work(name: str) -> None:
        try:
            with new_namespace() as namespace:
                namespace.run(lambda: body(name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
