"""The host's own interfaces: what they are, how the host's configuration has them, and changes that undo themselves."""
