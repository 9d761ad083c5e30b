"""What the book costs: seconds a notebook; with FULL=1 also install, pages, tests and `make book`
on a fresh clone."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import nbrun  # noqa: E402


def machine():
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    chip = names[0] if names else platform.processor() or platform.machine()
    system = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{chip}, {os.cpu_count()} cores, {memory:.0f} GiB, {system}"


def row(name, seconds, note=""):
    print(f"{name:<32}{seconds:8.1f} s  {note}".rstrip(), flush=True)


def bench_notebooks():
    os.environ["RLHF_SCALE"] = "tiny"
    total = 0.0
    for path in nbrun.find_notebooks():
        _, seconds, peak = nbrun.execute(path)
        total += seconds
        row(path.stem, seconds, f"{peak:6.0f} MiB")
    row("all notebooks", total)


def bench_goals():
    """Time each goal on a clone of the last commit, with its own empty .venv."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", str(ROOT), folder], check=True)
        start = time.perf_counter()
        for goal in ("setup", "html", "test", "book"):
            begin = time.perf_counter()
            subprocess.run(["make", goal], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            row(f"make {goal}", time.perf_counter() - begin)
            if goal == "setup":
                installed = time.perf_counter() - start
        row("make book from nothing", installed + time.perf_counter() - begin)


if __name__ == "__main__":
    print(machine())
    bench_notebooks()
    if os.environ.get("FULL"):
        bench_goals()
