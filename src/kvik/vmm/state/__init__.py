"""The state of a machine outside of itself: snapshots, the reset loop, migration. docs/internals/vmm-state.md"""
