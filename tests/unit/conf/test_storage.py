"""Documents of storage pools and volumes: as libvirt prints them, what is filled in, what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lxml import etree

from kvik.conf.codec import Element
from kvik.conf.storage_pool import (
    StoragePool,
    complete_pool,
    format_pool,
    load_pool,
    parse_pool,
    parse_source,
    validate_pool,
)
from kvik.conf.storage_state import PoolOrigin, PoolState, format_state, parse_state
from kvik.conf.storage_volume import check_volume_name, format_volume, load_volume, parse_volume, validate_volume
from kvik.conf.tree import walk
from kvik.errors import ConfigError, ConfigUnsupported, InvalidArgument

DATA = Path(__file__).parents[2] / "data/storage"
POOLS, VOLUMES = sorted(DATA.glob("pool-*.xml")), sorted(DATA.glob("volume-*.xml"))
SCHEMAS = Path("/usr/share/libvirt/schemas")

pools = pytest.mark.parametrize("path", POOLS, ids=lambda path: path.stem)
volumes = pytest.mark.parametrize("path", VOLUMES, ids=lambda path: path.stem)


@pools
def test_a_pool_document_of_libvirt_comes_out_as_it_went_in(path: Path) -> None:
    document = parse_pool(path.read_text())
    complete_pool(document)
    validate_pool(document)
    assert format_pool(document) == path.read_text()
    assert not document.warnings()
    complete_pool(document)
    assert format_pool(document) == path.read_text()  # doing it twice changes nothing


@volumes
def test_a_volume_document_of_libvirt_comes_out_as_it_went_in(path: Path) -> None:
    document = parse_volume(path.read_text())
    assert format_volume(document) == path.read_text()
    assert not document.warnings()


@pytest.mark.skipif(not SCHEMAS.exists(), reason="needs libvirt's schemas (libvirt-daemon)")
@pytest.mark.parametrize("path", [*POOLS, *VOLUMES], ids=lambda path: path.stem)
def test_what_is_written_is_valid_by_libvirts_schema(path: Path) -> None:
    is_pool = path.stem.startswith("pool")
    schema = etree.RelaxNG(etree.parse(SCHEMAS / ("storagepool.rng" if is_pool else "storagevol.rng")))
    text = format_pool(parse_pool(path.read_text())) if is_pool else format_volume(parse_volume(path.read_text()))
    schema.assertValid(etree.fromstring(text))


def test_every_declared_field_is_exercised_by_some_document() -> None:
    used: set[str] = set()
    declared: set[str] = set()
    for path in [*POOLS, *VOLUMES]:
        root: Element = (parse_pool if path.stem.startswith("pool") else parse_volume)(path.read_text())
        for item, _ in walk(root, ""):
            for field in item.__struct_fields__:
                declared.add(f"{type(item).__name__}.{field}")
                if getattr(item, field) not in (None, []):
                    used.add(f"{type(item).__name__}.{field}")
    left = {name for name in declared - used if not name.endswith(".unknown")}
    assert left == {
        # told in other ways: by name, by the fabric, by a search, and what qcow2 volumes only have on request
        "SourceAdapter.name", "SourceAdapter.parent_wwnn", "SourceAdapter.parent_wwpn",
        "SourceAdapter.parent_fabric_wwn", "Encryption.engine", "EncryptionSecret.usage", "BackingStore.timestamps",
    }  # fmt: skip


def pool(inner: str, kind: str = "dir") -> str:
    return f"<pool type='{kind}'>\n<name>p</name>\n{inner}\n</pool>"


def test_what_is_left_out_is_filled_in() -> None:
    made = load_pool(pool("<target><path>/srv/x//</path></target>"))
    assert made.path == "/srv/x"
    assert made.uuid is not None and len(made.uuid) == 36
    assert load_pool(pool("<source><name>vg</name></source>", "logical")).path == "/dev/vg"
    assert load_pool(pool("", "logical")).path == "/dev/p"
    assert load_pool(pool("", "mpath")).path == "/dev/mapper"
    source = "<source><device path='/dev/sdz'/></source><target><path>/mnt</path></target>"
    assert load_pool(pool(source, "fs")).format == "auto"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (pool(""), "missing storage pool target path"),
        (pool("<target><path>relative</path></target>"), "relative"),
        (pool("<target><path>/a/../etc</path></target>"), "'..'"),
        (pool("<target><path>/a</path></target>", "fs"), "missing storage pool source device name"),
        (pool("<target><path>/a</path></target>", "netfs"), "missing storage pool source host name"),
        (pool("<source><host name='-o'/><dir path='/x'/></source><target><path>/a</path></target>", "netfs"), "'-o'"),
        (
            pool("<source><device path='/dev/x'/><format type='ntfs'/></source><target><path>/a</path></target>", "fs"),
            "unknown pool format type ntfs",
        ),
        (pool("<source><name>../x</name></source>", "logical"), "not the name of a"),
        (pool("<source><name>a/b</name></source>", "logical"), "not the name of a volume group"),
        (pool("<source><device path='disk'/></source>", "disk"), "disk"),
        (pool("<target><path>/dev</path></target>", "scsi"), "missing storage pool source adapter"),
        (
            pool("<source><adapter name='eth0'/></source><target><path>/dev</path></target>", "scsi"),
            "not a SCSI host",
        ),
        (
            pool(
                "<source><adapter type='fc_host' wwnn='1' wwpn='2'/></source><target><path>/dev</path></target>",
                "scsi",
            ),
            "16 hexadecimal digits",
        ),
        (pool("<target><path>/a</path><permissions><mode>999</mode></permissions></target>"), "octal"),
        (pool("<target><path>/a</path><permissions><owner>-2</owner></permissions></target>"), "not a user"),
        ("<pool type='frob'><name>p</name></pool>", "frob"),
        ("<pool type='dir'><name>a/b</name><target><path>/a</path></target></pool>", "'/'"),
        ("<network/>", "starts with <pool>"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("'..'", r"'\.\.'")):
        load_pool(text)


def test_mount_options_are_single_words() -> None:
    fs = "xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'"
    text = (
        f"<pool type='netfs' {fs}><name>p</name><source><host name='h'/><dir path='/x'/></source>"
        "<target><path>/a</path></target><fs:mount_opts><fs:option name='ro,suid'/></fs:mount_opts></pool>"
    )
    with pytest.raises(ConfigError, match="one word"):
        load_pool(text)


def volume(inner: str, name: str = "v.img") -> str:
    return f"<volume>\n<name>{name}</name>\n{inner}\n</volume>"


def test_sizes_of_a_volume_are_bytes_in_the_end() -> None:
    made = load_volume(volume("<capacity unit='G'>2</capacity>"))
    assert (made.size, made.allocated, made.format) == (2 << 30, 2 << 30, "raw")
    made = load_volume(volume("<capacity>5</capacity><allocation unit='KiB'>1</allocation>"))
    assert (made.size, made.allocated) == (5, 1024)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (volume(""), "missing capacity"),
        (volume("<capacity unit='Q'>1</capacity>"), "unknown unit"),
        (volume("<capacity unit='E'>8</capacity>"), "more than"),
        (volume("<capacity>-1</capacity>"), "unsigned"),
        (volume("<capacity>1</capacity>", "a/b"), "cannot contain '/'"),
        (volume("<capacity>1</capacity>", "-rf"), "begins with '-'"),
        (volume("<capacity>1</capacity>", "a\nb"), "holds"),
        (volume("<capacity>1</capacity><target><compat>9</compat></target>"), "version of qcow2"),
        (volume("<capacity>1</capacity><target><clusterSize unit='B'>3</clusterSize></target>"), "clusters of 3"),
        (volume("<capacity>1</capacity><backingStore><path>x</path></backingStore>"), "backing store"),
        ("<pool type='dir'/>", "starts with <volume>"),
    ],
)
def test_a_volume_that_makes_no_sense_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_volume(text)


def test_formats_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ConfigUnsupported, match="unknown volume format type foo"):
        load_volume(volume("<capacity>1</capacity><target><format type='foo'/></target>"))
    made = parse_volume(volume("<capacity>1</capacity><target><format type='linux'/></target>"))
    validate_volume(made, ("linux",))


@pytest.mark.parametrize("name", ["a", "Windows 10 (x64).iso", "größe.qcow2", "_x", "a+b=c@d,e~f", "диск-1"])
def test_names_of_volumes(name: str) -> None:
    assert check_volume_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-rf", "a/b", "a\nb", "a\0b", "a\u202eb", "a ", " a", "a*",
                                  "a'b", 'a"b', "a\\b", "$a", "a;b", "a|b", "x" * 256])  # fmt: skip
def test_names_that_no_volume_gets(name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not allowed"):
        check_volume_name(name)


def test_a_state_is_read_as_it_was_written() -> None:
    document: StoragePool = load_pool(pool("<target><path>/srv/x</path></target>"))
    state = PoolState(pool=document, origin=PoolOrigin(state="active", boot="b", persistent=True))
    assert parse_state(format_state(state)) == state
    for wrong in ("<poolstate/>", "<pool type='dir'/>", "<poolstate>" + format_pool(document) + "</poolstate>"):
        with pytest.raises(ConfigError):
            parse_state(wrong)


def test_a_source_to_search() -> None:
    assert parse_source("<source><host name='h' port='3'/></source>").host == "h"
    with pytest.raises(ConfigError, match="starts with <source>"):
        parse_source("<pool type='dir'/>")


def test_libvirts_test_driver_takes_what_we_write(tmp_path: Path) -> None:
    """virsh's driver in memory knows all types of pools and their documents."""
    try:
        subprocess.run(["virsh", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs virsh (libvirt-clients)")
    for path in POOLS:
        document = load_pool(path.read_text())
        (tmp_path / "pool.xml").write_text(format_pool(document))
        line = f"pool-define {tmp_path}/pool.xml; pool-dumpxml {document.name}"
        said = subprocess.run(
            ["virsh", "-q", "-c", "test:///default", line], capture_output=True, text=True, check=True
        ).stdout
        theirs = load_pool(said[said.index("<pool") :])
        assert (theirs.name, theirs.uuid, theirs.type, theirs.path) == (
            document.name,
            document.uuid,
            document.type,
            document.path,
        )
        for device in document.origin.devices:
            device.free_extents = []  # which only an active one has
        assert theirs.source == document.source
