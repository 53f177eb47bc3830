"""The virtual networks of a scope, as the manager composes them and the daemon sees them."""

from __future__ import annotations

from kvik.network.default import ensure_default
from kvik.network.network import NetworkObject
from kvik.network.networks import Networks

__all__ = ["NetworkObject", "Networks", "ensure_default"]
