"""Machines saved to a file, with their memory, and back: `save`, `restore`, the managed save, snapshots' memory."""
