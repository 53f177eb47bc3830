"""Imports point one way: the table of docs/internals/architecture.md, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvik

SRC = Path(kvik.__file__).parent

# A package may import itself, the shared leaves, and these. Kept beside the picture in the architecture page.
SHARED = {"errors", "named", "numbers", "paths", "__version__"}
DRIVERS = {"hypervisor", "network", "storage", "security", "host"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "named": set(),
    "numbers": set(),
    "paths": set(),
    "kvm": set(),
    "qmp": set(),
    "rpc": set(),
    "conf": set(),
    "image": set(),
    "host": {"kvm"},
    "guest": {"image", "host"},
    "vmm": {"kvm", "qmp", "image", "host"},
    "hypervisor": {"conf", "qmp", "image", "host"},
    "network": {"conf", "host"},
    "storage": {"conf", "image", "host"},
    "security": {"conf", "host"},
    "manager": DRIVERS | {"conf"},
    "client": {"rpc", "conf"},
    "daemon": {"rpc", "manager", "conf"},
    "cli": {"client", "conf", "image", "host", "guest"},
    "web": {"client", "conf"},
    "cluster": {"manager", "client", "conf"},
}


def kvik_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "kvik" else node.module for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"relative import on line {node.lineno}: write the whole name")
        else:
            continue
        found |= {parts[1] for name in names if (parts := name.split("."))[0] == "kvik" and len(parts) > 1}
    return found


def package_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


MODULES = sorted(path for path in SRC.rglob("*.py") if package_of(path) not in {"__init__", "__main__"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_module_imports_only_what_its_package_may(path: Path) -> None:
    package = package_of(path)
    allowed = MAY_IMPORT[package] | SHARED | {package}
    assert kvik_imports(ast.parse(path.read_text())) <= allowed


def test_only_host_spawns_processes() -> None:
    """Two modules of `host/` are the sole spawners; the client's daemon autostart and ssh transport are exceptions."""
    allowed = {"host/process.py", "host/tools.py", "client/transport.py"}
    spawners = {"subprocess", "pty", "multiprocessing"}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        if names & spawners:
            assert str(path.relative_to(SRC)) in allowed, path
