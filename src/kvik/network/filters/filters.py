"""All network filters of one scope, and which interface has which.

Every change of what the kernel does is one nftables transaction: an interface has its old rules or its new ones, never
a part. Changing a filter changes, in one transaction, every interface that uses it; if one of them cannot have the new
rules, none gets them and the definition stays as it was.

Blocking (a transaction takes a few milliseconds); may be called from any thread.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from uuid import UUID, uuid4

from kvik.conf.nwfilter import FilterBinding, FilterReference, NetworkFilter, parse_filter
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    HostError,
    KvikError,
    NoFilter,
    NoFilterBinding,
    OperationInvalid,
)
from kvik.host import nft_probe, nftables
from kvik.host.netlink import Netlink
from kvik.network.egress import (
    KEEP,
    NAMES_MAX,
    Place,
    Resolver,
    check_name,
    find_place,
    lapse,
    name_servers,
    redirects,
)
from kvik.network.egress_keeper import Keeper
from kvik.network.filters import table, tree
from kvik.network.filters.builtin import builtin_filters
from kvik.network.filters.compile import Features, Ruleset, address_set, compile_rules
from kvik.network.filters.dhcp import DhcpSnooper
from kvik.network.filters.store import FilterStore
from kvik.network.filters.table import Command
from kvik.network.filters.variables import ALLOWED, KEPT, LEARNED, collect, set_name
from kvik.paths import Paths

__all__ = ["Filters"]

logger = logging.getLogger(__name__)

_LEARNING = {"any": "any", "dhcp": "dhcp", "none": ""}


class _Bound:
    """A binding, and what of it is in the kernel."""

    __slots__ = ("allow", "binding", "chains", "filters", "guarded", "learn", "notes", "place", "sets")

    def __init__(self, binding: FilterBinding) -> None:
        self.binding = binding
        self.filters: set[str] = set()  # all that its filter refers to
        self.allow: list[str] = []  # names that the machine may reach
        self.place = Place("", (), ())  # where such a machine finds its resolver
        self.guarded = False
        self.learn = ""
        self.notes: list[str] = []
        self.chains: list[str] = []
        self.sets: list[str] = []


class Filters:
    """`open` before anything else. `warnings` holds what could not be put right then."""

    def __init__(self, paths: Paths, *, keep: float = KEEP) -> None:
        """`keep`: seconds, as in network/egress.py."""
        self.store = FilterStore(paths)
        self._keep = keep
        self.warnings: list[str] = []
        self._defined: dict[str, NetworkFilter] = {}
        self._bound: dict[str, _Bound] = {}
        self._lock = threading.RLock()
        self._based = False  # the shared part of the table is there
        self._snooper: DhcpSnooper | None = None  # once an interface wants it
        self._keeper: Keeper | None = None  # likewise

    def open(self) -> None:
        """Read what is defined; put interfaces that still exist under their rules again, and forget the others."""
        with self._lock:
            self.store.open()
            self._defined = {one.name: one for one in self.store.load_filters()}
            bindings = self.store.load_bindings()
            if not bindings:
                return
            with Netlink() as netlink:
                present = {link.name for link in netlink.links()}
            chains, sets = self._in_kernel()
            for binding in bindings:
                bound = _Bound(binding)
                mine = f"{binding.portdev}/"
                bound.chains = [name for name in chains if name.startswith(mine)]
                named = {set_name(value, binding.portdev) for value in (*ALLOWED.values(), *KEPT.values())}
                bound.sets = [name for name in sets if name.startswith(mine) or name in named]
                bound.guarded = bool(bound.chains)  # perhaps: taking away what is not there does no harm
                self._bound[binding.portdev] = bound
                try:
                    if binding.portdev in present:
                        self._apply([bound])
                    else:
                        self.unbind(binding.portdev)
                except KvikError as error:  # what was in the kernel stays there
                    self.warnings.append(f"filter of interface {binding.portdev}: {error}")
                    logger.warning("%s", self.warnings[-1])

    def close(self) -> None:
        """Let go. Rules stay, and so do resolvers."""
        for one in (self._snooper, self._keeper):
            if one is not None:
                one.close()
        self._snooper = self._keeper = None

    # looking up

    def all(self) -> list[NetworkFilter]:
        return [one for _, one in sorted({**builtin_filters(), **self._defined}.items())]

    def lookup_name(self, name: str) -> NetworkFilter:
        found = self._defined.get(name) or builtin_filters().get(name)
        if found is None:
            raise NoFilter(f"no network filter with name {name!r}")
        return found

    def lookup_uuid(self, uuid: bytes) -> NetworkFilter:
        text = str(UUID(bytes=uuid))
        for one in self.all():
            if one.uuid == text:
                return one
        raise NoFilter(f"no network filter with UUID {text}")

    def bindings(self) -> Sequence[FilterBinding]:
        return [bound.binding for bound in list(self._bound.values())]

    def lookup_binding(self, device: str) -> FilterBinding:
        return self._lookup_bound(device).binding

    def notes(self, device: str) -> Sequence[str]:
        """Where less is done than the filter says, and why."""
        return list(self._lookup_bound(device).notes)

    def _lookup_bound(self, device: str) -> _Bound:
        try:
            return self._bound[device]
        except KeyError:
            raise NoFilterBinding(f"no network filter binding for interface {device!r}") from None

    # defining

    def define(self, xml: str) -> NetworkFilter:
        """New, or in place of one with the same name and UUID; interfaces that use it have the new rules at once."""
        made = parse_filter(xml)
        with self._lock:
            self._settle_identity(made)
            before = self._defined.get(made.name)
            self._defined[made.name] = made
            try:
                self._check_loops(made)
                users = [bound for bound in self._bound.values() if made.name in bound.filters]
                self.store.save_filter(made)
                self._apply(users)
            except BaseException:
                if before is None:
                    del self._defined[made.name]
                    self.store.remove_filter(made.name)
                else:
                    self._defined[made.name] = before
                    self.store.save_filter(before)
                raise
            return made

    def _settle_identity(self, made: NetworkFilter) -> None:
        """A name belongs to one UUID and the other way round. A document without one means the filter of its name."""
        for one in self.all():
            if one.name == made.name:
                made.uuid = made.uuid or one.uuid
                if one.uuid != made.uuid and one.name in self._defined:  # a built-in one can be replaced by any
                    raise AlreadyExists(f"filter {made.name!r} already exists with uuid {one.uuid}")
            elif one.uuid == made.uuid:
                raise AlreadyExists(f"filter {one.name!r} is already defined with uuid {one.uuid}")
        made.uuid = made.uuid or str(uuid4())

    def _check_loops(self, made: NetworkFilter) -> None:
        """References to filters that are not defined yet are allowed."""

        def lookup(name: str) -> NetworkFilter:
            try:
                return self.lookup_name(name)
            except NoFilter:
                return NetworkFilter(name=name)

        tree.names(FilterReference(filter=made.name), lookup)

    def undefine(self, name: str) -> None:
        """A built-in filter that was redefined is the built-in one again."""
        with self._lock:
            self.lookup_name(name)
            if name not in self._defined:
                raise OperationInvalid(f"filter {name!r} is built in and cannot be undefined")
            users = [device for device, bound in self._bound.items() if name in bound.filters]
            if users:
                raise OperationInvalid(
                    f"filter {name!r} is in use by interface {users[0]}",
                    remedy="stop the machine, or delete the binding: kvik nwfilter-binding-delete " + users[0],
                )
            self.store.remove_filter(name)
            del self._defined[name]

    # interfaces

    def bind(self, binding: FilterBinding) -> Sequence[str]:
        """Put an interface that exists under a filter; what was on it before is replaced. Returns `notes`.

        Raises ConfigError (a variable without value, a loop), ConfigUnsupported, NoFilter, HostError; then the
        interface is as it was.
        """
        with self._lock:
            before = self._bound.get(binding.portdev)
            bound = _Bound(binding)
            if before is not None:
                bound.chains, bound.sets, bound.guarded = before.chains, before.sets, before.guarded
            self.store.save_binding(binding)
            self._bound[binding.portdev] = bound
            try:
                self._apply([bound], anew=before is None or not self._extends(bound, before))
            except BaseException:
                self._take_back(bound, before)
                raise
            for note in bound.notes:
                logger.warning("filter %s on %s: %s", binding.reference.filter, binding.portdev, note)
            return bound.notes

    def _extends(self, bound: _Bound, before: _Bound) -> bool:
        """Whether a machine may go on with what its allow-list let it find: when the list was only added to."""
        new, old = bound.binding, before.binding
        names = {one.value.lower() for one in new.reference.parameters if one.name == "ALLOW"}
        same = (new.owner_uuid, new.mac, new.reference.filter) == (old.owner_uuid, old.mac, old.reference.filter)
        rest = [[one for one in binding.reference.parameters if one.name != "ALLOW"] for binding in (new, old)]
        return same and bool(before.allow) and names.issuperset(before.allow) and rest[0] == rest[1]

    def _take_back(self, bound: _Bound, before: _Bound | None) -> None:
        """The interface as it was, after `bound` could not be had, or not all of it."""
        if before is None:
            with suppress(KvikError):
                self.unbind(bound.binding.portdev)
            return
        before.chains, before.sets, before.guarded = bound.chains, bound.sets, bound.guarded
        self._bound[bound.binding.portdev] = before
        self.store.save_binding(before.binding)
        with suppress(KvikError):
            self._apply([before])

    def create_binding(self, binding: FilterBinding) -> Sequence[str]:
        """As `bind`, but refuses an interface that has one."""
        with self._lock:
            if binding.portdev in self._bound:
                raise OperationInvalid(f"interface {binding.portdev!r} has a filter binding already")
            with Netlink() as netlink:
                netlink.link(binding.portdev)
            return self.bind(binding)

    def unbind(self, device: str) -> None:
        """Take an interface's rules away. Its packets pass freely then: take the interface down or away first."""
        with self._lock:
            bound = self._lookup_bound(device)
            if bound.chains:
                try:
                    nftables.run(self._removal(bound))
                except HostError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    # Somebody flushed the host's rules: what is left of ours, if anything, goes with the next binding.
            del self._bound[device]
            self.store.remove_binding(device)
            if self._keeper is not None:
                self._keeper.forget(device)
            resolver = self._resolver(bound)
            if resolver.config_file.exists():
                resolver.stop()
            if self._snooper is not None:
                self._snooper.forget(device)

    def release(self, device: str, owner_uuid: str = "") -> None:
        """As `unbind`, but content with nothing; with an owner, only what is that machine's."""
        with self._lock:
            bound = self._bound.get(device)
            if bound is not None and owner_uuid in ("", bound.binding.owner_uuid):
                self.unbind(device)

    def repair(self) -> bool:
        """Put back what somebody flushed (`nft flush ruleset`); whether there was anything to put back."""
        with self._lock:
            chains = self._in_kernel()[0] if self._bound else set()
            listed = {(bound.place.interface, bound.binding.mac) for bound in self._bound.values() if bound.allow}
            whole = all(chains.issuperset(bound.chains) for bound in self._bound.values())
            if whole and (not listed or redirects() >= listed):
                return False
            self.reapply()
            return True

    def reapply(self) -> None:
        """All interfaces anew, in one transaction."""
        with self._lock:
            chains, sets = self._in_kernel()
            self._based = False
            for bound in self._bound.values():
                bound.chains = [name for name in bound.chains if name in chains]
                bound.sets = [name for name in bound.sets if name in sets]
            self._apply(list(self._bound.values()))

    def learned(self, device: str, address: str, seconds: int | None = None) -> None:
        """An address that the machine may use from now on, for `seconds` if given."""
        with self._lock:
            bound = self._lookup_bound(device)
            if bound.learn != "dhcp":
                return
            element: object = {"elem": {"val": address, "timeout": seconds}} if seconds else address
            name = address_set(device)
            # An element keeps the timeout it was made with: out and in again, in one transaction.
            once = table.add("element", name=name, elem=[address])
            again = [once, table.delete("element", name=name, elem=[address])]
            nftables.run([*again, table.add("element", name=name, elem=[element])])

    # the kernel

    def _apply(self, changed: Sequence[_Bound], *, anew: bool = False) -> None:
        """One transaction; `anew` forgets what an interface has learned."""
        if not changed:
            return
        rulesets = [self._compile(bound) for bound in changed]
        commands: list[Command] = []
        for bound, ruleset in zip(changed, rulesets, strict=True):
            commands += self._replacement(bound, ruleset, anew=anew)
        # The shared part takes rules out, for which the kernel waits (about 10 ms): only where it is not known to be.
        try:
            nftables.run(commands if self._based else [*table.base(), *commands])
        except HostError as error:
            if not self._based or error.errno != errno.ENOENT:
                raise
            self._based = False  # somebody flushed the host's rules
            self.reapply()
            return
        self._based = True
        for bound, ruleset in zip(changed, rulesets, strict=True):
            bound.chains, bound.sets, bound.notes = ruleset.chains, [*ruleset.sets], ruleset.notes
            bound.guarded = ruleset.guarded
            self._listen(bound)
            self._resolve(bound)

    def _resolver(self, bound: _Bound) -> Resolver:
        return Resolver(self.store.bindings, bound.binding.portdev, bound.binding.mac, self._keep)

    def _resolve(self, bound: _Bound) -> None:
        resolver = self._resolver(bound)
        device = bound.binding.portdev
        if self._keeper is not None:  # its resolver may be replaced: that is not a death
            self._keeper.let_go(device)
        if bound.allow:
            given = collect(bound.binding.reference.parameters, {})
            resolver.start(bound.place, bound.allow, given.get("DNSSERVER") or name_servers())
            handle = resolver.find()
            if handle is not None:
                self._keeper = self._keeper or Keeper(self._keep, self._resolver_ended, self._period_over)
                self._keeper.watch(device, handle)
        elif resolver.config_file.exists():
            resolver.stop()

    def _resolver_ended(self, device: str) -> None:
        with self._lock:
            bound = self._bound.get(device)
            if bound is None or not bound.allow:
                return
            logger.warning("the resolver of %s ended by itself; it is started again", device)
            try:
                self._resolve(bound)
            except KvikError as error:  # tried again when the period is over
                logger.error("the resolver of %s cannot be started: %s", device, error)

    def _period_over(self) -> None:
        with self._lock:
            listed = [bound for bound in self._bound.values() if bound.allow]
            for bound in listed:
                handle = self._resolver(bound).find()
                if handle is None:
                    self._resolver_ended(bound.binding.portdev)
                else:
                    handle.close()
            try:
                lapse([bound.binding.portdev for bound in listed], self._keep)
            except KvikError as error:  # somebody flushed the host's rules: `repair` comes
                logger.info("what allowed names resolved to did not lapse: %s", error)

    def _listen(self, bound: _Bound) -> None:
        if bound.learn == "dhcp":
            self._snooper = self._snooper or DhcpSnooper(self.learned)
            self._snooper.watch(bound.binding.portdev, bound.binding.mac)
        elif self._snooper is not None:
            self._snooper.forget(bound.binding.portdev)

    def _compile(self, bound: _Bound) -> Ruleset:
        binding = bound.binding
        values: dict[str, Sequence[str]] = {"MAC": [binding.mac]}
        given = collect(binding.reference.parameters, {})
        bound.allow = [check_name(name) for name in given.get("ALLOW", ())]
        if len(bound.allow) > NAMES_MAX:
            raise ConfigError(f"{len(bound.allow)} names are allowed; {NAMES_MAX} are the most")
        if bound.allow:
            bound.place = find_place(binding.portdev, given.get("GATEWAY", ()))
        learn = ""
        if "IP" not in given:
            mode = next((one.value for one in binding.reference.parameters if one.name == "CTRL_IP_LEARNING"), "any")
            if mode not in _LEARNING:
                raise ConfigError(f"CTRL_IP_LEARNING is {mode!r}, which is none of {', '.join(_LEARNING)}")
            if _LEARNING[mode] and tree.uses(binding.reference, "IP", self.lookup_name):
                learn = _LEARNING[mode]
                values["IP"] = [LEARNED]
        if bound.allow:
            values |= {"ALLOWED": [ALLOWED[4], KEPT[4]], "ALLOWED6": [ALLOWED[6], KEPT[6]], **bound.place.variables}
        rules = tree.flatten(binding.reference, values, self.lookup_name)
        bound.filters = tree.names(binding.reference, self.lookup_name)
        bound.learn = learn
        return compile_rules(binding.portdev, binding.mac, rules, _kernel_features(), learn=learn)

    @staticmethod
    def _replacement(bound: _Bound, ruleset: Ruleset, *, anew: bool) -> Iterable[Command]:
        if ruleset.guarded:
            yield from table.guard(bound.binding.portdev)
        elif bound.guarded:
            yield from table.unguard(bound.binding.portdev)
        kept = set() if anew else set(bound.sets) & set(ruleset.sets)
        yield from (table.flush(chain) for chain in bound.chains)
        yield from (table.delete("chain", name=chain) for chain in bound.chains if chain not in ruleset.chains)
        yield from (table.delete("set", name=name) for name in bound.sets if name not in kept)
        yield from (command for name, command in ruleset.sets.items() if name not in kept)
        yield from (table.add("chain", name=chain) for chain in ruleset.chains)
        yield from ruleset.commands

    @staticmethod
    def _removal(bound: _Bound) -> list[Command]:
        device = bound.binding.portdev
        return [
            *(table.unguard(device) if bound.guarded else []),
            *(table.undispatch(stage, device) for stage in table.STAGES),
            *(table.flush(chain) for chain in bound.chains),
            *(table.delete("chain", name=chain) for chain in bound.chains),
            *(table.delete("set", name=name) for name in bound.sets),
        ]

    def _in_kernel(self) -> tuple[set[str], set[str]]:
        """Names of chains and sets in our table."""
        try:
            found = nftables.run([{"list": {"table": {"family": table.FAMILY, "name": table.TABLE}}}])
        except HostError as error:
            if error.errno != errno.ENOENT:
                raise
            return set(), set()
        chains = {item["chain"]["name"] for item in found if "chain" in item}
        return chains, {item["set"]["name"] for item in found if "set" in item}


def _kernel_features() -> Features:
    lacking = nft_probe.missing("bridge-ct", "bridge-reject", "ingress")
    return Features(
        connection_tracking="bridge-ct" not in lacking,
        reject="bridge-reject" not in lacking,
        ingress="ingress" not in lacking,
    )
