"""Snapshots of machines: a tree of them a machine, and the image files that they rest on."""
