"""The device elements of a domain document, one module per family."""
