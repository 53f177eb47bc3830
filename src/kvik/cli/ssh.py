"""ssh: the system's ssh into a machine, by its name: its address found, its key remembered for the machine itself."""

from __future__ import annotations

import os
import time

from kvik.cli import document
from kvik.cli.common import ACTIVE
from kvik.cli.domain_net import addresses, rank
from kvik.cli.guest_exec import seconds
from kvik.cli.options import FLAG, NUMBER, REST, TEXT, WORDS, Option, UsageError, Verb
from kvik.errors import InvalidArgument, KvikError, MissingPackages, OperationInvalid, OperationTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain
    from kvik.client.uri import Address

TIMEOUT = 60.0  # seconds
POLL = 0.25
BANNER_WAIT = 3.0  # a guest under emulation takes its time
BANNER_MAX = 8192  # a server may say other lines first (RFC 4253, 4.2)
INSTALL = "install it: apt-get install openssh-client (dnf install openssh-clients)"
NOT_A_USER = set("\0\n\r\t '\"`$\\;&<>|(){}*?!#%,")
SOURCES = ("lease", "arp", "agent")  # the host's own knowledge first: an agent may name any address as the guest's


def ssh(ctx: Context, options: Options) -> int:
    from kvik.client.uri import default_uri, parse_uri

    port, user, identity = options.number("port"), options.text("login"), options.text("identity")
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"{port} is not a port")
    if user is not None and (not user or user.startswith("-") or NOT_A_USER & set(user)):
        raise UsageError(f"{user!r} is not a user's name")
    if identity is not None and not os.path.isfile(identity):  # noqa: PTH113
        raise UsageError(f"there is no file {identity!r}")
    timeout = seconds(options.text("timeout")) or TIMEOUT
    host = parse_uri(ctx.uri or default_uri())
    domain = ctx.domain(options.data("domain"))
    if domain.id <= 0:
        raise OperationInvalid(f"domain '{domain.name}' is not running", remedy=f"'kvik start {domain.name}' starts it")
    ctx.doing = f"Failed to reach ssh of domain '{domain.name}'"
    place = where(ctx, domain, port or 22, host, timeout)
    command = [*options.words("command"), *options.words("rest")]
    argv = arguments(domain.uuid, place, known_hosts(), command, user=user, identity=identity, jump=host)
    if options.flag("print"):
        import shlex

        ctx.line(shlex.join(argv))
        return 0
    ctx.stdout.flush()
    return run(argv)


def where(ctx: Context, domain: Domain, port: int, host: Address, timeout: float) -> tuple[str, int]:
    """An address and port of this host's, or of the host that `host` names, at which the machine's ssh answers."""
    forwarded = forward(domain, port)
    if forwarded is not None:
        candidates: Callable[[], list[str]] = lambda: [forwarded[0]]  # noqa: E731
        port = forwarded[1]
    elif behind_user(domain, session=host.scope == "session"):
        raise InvalidArgument(
            f"the interfaces of '{domain.name}' are behind user networking, which nobody reaches from outside",
            remedy="give one <portForward proto='tcp' address='127.0.0.1'><range start='2222' to='22'/></portForward>",
        )
    else:
        candidates = lambda: reachable(domain)  # noqa: E731
    from kvik.cli.progress import Progress

    deadline = time.monotonic() + timeout
    with Progress(ctx.stderr, quiet=ctx.quiet) as progress:
        while True:
            found = candidates()
            if found and host.transport == "ssh":
                return found[0], port  # only ssh itself gets there
            heard = ""  # at the best of them
            for address in found:
                said = banner(address, port)
                if not said:
                    return address, port
                heard = heard or said
            left = deadline - time.monotonic()
            if left <= 0:
                raise stalled(domain, found, port, heard, timeout)
            progress.transient(f"{domain.name}: waiting for {'ssh' if found else 'an address'} {timeout - left:.0f} s")
            time.sleep(min(POLL, left))


def reachable(domain: Domain) -> list[str]:
    """Addresses that can be typed without more: the best first, as canonical text, none of this host's own."""
    from ipaddress import ip_address

    try:
        found = sorted(addresses(domain, None), key=lambda one: (min(map(trust, one.sources)), *rank(one)))
    except KvikError:
        return []
    kept = []
    for one in found:
        try:
            address = ip_address(one.address.address)
        except ValueError:  # an agent's words
            continue
        if not (address.is_link_local or address.is_loopback or address.is_multicast or address.is_unspecified):
            kept.append(str(address))
    return list(dict.fromkeys(kept))


def trust(source: str) -> int:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


def forward(domain: Domain, port: int) -> tuple[str, int] | None:
    """Which address and port of the host lead to the machine's TCP port, by a <portForward> of its document."""
    for element in document.devices(document.parse(domain.xml()), "interface"):
        for one in element.findall("portForward"):
            for ports in one.findall("range"):
                first = int(ports.get("start", "0"))
                to, end = int(ports.get("to", first)), int(ports.get("end", first))
                if one.get("proto") == "tcp" and ports.get("exclude") != "yes" and to <= port <= to + end - first:
                    return one.get("address") or "127.0.0.1", first + port - to
    return None


def behind_user(domain: Domain, *, session: bool) -> bool:
    """Whether no interface of the machine has an address of this host's networks: a session's are a switch's."""
    nics = document.interfaces(document.parse(domain.xml()))
    return bool(nics) and all(nic.kind == "user" or (session and nic.kind == "network") for nic in nics)


def banner(address: str, port: int) -> str:
    """ "" if something there speaks ssh (RFC 4253, 4.2); else what is heard instead."""
    import socket

    try:
        with socket.create_connection((address, port), timeout=BANNER_WAIT) as connection:
            text = b""
            while len(text) < BANNER_MAX and not (text.startswith(b"SSH-") or b"\nSSH-" in text):
                more = connection.recv(256)
                if not more:
                    return "it hangs up at once"
                text += more
            return "" if len(text) < BANNER_MAX else "what answers there is no ssh"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def stalled(domain: Domain, found: Sequence[str], port: int, heard: str, timeout: float) -> OperationTimeout:
    """Which stage it is that does not come."""
    if found:
        return OperationTimeout(
            f"'{domain.name}' has the address {found[0]}, and its port {port} does not answer as ssh within "
            f"{timeout:g} s: {heard}",
            remedy=f"look whether its ssh server runs: 'kvik exec {domain.name} -- ss -ltn', or its console",
        )
    from kvik.cli.run_stages import current, state_word

    stage = None
    try:
        stage = current(domain.stages())
    except KvikError:
        pass
    at = f"; its stage '{stage.name}' is {state_word(stage)}" if stage is not None else ""
    return OperationTimeout(
        f"nobody knows an address of '{domain.name}' within {timeout:g} s{at}",
        remedy="wait until it has booted, or look on its console",
    )


def known_hosts(environ: Mapping[str, str] = os.environ) -> str:
    """The file with machines' keys: our own, for names and addresses of machines are given again and again."""
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/", ".local/state")  # noqa: PTH118
    directory = os.path.join(home, "kvik")  # noqa: PTH118
    if any(char in directory for char in '"\\\n'):
        raise InvalidArgument(f"ssh cannot be told a path such as {directory!r}", remedy="set XDG_STATE_HOME")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)  # noqa: PTH103
    except OSError as error:
        raise InvalidArgument(f"cannot make {directory}: {error.strerror}", remedy="set XDG_STATE_HOME") from error
    return os.path.join(directory, "known_hosts")  # noqa: PTH118


def arguments(
    uuid: str,
    place: tuple[str, int],
    hosts_file: str,
    command: Sequence[str],
    *,
    user: str | None = None,
    identity: str | None = None,
    jump: Address | None = None,
) -> list[str]:
    """ssh(1)'s. What comes from outside stands where nothing but a host or a command can: behind `--`."""
    address, port = place
    settings = {
        "HostKeyAlias": f"kvik-{uuid}",  # the key belongs to the machine, whatever its name or address
        "UserKnownHostsFile": '"' + hosts_file.replace("%", "%%") + '"',
        "StrictHostKeyChecking": "accept-new",
        "CheckHostIP": "no",
    }
    argv = ["ssh", *(f"-o{name}={value}" for name, value in settings.items()), "-p", str(port)]
    if user is not None:
        argv += ["-l", user]
    if identity is not None:
        argv += ["-i", identity, "-oIdentitiesOnly=yes"]
    if jump is not None and jump.transport == "ssh":
        there = f"[{jump.host}]" if ":" in jump.host else jump.host
        there = f"{jump.user}@{there}" if jump.user else there
        argv += ["-J", f"{there}:{jump.port}" if jump.port else there]
    return [*argv, "--", address, *command]


def run(argv: list[str]) -> int:
    """Its exit code, 128 + N for signal N. An interrupt from the terminal is ssh's business, which has it too."""
    import shutil

    if shutil.which(argv[0]) is None:
        raise MissingPackages("ssh is not installed", packages=("openssh-client",), remedy=INSTALL)
    pid = os.spawnvp(os.P_NOWAIT, argv[0], argv)
    while True:
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue


COMMANDS = {
    "ssh": Verb(
        ssh,
        "Opens the system's ssh into a machine, or runs a command there: finds the machine's address, waits until its\n"
        "ssh answers, and keeps its host key under the machine's identity.",
        ACTIVE,
        Option("login", TEXT, "user in the machine", short="l", metavar="user", named_only=True),
        Option("port", NUMBER, "port in the machine (22)", short="p", named_only=True),
        Option("identity", TEXT, "file with the private key", short="i", metavar="file", named_only=True),
        Option("timeout", TEXT, "seconds until its ssh must answer (60)", metavar="seconds", named_only=True),
        Option("print", FLAG, "print the ssh command instead of running it"),
        Option("command", WORDS, "the command and its arguments"),
        Option("rest", REST, "the command and its arguments, however they look", metavar="command"),
    )
}
