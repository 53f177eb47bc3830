"""What answers each procedure, one module per group; `kvik.daemon.dispatch` is the table over them."""
