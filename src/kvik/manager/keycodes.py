"""Key codes of every set that libvirt's send-key knows, turned into Linux's (`<linux/input-event-codes.h>`).

Sources: HID Usage Tables 1.12 section 10 (keyboard page), the PS/2 scan code sets 1 and 2, Windows' virtual-key codes,
Carbon's `kVK_` codes. Linux's codes below 84 *are* scan code set 1, which keeps the tables small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from kvik.errors import InvalidArgument, OperationUnsupported

LINUX, XT, ATSET1, ATSET2, ATSET3, OSX, XT_KBD, USB, WIN32, QNUM = range(10)  # virKeycodeSet
NAMES = ("linux", "xt", "atset1", "atset2", "atset3", "os_x", "xt_kbd", "usb", "win32", "qnum")
MAX_KEYS = 16  # VIR_DOMAIN_SEND_KEY_MAX_KEYS
MAX_LINUX = 0x2FF  # KEY_MAX

# Set 1 codes behind an 0xE0 prefix -> Linux.
_EXTENDED = {
    0x10: 165, 0x19: 163, 0x1C: 96, 0x1D: 97, 0x20: 113, 0x21: 140, 0x22: 164, 0x24: 166, 0x2E: 114, 0x30: 115,
    0x32: 172, 0x35: 98, 0x37: 99, 0x38: 100, 0x46: 119, 0x47: 102, 0x48: 103, 0x49: 104, 0x4B: 105, 0x4D: 106,
    0x4F: 107, 0x50: 108, 0x51: 109, 0x52: 110, 0x53: 111, 0x5B: 125, 0x5C: 126, 0x5D: 127, 0x5E: 116, 0x5F: 142,
    0x63: 143, 0x65: 217, 0x66: 156, 0x67: 173, 0x68: 128, 0x69: 159, 0x6A: 158, 0x6B: 157, 0x6C: 155, 0x6D: 226,
}  # fmt: skip
# Set 1 codes that are not Linux's own number: F13 to F24, Japanese and Brazilian keys.
_PLAIN = {
    **{code: code for code in range(1, 84)}, 86: 86, 87: 87, 88: 88, 0x59: 117, 0x5C: 95, 0x64: 183, 0x65: 184,
    0x66: 185, 0x67: 186, 0x68: 187, 0x69: 188, 0x6A: 189, 0x6B: 190, 0x6C: 191, 0x6D: 192, 0x6E: 193, 0x76: 194,
    0x70: 93, 0x73: 89, 0x77: 91, 0x78: 90, 0x79: 92, 0x7B: 94, 0x7D: 124, 0x7E: 121,
}  # fmt: skip
# HID usages from 4 on; 0 where there is no key.
_USB = (
    30, 48, 46, 32, 18, 33, 34, 35, 23, 36, 37, 38, 50, 49, 24, 25, 16, 19, 31, 20, 22, 47, 17, 45, 21, 44,  # a to z
    2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 28, 1, 14, 15, 57, 12, 13, 26, 27, 43, 43, 39, 40, 41, 51, 52, 53, 58,
    59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 87, 88, 99, 70, 119, 110, 102, 104, 111, 107, 109, 106, 105, 108, 103,
    69, 98, 55, 74, 78, 96, 79, 80, 81, 75, 76, 77, 71, 72, 73, 82, 83, 86, 127, 116, 117,
    183, 184, 185, 186, 187, 188, 189, 190, 191, 192, 193, 194, 134, 138, 130, 132, 128, 129, 131, 137, 133, 135,
    136, 113, 115, 114, 0, 0, 0, 121, 0, 89, 93, 124, 92, 94, 95,
)  # fmt: skip
_USB_MODIFIERS = (29, 42, 56, 125, 97, 54, 100, 126)  # usages 0xE0 to 0xE7
_LETTERS = _USB[:26]
_DIGITS = (11, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # 0 to 9
_KEYPAD = (82, 79, 80, 81, 75, 76, 77, 71, 72, 73)  # 0 to 9
_FUNCTION = (59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 87, 88, *range(183, 195))  # F1 to F24
_WIN32 = {
    0x08: 14, 0x09: 15, 0x0D: 28, 0x10: 42, 0x11: 29, 0x12: 56, 0x13: 119, 0x14: 58, 0x1B: 1, 0x20: 57, 0x21: 104,
    0x22: 109, 0x23: 107, 0x24: 102, 0x25: 105, 0x26: 103, 0x27: 106, 0x28: 108, 0x2C: 99, 0x2D: 110, 0x2E: 111,
    0x5B: 125, 0x5C: 126, 0x5D: 127, 0x6A: 55, 0x6B: 78, 0x6D: 74, 0x6E: 83, 0x6F: 98, 0x90: 69, 0x91: 70,
    0xA0: 42, 0xA1: 54, 0xA2: 29, 0xA3: 97, 0xA4: 56, 0xA5: 100, 0xAD: 113, 0xAE: 114, 0xAF: 115,
    0xBA: 39, 0xBB: 13, 0xBC: 51, 0xBD: 12, 0xBE: 52, 0xBF: 53, 0xC0: 41, 0xDB: 26, 0xDC: 43, 0xDD: 27, 0xDE: 40,
    0xE2: 86,
}  # fmt: skip
_OSX = (
    30, 31, 32, 33, 35, 34, 44, 45, 46, 47, 86, 48, 16, 17, 18, 19, 21, 20, 2, 3, 4, 5, 7, 6, 13, 10, 8, 12, 9, 11,
    27, 24, 22, 26, 23, 25, 28, 38, 36, 40, 37, 39, 43, 51, 53, 49, 50, 52, 15, 57, 41, 14, 0, 1, 126, 125, 42, 58,
    56, 29, 54, 100, 97, 0, 187, 83, 0, 55, 0, 78, 0, 69, 115, 114, 113, 98, 96, 0, 74, 188, 189, 117, 82, 79, 80,
    81, 75, 76, 77, 71, 190, 72, 73, 124, 89, 121, 63, 64, 65, 61, 66, 67, 0, 87, 0, 183, 186, 184, 0, 68, 127, 88,
    0, 185, 110, 102, 104, 111, 62, 107, 60, 109, 59, 105, 106, 108, 103,
)  # fmt: skip
_ATSET2 = {
    0x76: 1, 0x16: 2, 0x1E: 3, 0x26: 4, 0x25: 5, 0x2E: 6, 0x36: 7, 0x3D: 8, 0x3E: 9, 0x46: 10, 0x45: 11, 0x4E: 12,
    0x55: 13, 0x66: 14, 0x0D: 15, 0x15: 16, 0x1D: 17, 0x24: 18, 0x2D: 19, 0x2C: 20, 0x35: 21, 0x3C: 22, 0x43: 23,
    0x44: 24, 0x4D: 25, 0x54: 26, 0x5B: 27, 0x5A: 28, 0x14: 29, 0x1C: 30, 0x1B: 31, 0x23: 32, 0x2B: 33, 0x34: 34,
    0x33: 35, 0x3B: 36, 0x42: 37, 0x4B: 38, 0x4C: 39, 0x52: 40, 0x0E: 41, 0x12: 42, 0x5D: 43, 0x1A: 44, 0x22: 45,
    0x21: 46, 0x2A: 47, 0x32: 48, 0x31: 49, 0x3A: 50, 0x41: 51, 0x49: 52, 0x4A: 53, 0x59: 54, 0x7C: 55, 0x11: 56,
    0x29: 57, 0x58: 58, 0x05: 59, 0x06: 60, 0x04: 61, 0x0C: 62, 0x03: 63, 0x0B: 64, 0x83: 65, 0x0A: 66, 0x01: 67,
    0x09: 68, 0x77: 69, 0x7E: 70, 0x6C: 71, 0x75: 72, 0x7D: 73, 0x7B: 74, 0x6B: 75, 0x73: 76, 0x74: 77, 0x79: 78,
    0x69: 79, 0x72: 80, 0x7A: 81, 0x70: 82, 0x71: 83, 0x61: 86, 0x78: 87, 0x07: 88,
    0xE05A: 96, 0xE014: 97, 0xE04A: 98, 0xE07C: 99, 0xE011: 100, 0xE06C: 102, 0xE075: 103, 0xE07D: 104, 0xE06B: 105,
    0xE074: 106, 0xE069: 107, 0xE072: 108, 0xE07A: 109, 0xE070: 110, 0xE071: 111, 0xE023: 113, 0xE021: 114,
    0xE032: 115, 0xE037: 116, 0xE01F: 125, 0xE027: 126, 0xE02F: 127,
}  # fmt: skip


@cache
def _table(codeset: int) -> Mapping[int, int]:
    if codeset in (XT, ATSET1):  # an extended key is 0xE0 and its code
        return {**_PLAIN, **{0xE000 | code: key for code, key in _EXTENDED.items()}}
    if codeset == QNUM:  # an extended key has bit 7 set (RFB's extended key event; QEMU's own)
        return {**_PLAIN, **{0x80 | code: key for code, key in _EXTENDED.items()}, 0x54: 99}
    if codeset == USB:
        usages = {4 + index: key for index, key in enumerate(_USB) if key}
        return usages | {0xE0 + index: key for index, key in enumerate(_USB_MODIFIERS)}
    if codeset == WIN32:
        return (
            _WIN32
            | {ord("A") + index: key for index, key in enumerate(_LETTERS)}
            | {ord("0") + index: key for index, key in enumerate(_DIGITS)}
            | {0x60 + index: key for index, key in enumerate(_KEYPAD)}
            | {0x70 + index: key for index, key in enumerate(_FUNCTION)}
        )
    if codeset == OSX:
        return {index: key for index, key in enumerate(_OSX) if key}
    if codeset == ATSET2:
        return _ATSET2
    raise OperationUnsupported(f"key code set {NAMES[codeset]} is not supported", remedy="send the keys as linux codes")


def to_linux(codeset: int, codes: Sequence[int]) -> list[int]:
    """The Linux key codes for `codes` of a virKeycodeSet.

    `InvalidArgument` for a set or a code that does not exist, and for more than 16 keys at once.
    """
    if not 0 <= codeset < len(NAMES):
        raise InvalidArgument(f"there is no key code set {codeset}")
    if not 0 < len(codes) <= MAX_KEYS:
        raise InvalidArgument(f"between 1 and {MAX_KEYS} keys can be sent at once, not {len(codes)}")
    if codeset == LINUX:
        table: Mapping[int, int] | None = None
    else:
        table = _table(codeset)
    keys = []
    for code in codes:
        key = table.get(code, 0) if table is not None else (code if 0 < code <= MAX_LINUX else 0)
        if not key:
            raise InvalidArgument(f"key code {code} is not in the set {NAMES[codeset]}")
        keys.append(key)
    return keys
