"""The saver as the manager executes it: `python -I -S .../kvik/vmm/saver/__main__.py OPTION...` (as kvik-blk)."""

import sys

if __name__ == "__main__":
    root = __file__.rsplit("/", 4)[0]
    packages = "{}/lib/python{}.{}/site-packages".format(sys.executable.rsplit("/", 2)[0], *sys.version_info)
    sys.path[:] = [item for item in sys.path if item != __file__.rsplit("/", 1)[0]]
    sys.path += [root] if root == packages else [root, packages]
    from kvik.vmm.saver.main import main

    sys.exit(main(sys.argv[1:]))
