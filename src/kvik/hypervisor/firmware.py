"""UEFI images on this host, from the descriptors that their packages install.

Reference: QEMU's docs/interop/firmware.json. Descriptors are read in the order of their names, a later directory
overriding the same name in an earlier one; the first that fits wins.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvik.conf.domain import Domain
from kvik.conf.features import Features, Smm
from kvik.conf.os import Loader, Nvram
from kvik.errors import ConfigError, ConfigUnsupported, KvikError
from kvik.host import files

__all__ = [
    "DIRECTORIES",
    "Firmware",
    "complete_firmware",
    "find_firmware",
    "installed_firmware",
    "make_variables",
    "pristine_variables",
    "reset_variables",
    "variables_of",
]

DIRECTORIES = (Path("/usr/share/qemu/firmware"), Path("/etc/qemu/firmware"))
_LIMIT = 1 << 20
_VARIABLES = 64 << 20  # bytes; OVMF has half a MiB


@dataclass(frozen=True, slots=True)
class Firmware:
    code: str
    code_format: str
    nvram_template: str
    nvram_format: str
    targets: tuple[tuple[str, str], ...]  # architecture, machine type pattern
    features: frozenset[str]

    def fits(self, arch: str, machine: str, secure: bool) -> bool:
        if secure != ("secure-boot" in self.features) or "enrolled-keys" in self.features:
            return False
        return any(arch == target and fnmatch.fnmatchcase(machine, pattern) for target, pattern in self.targets)


def installed_firmware(directories: Sequence[Path] = DIRECTORIES) -> list[Firmware]:
    """All usable UEFI flash images; a descriptor that cannot be read or understood is passed over."""
    found: dict[str, Path] = {}
    for directory in directories:
        try:
            found |= {path.name: path for path in directory.glob("*.json")}
        except OSError:
            continue
    images = []
    for _, path in sorted(found.items()):
        try:
            parsed = _parse(msgspec.json.decode(files.read_file(path.resolve(), limit=_LIMIT)))
        except (KvikError, msgspec.MsgspecError, KeyError, TypeError, AttributeError, OSError):
            continue
        if parsed is not None and Path(parsed.code).exists():
            images.append(parsed)
    return images


def _parse(body: dict[str, Any]) -> Firmware | None:
    mapping = body["mapping"]
    if "uefi" not in body["interface-types"] or mapping["device"] != "flash" or "nvram-template" not in mapping:
        return None
    return Firmware(
        code=str(mapping["executable"]["filename"]),
        code_format=str(mapping["executable"]["format"]),
        nvram_template=str(mapping["nvram-template"]["filename"]),
        nvram_format=str(mapping["nvram-template"]["format"]),
        targets=tuple(
            (target["architecture"], machine) for target in body["targets"] for machine in target["machines"]
        ),
        features=frozenset(map(str, body["features"])),
    )


def find_firmware(arch: str, machine: str, *, secure: bool, directories: Sequence[Path] = DIRECTORIES) -> Firmware:
    """The image for this machine type. Raises `ConfigUnsupported` naming the package."""
    for image in installed_firmware(directories):
        if image.fits(arch, machine, secure):
            return image
    kind = "UEFI firmware with Secure Boot" if secure else "UEFI firmware"
    raise ConfigUnsupported(
        f"no {kind} for {arch} machine type {machine} is installed", path="/domain/os", remedy="apt install ovmf"
    )


def complete_firmware(definition: Domain, arch: str, machine: str, variables: Path) -> None:
    """Write out what <os firmware='efi'> means on this host for this machine type, and where the machine's own
    variables are: in the directory `variables`. Raises `ConfigUnsupported` if nothing fits."""
    described = definition.os
    if described.firmware == "efi" and (described.loader is None or not described.loader.value):
        wanted = described.firmware_features.features if described.firmware_features else []
        secure = any(feature.name == "secure-boot" and feature.enabled for feature in wanted)
        secure = secure or bool(described.loader and described.loader.secure)
        image = find_firmware(arch, machine, secure=secure)
        described.loader = Loader(readonly=True, type="pflash", value=image.code, secure=secure or None)
        if image.code_format != "raw":
            described.loader.format = "qcow2"
        described.nvram = described.nvram or Nvram()
        described.nvram.template = described.nvram.template or image.nvram_template
    loader = described.loader
    if loader is None or loader.type != "pflash" or loader.stateless:
        return
    if loader.secure:
        definition.features = definition.features or Features()
        definition.features.smm = definition.features.smm or Smm(state=True)
    nvram = described.nvram
    if nvram is None and loader.value:
        template = next((item.nvram_template for item in installed_firmware() if item.code == loader.value), None)
        nvram = described.nvram = Nvram(template=template)
    if nvram is not None and not nvram.value and nvram.source is None:
        nvram.value = str(variables / f"{definition.name}_VARS.fd")


def variables_of(document: Domain) -> str | None:
    """The file that a machine's firmware keeps its variables in."""
    nvram, loader = document.os.nvram, document.os.loader
    if nvram is None or loader is None or loader.type != "pflash":
        return None
    return (nvram.source.location if nvram.source else None) or nvram.value or None


def make_variables(path: str, template: str | None) -> None:
    """A machine's own UEFI variables: made from the template at the first start, kept from then on (blocking)."""
    target = Path(path)
    if target.exists():
        return
    if not template:
        raise ConfigError(f"the NVRAM file {path} does not exist and no template is named", path="/domain/os/nvram")
    data = _template(template)
    files.ensure_directory(target.parent)
    files.atomic_write(target, data)


def pristine_variables(document: Domain) -> bytes | None:
    """What they are before a machine's first start (blocking); None where its firmware keeps none. Raises
    `ConfigError`, `HostError`."""
    path, loader, nvram = variables_of(document), document.os.loader, document.os.nvram
    if path is None or loader is None or nvram is None:
        return None
    template = nvram.template or next(
        (item.nvram_template for item in installed_firmware() if item.code == loader.value), None
    )
    if not template:
        raise ConfigError(
            f"the firmware's variables in {path} cannot be made anew: no template is named",
            path="/domain/os/nvram/@template",
            remedy="write <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>, or whichever belongs to the loader",
        )
    return _template(template)


def reset_variables(document: Domain) -> None:
    """Make them anew, in a file of the same owner and mode (blocking). Raises `ConfigError`, `ConfigUnsupported`,
    `HostError`; then they are as they were."""
    path, data = variables_of(document), pristine_variables(document)
    if path is None or data is None:
        return
    try:
        before = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        files.ensure_directory(Path(path).parent)
        files.atomic_write(path, data)
        return
    except OSError as error:
        raise files.host_error("look at", path, error) from error
    if not stat.S_ISREG(before.st_mode):
        raise ConfigUnsupported(f"{path} is no file: its variables cannot be made anew", path="/domain/os/nvram")
    files.atomic_write(path, data, mode=stat.S_IMODE(before.st_mode), exact=True)
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        try:
            os.chown(path, before.st_uid, before.st_gid)
        except OSError as error:
            raise files.host_error("change the owner of", path, error) from error


def _template(path: str) -> bytes:
    return files.read_file(Path(path).resolve(), limit=_VARIABLES)
