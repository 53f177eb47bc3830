"""The program: `python -I -S .../switch/__main__.py LISTENER SETTINGS`, two descriptors; see `server.main`."""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 4)[0])  # without site, the package is found from here
    from kvik.network.switch.server import main

    raise SystemExit(main(sys.argv[1:]))
