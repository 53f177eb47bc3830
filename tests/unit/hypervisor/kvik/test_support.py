"""What kvik-vmm cannot run is refused by the element's name, with what to write instead; and only that."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import kvik
from kvik.conf.domain import parse_domain
from kvik.errors import ConfigUnsupported, HypervisorError
from kvik.hypervisor.driver import Feature, HostVerdict
from kvik.hypervisor.kvik import program, support
from kvik.hypervisor.kvik.driver import KvikDriver
from kvik.paths import Paths

DOMAIN = (
    "<domain type='{type}'><name>m</name><memory>65536</memory>{top}<os{os}><type{machine}>hvm</type>{boot}</os>"
    "<devices><emulator>{emulator}</emulator>{devices}</devices></domain>"
)
USUAL = {"type": "kvm", "top": "", "os": "", "machine": "", "boot": "<kernel>/k</kernel>", "devices": ""}
DISK = "<disk type='file' device='{0}'><driver name='qemu' type='{1}'/><source file='/d'/><target dev='{2}'/></disk>"
LOADER = "<loader type='pflash' readonly='yes'{0}>/x</loader>"
SERVED = "<disk type='file'><driver type='qcow2'/><source file='/d'/><target dev='vda'/>{0}</disk>"

REFUSED = [
    ({"type": "qemu"}, "/domain/@type", "needs KVM"),
    ({"machine": " machine='q35'"}, "/domain/os/type/@machine", "'q35'"),
    ({"machine": " arch='aarch64'"}, "/domain/os/type/@arch", "aarch64"),
    ({"boot": ""}, "/domain/os", "needs a <kernel>"),
    ({"os": " firmware='efi'"}, "/domain/os", "kernel or with firmware"),
    ({"os": " firmware='bios'", "boot": ""}, "/domain/os/@firmware", "no BIOS"),
    ({"boot": "<loader type='rom'>/x</loader>"}, "/domain/os/loader/@type", "flash only"),
    ({"boot": LOADER.format(" secure='yes'")}, "/domain/os/loader/@secure", "Secure Boot"),
    ({"boot": LOADER.format(" stateless='yes'")}, "/domain/os/loader/@stateless", "variables"),
    ({"boot": LOADER.format(" format='qcow2'")}, "/domain/os/loader/@format", "as it is"),
    ({"boot": "<loader type='pflash' readonly='no'>/x</loader>"}, "/domain/os/loader/@readonly", "cannot change"),
    ({"boot": LOADER.format("") + "<nvram format='qcow2'>/v</nvram>"}, "/domain/os/nvram/@format", "as they are"),
    ({"os": " firmware='efi'", "boot": "<firmware><feature enabled='yes' name='secure-boot'/></firmware>"},
     "/domain/os/firmware", "Secure Boot"),
    ({"top": "<vcpu>2000</vcpu>"}, "/domain/vcpu", "1024 vCPUs"),
    ({"devices": "<graphics type='vnc'/>"}, "/domain/devices/graphics", "no screen"),
    ({"devices": "<video><model type='vga'/></video>"}, "/domain/devices/video", "no screen"),
    ({"devices": "<input type='tablet' bus='usb'/>"}, "/domain/devices/input", "no keyboard"),
    ({"devices": "<sound model='ich9'/>"}, "/domain/devices/sound", "sound"),
    ({"devices": "<controller type='usb' model='qemu-xhci'/>"}, "/domain/devices/controller[1]", "usb controller"),
    ({"devices": "<controller type='scsi' model='virtio-scsi'/>"}, "/domain/devices/controller[1]", "scsi"),
    ({"devices": DISK.format("disk", "luks", "vda")}, "/domain/devices/disk[1]/driver/@type", "luks"),
    ({"devices": SERVED.format("<serial>one</serial>").replace("qcow2", "vdi")},
     "/domain/devices/disk[1]/serial", "serial number"),
    ({"top": "<iothreads>1</iothreads>"}, "/domain/iothreads", "no I/O threads"),
    ({"devices": SERVED.format("<transient/>")}, "/domain/devices/disk[1]/transient", "own image"),
    ({"devices": SERVED.format("<wwn>5000c50015ea71aa</wwn>")}, "/domain/devices/disk[1]/wwn", "no wwn"),
    ({"devices": SERVED.format("<blockio physical_block_size='4096'/>")}, "/domain/devices/disk[1]/blockio", "512"),
    ({"devices": DISK.format("disk", "raw' io='native", "vda")}, "/domain/devices/disk[1]/driver/@io", "native"),
    ({"devices": DISK.format("disk", "raw' detect_zeroes='on", "vda")},
     "/domain/devices/disk[1]/driver/@detect_zeroes", "zeros"),
    ({"devices": DISK.format("disk", "raw' copy_on_read='on", "vda")},
     "/domain/devices/disk[1]/driver/@copy_on_read", "on read"),
    ({"top": "<iothreads>1</iothreads>", "devices": DISK.format("disk", "raw' iothread='1", "vda")},
     "/domain/devices/disk[1]/driver/@iothread", "thread of its own"),
    ({"devices": SERVED.format("<iotune><total_iops_sec>9</total_iops_sec><group_name>g</group_name></iotune>")},
     "/domain/devices/disk[1]/iotune/group_name", "each disk"),
    ({"devices": DISK.format("disk", "raw", "sda' bus='sata")}, "/domain/devices/disk[1]/target/@bus", "'sata'"),
    ({"devices": DISK.format("cdrom", "raw", "vda")}, "/domain/devices/disk[1]/@device", "CD"),
    ({"devices": "<interface type='user'><model type='e1000e'/></interface>"},
     "/domain/devices/interface[1]/model", "e1000e"),
    ({"devices": "<interface type='mcast'><source address='230.0.0.1' port='5558'/></interface>"},
     "/domain/devices/interface[1]/@type", "mcast"),
    ({"devices": "<tpm><backend type='emulator'/></tpm>"}, "/domain/devices/tpm", "TPM"),
    ({"devices": "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source>"
                 "</hostdev>"}, "/domain/devices/hostdev", "pass"),
    ({"devices": "<serial type='tcp'><source mode='bind' host='::' service='1'/></serial>"},
     "/domain/devices/serial", "'tcp'"),
    ({"devices": "<filesystem><source dir='/s'/><target dir='t'/></filesystem>"},
     "/domain/devices/filesystem/driver", "virtiofs"),
    ({"devices": "<memory model='dimm'><target><size>1024</size></target></memory>"},
     "/domain/devices/memory", "dimm"),
]  # fmt: skip


def driver(tmp_path: Path, verdict: HostVerdict | None = None) -> KvikDriver:
    found = verdict or HostVerdict(True, "it ran code")
    return KvikDriver(Paths.system(tmp_path / "root"), lambda: found)


def document(tmp_path: Path, **parts: str) -> str:
    return DOMAIN.format(**{**USUAL, "emulator": "kvik-vmm", **parts})


@pytest.mark.parametrize(("parts", "path", "words"), REFUSED, ids=[path.split("/", 2)[2] for _, path, _ in REFUSED])
async def test_a_refusal_names_the_element_and_what_to_do(
    parts: dict[str, str], path: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigUnsupported) as raised:
        await driver(tmp_path).complete(parse_domain(document(tmp_path, **parts)))
    assert raised.value.path == path
    assert words in raised.value.message and raised.value.remedy


async def test_a_plain_document_is_taken(tmp_path: Path) -> None:
    domain = parse_domain(document(tmp_path, devices=DISK.format("disk", "raw", "vda")))
    await driver(tmp_path).complete(domain)
    await driver(tmp_path).validate(domain)


async def test_without_kvm_the_verdicts_reason_is_given_and_a_way_out(tmp_path: Path) -> None:
    verdict = HostVerdict(False, "/dev/kvm belongs to root:kvm", "usermod -aG kvm you")
    refusing = driver(tmp_path, verdict)
    domain = parse_domain(document(tmp_path))
    await refusing.complete(domain)  # a definition may wait for a better host
    with pytest.raises(ConfigUnsupported, match=r"kvik-vmm needs KVM.*belongs to root:kvm") as raised:
        await refusing.validate(domain)
    assert raised.value.path == "/domain/devices/emulator"
    assert "usermod" in raised.value.remedy and "QEMU" in raised.value.remedy
    assert Feature.KVM not in refusing.features()
    with pytest.raises(ConfigUnsupported, match="belongs to root:kvm"):
        await refusing.domain_capabilities("", "", "", "")


async def test_a_host_that_can_by_now_is_asked_again(tmp_path: Path) -> None:
    verdicts = [HostVerdict(False, "no module"), HostVerdict(True, "SVM")]
    found = driver(tmp_path)
    late = KvikDriver(Paths.system(tmp_path / "root"), lambda: verdicts.pop(0))
    domain = parse_domain(document(tmp_path))
    await found.complete(domain)
    await late.validate(domain)
    assert late.verdict().reason == "SVM"


@pytest.mark.parametrize(
    ("emulator", "why"),
    [("/nowhere/kvik-vmm", "cannot be run"), ("bin/kvik-vmm", "is no absolute path")],
)
async def test_an_emulator_that_is_not_there_is_said_so(tmp_path: Path, emulator: str, why: str) -> None:
    domain = parse_domain(document(tmp_path, emulator=emulator))
    found = driver(tmp_path)
    await found.complete(domain)
    with pytest.raises(ConfigUnsupported, match=f"{emulator} {why}") as raised:
        await found.validate(domain)
    assert raised.value.remedy == "<emulator>kvik-vmm</emulator>"


async def test_the_plain_name_stays_and_means_the_vmm_of_this_installation(tmp_path: Path) -> None:
    domain = parse_domain(document(tmp_path, emulator="kvik-vmm"))
    await driver(tmp_path).complete(domain)
    await driver(tmp_path).validate(domain)
    assert domain.devices.emulator == "kvik-vmm"
    said = subprocess.run(
        program.command(["kvik-vmm", "--version"]), check=False, capture_output=True, text=True, env={}, cwd="/"
    )
    assert said.stdout == f"kvik-vmm {kvik.__version__}\n"
    with pytest.raises(HypervisorError, match="x86_64"):
        await driver(tmp_path).default_emulator("aarch64")


async def test_a_path_means_that_file(tmp_path: Path) -> None:
    other = tmp_path / "kvik-vmm"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    domain = parse_domain(document(tmp_path, emulator=str(other)))
    await driver(tmp_path).complete(domain)
    await driver(tmp_path).validate(domain)
    assert program.command([domain.devices.emulator or "", "--name", "m"]) == [str(other), "--name", "m"]


async def test_its_capabilities_promise_only_what_it_takes(tmp_path: Path) -> None:
    found = driver(tmp_path)
    xml = await found.domain_capabilities("", "kvik", "kvm", "")
    assert "<path>kvik-vmm</path>" in xml
    assert f"<machine>{support.MACHINE}</machine>" in xml and "<domain>kvm</domain>" in xml
    for kind in ("graphics", "video", "hostdev", "tpm", "redirdev"):
        assert f"<{kind} supported='no'/>" in xml
    assert "<value>virtio</value>" in xml and "<value>sata</value>" not in xml
    for arguments in (("", "q35", "", ""), ("", "", "qemu", "")):
        with pytest.raises(ConfigUnsupported):
            await found.domain_capabilities(*arguments)
