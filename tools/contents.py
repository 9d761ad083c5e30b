"""The order of the book and what each page says of itself: _toc.yml and the first lines of the
pages, read by every tool that lists chapters.

A page begins with `# Title`; the question that it answers follows on a line of its own, in bold.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
QUESTION = re.compile(r"^\*\*(?P<question>[^*]+\?)\*\*$", re.M)


class Chapter(NamedTuple):
    """A page that asks a question."""

    part: str
    number: str  # as the built page shows it; "" where it has none
    path: Path  # of its source, from the top of the repository
    title: str
    question: str


def contents(root=ROOT):
    return yaml.safe_load((Path(root) / "_toc.yml").read_text(encoding="utf-8")) or {}


def pages(node):
    """Every file named in a table of contents, without ending, in the order of the book."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("root", "file") if key in node)
        for value in node.values():
            yield from pages(value)
    elif isinstance(node, list):
        for item in node:
            yield from pages(item)


def source(name, root=ROOT):
    """The file behind a name of the table of contents, or None."""
    found = [Path(root) / f"{name}{ending}" for ending in (".md", ".ipynb")]
    return next(filter(Path.exists, found), None)


def notebooks(root=ROOT):
    """Paths of all notebooks, in the order of the book; one that _toc.yml does not name comes
    last."""
    found = [path for name in pages(contents(root)) if (path := source(name, root))]
    listed = [path for path in found if path.suffix == ".ipynb"]
    others = sorted((Path(root) / "notebooks").glob("*.ipynb"))
    return listed + [path for path in others if path not in listed]


def markdown(path):
    """The prose of a page."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def title(path):
    return re.search(r"^# (.+)$", markdown(path), re.M)[1].strip()


def question(path):
    """What the first lines of a page ask, or None."""
    found = QUESTION.search("\n".join(markdown(path).splitlines()[:6]))
    return " ".join(found["question"].split()) if found else None


def chapters(root=ROOT):
    """The pages that ask a question, in order, numbered as the built pages are."""
    found, count = [], 0
    for part in contents(root).get("parts", []):
        for name in pages(part.get("chapters", [])):
            count += bool(part.get("numbered"))
            path = source(name, root)
            if path is not None and question(path):
                number = str(count) if part.get("numbered") else ""
                relative = path.relative_to(root)
                one = Chapter(part["caption"], number, relative, title(path), question(path))
                found.append(one)
    return found
