"""Virtio 1.2 devices: queues, the PCI transport, and one module for each device type."""
