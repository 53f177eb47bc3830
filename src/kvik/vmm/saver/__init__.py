"""The saver: a process that writes a machine's RAM out as it was at one instant, while the guest goes on.

`main` is the program, `saver` its loop, `mappings` what it is told by each process that has RAM mapped.
"""
