"""What comes from outside is bounded and refused with line, path and reason."""

from __future__ import annotations

import pytest

from kvik.conf import reader
from kvik.conf.cpuset import format_cpuset, parse_cpuset
from kvik.conf.domain import parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.prepare import load_domain
from kvik.conf.units import parse_bytes, parse_kib
from kvik.errors import ConfigError

HEAD = "<domain type='qemu'>\n<name>{name}</name>\n<memory>{memory}</memory>\n<vcpu>{vcpu}</vcpu>\n"
BODY = "<os>{os}</os>\n{more}<devices>\n{devices}\n</devices>\n</domain>"


def document(**parts: str) -> str:
    values = {
        "name": "m",
        "memory": "1024",
        "vcpu": "2",
        "os": "<type machine='q35'>hvm</type>",
        "more": "",
        "devices": "",
    }
    return (HEAD + BODY).format(**{**values, **parts})


@pytest.mark.parametrize(
    ("more", "devices", "reason"),
    [
        ("<iothreads>1</iothreads><cputune><iothreadpin iothread='2' cpuset='0'/></cputune>", "", "no I/O thread 2"),
        (
            "<iothreads>1</iothreads><cputune><iothreadpin iothread='1' cpuset='0'/>"
            "<iothreadpin iothread='1' cpuset='1'/></cputune>",
            "",
            "pinned I/O thread",
        ),
        (
            "<iothreadids><iothread id='2' thread_pool_min='3' thread_pool_max='2'/></iothreadids>",
            "",
            "above its thread_pool_max",
        ),
        (
            "<iothreads>1</iothreads>",
            "<disk type='file'><driver iothread='2'/><source file='/a'/><target dev='vda'/></disk>",
            "names I/O thread 2",
        ),
        (
            "",
            "<disk type='file'><driver><iothreads><iothread id='1'/></iothreads></driver><source file='/a'/>"
            "<target dev='vda'/></disk>",
            "names I/O thread 1",
        ),
        ("", "<controller type='nvme'><serial>more than twenty letters</serial></controller>", "NVMe controller"),
        (
            "",
            "<disk type='file'><source file='/a'/><target dev='nvme0n1' bus='virtio'/></disk>",
            "not a target of bus virtio",
        ),
    ],
)
def test_threads_and_buses_that_are_not_there(more: str, devices: str, reason: str) -> None:
    assert reason in str(load(document(more=more, devices=devices)))


def load(xml: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_domain(xml, MachineDefaults())
    return caught.value


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ("not xml", "not well-formed"),
        ("<domain", "not well-formed"),
        ("<network/>", "starts with <domain>"),
        (b"\xff\xfe<\x00d\x00", "not UTF-8"),
        (
            "<!DOCTYPE domain [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain>&x;</domain>",
            "document type declaration",
        ),
        ("<?xml version='1.0'?>\n<!-- a -->\n<!DOCTYPE domain><domain/>", "document type declaration"),
        ("<domain type='qemu'><name>&undefined;</name></domain>", "not well-formed"),
        ("<domain>" + "<a>" * 70 + "</a>" * 70 + "</domain>", "64 elements deep"),
        ("<a>" * 100_000, "more than 20000 elements"),
        ("<domain>" + " " * reader.MAX_BYTES + "</domain>", "bytes; at most"),
        ("<domain type='qemu'/>", "<os> is missing"),
        ("<domain type='vmware'><os><type>hvm</type></os></domain>", "'vmware' is not one of"),
    ],
)
def test_text_that_is_no_domain_document(xml: str | bytes, reason: str) -> None:
    assert reason in str(load(xml))


def test_a_parse_error_has_line_and_path() -> None:
    error = load(document(devices="<disk>\n<target dev='vda' bus='floppy'/></disk>"))
    assert (error.line, error.path) == (8, "/domain/devices/disk/target/@bus")
    assert "'floppy' is not one of" in error.message


def test_a_later_error_has_line_and_path() -> None:
    disk = "<disk><source file='/srv/{0}'/><target dev='vda' bus='virtio'/></disk>\n"
    error = load(document(devices=disk.format("a") + disk.format("b")))
    assert (error.line, error.path) == (8, "/domain/devices/disk[2]")
    assert "target 'vda' is already that of /domain/devices/disk[1]" in error.message


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "-rf", "x" * 256, "a\nb", "a\tb", " a", "a ", "a\x7fb", "a\u202eb", "\u00e9" * 128]
)
def test_names_that_would_mean_something_else(name: str) -> None:
    error = load(document(name=name.replace("\n", "&#10;").replace("\t", "&#9;")))
    assert error.path == "/domain/name"
    assert error.line == 2


@pytest.mark.parametrize("name", ["a", "vm-1", "my vm", "\u00e9t\u00e9", "a.b", "x" * 251, "_"])
def test_names_that_are_fine(name: str) -> None:
    assert load_domain(document(name=name)).name == name


@pytest.mark.parametrize("memory", ["0", "-1", "18446744073709551616", "9223372036854775808", "1e3", "", "0.5", "x"])
def test_memory_out_of_bounds(memory: str) -> None:
    assert load(document(memory=memory)).path == "/domain/memory"


@pytest.mark.parametrize("vcpu", ["0", "-1", "4097", "2147483648", "18446744073709551616", "many"])
def test_vcpus_out_of_bounds(vcpu: str) -> None:
    assert load(document(vcpu=vcpu)).path == "/domain/vcpu"


PCI = "<address type='pci' bus='{0}' slot='{1}' function='0'/>"
NIC = "<interface type='user'><mac address='{0}'/><model type='virtio'/>{1}</interface>"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"more": "<cpu><topology sockets='2' cores='2' threads='1'/></cpu>"}, "the topology has 4 vCPUs"),
        ({"more": "<cpu><topology sockets='0' cores='2' threads='1'/></cpu>"}, "at least one"),
        ({"more": "<currentMemory>2048</currentMemory>"}, "not between 1 and the maximum"),
        ({"more": "<memory unit='parsec'>1</memory>"}, "unknown unit"),
        ({"more": "<name>again</name>"}, "appears more than once"),
        ({"more": "<seclabel type='dynamic'><escape/></seclabel>"}, "weaken isolation"),
        ({"more": "<launchSecurity type='sev' loose='yes'/>"}, "weaken isolation"),
        ({"more": "<futurething><sandbox/></futurething><sandbox/>"}, "weaken isolation"),
        ({"os": "<type>hvm</type><kernel>vmlinuz</kernel>"}, "not an absolute path"),
        ({"os": "<type>hvm</type><initrd>/a</initrd>"}, "without a kernel"),
        ({"os": "<type>xen</type>"}, "cannot be run"),
        ({"os": "<type machine='q35,accel=x'>hvm</type>"}, "no machine"),
        ({"os": "<type>hvm</type><boot dev='hd'/><boot dev='hd'/>"}, "appears twice"),
        ({"devices": "<emulator>qemu</emulator>"}, "not an absolute path"),
        ({"devices": "<emulator>bin/kvik-vmm</emulator>"}, "not an absolute path"),
        ({"devices": "<disk><target dev='vda'/></disk>"}, "needs a <source file"),
        ({"devices": "<disk><source file='a.img'/><target dev='vda'/></disk>"}, "not an absolute path"),
        ({"devices": "<disk><source file='/a'/><target dev='vda,x'/></disk>"}, "not a target"),
        ({"devices": "<disk><source file='/a'/><target dev='vda'/><serial>a,b</serial></disk>"}, "serial"),
        ({"devices": "<disk><source file='/a'/><driver type='raw,x'/><target dev='vda'/></disk>"}, "no image format"),
        ({"devices": "<disk device='cdrom'><target dev='vda' bus='virtio'/></disk>"}, "CD drive"),
        ({"devices": NIC.format("52:54:00:00:00:01", "") * 2}, "MAC address 52:54:00:00:00:01 is already"),
        ({"devices": NIC.format("01:00:5e:00:00:01", "")}, "multicast"),
        ({"devices": NIC.format("52:54:00", "")}, "not a MAC"),
        ({"devices": NIC.format("52:54:00:00:00:01", "<target dev='averyveryverylongname'/>")}, "interface name"),
        ({"devices": "<interface type='bridge'/>"}, "needs a <source bridge"),
        ({"devices": NIC.format("52:54:00:00:00:01", PCI.format(0, 3)) + NIC.format("52:54:00:00:00:02", PCI.format(0, 3))},  # noqa: E501
         "is already that of /domain/devices/interface[1]"),
        ({"devices": NIC.format("52:54:00:00:00:01", PCI.format(0, 33))}, "is not a PCI address"),
        ({"devices": NIC.format("52:54:00:00:00:01", "<boot order='1'/>"), "os": "<type>hvm</type><boot dev='hd'/>"}, "not both"),  # noqa: E501
        ({"devices": "<serial type='file'/>"}, "needs a <source path"),
        ({"devices": "<serial type='unix'><source mode='bind' path='/" + "a" * 120 + "'/></serial>"}, "at most 107"),
        ({"devices": "<graphics type='vnc' passwd='ninechars'/>"}, "at most 8"),
        ({"devices": "<vsock><cid address='2'/></vsock>"}, "guest CID 2"),
        ({"devices": "<controller type='usb' model='none'/><input type='tablet' bus='usb'/>"}, "needs a USB controller"),  # noqa: E501
        ({"devices": "<rng model='virtio'><alias name='ua-x'/><backend model='builtin'/></rng>" * 2}, "alias 'ua-x'"),
    ],
)  # fmt: skip
def test_documents_that_make_no_sense(parts: dict[str, str], reason: str) -> None:
    error = load(document(**parts))
    assert reason in str(error)
    assert error.path.startswith("/domain/")


def test_sizes_and_units() -> None:
    assert parse_kib(1, None) == 1
    assert parse_kib(1, "MiB") == 1024
    assert parse_kib(1, "b") == 1
    assert parse_kib(1000, "KB") == 977
    assert parse_bytes("64K") == 65536
    assert parse_bytes("10 GiB") == 10 << 30
    with pytest.raises(ValueError, match=r"2\^63"):
        parse_kib(16, "EiB")


def test_sets_of_cpus() -> None:
    assert parse_cpuset("0-3,^2,7") == {0, 1, 3, 7}
    assert format_cpuset({0, 1, 3, 7}) == "0-1,3,7"
    assert format_cpuset({0, 1, 2, 5, 7, 8}).split(",") == ["0-2", "5", "7-8"]
    assert format_cpuset([0, 1, 2, 8, 10, 11]) == "0-2,8,10-11"
    assert format_cpuset([]) == ""
    for bad in ("", "a", "3-1", "0-99999999", "1-", "-1", "0,,1"):
        with pytest.raises(ValueError, match=r"set|range"):
            parse_cpuset(bad)


def test_comments_do_not_cut_text() -> None:
    domain = parse_domain(document(name="a<!-- x -->b"))
    assert domain.name == "ab"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("<vcpu id='1' enabled='yes' hotpluggable='yes'/>", "vCPU 0"),
        ("<vcpu id='0' enabled='yes' hotpluggable='yes'/>", "vCPU 0"),
        ("<vcpu id='0' enabled='no'/>", "vCPU 0"),
        ("<vcpu id='0' enabled='yes'/><vcpu id='1' enabled='no' hotpluggable='no'/>", "neither"),
        ("<vcpu id='0' enabled='yes' order='1'/><vcpu id='1' enabled='yes'/>", "order"),
        ("<vcpu id='0' enabled='yes' order='1'/><vcpu id='1' enabled='yes' order='1'/>", "order"),
        ("<vcpu id='0'/>", "enabled"),
        ("<vcpu id='0' enabled='yes'/><vcpu id='2' enabled='yes'/>", "does not exist"),
    ],
)
def test_vcpus_told_one_by_one_make_sense(entries: str, reason: str) -> None:
    xml = (
        f"<domain type='qemu'><name>m</name><memory>65536</memory><vcpu>2</vcpu><vcpus>{entries}</vcpus>"
        "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os></domain>"
    )
    with pytest.raises(ConfigError, match=reason):
        load_domain(xml, MachineDefaults())
