"""`python -m kvik.daemon` is kvikd."""

from __future__ import annotations

import sys

from kvik.daemon.main import main

sys.exit(main())
