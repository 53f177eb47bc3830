"""<cpu>, <vcpu>, topology, and guest memory with its NUMA nodes."""

from __future__ import annotations

from kvik.conf.cpu import NumaCell
from kvik.conf.cpuset import format_cpuset, parse_cpuset
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.cpus import boot_vcpus
from kvik.hypervisor.qemu.argv.options import Context, Props, json_text, keyval

__all__ = ["cpu", "memory", "needs_shared_memory", "parse_set", "topology"]

HUGEPAGE_ROOT = "/dev/hugepages"


def cpu(context: Context) -> list[str]:
    """-cpu. Under software emulation the host's CPU means the best that the emulator has."""
    domain = context.domain
    described, features = domain.cpu, domain.features
    emulated = domain.type != "kvm"
    mode = described.mode if described else None
    options: Props = {}
    if described is None or (mode in (None, "custom") and described.model is None):
        name = _default(context)
    elif mode in ("host-passthrough", "host-model"):
        name = "max" if emulated else "host"
        if not emulated:
            options["migratable"] = True if described.migratable is None else described.migratable
    elif mode == "maximum":
        name = "max"
        options["migratable"] = described.migratable
    else:
        assert described.model is not None
        name = described.model.value or ""
        if context.capabilities.cpus and name not in {model.name for model in context.capabilities.cpus}:
            raise ConfigUnsupported(
                f"{context.capabilities.binary} has no CPU model {name!r}", path="/domain/cpu/model"
            )
        options["vendor"] = described.model.vendor_id
        if described.check == "full":
            options["enforce"] = True
        elif described.check == "partial":
            options["check"] = True
    if described is not None:
        for feature in described.features:
            if feature.policy in (None, "require", "force"):
                options[feature.name] = True
            elif feature.policy in ("disable", "forbid"):
                options[feature.name] = False
        if described.cache is not None:
            options |= _cache(described.cache.mode, name)
        physical = described.maxphysaddr
        if physical is not None:
            if physical.mode == "passthrough":
                options |= {"host-phys-bits": True, "host-phys-bits-limit": physical.limit}
            else:
                options["phys-bits"] = physical.bits
    if features is not None:
        options |= _paravirtual(domain)
    for timer in domain.clock.timers if domain.clock else []:
        if timer.name == "kvmclock" and timer.present is not None:
            options["kvmclock"] = timer.present
        elif timer.name == "hypervclock" and timer.present:
            options["hv-time"] = True
        elif timer.name == "tsc" and timer.frequency is not None:
            options["tsc-frequency"] = timer.frequency
    for word in (name, *options, *options.values()):
        if isinstance(word, str) and ("," in word or "=" in word):
            # Unlike every other option, -cpu knows no escape for a comma (x86_cpu_parse_featurestr).
            raise ConfigUnsupported(f"{word!r} cannot be part of a CPU description", path="/domain/cpu")
    return ["-cpu", keyval(name, options)]


def _cache(mode: str, model: str) -> Props:
    if mode == "passthrough":
        if model != "host":
            raise ConfigUnsupported(
                "the CPU cache can be passed through only with <cpu mode='host-passthrough'> on KVM",
                path="/domain/cpu/cache",
            )
        return {"host-cache-info": True, "l3-cache": False}
    return {"l3-cache": mode == "emulate"}


def _default(context: Context) -> str:
    machine = context.capabilities.machine(context.machine)
    typename = machine.default_cpu if machine else ""
    return typename.removesuffix(f"-{context.capabilities.arch}-cpu") or "qemu64"


_HYPERV = (
    "relaxed", "vapic", "vpindex", "runtime", "synic", "reset", "frequencies", "reenlightenment", "ipi", "evmcs",
    "avic",
)  # fmt: skip


def _paravirtual(domain: Domain) -> Props:
    features = domain.features
    assert features is not None
    options: Props = {}
    if features.hyperv is not None:
        hyperv = features.hyperv
        if hyperv.mode == "passthrough":
            options["hv-passthrough"] = True
        for name in _HYPERV:
            state = getattr(hyperv, name)
            if state is not None and state.state:
                options[f"hv-{name}"] = True
        if hyperv.spinlocks is not None and hyperv.spinlocks.state:
            options["hv-spinlocks"] = f"0x{hyperv.spinlocks.retries or 4095:x}"
        if hyperv.stimer is not None and hyperv.stimer.state:
            options["hv-stimer"] = True
            if hyperv.stimer.direct is not None and hyperv.stimer.direct.state:
                options["hv-stimer-direct"] = True
        if hyperv.tlbflush is not None and hyperv.tlbflush.state:
            options["hv-tlbflush"] = True
        if hyperv.vendor_id is not None and hyperv.vendor_id.state:
            options["hv-vendor-id"] = hyperv.vendor_id.value
    if features.kvm is not None:
        if features.kvm.hidden is not None and features.kvm.hidden.state:
            options["kvm"] = False
        if features.kvm.hint_dedicated is not None and features.kvm.hint_dedicated.state:
            options["kvm-hint-dedicated"] = True
        if features.kvm.poll_control is not None and features.kvm.poll_control.state:
            options["kvm-poll-control"] = True
        if features.kvm.pv_ipi is not None and features.kvm.pv_ipi.state:
            options["kvm-pv-ipi"] = True
    if features.pmu is not None and features.pmu.state is not None:
        options["pmu"] = features.pmu.state
    if features.pvspinlock is not None and features.pvspinlock.state is not None:
        options["kvm-pv-unhalt"] = features.pvspinlock.state
    if features.apic is not None and features.apic.eoi is not None:
        options["kvm-pv-eoi"] = features.apic.eoi
    return options


def topology(context: Context) -> list[str]:
    """-smp. Raises `ConfigUnsupported` for more vCPUs than the machine type has room for."""
    domain = context.domain
    maximum = domain.vcpu.value if domain.vcpu else 1
    current = boot_vcpus(domain)
    kind = context.capabilities.machine(context.machine)
    if kind is not None and maximum > kind.max_cpus:
        raise ConfigUnsupported(
            f"machine type {context.machine} has at most {kind.max_cpus} vCPUs, not {maximum}", path="/domain/vcpu"
        )
    options: Props = {"maxcpus": maximum if maximum != current else None}
    described = domain.cpu.topology if domain.cpu else None
    if described is not None:
        if described.total != maximum:
            raise ConfigUnsupported(
                f"the topology has {described.total} vCPUs, <vcpu> has {maximum}", path="/domain/cpu/topology"
            )
        options |= {"maxcpus": maximum, "sockets": described.sockets, "dies": described.dies}
        options |= {"clusters": described.clusters if described.clusters not in (None, 1) else None}
        options |= {"cores": described.cores, "threads": described.threads}
        return ["-smp", keyval(str(current), options)]
    options |= {"sockets": maximum, "cores": 1, "threads": 1}
    return ["-smp", keyval(str(current), options | {"maxcpus": maximum})]


# -- memory


def needs_shared_memory(domain: Domain) -> bool:
    """Whether another process has to see the guest's memory (vhost-user devices)."""
    devices = domain.devices
    return (
        any(item.driver is not None and item.driver.type == "virtiofs" for item in devices.filesystems)
        or any(item.type == "vhostuser" for item in devices.interfaces)
        or any(item.type == "vhostuser" for item in devices.disks)
        or any(item.driver is not None and item.driver.name == "vhostuser" for item in devices.videos)
    )


def memory(context: Context) -> tuple[list[str], str | None]:
    """-m with its backends and NUMA nodes, and the backend the machine has to name if there is one for all."""
    domain = context.domain
    size: Props = {"size": f"{_boot_memory(domain)}k"}
    if domain.max_memory is not None and domain.max_memory.value:
        size |= {"slots": domain.max_memory.slots, "maxmem": f"{domain.max_memory.value}k"}
    argv = ["-m", keyval("", size)]
    if domain.memory_backing is not None and domain.memory_backing.locked:
        argv += ["-overcommit", "mem-lock=on"]
    cells = domain.cpu.numa.cells if domain.cpu and domain.cpu.numa else []
    if cells:
        for number, cell in enumerate(cells):
            argv += _cell(context, number if cell.id is None else cell.id, cell)
        for number, cell in enumerate(cells):
            argv += _distances(number if cell.id is None else cell.id, cell)
        return argv, None
    backing = _backend(context, None, None)
    if backing is None:
        return argv, None
    kind = context.capabilities.machine(context.machine)
    name = (kind.default_ram_id if kind else "") or "pc.ram"
    return [*argv, "-object", json_text(backing | {"id": name, "size": _boot_memory(domain) * 1024})], name


def _boot_memory(domain: Domain) -> int:
    """KiB present at start: <memory> includes hot-plug modules, whose memory comes with them."""
    modules = sum(
        (module.target.size or 0)
        for module in domain.devices.memorys
        if module.target is not None and module.model in ("dimm", "nvdimm", "virtio-mem", "virtio-pmem")
    )
    cells = domain.cpu.numa.cells if domain.cpu and domain.cpu.numa else []
    if cells:
        return sum(cell.memory or 0 for cell in cells)
    return domain.memory - modules if domain.memory > modules else domain.memory


def _backend(context: Context, cell: int | None, access: str | None) -> Props | None:
    """The memory-backend object's properties; None where QEMU's plain anonymous memory does."""
    domain = context.domain
    backing, tune = domain.memory_backing, domain.numatune
    shared = needs_shared_memory(domain)
    if backing is not None and backing.access is not None:
        shared = backing.access.mode == "shared"
    if access is not None:
        shared = access == "shared"
    props: Props = {"qom-type": "memory-backend-ram"}
    source = backing.source.type if backing and backing.source else None
    pages = _huge_page(domain, cell)
    if pages is not None:
        size = pages or None
        props = {"qom-type": "memory-backend-memfd", "hugetlb": True, "hugetlbsize": size and size * 1024}
    elif source == "file":
        path = context.files.path("memory", f"{HUGEPAGE_ROOT.rpartition('/')[0]}/shm")
        props = {"qom-type": "memory-backend-file", "mem-path": path, "discard-data": True}
    elif source == "memfd" or shared:
        props = {"qom-type": "memory-backend-memfd"}
    if shared:
        props["share"] = True
    if backing is not None and backing.allocation is not None and backing.allocation.mode == "immediate":
        props |= {"prealloc": True, "prealloc-threads": backing.allocation.threads}
    nodeset, policy = None, None
    if tune is not None and tune.memory is not None:
        nodeset, policy = tune.memory.nodeset, tune.memory.mode
    for node in tune.memnodes if tune else []:
        if node.cellid == cell:
            nodeset, policy = node.nodeset, node.mode
    if nodeset is not None and policy != "restrictive":
        props["host-nodes"] = sorted(parse_set(nodeset))
        props["policy"] = {"strict": "bind", None: "bind"}.get(policy, policy)
    return props if cell is not None or len(props) > 1 or source is not None else None


def _huge_page(domain: Domain, cell: int | None) -> int | None:
    """KiB of the pages for this node; 0: the host's default size; None: ordinary pages."""
    pages = domain.memory_backing.hugepages if domain.memory_backing else None
    if pages is None:
        return None
    for page in pages.pages:
        if page.nodeset is None or (cell is not None and cell in parse_set(page.nodeset)):
            return page.size or 0
    return None if pages.pages else 0


def _cell(context: Context, number: int, cell: NumaCell) -> list[str]:
    backing = _backend(context, number, cell.mem_access)
    assert backing is not None
    name = f"ram-node{number}"
    node: Props = {"nodeid": number, "memdev": name if cell.memory else None}
    cpus = format_cpuset(parse_set(cell.cpus)).split(",") if cell.cpus else []
    node["cpus"] = cpus or None
    argv = []
    if cell.memory:
        argv = ["-object", json_text(backing | {"id": name, "size": cell.memory * 1024})]
    return [*argv, "-numa", keyval("node", node)]


def _distances(number: int, cell: NumaCell) -> list[str]:
    argv: list[str] = []
    for sibling in cell.distances.siblings if cell.distances else []:
        argv += ["-numa", keyval("dist", {"src": number, "dst": sibling.id, "val": sibling.value})]
    return argv


def parse_set(text: str) -> frozenset[int]:
    """`0-3,^2,8` as numbers. Raises `ConfigUnsupported` for anything else."""
    try:
        return parse_cpuset(text)
    except ValueError as error:
        raise ConfigUnsupported(str(error)) from None
