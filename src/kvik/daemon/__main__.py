"""`python -m kvik.daemon` is kvikd."""

from __future__ import annotations

import sys

from kvik.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
