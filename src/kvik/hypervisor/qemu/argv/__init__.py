"""A domain document as QEMU's command line: a pure function, one module per device family."""
