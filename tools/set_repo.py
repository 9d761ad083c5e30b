"""Set the repository's address everywhere it is written.  usage: set_repo.py owner/name [REF]

_config.yml (repository.url and branch) is its home; badges, links and install cells repeat it and
are held to it by a test. REF is the branch or, for a release, the tag that they point to; without
it they stay where they are.
"""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    "_config.yml",
    "README.md",
    "pyproject.toml",
    ".ci/*",
    ".github/workflows/*.yml",
    "book/*.md",
    "book/*.bib",
    "notebooks/*.ipynb",
    "rlhf_helpers/**/*.py",
]


def repository(root=ROOT):
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]


def name_of(root=ROOT):
    return repository(root)["url"].removeprefix("https://github.com/")


def source_url(root=ROOT):
    settings = repository(root)
    return f"{settings['url']}/blob/{settings['branch']}"


def raw_url(root=ROOT):
    """Where a picture of the repository can be loaded from."""
    return f"https://raw.githubusercontent.com/{name_of(root)}/{repository(root)['branch']}"


def colab_url(notebook, root=ROOT):
    path = f"{name_of(root)}/blob/{repository(root)['branch']}/notebooks/{notebook}.ipynb"
    return f"https://colab.research.google.com/github/{path}"


def install_url(root=ROOT):
    """What pip installs the package from."""
    settings = repository(root)
    return f"git+{settings['url']}{_at(settings['branch'])}"


def _at(ref):
    return "" if ref == "main" else f"@{ref}"


def pages_host(name):
    owner, project = name.split("/")
    return f"{owner.lower()}.github.io/{project}"


def set_repository(new, root=ROOT, ref=None):
    """Rewrite the address in every file that holds it; return those files."""
    if not re.fullmatch(r"[A-Za-z0-9-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is not of the form owner/name")
    old, old_ref = name_of(root), repository(root)["branch"]
    ref = old_ref if ref is None else ref
    if not re.fullmatch(r"[\w.-]+", ref):
        raise ValueError(f"{ref!r} is neither a branch nor a tag; take one like main or v1.0.0")
    # where a branch or tag stands: links, pictures, what pip installs, the configuration
    moved = [
        (f"{old}/blob/{old_ref}/", f"{old}/blob/{ref}/"),
        (f"githubusercontent.com/{old}/{old_ref}/", f"githubusercontent.com/{old}/{ref}/"),
        (f"branch: {old_ref}\n", f"branch: {ref}\n"),
    ]
    install = re.compile(rf"(git\+https://github\.com/{re.escape(old)}){_at(old_ref)}(?![\w@.-])")
    changed = []
    for path in sorted(path for pattern in FILES for path in root.glob(pattern) if path.is_file()):
        text = path.read_text(encoding="utf-8")
        found = install.sub(rf"\1{_at(ref)}", text)
        for before, after in moved:
            found = found.replace(before, after)
        found = found.replace(pages_host(old), pages_host(new)).replace(old, new)
        if found != text:
            path.write_text(found, encoding="utf-8")
            changed.append(path.relative_to(root))
    return changed


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit('usage: make repo REPO=owner/name, or REPO="owner/name v1.0.0"')
    try:
        print(*set_repository(sys.argv[1], ref=(*sys.argv, None)[2]), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
