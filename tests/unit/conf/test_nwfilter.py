"""Network filter documents: every protocol and attribute survives, and what is wrong is refused with its place."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.conf.nwfilter import CHAIN_PRIORITIES, FilterReference, Rule, format_binding, format_filter
from kvik.conf.nwfilter import parse_binding as binding
from kvik.conf.nwfilter import parse_filter as parse
from kvik.conf.nwfilter_fields import PROTOCOLS, check_value
from kvik.errors import ConfigError, KvikError

UUID = "fce8ae33-e69e-83bf-262e-30786c1f8072"


def example(protocol: str, attribute: str) -> str:
    """A good value, in the spelling that is kept."""
    six = protocol.endswith("v6")
    for pattern, value in (
        ("comment", "why &amp; what"),
        (".*mac(addr|mask)|.*-address(-mask)?", "52:54:00:ab:cd:ef"),
        (".*ipmask", "24"),
        (".*ip(addr|from|to)", "2001:db8::1" if six else "10.1.2.3"),
        ("protocolid|encap-protocol", "arp"),
        ("protocol", "udp"),
        ("opcode", "Request_Reverse"),
        ("gratuitous", "true"),
        ("state", "NEW,ESTABLISHED"),
        ("flags", "3" if protocol == "stp" else "SYN,ACK/SYN"),
        ("ipset", "known"),
        ("ipsetflags", "SRC,DST"),
    ):
        if re.fullmatch(pattern, attribute):
            return value
    return "0x11"


def document(rule: str, head: str = "name='f' chain='root'") -> str:
    return f"<filter {head}>\n  <uuid>{UUID}</uuid>\n{rule}</filter>\n"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("match", ["", " match='no'"])
def test_every_attribute_of_every_protocol_survives(protocol: str, match: str) -> None:
    attributes = "".join(f" {name}='{example(protocol, name)}'" for name in PROTOCOLS[protocol])
    text = document(
        "  <rule action='drop' direction='in' priority='500' statematch='false'>\n"
        f"    <{protocol}{match}{attributes}/>\n  </rule>\n"
    )
    assert format_filter(parse(text)) == text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_attribute_takes_a_variable_and_refuses_nonsense(protocol: str) -> None:
    wrong = ("", "-1", "0x", "999999999999", "1.2.3.4.5", "::1::", "x" * 300)
    for attribute in set(PROTOCOLS[protocol]) - {"comment"}:
        for variable in ("$IP", "$PORTS[2]", "$PORTS[@1]", "$ A_1 [ @ 0 ]"):
            assert check_value(protocol, attribute, variable) == variable
        for nonsense in ("$", "$IP]", "$IP[x]", *(wrong if attribute != "ipset" else ("", "x" * 32, "a/b"))):
            with pytest.raises(ValueError):
                check_value(protocol, attribute, nonsense)


def test_entries_stay_in_their_order_and_parameters_with_their_reference() -> None:
    text = document(
        "  <filterref filter='a'>\n    <parameter name='IP' value='10.0.0.1'/>\n"
        "    <parameter name='IP' value='10.0.0.2'/>\n  </filterref>\n"
        "  <rule action='accept' direction='inout' priority='-10'/>\n"
        "  <filterref filter='b'/>\n",
        "name='f' chain='arp-x' priority='-200'",
    )
    found = parse(text)
    assert [type(entry) for entry in found.entries] == [FilterReference, Rule, FilterReference]
    assert format_filter(found) == text


@pytest.mark.parametrize("prefix", [prefix for prefix in CHAIN_PRIORITIES if prefix != "root"])
def test_a_chain_has_the_priority_of_its_prefix_unless_given(prefix: str) -> None:
    assert parse(f"<filter name='f' chain='{prefix}-x'/>").priority == CHAIN_PRIORITIES[prefix]
    assert parse(f"<filter name='f' chain='{prefix}' priority='7'/>").priority == 7
    assert parse("<filter name='f'/>").chain == "root"


def test_what_is_spelled_in_many_ways_is_kept_in_one() -> None:
    rule = "<rule action='drop' direction='in'><ip srcmacaddr='52:54:0:AB:1:2' srcipaddr='10.0.0.1' "
    rule += "srcipmask='255.255.255.0' protocol='TCP' dscp='0X1F'/></rule>"
    (found,) = parse(document(rule)).entries
    assert isinstance(found, Rule)
    assert found.conditions[0].values == {
        "srcmacaddr": "52:54:00:ab:01:02", "srcipaddr": "10.0.0.1", "srcipmask": "24", "protocol": "tcp",
        "dscp": "0x1f",
    }  # fmt: skip


RULE = "<rule action='drop' direction='in'>{}</rule>"


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<network/>", "not a <filter>"),
        ("<filter/>", "'name' is missing"),
        ("<filter name='../x'/>", "not allowed here"),
        ("<filter name='x' chain='output'/>", "not allowed here"),
        ("<filter name='x' priority='1001'/>", "-1000 to 1000"),
        ("<filter name='x' strict='yes'/>", "weaken isolation"),
        ("<filter name='x'><uuid>1</uuid></filter>", "not a UUID"),
        (f"<filter name='x'><uuid>{UUID}</uuid><uuid>{UUID}</uuid></filter>", "more than once"),
        ("<filter name='x'><allow/></filter>", "weaken isolation"),
        ("<filter name='x'><filterref/></filter>", "'filter' is missing"),
        ("<filter name='x'><filterref filter='y'><p/></filterref></filter>", "not understood"),
        (document("<rule direction='in'/>"), "'action' is missing"),
        (document("<rule action='pass' direction='in'/>"), "not allowed here"),
        (document("<rule action='drop' direction='up'/>"), "not allowed here"),
        (document("<rule action='drop' direction='in' statematch='maybe'/>"), "neither 'true' nor 'false'"),
        (document(RULE.format("<quic/>")), "no protocol that is understood"),
        (document(RULE.format("<tcp/><udp/>")), "one protocol, not <tcp>, <udp>"),
        (document(RULE.format("<tcp port='1'/>")), "weaken isolation"),
        (document(RULE.format("<tcp match='maybe'/>")), "neither 'yes' nor 'no'"),
        (document(RULE.format("<tcp dstportstart='65536'/>")), "not in 0 to 65535"),
        (document(RULE.format("<tcp dstportend='80'/>")), "dstportend needs dstportstart"),
        (document(RULE.format("<tcp flags='SYN'/>")), "MASK/FLAGS"),
        (document(RULE.format("<tcp state='NEW,SOMETIMES'/>")), "not a list of NEW"),
        (document(RULE.format("<ip srcipaddr='10.0.0.1' srcipmask='33'/>")), "at most 32 bits"),
        (document(RULE.format("<ip srcipaddr='10.0.0.1' srcipmask='255.0.255.0'/>")), "has holes"),
        (document(RULE.format("<ipv6 srcipaddr='fe80::1%eth0'/>")), "zone"),
        (document(RULE.format("<mac srcmacmask='ff:ff:ff:00:00:00'/>")), "srcmacmask needs srcmacaddr"),
        (document(RULE.format("<stp root-address-mask='ff:ff:ff:00:00:00'/>")), "needs root-address"),
        (document(RULE.format("<arp opcode='Shout'/>")), "nor one of Request"),
        ("<filter name='x'>" + RULE.format("") * 4097 + "</filter>", "at most 4096"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(xml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        parse(xml)
    assert raised.value.line and raised.value.path.startswith("/")


BINDING = """\
<filterbinding>
  <owner>
    <name>vm &amp; co</name>
    <uuid>12345678-1234-4234-8234-123456789abc</uuid>
  </owner>
  <portdev name='vnet0'/>
  <linkdev name='eth0'/>
  <mac address='52:54:00:7b:35:93'/>
  <filterref filter='clean-traffic'>
    <parameter name='IP' value='10.0.0.1'/>
  </filterref>
</filterbinding>
"""


def test_a_binding_survives() -> None:
    assert format_binding(binding(BINDING)) == BINDING


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filterbinding", "binding", "not a <filterbinding>"),
        ("<portdev name='vnet0'/>", "", "<portdev> is missing"),
        ("<portdev name='vnet0'/>", "<portdev name='../../etc'/>", "not allowed here"),
        ("<portdev name='vnet0'/>", "<portdev name='vnet0'/><portdev name='vnet1'/>", "more than once"),
        ("52:54:00:7b:35:93", "52:54", "not a MAC address"),
        ("    <name>vm &amp; co</name>\n", "", "<name> and <uuid>"),
        ("<linkdev name='eth0'/>", "<chain name='eth0'/>", "not understood"),
    ],
)
def test_a_wrong_binding_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        binding(BINDING.replace(old, new))


@given(st.text(st.sampled_from("<>/='\"$[]@ filterubchamp01:.-"), max_size=200))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for read in (parse, binding):
        try:
            read(f"<filter name='x'>{text}</filter>")
        except KvikError:
            pass
