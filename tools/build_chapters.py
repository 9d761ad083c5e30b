"""Write the tables of chapters in README.md and on the welcome page, between two marks, from
_toc.yml and each page's first lines."""

import os
import re
from pathlib import Path

import contents
import set_repo

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- chapters: written by `make tables` -->", "<!-- end of chapters -->"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# Where a table stands, and whether that is outside the book's own pages. There links are addresses,
# since an index of packages shows the file without the repository, and those to Colab are pictures;
# pages of the book load nothing from elsewhere.
PLACES = {"README.md": True, "book/index.md": False}


def colab(chapter, badge, root):
    if chapter.path.suffix != ".ipynb":
        return ""
    words = f"![Open in Colab]({BADGE})" if badge else "Open in Colab"
    return f"[{words}]({set_repo.colab_url(chapter.path.stem, root)})"


def table(place, root=ROOT):
    lines = ["| | Chapter | The question it answers | Run it |", "|---|---|---|---|"]
    for one in contents.chapters(root):
        link = Path(os.path.relpath(root / one.path, (root / place).parent)).as_posix()
        if PLACES[place]:
            link = f"{set_repo.source_url(root)}/{link}"
        run = colab(one, PLACES[place], root)
        lines.append(f"| {one.number} | [{one.title}]({link}) | {one.question} | {run} |")
    return "\n".join(lines)


def build(place, root=ROOT):
    """The text of a page with its table as it should be.

    Raises: ValueError if the page has not the two marks.
    """
    text = (root / place).read_text(encoding="utf-8")
    pattern = re.compile(rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{place} needs the lines {BEGIN} and {END}, once, around its table")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{table(place, root)}\n\n{END}", text)


if __name__ == "__main__":
    for place in PLACES:
        # newline: git's own, on every system
        (ROOT / place).write_text(build(place), encoding="utf-8", newline="\n")
