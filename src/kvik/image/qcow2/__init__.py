"""The qcow2 format (QEMU's docs/interop/qcow2.rst): versions 2 and 3."""
