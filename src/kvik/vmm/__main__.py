"""kvik-vmm as the manager executes it: `python -I -S .../kvik/vmm/__main__.py OPTION...`; with `--zygote FD` the
process of which machines are forks.

An interpreter without `site` starts 3 ms sooner, and a console script's `import re` is saved as well. The package is
sought after the standard library, for which the interpreter then looks in its own places first.
"""

import sys

if __name__ == "__main__":
    root = __file__.rsplit("/", 3)[0]
    packages = "{}/lib/python{}.{}/site-packages".format(sys.executable.rsplit("/", 2)[0], *sys.version_info)
    sys.path += [root] if root == packages else [root, packages]  # a source tree's needs lie beside the interpreter
    from kvik.vmm.main import main

    if sys.argv[1:2] == ["--zygote"]:
        from kvik.vmm import zygote

        fork = zygote.main(int(sys.argv[2]))
        sys.exit(main(prepared=fork.prepared) if fork is not None else 0)
    sys.exit(main())
