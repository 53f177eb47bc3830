"""Linux keycodes (input-event-codes.h) as QEMU's `QKeyCode` names (qapi/ui.json)."""

from __future__ import annotations

from collections.abc import Sequence

from kvik.errors import InvalidArgument

__all__ = ["QCODES", "qcodes"]

_ROWS: tuple[tuple[int, str], ...] = (
    # first keycode, then the names of consecutive ones ("-": QEMU has no name)
    (1, "esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace tab"),
    (16, "q w e r t y u i o p bracket_left bracket_right ret ctrl"),
    (30, "a s d f g h j k l semicolon apostrophe grave_accent shift backslash"),
    (44, "z x c v b n m comma dot slash shift_r kp_multiply alt spc caps_lock"),
    (59, "f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 num_lock scroll_lock"),
    (71, "kp_7 kp_8 kp_9 kp_subtract kp_4 kp_5 kp_6 kp_add kp_1 kp_2 kp_3 kp_0 kp_decimal"),
    (85, "- less f11 f12 ro katakana hiragana henkan katakanahiragana muhenkan - kp_enter ctrl_r kp_divide"),
    (99, "sysrq alt_r lf home up pgup left right end down pgdn insert delete - audiomute volumedown volumeup power"),
    (117, "kp_equals - pause - kp_comma lang1 lang2 yen meta_l meta_r compose"),
    (128, "stop again props undo front copy open paste find cut help menu calculator - sleep wake"),
    (155, "mail ac_bookmarks computer ac_back ac_forward"),
    (163, "audionext audioplay audioprev audiostop - - - - - ac_home ac_refresh"),
    (183, "f13 f14 f15 f16 f17 f18 f19 f20 f21 f22 f23 f24"),
    (217, "-"),
    (226, "mediaselect"),
)

QCODES = {first + index: name for first, names in _ROWS for index, name in enumerate(names.split()) if name != "-"}


def qcodes(keycodes: Sequence[int]) -> list[dict[str, str]]:
    """`send-key`'s list of keys. Raises `InvalidArgument` for a key QEMU cannot press."""
    keys = []
    for code in keycodes:
        name = QCODES.get(code)
        if name is None:
            raise InvalidArgument(f"QEMU has no key with the Linux keycode {code}")
        keys.append({"type": "qcode", "data": name})
    return keys
