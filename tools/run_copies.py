"""Execute a copy of every notebook under _build/run, beside copies of the prose, so that a book can
be built there."""

import os
import shutil
import sys

import nbrun
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

# a cell's own error, one that takes too long, a kernel that died
FAILURES = (CellExecutionError, CellControlSignal, DeadKernelError)


def copy_sources(root, target):
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, target)
    for name in ("book", "notebooks", "results"):
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
            shutil.copytree(root / name, target / name, ignore=ignore)


def run(paths):
    """Execute notebooks in place, one after the other, and print how long each took.

    Returns: the names of those that failed; one that fails says nothing about the others.
    """
    total, failed = 0.0, []
    for path in paths:
        print(f"{path.stem:<32}", end="", flush=True)
        try:
            nb, seconds, _ = nbrun.execute(path)
        except FAILURES as error:
            print("failed", flush=True)
            print(error, file=sys.stderr, flush=True)
            failed.append(path.stem)
            continue
        nbrun.write(nbrun.normalise(nb), path)
        total += seconds
        print(f"{seconds:6.1f} s", flush=True)
    print(f"{'all notebooks' if not failed else 'the others':<32}{total:6.1f} s")
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return failed


def main(root=nbrun.ROOT):
    os.environ["RLHF_SCALE"] = "tiny"
    target = root / "_build" / "run"
    copy_sources(root, target)
    return bool(run(nbrun.find_notebooks(target)))


if __name__ == "__main__":
    sys.exit(main())
