"""Generated procedure tables, one module per program."""
