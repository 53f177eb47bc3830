"""A script, run as somebody without privileges: a switch and machines on it, until its standard input ends.

    switch_session.py DIRECTORY JSON      {"settings": ..., "machines": [{"name": ..., "mac": ...}], "kernel": ..., ...}

In DIRECTORY appear `switch` (control), and NAME.agent and NAME.qmp for each machine.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvik.network.switch.control import Switch


def qemu(directory: Path, given: dict[str, Any], machine: dict[str, Any], fd: int) -> subprocess.Popen[bytes]:
    name = machine["name"]
    return subprocess.Popen(
        [
            *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "192", "-display", "none"),
            *("-nodefaults", "-no-user-config", "-bios", "qboot.rom", "-kernel", given["kernel"]),
            *("-initrd", given["initrd"], "-append", f"{given['append']} kvik.hostname={name}"),
            *("-chardev", f"socket,id=agent,path={directory}/{name}.agent,server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-netdev", machine.get("netdev") or f"stream,id=net,addr.type=fd,addr.str={fd},server=off"),
            *("-device", f"virtio-net-pci,netdev=net,romfile=,mac={machine['mac']}"),
            *("-serial", f"file:{directory}/{name}.console", "-qmp", f"unix:{directory}/{name}.qmp,server=on,wait=off"),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=(fd,),
    )


def main() -> None:
    directory, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    switch = Switch.start(directory / "switch", given["settings"], 2)
    started = []
    try:
        for machine in given["machines"]:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                mtu = machine.get("mtu", 0)
                switch.add_port(machine["name"], machine["mac"], ours.fileno(), alias="net0", mtu=mtu)
                started.append(qemu(directory, given, machine, theirs.fileno()))
        print(switch.process.pid, flush=True)
        sys.stdin.read()
    finally:
        for process in started:
            process.kill()
            process.wait()
        switch.stop()


if __name__ == "__main__":
    main()
