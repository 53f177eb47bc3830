"""Checkpoints of a machine: points in time since which dirty bitmaps tell what changed on its disks."""
