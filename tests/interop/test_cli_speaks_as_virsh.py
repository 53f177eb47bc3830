"""The same command to `virsh` and to `kvik`, on one libvirtd with its in-memory test driver: the same words.

What may differ is named in each case's absence: figures that move by themselves, and errors that say more here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik

pytestmark = [pytest.mark.interop, pytest.mark.root]

LINES = """\
list
list --all
list --all --title
list --name
list --uuid --name
list --inactive
domstate test
domstate test --reason
domcontrol test
domstats
domstats test
domblklist test
domblklist test --details
domiflist test
domblkerror test
vcpucount test
vcpucount test --maximum
vcpucount test --live
vcpuinfo test --pretty
nodeinfo
freecell
freecell --all
freecell 0
maxvcpus
hostname
sysinfo
vncdisplay test
domdisplay test
event --list
autostart test
autostart test --disable
domid test
domuuid test
domname 1
desc test
metadata test http://foo
domfsinfo test
domblkinfo test --all --human
domifaddr test
cpu-models x86_64
capabilities
domif-getlink test testnet0
domif-getlink test foo
domiftune test testnet0
domiftune test foo
domiftune test testnet0 --inbound 100,x
domif-setlink test testnet0 foo
domif-setlink test testnet0 down --print-xml
domhostname test
dumpxml test
dumpxml test --inactive
dumpxml test --xpath //vcpu
dumpxml test --xpath //nope
dumpxml test --xpath //mac/@address
dumpxml test --xpath '//name|//uuid' --wrap
attach-disk test /tmp/x vdb --print-xml
attach-disk test /x vdb --driver qemu --subdriver qcow2 --cache none --mode readonly --serial s --print-xml
attach-disk test /x vdb --address pci:0000.00.0a.0 --multifunction --iothread 1 --alias ua-x --print-xml
attach-disk test /x sdb --address scsi:0.0.1 --targetbus scsi --print-xml
attach-disk test v vdb --sourcetype network --source-protocol nbd --source-host-name h --print-xml
attach-interface test bridge br0 --model virtio --target vnet7 --inbound 100,200,300 --outbound 50 --print-xml
attach-interface test hostdev 0000:00:03.0 --print-xml --managed
attach-interface test user x --print-xml
detach-disk test vda --print-xml
detach-disk test vdz
detach-interface test network --print-xml
change-media test hdc --eject --print-xml
setmem test abc
setvcpus test 0
setvcpus test x
start test
start test --frob
resume test
domrename test foo
dominfo nope
dominfo
lisst
list foo
event --event foo
event --event lifecycle --timeout 1
send-key test KEY_NOPE
echo 'a b' --shell
"""

CONFIGURATION = """\
unix_sock_dir = "{run}"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for program in ("libvirtd", "virsh", "unshare"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("libvirtd's system mode needs root")
    base = tmp_path_factory.mktemp("lv")
    (base / "libvirtd.conf").write_text(CONFIGURATION.format(run=base))
    # A mount namespace of its own: this daemon must not meet the host's libvirt.
    script = f"mount -t tmpfs none /run && exec libvirtd -f {base}/libvirtd.conf -p {base}/pid"
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=log, stderr=log)
    socket = base / "libvirt-sock"
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"libvirtd does not start here: {(base / 'log').read_text()[-300:]}")
            time.sleep(0.05)
        yield f"test+unix:///default?socket={socket}"
    finally:
        process.terminate()
        process.wait(10)


def run(argv: list[str], environ: dict[str, str]) -> tuple[int, str, str]:
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ, check=False)
    errors = "".join(line for line in result.stderr.splitlines(keepends=True) if not line.startswith("hint: "))
    return result.returncode, result.stdout, errors


@pytest.mark.parametrize("line", LINES.splitlines())
def test_same_words_and_exit_code(uri: str, line: str) -> None:
    words = shlex.split(line)
    environ = {**os.environ, "LC_ALL": "C", "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}
    theirs = run(["virsh", "-c", uri, *words], environ)
    ours = run([sys.executable, "-m", "kvik.cli.main", "-c", uri, *words], environ)
    assert ours == theirs
