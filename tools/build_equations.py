"""Build book/equations.md: every labelled equation with its page, the function that implements it,
and its tests.

The three sources are the displayed equations `$$ ... $$ (eq:label)`, the line `Equation: eq:label`
in a docstring, and `@pytest.mark.equation("eq:label")` on a test whose docstring begins with
`Oracle:`.
"""

import ast
import re
from pathlib import Path

import contents
import set_repo

ROOT = Path(__file__).resolve().parents[1]
# The files in which every public function is an equation's; the layers of the package begin with
# them.
MATHEMATICS = ("logprobs", "kl", "advantages", "losses", "trust_region")
DISPLAYED = re.compile(r"\$\$[ \t]*\((eq:[\w-]+)\)[ \t]*$", re.M)
HEADER = """# Equations, functions, tests

Every numbered equation with a label in this book is implemented by one function of the package and
checked by at least one test against an oracle that does not share its code. This page is built from
the equations' labels, the functions' docstrings and the tests.

"""


def displayed(root=ROOT):
    """Pairs (label, page) in reading order; a label that stands twice is listed twice."""
    prose = [page for page in sorted((root / "book").glob("*.md")) if page.name != "equations.md"]
    return [
        (label, page.relative_to(root))
        for page in contents.notebooks(root) + prose
        for label in DISPLAYED.findall(contents.markdown(page))
    ]


def definitions(tree, prefix=""):
    """Public functions, classes and methods of a module as (dotted name, node)."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


def docstring_labels(node):
    lines = re.findall(r"^\s*Equations?:\s*(.*)$", ast.get_docstring(node) or "", re.M)
    return re.findall(r"eq:[\w-]+", " ".join(lines))


def functions(root=ROOT):
    """Triples (label, role, dotted name) and the public functions of the mathematics files that
    name no label."""
    found, bare = [], []
    for path in sorted((root / "rlhf_helpers").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            role = "class" if isinstance(node, ast.ClassDef) else "meth" if "." in name else "func"
            labels = docstring_labels(node)
            found += [(label, role, f"{module}.{name}") for label in labels]
            if (
                not labels
                and role == "func"
                and path.parent.name == "rlhf_helpers"
                and path.stem in MATHEMATICS
            ):
                bare.append(f"{module}.{name}")
    return found, bare


def marked_labels(node):
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
            yield from (ast.literal_eval(argument) for argument in mark.args)


def checks(root=ROOT):
    """Quadruples (label, file, test, oracle); the oracle is None when the docstring does not begin
    with one."""
    found = []
    for path in sorted((root / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                oracle = re.match(
                    r"Oracle:\s*(.+?)(?:\n\s*\n|$)", ast.get_docstring(node) or "", re.S
                )
                oracle = " ".join(oracle[1].split()) if oracle else None
                found += [(label, path.name, node.name, oracle) for label in marked_labels(node)]
    return found


def problems(root=ROOT):
    """What breaks the tie between equations, functions and tests, one sentence each."""
    shown = [label for label, _ in displayed(root)]
    implemented, bare = functions(root)
    implemented = [label for label, _, _ in implemented]
    checked = checks(root)
    tested = [label for label, *_ in checked]
    known = dict.fromkeys(shown + implemented + tested)
    found = [
        f"{label} is displayed {shown.count(label)} times"
        for label in known
        if shown.count(label) != 1
    ]
    found += [f"{label} has no function" for label in known if label not in implemented]
    found += [f"{label} has no test" for label in known if label not in tested]
    found += [f"{name} names no equation" for name in bare]
    found += [
        f"{file}::{test} does not say what its oracle is"
        for _, file, test, oracle in checked
        if not oracle
    ]
    return found


def table_row(label, page, implemented, checked, root):
    url = set_repo.source_url(root)
    names = [f"{{py:{role}}}`~{name}`" for found, role, name in implemented if found == label]
    tests = [
        f"[`{test}`]({url}/tests/{file})<br>{(oracle or '').replace('|', chr(92) + '|')}"
        for found, file, test, oracle in checked
        if found == label
    ]
    link = Path("..") / page if page.suffix == ".ipynb" else page.name
    return (
        f"| {{eq}}`{label}`<br>[{contents.title(root / page)}]({link}) | {'<br>'.join(names)} |"
        f" {'<br><br>'.join(tests)} |"
    )


def build(root=ROOT):
    implemented, _ = functions(root)
    checked = checks(root)
    rows = [table_row(label, page, implemented, checked, root) for label, page in displayed(root)]
    if not rows:
        return HEADER + "No equation has a label yet.\n"
    head = ["| Equation | Function | Tests and their oracles |", "|---|---|---|"]
    return HEADER + "\n".join(head + rows) + "\n"


if __name__ == "__main__":
    (ROOT / "book" / "equations.md").write_text(build(), encoding="utf-8")
    # The page is written all the same while a chapter is in the making; the tests are what fails.
    print(*problems(), sep="\n")
