"""<seclabel> and <launchSecurity>: everything here restricts or seals, so nothing unknown is let through.
https://libvirt.org/formatdomain.html#security-label"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, LIVE, ON_OFF, YES_NO, Element, Hex, Text, YesNo


class Seclabel(Element):
    __xml_strict__ = True

    type: Literal["dynamic", "static", "none"] | None = None
    model: str | None = None
    relabel: YesNo = None
    label: Text = None
    imagelabel: Annotated[str | None, CHILD, LIVE] = None
    baselabel: Text = None


class LaunchSecurity(Element):
    """AMD SEV, SEV-SNP, Intel TDX or s390 Protected Virtualization."""

    __xml_strict__ = True

    type: Literal["sev", "sev-snp", "s390-pv", "tdx"]
    kernel_hashes: Annotated[bool | None, YES_NO, "kernelHashes"] = None
    author_key: Annotated[bool | None, YES_NO, "authorKey"] = None
    vcek: YesNo = None
    cbitpos: Annotated[int | None, CHILD] = None
    reduced_phys_bits: Annotated[int | None, CHILD, "reducedPhysBits"] = None
    policy: Annotated[int | None, CHILD, Hex(4)] = None
    guest_visible_workarounds: Annotated[str | None, CHILD, "guestVisibleWorkarounds"] = None
    id_block: Annotated[str | None, CHILD, "idBlock"] = None
    id_auth: Annotated[str | None, CHILD, "idAuth"] = None
    host_data: Annotated[str | None, CHILD, "hostData"] = None
    dh_cert: Annotated[str | None, CHILD, "dhCert"] = None
    session: Text = None


class KeyWrapCipher(Element):
    __xml_strict__ = True

    name: Literal["aes", "dea"]
    state: Annotated[bool, ON_OFF]


class KeyWrap(Element):
    __xml_strict__ = True

    ciphers: Annotated[list[KeyWrapCipher], "cipher"] = []
