"""Backups of a running machine's disks, pushed into files or pulled by NBD clients."""
