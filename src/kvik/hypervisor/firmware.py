"""UEFI images on this host, from the descriptors that their packages install.

Reference: QEMU's docs/interop/firmware.json. Descriptors are read in the order of their names, a later directory
overriding the same name in an earlier one; the first that fits wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvik.conf.domain import Domain
from kvik.conf.features import Features, Smm
from kvik.conf.os import Loader, Nvram
from kvik.errors import ConfigUnsupported, KvikError
from kvik.host import files

__all__ = ["DIRECTORIES", "Firmware", "complete_firmware", "find_firmware", "installed_firmware"]

DIRECTORIES = (Path("/usr/share/qemu/firmware"), Path("/etc/qemu/firmware"))
_LIMIT = 1 << 20


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
