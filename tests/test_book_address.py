"""The repository's address has one home; every badge, link and install cell is held to it."""

import re
import shutil

import nbrun
import pytest
import set_repo

ROOT = set_repo.ROOT
PUBLIC = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *nbrun.find_notebooks()]
COLAB = re.compile(r"https://colab\.research\.google\.com/github/[^\s)\"\\]+")
INSTALL = re.compile(r"git\+https://[^\s)\"'\\`]+")
PAGES = re.compile(r"https://([\w-]+\.github\.io/[\w.-]+)")


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.name)
def test_every_address_is_that_of_the_configuration(path):
    text = path.read_text(encoding="utf-8")
    expected = {set_repo.colab_url(notebook.stem) for notebook in nbrun.find_notebooks()}
    assert set(COLAB.findall(text)) <= expected
    assert set(INSTALL.findall(text)) <= {set_repo.install_url()}


def test_the_readme_has_a_badge_for_each_chapter():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = re.findall(r"\[!\[Open in Colab\]\(https://\S+/colab-badge\.svg\)\]\((\S+)\)", text)
    assert badges == [set_repo.colab_url(notebook.stem) for notebook in nbrun.find_notebooks()]
    assert set(PAGES.findall(text)) == {set_repo.pages_host(set_repo.name_of())}
    assert f"git clone {set_repo.repository()['url']}" in text


@pytest.fixture
def copy(tmp_path):
    """The files of this repository that hold its address."""
    for path in {
        path for pattern in set_repo.FILES for path in ROOT.glob(pattern) if path.is_file()
    }:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def texts(root):
    return {
        path.relative_to(root): path.read_text(encoding="utf-8")
        for path in root.rglob("*")
        if path.is_file()
    }


def test_set_repo_leaves_no_trace_of_the_old_address(copy):
    old, before = set_repo.name_of(copy), texts(copy)
    changed = set_repo.set_repository("some-one/a.fork", copy)
    after = texts(copy)
    assert {path for path in before if before[path] != after[path]} == set(changed)
    assert not [
        path for path, text in after.items() if old in text or set_repo.pages_host(old) in text
    ]
    assert set_repo.colab_url("bandit", copy).startswith(
        "https://colab.research.google.com/github/some-one/a.fork/blob/"
    )
    assert "https://some-one.github.io/a.fork/" in after[(copy / "README.md").relative_to(copy)]


def test_a_release_moves_every_link_and_install_line_to_its_tag(copy):
    """Oracle: the texts, searched for the branch; and back again, to the letter."""
    name, before = set_repo.name_of(copy), texts(copy)
    set_repo.set_repository(name, copy, "v1.0.0")
    after = "\n".join(texts(copy).values())
    assert set(INSTALL.findall(after)) == {f"git+https://github.com/{name}@v1.0.0"}
    assert set_repo.install_url(copy) == f"git+https://github.com/{name}@v1.0.0"
    assert f"{name}/blob/v1.0.0/notebooks/grpo.ipynb" in after
    assert not re.findall(rf"{re.escape(name)}(?:/blob)?/main\b", after)
    set_repo.set_repository("some-one/fork", copy)
    assert set_repo.install_url(copy) == "git+https://github.com/some-one/fork@v1.0.0"
    set_repo.set_repository(name, copy, "main")
    assert texts(copy) == before


def test_set_repo_refuses_what_is_no_tag(copy):
    with pytest.raises(ValueError, match="neither a branch nor a tag"):
        set_repo.set_repository("owner/name", copy, "v1 0")


def test_set_repo_and_back_changes_nothing(copy):
    old, before = set_repo.name_of(copy), texts(copy)
    set_repo.set_repository("some-one/fork", copy)
    set_repo.set_repository(old, copy)
    assert texts(copy) == before


@pytest.mark.parametrize(
    "name", ["", "owner", "owner/a/b", "https://github.com/owner/name", "owner/na me"]
)
def test_set_repo_refuses_what_is_no_address(copy, name):
    before = texts(copy)
    with pytest.raises(ValueError, match="owner/name"):
        set_repo.set_repository(name, copy)
    assert texts(copy) == before
