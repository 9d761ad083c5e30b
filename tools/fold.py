"""Fold report cells in Jupyter and Colab too: a cell whose code the pages hide or close (tags
remove-input, hide-input) is closed there as well, under a title.  usage: fold.py [NOTEBOOK ...]

The title is its first line, `# @title …`; where that is missing, the heading above the cell gives
it.
"""

import re
import sys

import nbrun

HIDDEN = {"remove-input", "hide-input"}
TITLE = "# @title "


def is_report(cell):
    return cell.cell_type == "code" and bool(HIDDEN & set(cell.metadata.get("tags", [])))


def plain(heading):
    """A heading without what Colab would show as it stands: formulas, code marks, links."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[$`*_\\{}]", "", text).strip()


def fold(nb):
    """Close every report cell; return how many were still open."""
    heading, opened = "Report", 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                found = re.match(r"#+ (.+)", line)
                heading = plain(found[1]) if found else heading
        if not is_report(cell):
            continue
        before = (cell.source, dict(cell.metadata))
        if not cell.source.startswith(TITLE):
            cell.source = f"{TITLE}{heading}\n{cell.source}"
        jupyter = cell.metadata.get("jupyter", {}) | {"source_hidden": True}
        cell.metadata.update(jupyter=jupyter, cellView="form")
        opened += before != (cell.source, dict(cell.metadata))
    return opened


def main(names):
    for path in nbrun.chosen(names):
        nb = nbrun.read(path)
        opened = fold(nb)
        if opened:
            nbrun.write(nb, path)
        print(f"{path.stem}: {opened} cells closed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
