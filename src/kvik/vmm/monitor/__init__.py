"""The machine's monitor: QMP, as QEMU speaks it (see docs/internals/vmm-control.md).

`server.py` is the sockets, `commands.py` the table of commands, `schema.py` the types of their arguments, `events.py`
the events; every other module is one group of commands.
"""
