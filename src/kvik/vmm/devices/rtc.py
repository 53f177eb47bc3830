"""The PC's clock and CMOS memory: an MC146818A (Motorola, 1984; section numbers are its data sheet's).

The time is the host's plus an offset, so it needs no ticking: registers are computed when they are read, and what
happened meanwhile (update, alarm, periodic flags) when somebody looks. A timer runs only while an interrupt that the
guest enabled is still to come, so a flag that nobody acknowledges costs nothing.
"""

from __future__ import annotations

import time

from kvik.vmm.device import PortDevice
from kvik.vmm.layout import RTC_GSI, RTC_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.interrupts import Line
    from kvik.vmm.loop import Timer
    from kvik.vmm.machine import Machine

__all__ = ["Rtc"]

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY, MONTH, YEAR, A, B, C, D = range(6, 14)
CENTURY = 0x32  # the PC's, named by ACPI's FADT
TIME = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY)

UIP, DIVIDER, RATE = 0x80, 0x70, 0x0F  # A
DIVIDER_RUNS, DIVIDER_RESET = 0x20, 0x60  # 32768 Hz; 11x holds it
SET, PIE, AIE, UIE, BINARY, HOUR_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02  # B; PIE, AIE, UIE match C's flags
IRQ, PF, AF, UF = 0x80, 0x40, 0x20, 0x10  # C
VALID = 0x80  # D: the battery is good
PM = 0x80
ANY = 0xC0  # an alarm register with both bits set matches everything

SECOND = 1_000_000_000
UPDATE = 244_000  # ns that UIP is set before the update (figure 16)
TELL_AFTER = 0.5  # seconds from a change of the time to the event
FASTEST = 1 / 1024  # seconds between interrupts that we are willing to give
SIZE = 128


class Rtc(PortDevice):
    """`base`: utc, localtime, or the seconds since the epoch that the clock shows at power-on."""

    kind, base, size = "mc146818rtc", RTC_PORT, 2

    def __init__(self, name: str = "rtc", start: str = "utc") -> None:
        self.line: Line | None = None
        self.machine: Machine | None = None
        self._timer: Timer | None = None
        self._tell_timer: Timer | None = None
        self._telling = self._arming = False
        self.cmos = bytearray(SIZE)
        self.cmos[A], self.cmos[B], self.cmos[D] = DIVIDER_RUNS | 6, HOUR_24, VALID
        self.index = 0
        if start == "localtime":
            self.offset = time.localtime().tm_gmtoff * SECOND
        else:
            self.offset = 0 if start == "utc" else int(start) * SECOND - time.time_ns()
        self._settled = self.now()  # up to here, what happened is in register C
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine
        self.line = machine.interrupts.line(RTC_GSI)

    def reset(self) -> None:
        """The RESET pin: interrupts off, flags gone; time and memory stay (table 4)."""
        self.cmos[B] &= ~(PIE | AIE | UIE | 0x08)
        self.cmos[C] = 0
        self._drive()

    def close(self) -> None:
        super().close()
        self.pause()
        if self._tell_timer is not None:
            self._tell_timer.cancel()

    def pause(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume(self) -> None:
        self._arm()

    # Registers ---------------------------------------------------------------------------------------------------

    def now(self) -> int:
        """The guest's time, ns since the epoch."""
        return time.time_ns() + self.offset

    @property
    def _halted(self) -> bool:
        """The time stands: SET, or the divider is held in reset."""
        return bool(self.cmos[B] & SET) or self.cmos[A] & DIVIDER_RESET == DIVIDER_RESET

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # write only
        register = self.index
        if register == C:
            self._settle()
            value = self.cmos[C]
            self.cmos[C] = 0  # reading acknowledges
            self._drive()
            self._arm_soon()
            return value
        if register == A:
            updating = not self._halted and self.now() % SECOND >= SECOND - UPDATE
            return self.cmos[A] | (UIP if updating else 0)
        if register in TIME and not self._halted:
            self._store_time()
        return self.cmos[register]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            self.index = value & 0x7F  # bit 7 masks NMIs on a PC
            return
        register = self.index
        if register in (C, D):
            return  # read only
        if register in (A, B):
            self._control(register, value)
        elif register in TIME:
            if not self._halted:
                self._store_time()
            self.cmos[register] = value
            if not self._halted:
                self._load_time()
        else:
            if register in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                self._settle()
            self.cmos[register] = value
            self._arm_soon()

    def _control(self, register: int, value: int) -> None:
        self._settle()
        halted = self._halted
        if not halted:
            self._store_time()
        if register == A:
            self.cmos[A] = value & ~UIP
        else:
            self.cmos[B] = value & ~UIE if value & SET else value  # SET clears UIE (register B)
        if halted and not self._halted:
            self._load_time()
        self._drive()
        self._arm_soon()

    # Time --------------------------------------------------------------------------------------------------------

    def _encode(self, value: int) -> int:
        return value if self.cmos[B] & BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.cmos[B] & BINARY else (value >> 4) * 10 + (value & 0xF)

    def _hour(self, value: int) -> int:
        """0 to 23 of an hour register, or something beyond."""
        if self.cmos[B] & HOUR_24:
            return self._decode(value)
        hour = self._decode(value & ~PM)
        return hour % 12 + (12 if value & PM else 0) if 1 <= hour <= 12 else 99

    def _store_time(self) -> None:
        """The time into the registers."""
        cmos, encode = self.cmos, self._encode
        at = time.gmtime(self.now() // SECOND)
        cmos[SECONDS], cmos[MINUTES] = encode(min(at.tm_sec, 59)), encode(at.tm_min)
        if cmos[B] & HOUR_24:
            cmos[HOURS] = encode(at.tm_hour)
        else:
            cmos[HOURS] = encode((at.tm_hour + 11) % 12 + 1) | (PM if at.tm_hour >= 12 else 0)
        cmos[DAY_OF_WEEK] = encode((at.tm_wday + 1) % 7 + 1)  # Sunday is 1
        cmos[DAY], cmos[MONTH] = encode(at.tm_mday), encode(at.tm_mon)
        century, year = divmod(at.tm_year, 100)
        cmos[YEAR], cmos[CENTURY] = encode(year), encode(century % 100)

    def _load_time(self) -> None:
        """The registers, as the guest set them, into the offset. What is no date counts on into the next one."""
        cmos, decode = self.cmos, self._decode
        days = days_from_civil(
            decode(cmos[CENTURY]) * 100 + decode(cmos[YEAR]), min(max(decode(cmos[MONTH]), 1), 12), decode(cmos[DAY])
        )
        hours = days * 24 + self._hour(cmos[HOURS]) % 24
        seconds = (hours * 60 + decode(cmos[MINUTES])) * 60 + decode(cmos[SECONDS])
        # Half a second before the first update: when the divider starts anew (register A, DV).
        before = self.now()
        self.offset = seconds * SECOND + SECOND // 2 - time.time_ns()
        self._settled = self.now()
        self._arm_soon()
        if self.machine is not None and abs(self.now() - before) >= SECOND and not self._telling:
            self._telling = True
            self.machine.loop.call_soon(self._tell_soon)

    def _tell_soon(self) -> None:
        """A guest sets register by register, and may do so without end: one event for what happened in a while."""
        assert self.machine is not None
        self._tell_timer = self.machine.loop.call_later(TELL_AFTER, self._tell)

    def _tell(self) -> None:
        with self.lock:
            self._telling, self._tell_timer = False, None
            offset = round(self.offset / SECOND)
        if self.machine is not None:
            self.machine.emit("RTC_CHANGE", {"offset": offset})

    # Flags and interrupts ----------------------------------------------------------------------------------------

    def _period(self) -> int:
        """Of the periodic flag, in ns; 0: none (table 5, for 32768 Hz)."""
        rate = self.cmos[A] & RATE
        if not rate or self.cmos[A] & DIVIDER != DIVIDER_RUNS:
            return 0
        return SECOND * (1 << (rate + 6 if rate <= 2 else rate - 1)) // 32768

    def next_alarm(self, after: int) -> int:
        """The first moment behind `after` (ns) when the alarm matches, within a day; -1: it never does."""
        cmos, decode = self.cmos, self._decode
        pairs = ((HOURS_ALARM, 24), (MINUTES_ALARM, 60), (SECONDS_ALARM, 60))
        wanted = []
        for register, limit in pairs:
            value = cmos[register]
            if value & ANY == ANY:
                wanted.append(range(limit))
                continue
            value = self._hour(value) if register == HOURS_ALARM else decode(value)
            if value >= limit:
                return -1
            wanted.append(range(value, value + 1))
        hours, minutes, seconds = wanted
        day, current = divmod(after // SECOND + 1, 86400)
        for hour in hours:
            if hour * 3600 + 3599 < current:
                continue
            for minute in minutes:
                start = hour * 3600 + minute * 60
                if start + 59 < current:
                    continue
                first = next((second for second in seconds if start + second >= current), -1)
                if first >= 0:
                    return (day * 86400 + start + first) * SECOND
        return ((day + 1) * 86400 + hours[0] * 3600 + minutes[0] * 60 + seconds[0]) * SECOND

    def _settle(self) -> None:
        """Bring the flags up to now."""
        before, now = self._settled, self.now()
        self._settled = now
        if now < before:
            return  # the host's clock was set back
        flags = 0
        if not self._halted:
            if now // SECOND > before // SECOND:
                flags |= UF
            if 0 <= self.next_alarm(before) <= now:
                flags |= AF
        period = self._period()
        if period and now // period > before // period:
            flags |= PF
        self.cmos[C] |= flags
        self._drive()

    def _drive(self) -> None:
        up = bool(self.cmos[C] & self.cmos[B] & (PF | AF | UF))
        self.cmos[C] = self.cmos[C] & ~IRQ | (IRQ if up else 0)
        if self.line is not None:
            self.line.set(up)

    def _arm_soon(self) -> None:
        """From a vCPU's thread: timers belong to the loop's."""
        if self._arming or self.machine is None:
            return
        if self._timer is not None or self.cmos[B] & (PIE | AIE | UIE):
            self._arming = True
            self.machine.loop.call_soon(self._arm)

    def _arm(self) -> None:
        """Set the timer for the next interrupt that is enabled and not yet pending."""
        with self.lock:
            self._arming = False
            self.pause()
            if self.machine is None or self._bus is None:
                return
            missing = self.cmos[B] & ~self.cmos[C]
            after = self._settled
            due = []
            if missing & UIE and not self._halted:
                due.append((after // SECOND + 1) * SECOND)
            if missing & AIE and not self._halted and (alarm := self.next_alarm(after)) >= 0:
                due.append(alarm)
            if missing & PIE and (period := self._period()):
                due.append((after // period + 1) * period)
            if due:
                wait = max((min(due) - self.now()) / SECOND, FASTEST)
                self._timer = self.machine.loop.call_later(wait, self._fire)

    def _fire(self) -> None:
        with self.lock:
            self._timer = None
            self._settle()
        self._arm()

    # State -------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        self._settle()
        return {"cmos": bytes(self.cmos), "index": self.index, "offset": self.offset, "settled": self._settled}

    def restore(self, state: State) -> None:
        cmos = bytes(state["cmos"])
        if len(cmos) != SIZE:
            raise ValueError(f"the CMOS memory has {SIZE} bytes, not {len(cmos)}")
        self.cmos = bytearray(cmos)
        self.index = int(state["index"]) & 0x7F
        self.offset, self._settled = int(state["offset"]), int(state["settled"])
        self._drive()
        self._arm_soon()


def days_from_civil(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01 of a date of the Gregorian calendar (H. Hinnant, "chrono-compatible low-level date
    algorithms"): `calendar` would import a lot for it."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468
