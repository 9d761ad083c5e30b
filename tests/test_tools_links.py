"""Chapters are called by name, every link leads somewhere, and the check that says so can fail."""

import json

import check_links
import pytest

CONFIG = "repository:\n  url: https://github.com/some-one/a-book\n  branch: main\n"
SITE = "https://some-one.github.io/a-book/"
SOURCE = "https://github.com/some-one/a-book/blob/main/"
RAW = "https://raw.githubusercontent.com/some-one/a-book/main/"


@pytest.mark.skipif(not (check_links.ROOT / ".git").exists(), reason="asks git for the files")
def test_the_book_has_no_broken_link_and_no_numbered_chapter():
    assert check_links.problems() == []


@pytest.fixture
def book(tmp_path):
    """Two chapters that name each other, a prose page and a README."""
    page = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    texts = {
        "_config.yml": CONFIG,
        "_toc.yml": "root: book/index\nchapters:\n- file: notebooks/one\n- file: notebooks/two\n",
        "README.md": "[one](notebooks/one.ipynb), [site](" + SITE + ")\n",
        "book/index.md": "# Book\n\n[two](../notebooks/two.ipynb) [paper](https://e.org/x.pdf)\n",
    }
    for name, other in (("one", "two"), ("two", "one")):
        source = f"# {name}\n\n[{other}]({other}.ipynb) and [the book]({SITE}book/index.html#top)"
        cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source}
        texts[f"notebooks/{name}.ipynb"] = json.dumps(page | {"cells": [cell]})
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def found(book):
    return "\n".join(
        f"{path.name}: {why}"
        for path in check_links.linking(book)
        for target in check_links.LINK.findall(check_links.contents.markdown(path))
        if (why := check_links.problem(path, target, book))
    )


def test_the_readme_can_be_read_where_the_repository_is_not():
    """An index of packages shows it without the files beside it."""
    text = (check_links.ROOT / "README.md").read_text(encoding="utf-8")
    targets = check_links.LINK.findall(text) + check_links.IMAGE.findall(text)
    assert targets
    assert not [target for target in targets if not target.startswith("https://")]


def test_a_sound_book_has_no_problem(book):
    assert found(book) == ""


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("notebooks/one.ipynb", "two.ipynb", "three.ipynb", "leads to no file: three.ipynb"),
        ("notebooks/one.ipynb", "two.ipynb", "../book/index.md", "leads nowhere in Colab"),
        ("notebooks/one.ipynb", "index.html", "gone.html", "is no page of _toc.yml"),
        ("book/index.md", "two.ipynb", "gone.ipynb", "leads to no file"),
        ("README.md", "notebooks/one", "one", "leads to no file: one.ipynb"),
        ("README.md", SITE, SOURCE + "gone.md", "leads to no file: " + SOURCE + "gone.md"),
        ("README.md", SITE, RAW + "gone.png", "leads to no file: " + RAW + "gone.png"),
        ("_toc.yml", "- file: notebooks/two\n", "", "a notebook that _toc.yml does not name"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(book, name, old, new, problem):
    text = (book / name).read_text()
    assert old in text
    (book / name).write_text(text.replace(old, new))
    assert problem in found(book)


@pytest.mark.parametrize("number", ["3", "03", "11"])
@pytest.mark.parametrize("words", ["chapter {}", "Chapter {}", "chapters {} and 4", "a_{}_name"])
def test_a_chapter_that_is_called_by_a_number_is_found(tmp_path, words, number):
    path = tmp_path / "page.md"
    path.write_text(f"First line.\nAs in {words.format(number)}.\n")
    wanted = [] if words.startswith("a_") and number != "03" else ["page.md:2: "]
    assert [place[: len("page.md:2: ")] for place in check_links.numbered(path)] == wanted


def test_the_word_without_a_number_is_no_problem(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Each chapter asks one question. Ten chapters, 3 of them on bandits.\n")
    assert check_links.numbered(path) == []
