"""Run one notebook from top to bottom: what `make book`, `make refresh` and `make bench` share."""

import os
import re
import sys
import time
from pathlib import Path

import contents
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
# On Linux getrusage counts the peak of the process that started the kernel too, so the kernel's own
# record comes first. Windows has neither; psutil comes with ipykernel.
PEAK_MEMORY = """
import os, re, sys
if os.path.exists("/proc/self/status"):
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10)
elif sys.platform == "win32":
    import psutil
    print(psutil.Process().memory_info().peak_wset / 2**20)
else:
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def find_notebooks(root=ROOT):
    """Paths of all notebooks, in the order of the book."""
    return contents.notebooks(root)


def chosen(names, root=ROOT):
    """The notebooks of these names (with or without folder and ending), all if there are none.

    Raises: SystemExit on an unknown name, with the known ones.
    """
    known = {path.stem: path for path in find_notebooks(root)}
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def read(path):
    return nbformat.read(path, as_version=4)


def execute(path):
    """Return (executed notebook, seconds, peak MiB of its kernel); the file itself is left
    alone."""
    nb = read(path)
    # A last cell asks the kernel for its own peak, which is gone once the kernel has stopped.
    nb.cells.append(nbformat.v4.new_code_cell(PEAK_MEMORY))
    client = NotebookClient(
        nb,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(Path(path).parent)}},
    )
    # Where MPLBACKEND is set (containers, CI) a kernel would draw into nothing.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    start = time.perf_counter()
    client.execute(env=environment)
    seconds = time.perf_counter() - start
    peak = float(nb.cells.pop().outputs[0]["text"])
    return nb, seconds, peak


def normalise(nb):
    """Drop what differs between two equal runs, so that storing outputs again gives no diff."""
    nb.metadata["kernelspec"] = KERNELSPEC
    nb.metadata["language_info"] = LANGUAGE
    for cell in nb.cells:
        for key in ("execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            plain = output.get("data", {}).get("text/plain")
            if plain:
                output["data"]["text/plain"] = re.sub(r"0x[0-9a-f]{8,}", "0x0", plain)
    nbformat.validate(nb)
    return nb


def write(nb, path):
    text = nbformat.writes(nb, indent=1) + "\n"
    Path(path).write_text(text, encoding="utf-8", newline="\n")
