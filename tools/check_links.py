"""Check links in the sources: chapters are called by name, and every link leads where it says, on
GitHub, in Jupyter, in Colab and on the pages.

In a notebook a link to another notebook is relative, since all four follow it. Any other page of
the book is linked by its address on the site: Colab has no file beside the notebook, so a relative
link would lead nowhere; the page build turns the address back into a link within the site.
"""

import re
import subprocess
import sys
from pathlib import Path

import contents
import set_repo

ROOT = Path(__file__).resolve().parents[1]
NUMBERED = re.compile(r"\b[Cc]hapters? \d|of_[c]hapter|_0[1-9]_")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"[a-z]+:", re.I)
TEXT = (
    ".py",
    ".md",
    ".yml",
    ".yaml",
    ".toml",
    ".txt",
    ".cfg",
    ".cff",
    ".ipynb",
    ".bib",
    ".svg",
    ".js",
    ".css",
)


def tracked(root=ROOT):
    """The text files of the repository, untracked ones included unless git ignores them."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [Path(root) / name for name in names.splitlines()]
    return [path for path in paths if path.suffix in TEXT and path.exists()]


def numbered(path):
    """Places where a chapter is called by a number, which only _toc.yml may know."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path.name}:{number}: {found[0]!r}: call the chapter by its name and link it"
        for number, line in enumerate(lines, 1)
        if (found := NUMBERED.search(line))
    ]


def site(root=ROOT):
    return f"https://{set_repo.pages_host(set_repo.name_of(root))}/"


def page_problem(address, root):
    """Why an address on the site leads to no page of the book, or None."""
    name = address.removeprefix(site(root)).split("#")[0].removesuffix(".html")
    known = list(contents.pages(contents.contents(root)))
    return None if name in ("", *known) else f"is no page of _toc.yml: {address}"


def problem(path, target, root=ROOT):
    """Why a link in a source leads nowhere, or None."""
    if target.startswith(site(root)):
        return page_problem(target, root)
    for own in (set_repo.source_url(root), set_repo.raw_url(root)):
        if target.startswith(f"{own}/") and not (root / target[len(own) + 1 :]).exists():
            return f"leads to no file: {target}"
    if ELSEWHERE.match(target) or target.startswith("#"):
        return None
    goal = path.parent / target.split("#")[0]
    if not goal.exists():
        return f"leads to no file: {target}"
    if path.suffix == ".ipynb" and (goal.suffix != ".ipynb" or goal.parent != path.parent):
        return f"leads nowhere in Colab; link {site(root)}...: {target}"
    listed = {contents.source(name, root) for name in contents.pages(contents.contents(root))}
    if goal.suffix == ".ipynb" and Path(root, goal).resolve() not in listed:
        return f"leads to a notebook that _toc.yml does not name: {target}"
    return None


def linking(root=ROOT):
    """The sources whose links are checked: everything that readers see."""
    prose = [*root.glob("*.md"), *(root / "book").glob("*.md"), *(root / "tests").glob("*.md")]
    return sorted(prose) + contents.notebooks(root)


def problems(root=ROOT):
    found = [place for path in tracked(root) for place in numbered(path)]
    for path in linking(root):
        # code shows how a link is written; it is none
        text = re.sub(r"```.*?```|`[^`\n]*`", "", contents.markdown(path), flags=re.S)
        targets = dict.fromkeys(LINK.findall(text) + IMAGE.findall(text))
        found += [
            f"{path.relative_to(root)}: {why}"
            for target in targets
            if (why := problem(path, target, root))
        ]
    return found


if __name__ == "__main__":
    found = problems()
    print(*found, f"{len(found)} problems in the links", sep="\n")
    sys.exit(bool(found))
