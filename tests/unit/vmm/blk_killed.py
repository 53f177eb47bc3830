"""kvik-blk that ends by itself, as if it was killed, before it runs the N-th line of what serves requests.

blk_killed.py N WORD...
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kvik.vmm.blk.main import main

SERVING = ("/kvik/vmm/blk/", "/kvik/vmm/virtio/", "/kvik/vmm/backends/", "/kvik/image/")


class Tracer:
    def __init__(self, left: int) -> None:
        self.left, self.started = left, False

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        self.started = self.started or code.co_name == "_start_if_told"
        if not self.started or not any(part in code.co_filename for part in SERVING):
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                os._exit(9)
        return self


if __name__ == "__main__":
    sys.settrace(Tracer(int(sys.argv[1])))
    sys.exit(main([*sys.argv[2:], "--sandbox=off"]))
