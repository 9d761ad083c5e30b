"""Run every notebook as a reader in Colab meets it.  usage: as_reader.py WHEEL FOLDER

Each lies alone in a folder of its own, google.colab is there, and the set-up cell installs the
package by its own line, with the wheel in place of the repository's address.
"""

import os
import sys
from pathlib import Path

import nbformat
import nbrun
import run_copies
import set_repo

# Colab's kernels have imported it before the first cell runs. Libraries look for it too, so it has
# to be a package that they find.
COLAB = {
    "packages/google/colab/__init__.py": "",
    "ipython/profile_default/startup/colab.py": "import google.colab\n",
}
# A %pip that fails raises nothing.
CHECK = "assert _exit_code == 0, 'the package could not be installed'"


def copies(wheel, folder, root=nbrun.ROOT):
    """Write each notebook to FOLDER/name/name.ipynb, to be installed from the wheel.

    Raises: ValueError on one that does not install the package.
    """
    address = set_repo.install_url(root)
    for path in nbrun.find_notebooks(root):
        nb = nbrun.read(path)
        code = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
        first = nb.cells[code[0]]
        if address not in first.source:
            raise ValueError(f"the first code cell of {path.name} does not install {address}")
        first.source = first.source.replace(address, wheel.resolve().as_uri())
        nb.cells.insert(code[0] + 1, nbformat.v4.new_code_cell(CHECK))
        target = folder / path.stem / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbrun.write(nb, target)
        yield target


def environment(folder):
    """Write what stands for Colab; return the variables with which a kernel finds it."""
    for name, text in COLAB.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return {
        "PYTHONPATH": str((folder / "packages").resolve()),
        "IPYTHONDIR": str((folder / "ipython").resolve()),
        "RLHF_SCALE": "tiny",
    }


def main(wheel, folder, root=nbrun.ROOT):
    os.environ.update(environment(folder / "colab"))
    return bool(run_copies.run(list(copies(wheel, folder, root))))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    sys.exit(main(*map(Path, sys.argv[1:])))
