"""Check one chapter in about a minute: lint, the tests that matter to it, its notebook against the
stored outputs, and its page.  usage: check.py NOTEBOOK

The tests that matter are those of its exercises, those that hold every chapter to the book's rules,
and those of the modules that its code imports; slow ones are left to `make test`. The notebook runs
beside the rest, on a second core. A draft passes: that it has not yet the length and the figures of
a chapter is told, and fails in `make test`.
"""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import check_pages
import nbrun

ROOT = nbrun.ROOT
BIN = Path(sys.executable).parent
# Of all chapters: order, links, tables, equations, recorded settings.
ALWAYS = ["tools_contents", "tools_links", "equations", "results", "imports"]


def modules(notebook):
    """Names of the package's modules that the notebook's code imports, without their folder."""
    found = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            plain = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M)
            for node in ast.walk(ast.parse(plain)):
                module = getattr(node, "module", None) or ""
                if isinstance(node, ast.ImportFrom) and module.startswith("rlhf_helpers"):
                    found |= {module.rpartition(".")[2], *(alias.name for alias in node.names)}
    return found


def tests_of(path):
    """The test files that matter to a chapter."""
    names = [f"exercises_{path.stem}", *ALWAYS, *sorted(modules(nbrun.read(path)))]
    files = [ROOT / "tests" / f"test_{name}.py" for name in dict.fromkeys(names)]
    return [file for file in files if file.exists()]


def build_page(name):
    """Problems of a page. The first time the whole book is built, into a folder of its own; after
    that only what changed."""
    folder = ROOT / "_build" / "check"
    command = [BIN / "jupyter-book", "build", ROOT, "--path-output", folder, "-W", "-n"]
    run = subprocess.run([*command, "--keep-going", "-q"], capture_output=True, text=True)
    if run.returncode:
        return [run.stdout[-3000:] + run.stderr[-3000:]]
    return check_pages.check_one(name, ROOT, folder / "_build" / "html")


def said(name, code, start, failed="FAILED"):
    seconds = time.perf_counter() - start
    print(f"{failed if code else 'ok':<8}{name:<20}{seconds:6.1f} s", flush=True)
    return code


def run(name, *command, failed="FAILED"):
    start = time.perf_counter()
    return said(name, subprocess.run(command, cwd=ROOT).returncode, start, failed)


def main(names):
    if len(names) != 1:
        sys.exit("usage: make check NOTEBOOK=dpo_derivation")
    (path,) = nbrun.chosen(names)
    pytest = [BIN / "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"]
    rules = ["tests/test_book_notebooks.py", "-k", f"{path.stem}]"]
    begin = time.perf_counter()
    outputs = [*pytest, "--nbval", "--nbval-current-env", path]
    stored = subprocess.Popen(outputs, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    failed = run("lint", BIN / "ruff", "check", "-q", ".")
    failed |= run("format", BIN / "ruff", "format", "--check", "-q", ".")
    failed |= run("rules", *pytest, *rules, "-m", "not whole")
    run("length and figures", *pytest, *rules, "-m", "whole", failed="not yet")
    failed |= run("tests", *pytest, "-m", "not slow and not pages", *tests_of(path))
    start = time.perf_counter()
    problems = build_page(f"{path.parent.name}/{path.stem}")
    print(*problems, sep="\n", end="\n" if problems else "")
    failed |= said("page", bool(problems), start)
    text, _ = stored.communicate()
    print(text if stored.returncode else "", end="")
    failed |= said("stored outputs", stored.returncode, begin)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
