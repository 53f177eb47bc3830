"""swtpm(8): a TPM of the machine's own, its state in a directory that outlives each run.

    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>

The state is manufactured by swtpm_setup(8) at the first start, with an endorsement key and, where the host's local
CA can be used, its certificates. It is made beside its place and renamed into it: a half-made TPM is never used.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from kvik.conf.devices.other import PcrBanks, Tpm, TpmBackend
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported, HostError, HypervisorError
from kvik.host import tools
from kvik.host.files import ensure_directory, host_error
from kvik.host.process import BASE_ENVIRONMENT, find_program
from kvik.hypervisor import words
from kvik.hypervisor.sidecars.group import Command, program

__all__ = ["emulated", "forget_state", "manufacture", "state_directory", "swtpm_command"]

_SETUP_DEADLINE = 120.0  # seconds: it makes RSA keys, and the host may be busy
_VERSIONS = {"2.0": "tpm2", "1.2": "tpm1.2"}


def emulated(domain: Domain) -> list[Tpm]:
    return [item for item in domain.devices.tpms if item.backend is not None and item.backend.type == "emulator"]


def check(backend: TpmBackend) -> None:
    """Raises `ConfigUnsupported`."""
    if backend.encryption is not None:
        raise ConfigUnsupported("encrypted TPM state is not supported yet", path="/domain/devices/tpm/backend")
    source = backend.source
    if source is not None and source.path and (source.type == "file" or "," in source.path):
        raise ConfigUnsupported(
            f"TPM state {source.path!r}: only a directory without a comma in its name can hold it",
            path="/domain/devices/tpm/backend/source",
        )


def state_directory(root: Path, domain: Domain, backend: TpmBackend) -> Path:
    """Where the state is: what the document names, or a directory below the machine's own."""
    if backend.source is not None and backend.source.path:
        return Path(backend.source.path)
    assert domain.uuid is not None
    return root / domain.uuid / _VERSIONS[backend.version or "2.0"]


def forget_state(root: Path, uuid: str) -> None:
    """Remove a machine's TPM state (never a directory that its document named). Raises `HostError`."""
    place = root / uuid
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise host_error("remove TPM state", place, error) from error


async def manufacture(directory: Path, backend: TpmBackend, log_fd: int) -> None:
    """Make the TPM in `directory` if there is none yet. Raises `HypervisorError`, `HostError`."""
    banks = _banks(backend.active_pcr_banks)
    setup = find_program("swtpm_setup")
    if directory.exists() and any(directory.glob("*.permall")):
        if banks and setup is not None and backend.version != "1.2":
            await _run(setup, directory, backend, ["--reconfigure", "--pcr-banks", banks], log_fd)
        return
    ensure_directory(directory.parent)
    if setup is None:
        # swtpm makes an empty TPM by itself; only keys and certificates of a manufacturer are missing.
        ensure_directory(directory)
        return
    fresh = directory.with_name(f".{directory.name}.new")
    keys = ["--createek", "--lock-nvram", *(["--pcr-banks", banks] if banks else [])]
    attempts: tuple[list[str], ...] = (["--create-ek-cert", "--create-platform-cert"], [])
    for number, certificates in enumerate(attempts, 1):
        shutil.rmtree(fresh, ignore_errors=True)
        ensure_directory(fresh)
        try:
            await _run(setup, fresh, backend, [*keys, *certificates, "--not-overwrite"], log_fd)
            break
        except HypervisorError:
            if number == len(attempts):
                shutil.rmtree(fresh, ignore_errors=True)
                raise
    try:
        if directory.exists():
            directory.rmdir()  # made by hand, empty
        fresh.rename(directory)
    except OSError as error:
        raise host_error("make TPM state", directory, error) from error


async def _run(setup: str, directory: Path, backend: TpmBackend, options: list[str], log_fd: int) -> None:
    version = [] if backend.version == "1.2" else ["--tpm2"]
    argv = [setup, *version, "--tpmstate", str(directory), *options]
    words.write_header(log_fd, "starting swtpm_setup", argv)
    env = {**BASE_ENVIRONMENT, "HOME": os.environ.get("HOME", "/")}
    if "XDG_CONFIG_HOME" in os.environ:
        env["XDG_CONFIG_HOME"] = os.environ["XDG_CONFIG_HOME"]  # a user's own swtpm_setup.conf
    try:
        await tools.run_async(argv, env=env, timeout=_SETUP_DEADLINE)
    except HostError as error:
        raise HypervisorError(f"the emulated TPM could not be made: {error}", remedy=error.remedy) from error


def _banks(banks: PcrBanks | None) -> str:
    names = ("sha1", "sha256", "sha384", "sha512")
    return ",".join(name for name in names if banks is not None and getattr(banks, name))


def swtpm_command(alias: str, backend: TpmBackend, directory: Path, control: socket.socket) -> Command:
    """`control` is its end of a socket pair: when QEMU's end closes, it ends."""
    version = [] if backend.version == "1.2" else ["--tpm2"]
    argv = [
        *(program("swtpm"), "socket", *version),
        *("--tpmstate", f"dir={directory},mode=0600"),
        *("--ctrl", f"type=unixio,clientfd={control.fileno()}", "--terminate"),
    ]
    if backend.debug:
        argv += ["--log", f"fd=2,level={backend.debug}"]
    return Command("swtpm", alias, argv, (control.fileno(),))
