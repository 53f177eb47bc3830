"""From filters to rules: variables, the tree of references, the order of chains, directions. No kernel needed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvik.conf.nwfilter import FilterReference, NetworkFilter, Parameter, Rule, parse_filter
from kvik.errors import ConfigError, ConfigUnsupported, NoFilter
from kvik.network.filters.builtin import builtin_filters
from kvik.network.filters.compile import Features, Ruleset, compile_rules
from kvik.network.filters.tree import Placed, flatten, names, uses
from kvik.network.filters.variables import expand

MAC = "52:54:00:00:00:01"
VALUES = {"MAC": [MAC], "IP": ["10.0.0.1"]}


def library(*documents: str) -> dict[str, NetworkFilter]:
    return {**builtin_filters(), **{one.name: one for one in map(parse_filter, documents)}}


def rules_of(name: str, *documents: str, values: dict[str, list[str]] | None = None) -> list[Placed]:
    return flatten(FilterReference(filter=name), values or VALUES, library(*documents).__getitem__)


NOTHING_MORE = Features()


def compiled(rule: str, features: Features = NOTHING_MORE, chain: str = "root", learn: str = "") -> Ruleset:
    rules = rules_of("f", f"<filter name='f' chain='{chain}'>{rule}</filter>", values={**VALUES, "L": ["@learned"]})
    return compile_rules("vnet0", MAC, rules, features, learn=learn)


def chain(ruleset: Ruleset, name: str) -> list[str]:
    """The rules of one chain, in a short notation."""
    found = [command["add"]["rule"] for command in ruleset.commands if "rule" in command.get("add", {})]
    return [" ".join(map(short, rule["expr"])) for rule in found if rule["chain"] == name]


def short(expression: dict[str, Any]) -> str:
    if "match" in expression:
        one = expression["match"]
        return f"{value(one['left'])}{'' if one['op'] == '==' else one['op']}={value(one['right'])}"
    if "set" in expression:
        return f"{expression['set']['op']}:{expression['set']['set']}"
    ((verb, more),) = expression.items()
    return verb if not more else f"{verb}:{more.get('target', more)}"


def value(side: Any) -> str:
    if isinstance(side, dict) and "payload" in side:
        one = side["payload"]
        return f"{one['protocol']}.{one['field']}" if "protocol" in one else f"{one['base']}+{one['offset']}"
    if isinstance(side, dict) and "meta" in side:
        return str(side["meta"]["key"])
    if isinstance(side, dict) and "concat" in side:
        return ",".join(map(value, side["concat"]))
    return str(side) if not isinstance(side, dict) else json.dumps(side)


# variables ---------------------------------------------------------------------------------------------------------


def ports(text: str, values: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(source address, port) of the rules that one with variables becomes."""
    (rule,) = parse_filter(f"<filter name='f'><rule action='accept' direction='in'>{text}</rule></filter>").entries
    assert isinstance(rule, Rule)
    made = [one.conditions[0].values for one in expand(rule, values, "f")]
    return [(one.get("srcipaddr", ""), one.get("dstportstart", "")) for one in made]


LISTS = {"A": ["10.0.0.1", "11.1.2.3"], "P": ["80", "8080"], "Q": ["1", "2", "3"]}


def test_lists_with_one_iterator_go_side_by_side_with_two_in_all_combinations() -> None:
    """The example of "Usage of variables in filters"."""
    assert ports("<tcp srcipaddr='$A[@1]' dstportstart='$P[@2]'/>", LISTS) == [
        ("10.0.0.1", "80"), ("10.0.0.1", "8080"), ("11.1.2.3", "80"), ("11.1.2.3", "8080"),
    ]  # fmt: skip
    side_by_side = [("10.0.0.1", "80"), ("11.1.2.3", "8080")]
    assert ports("<tcp srcipaddr='$A[@1]' dstportstart='$P[@1]'/>", LISTS) == side_by_side
    assert ports("<tcp srcipaddr='$A' dstportstart='$P'/>", LISTS) == side_by_side
    assert ports("<tcp srcipaddr='$A' dstportstart='$P[1]'/>", LISTS) == [("10.0.0.1", "8080"), ("11.1.2.3", "8080")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tcp srcipaddr='$NO'/>", "needs the variable NO"),
        ("<tcp srcipaddr='$P'/>", "variable P for srcipaddr"),
        ("<tcp srcipaddr='$A' dstportstart='$Q'/>", "3 values where another .* has 2"),
        ("<tcp dstportstart='$P[2]'/>", r"has 2 values, no \[2\]"),
        ("<tcp srcportstart='$L[@1]' dstportstart='$L[@2]'/>", "more than 4096 combinations"),
    ],
)
def test_variables_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ports(text, {**LISTS, "L": ["1"] * 100})


# the tree ----------------------------------------------------------------------------------------------------------


def test_parameters_hold_inside_their_reference_only() -> None:
    outer = "<filter name='o'><filterref filter='i'><parameter name='IP' value='10.9.9.9'/></filterref>"
    outer += "<rule action='drop' direction='in'><ip srcipaddr='$IP'/></rule></filter>"
    inner = "<filter name='i'><rule action='drop' direction='in'><ip srcipaddr='$IP'/></rule></filter>"
    found = [one.rule.conditions[0].values["srcipaddr"] for one in rules_of("o", outer, inner)]
    assert found == ["10.9.9.9", "10.0.0.1"]


def test_loops_depth_and_unfolding_are_bounded() -> None:
    loop = ["<filter name='a'><filterref filter='b'/></filter>", "<filter name='b'><filterref filter='a'/></filter>"]
    with pytest.raises(ConfigError, match="loop: a -> b -> a"):
        rules_of("a", *loop)
    deep = [f"<filter name='f{n}'><filterref filter='f{n + 1}'/></filter>" for n in range(40)]
    with pytest.raises(ConfigError, match="32 deep"):
        rules_of("f0", *deep)
    wide = [f"<filter name='f{n}'>" + f"<filterref filter='f{n + 1}'/>" * 10 + "</filter>" for n in range(9)]
    with pytest.raises(ConfigError, match="more than 4096 times"):
        rules_of("f0", *wide, "<filter name='f9'/>")
    rule = "<rule action='drop' direction='in'/>" * 4096
    with pytest.raises(ConfigError, match="more than 16384 rules"):
        five = "<filterref filter='i'/>" * 5
        rules_of("o", f"<filter name='o'>{five}</filter>", f"<filter name='i'>{rule}</filter>")


def test_what_a_filter_needs_is_known() -> None:
    def lookup(name: str) -> NetworkFilter:
        try:
            return library()[name]
        except KeyError:
            raise NoFilter(name) from None

    clean = FilterReference(filter="clean-traffic")
    assert {"clean-traffic", "no-arp-ip-spoofing", "no-other-rarp-traffic"} <= names(clean, lookup)
    assert uses(clean, "IP", lookup)
    assert not uses(FilterReference(filter="no-mac-spoofing"), "IP", lookup)
    given = FilterReference(filter="clean-traffic", parameters=[Parameter(name="IP", value="10.0.0.1")])
    assert not uses(given, "IP", lookup)
    with pytest.raises(NoFilter):
        names(FilterReference(filter="nope"), lookup)


# rules -------------------------------------------------------------------------------------------------------------


def test_chains_and_rules_of_the_root_chain_go_by_priority() -> None:
    made = compile_rules("vnet0", MAC, rules_of("clean-traffic"), Features(ingress=True))
    assert chain(made, "vnet0/out") == [
        "jump:vnet0/out/0-mac",
        "ether.type=2048 jump:vnet0/out/1-ipv4-ip",
        "ether.type=2048 accept",
        "ether.type=2054 jump:vnet0/out/3-arp-mac",
        "ether.type=2054 jump:vnet0/out/4-arp-ip",
        "ether.type=2054 accept",
        "ether.type=32821 jump:vnet0/out/6-rarp",
        "ether.type=2101 accept",
        "drop",
    ]
    assert chain(made, "vnet0/out/0-mac") == [f"ether.saddr={MAC} return", "drop"]
    assert made.guarded and made.notes == []
    # The interface's entries come after all rules.
    assert ["element" in command["add"] for command in made.commands[-4:]] == [True] * 4


def test_on_layer_2_an_inout_rule_describes_what_the_machine_receives() -> None:
    made = compiled("<rule action='drop' direction='inout'><ip srcipaddr='10.0.0.9'/></rule>")
    assert chain(made, "vnet0/in") == ["ether.type=2048 ip.saddr=10.0.0.9 drop"]
    assert chain(made, "vnet0/out") == ["ether.type=2048 ip.daddr=10.0.0.9 drop"]


def test_about_ip_an_inout_rule_describes_what_the_machine_sends() -> None:
    made = compiled("<rule action='drop' direction='inout'><tcp dstipaddr='10.0.0.9' dstportstart='25'/></rule>")
    assert chain(made, "vnet0/out_ip") == ["ether.type=2048 l4proto=6 ip.daddr=10.0.0.9 th.dport=25 drop"]
    assert chain(made, "vnet0/in_ip") == ["ether.type=2048 l4proto=6 ip.saddr=10.0.0.9 th.sport=25 drop"]


def test_a_stateful_rule_notes_the_answer_it_expects_and_takes_no_other() -> None:
    made = compiled("<rule action='accept' direction='in'><tcp dstportstart='22'/></rule>")
    tcp = "ether.type=2048 l4proto=6"
    assert chain(made, "vnet0/in_ip") == [f"{tcp} th.dport=22 update:@vnet0/flows4 accept"]
    key = "ip.saddr,ip.daddr,l4proto,th.sport,th.dport"
    assert chain(made, "vnet0/out_ip") == [f"{tcp} th.sport=22 {key}=@vnet0/flows4 accept"]
    (note,) = [one["expr"][3]["set"]["elem"]["elem"] for one in rules(made) if one["chain"] == "vnet0/in_ip"]
    assert value(note["val"]) == "ip.daddr,ip.saddr,l4proto,th.dport,th.sport" and note["timeout"] == 3600
    assert made.sets["vnet0/flows4"]["add"]["set"]["size"] == 65536, "a guest fills its own, and no more"


def rules(ruleset: Ruleset) -> list[dict[str, Any]]:
    return [command["add"]["rule"] for command in ruleset.commands if "rule" in command["add"]]


def test_without_statematch_answers_are_what_looks_like_them() -> None:
    made = compiled("<rule action='accept' direction='out' statematch='0'><udp dstportstart='53'/></rule>")
    assert chain(made, "vnet0/in_ip") == ["ether.type=2048 l4proto=17 th.sport=53 accept"]
    assert made.sets == {}


def test_a_rule_about_every_protocol_tells_ports_apart_where_there_are_any() -> None:
    made = compiled("<rule action='accept' direction='out'><all-ipv6/></rule>")
    assert [line.split(" ", 1)[1] for line in chain(made, "vnet0/out_ip")] == [
        "l4proto=6 update:@vnet0/flows6 accept",
        'l4proto={"set": [17, 132, 136]} update:@vnet0/flows6 accept',
        'l4proto!=={"set": [6, 17, 132, 136]} update:@vnet0/peers6 accept',
    ]


def test_connections_to_what_a_name_resolved_to_go_on_when_that_has_lapsed() -> None:
    rule = "<rule action='accept' direction='out'><tcp dstipaddr='$ALLOWED' dstportstart='443'/></rule>"
    values = {"ALLOWED": ["@allowed4", "@kept4"]}
    placed = rules_of("f", f"<filter name='f' chain='root'>{rule}</filter>", values=values)
    made = compile_rules("vnet0", MAC, placed, Features())
    gate = "ether.type=2048 l4proto=6"
    flow = "ip.daddr,ip.saddr,l4proto,th.dport,th.sport=@vnet0/flows4"
    out = chain(made, "vnet0/out_ip")
    assert len(out) == 3 and [line.count("@allow4-vnet0") + line.count("@kept4-vnet0") for line in out] == [1, 0, 1]
    assert flow in out[1] and "!==syn" in out[1] and "th.dport=443" in out[1], "but none begins"
    (answer,) = chain(made, "vnet0/in_ip")
    assert "@allow4-vnet0" not in answer and "=@vnet0/flows4" in answer and answer.startswith(gate)


def test_icmp_with_a_type_is_about_its_own_direction() -> None:
    made = compiled("<rule action='drop' direction='out'><icmp type='8'/></rule>")
    assert chain(made, "vnet0/out_ip") == ["ether.type=2048 l4proto=1 icmp.type=8 drop"]
    assert chain(made, "vnet0/in_ip") == []


def test_masks_ranges_and_negation() -> None:
    made = compiled(
        "<rule action='drop' direction='out'><ip match='no' srcipaddr='10.1.2.3' srcipmask='8' protocol='tcp' "
        "dstportstart='1' dstportend='9'/></rule>"
        "<rule action='drop' direction='out'>"
        "<mac srcmacaddr='52:54:00:12:34:56' srcmacmask='ff:ff:ff:00:00:00'/></rule>"
        "<rule action='drop' direction='out'><tcp match='no' dstipfrom='10.0.0.1' dstipto='10.0.0.9'/></rule>"
        "<rule action='drop' direction='out'><ip match='no' srcipaddr='1.2.3.4' srcipmask='0'/></rule>"
    )
    assert chain(made, "vnet0/out") == [
        'ether.type=2048 ip.saddr!=={"prefix": {"addr": "10.0.0.0", "len": 8}} l4proto!==6 '
        'th.dport!=={"range": [1, 9]} drop',
        '{"&": [{"payload": {"protocol": "ether", "field": "saddr"}}, "ff:ff:ff:00:00:00"]}=52:54:00:00:00:00 drop',
    ], "what cannot match becomes no rule"
    assert chain(made, "vnet0/out_ip") == [
        'ether.type=2048 l4proto=6 ip.daddr!=={"range": ["10.0.0.1", "10.0.0.9"]} drop'
    ]


def test_a_learned_address_is_looked_up_in_the_interfaces_set() -> None:
    made = compiled("<rule action='drop' direction='out'><ip match='no' srcipaddr='$L'/></rule>", learn="any")
    assert chain(made, "vnet0/out")[-1] == "ether.type=2048 ip.saddr!==@vnet0/ip drop"
    assert made.sets["vnet0/ip"]["add"]["set"]["size"] == 1
    assert len(chain(made, "vnet0/out")) == 3, "two rules learn, from ARP and from IP"
    with pytest.raises(ConfigError, match="yet to be learned"):
        compiled("<rule action='drop' direction='out'><ip srcipaddr='$L' srcipmask='24'/></rule>", learn="any")


def test_what_this_kernel_lacks_is_done_without_and_said_or_refused() -> None:
    reject = "<rule action='reject' direction='out'><tcp dstportstart='25'/></rule>"
    made = compiled(reject)
    assert chain(made, "vnet0/out_ip")[0].endswith("drop") and "no nft_reject_bridge" in made.notes[0]
    made = compiled(reject, Features(reject=True))
    assert "reject:" in chain(made, "vnet0/out_ip")[0] and made.notes == []
    state = "<rule action='accept' direction='in'><tcp state='NEW'/></rule>"
    with pytest.raises(ConfigUnsupported, match="nf_conntrack_bridge"):
        compiled(state)
    assert len(chain(compiled(state, Features(connection_tracking=True)), "vnet0/in_ip")) == 1
    made = compiled("<rule action='drop' direction='out'/>")
    assert not made.guarded and "netdev ingress" in made.notes[0]


@pytest.mark.parametrize(
    ("rule", "guarded"),
    [
        ("<rule action='drop' direction='out'><mac srcmacaddr='$MAC'/></rule>", True),
        ("<rule action='drop' direction='in'/>", False),
        ("<rule action='accept' direction='out'><stp/></rule><rule action='drop' direction='out'/>", False),
        ("<rule action='drop' direction='out'><tcp dstportstart='25'/></rule>", False),
    ],
)
def test_spanning_tree_frames_need_a_rule_of_their_own_once_frames_are_restricted(rule: str, guarded: bool) -> None:
    assert compiled(rule, Features(ingress=True)).guarded is guarded
