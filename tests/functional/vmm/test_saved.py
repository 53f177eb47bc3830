"""Machines of kvik-vmm saved by the daemon: a guest of 26 bytes that counts what it is sent goes on counting."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator

import pytest
from guests import needs_kvm
from test_zygote_daemon import Host
from tiny_kernel import elf

from kvik.client import saved
from kvik.errors import OperationFailed

pytestmark = [pytest.mark.functional, needs_kvm]

COUNTER = 0x300_0000
# mov esi, COUNTER; 1: mov dx, 0x3FD; 2: in al, dx; test al, 1; jz 2b; mov dx, 0x3F8; in al, dx; inc dword [esi];
# mov al, [esi]; out dx, al; jmp 1b
COUNTING = bytes.fromhex("be00000003 66bafd03 ec a801 74fb 66baf803 ec ff06 8a06 ee ebeb".replace(" ", ""))
DOMAIN = """<domain type='kvm'><name>c</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type>hvm</type><kernel>{root}/counting</kernel></os>
<devices><emulator>kvik-vmm</emulator>
<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/c.raw'/><target dev='vda'/></disk>
<serial type='unix'><source mode='bind' path='{root}/line'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    (host.root / "counting").write_bytes(elf(COUNTING))
    (host.root / "c.raw").write_bytes(bytes(1 << 20))
    try:
        host.connection.define(DOMAIN.format(root=host.root))
        yield host
    finally:
        for domain in host.connection.domains(1):
            domain.destroy()
        host.connection.close()
        host.process.terminate()
        host.process.wait(15)
        shutil.rmtree(host.root, ignore_errors=True)


def counted(host: Host) -> int:
    """One more byte for the guest; how many that makes."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(30)
        line.connect(str(host.root / "line"))
        line.sendall(b"x")
        return line.recv(1)[0]


def test_its_memory_outlives_it(host: Host) -> None:
    domain = host.connection.lookup_name("c")
    domain.start()
    assert [counted(host) for _ in range(3)] == [1, 2, 3]
    path = host.root / "saved"
    saved.save(domain, str(path))
    assert not domain.is_active() and path.stat().st_mode & 0o777 == 0o600
    saved.restore(host.connection, str(path))
    assert counted(host) == 4
    # paused when it was saved: paused again, and saved once more from there
    domain.suspend()
    saved.managed_save(domain)
    assert domain.has_managed_save() and not domain.is_active()
    host.kill()
    host.start()
    domain = host.connection.lookup_name("c")
    assert domain.has_managed_save()
    domain.start()
    assert not domain.has_managed_save() and domain.state().state == 3
    domain.resume()
    assert counted(host) == 5
    domain.destroy()
    # a byte of its memory that was changed is found, and the machine is not started from it
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OperationFailed, match="fails its check"):
        saved.restore(host.connection, str(path))
    assert not domain.is_active()
