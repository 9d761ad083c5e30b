"""One order: _toc.yml; and the tables that are built from it."""

import build_api
import build_chapters
import contents
import pytest

TOC = """root: book/index
parts:
  - caption: Start here
    chapters:
      - file: book/start
  - caption: Bandits
    numbered: 1
    chapters:
      - file: notebooks/zebra
      - file: notebooks/apple
  - caption: Reference
    chapters:
      - file: book/letters
"""


def notebook(*lines):
    text = "\\n".join(lines)
    cell = f'{{"cell_type": "markdown", "id": "a", "metadata": {{}}, "source": "{text}"}}'
    return f'{{"cells": [{cell}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 5}}'


@pytest.fixture
def book(tmp_path):
    for name, text in {
        "_config.yml": "repository:\n  url: https://github.com/a/b\n  branch: main\n",
        "_toc.yml": TOC,
        "book/index.md": f"# Book\n\n{build_chapters.BEGIN}\nold\n{build_chapters.END}\n\nMore.\n",
        "book/start.md": "# Start\n\n**Where does it begin?**\n\nHere.\n",
        "book/letters.md": "# Letters\n\n**What is not a question** stands here.\n",
        "notebooks/zebra.ipynb": notebook("# Zebra", "", "**Why stripes?**", "", "Text."),
        "notebooks/apple.ipynb": notebook("# Apple: round", "", "**Why red?**"),
        "notebooks/extra.ipynb": notebook("# Extra"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_order_is_that_of_the_table_of_contents(book):
    """Oracle: the file, read by eye; its order is not that of the alphabet."""
    assert [path.stem for path in contents.notebooks(book)] == ["zebra", "apple", "extra"]
    assert [(c.number, c.title, c.question) for c in contents.chapters(book)] == [
        ("", "Start", "Where does it begin?"),
        ("1", "Zebra", "Why stripes?"),
        ("2", "Apple: round", "Why red?"),
    ]


def test_the_table_of_a_page_is_written_between_its_marks(book):
    built = build_chapters.build("book/index.md", book)
    colab = "https://colab.research.google.com/github/a/b/blob/main/notebooks/zebra.ipynb"
    assert (
        f"| 1 | [Zebra](../notebooks/zebra.ipynb) | Why stripes? | [Open in Colab]({colab}) |"
        in built
    )
    assert "|  | [Start](start.md) | Where does it begin? |  |" in built
    assert "old" not in built
    assert built.startswith("# Book\n")
    assert built.endswith("\n\nMore.\n")
    (book / "book" / "index.md").write_text(built)
    assert build_chapters.build("book/index.md", book) == built


def test_moving_a_line_moves_the_numbers(book):
    lines = TOC.splitlines(keepends=True)
    first, second = (i for i, line in enumerate(lines) if "notebooks/" in line)
    lines[first], lines[second] = lines[second], lines[first]
    (book / "_toc.yml").write_text("".join(lines))
    assert [(c.number, c.title) for c in contents.chapters(book)][1:] == [
        ("1", "Apple: round"),
        ("2", "Zebra"),
    ]


def test_a_page_without_marks_is_refused(book):
    (book / "book" / "index.md").write_text("# Book\n")
    with pytest.raises(ValueError, match=r"book/index\.md needs the lines"):
        build_chapters.build("book/index.md", book)


@pytest.mark.parametrize("place", build_chapters.PLACES)
def test_the_stored_tables_are_current(place):
    stored = (contents.ROOT / place).read_text(encoding="utf-8")
    assert stored == build_chapters.build(place), f"{place} is out of date: run `make tables`"


def test_every_module_is_on_the_page_of_functions():
    """Oracle: the files of the package, counted apart from the sections."""
    shown = [
        name for _, names in build_api.sorted_into_sections(build_api.modules()) for name in names
    ]
    package = contents.ROOT / "rlhf_helpers"
    files = [p for p in package.rglob("*.py") if not p.name.startswith("_")]
    assert len(shown) == len(set(shown))
    assert {name for name in shown if name != "worlds"} == {
        ".".join(p.relative_to(package).with_suffix("").parts) for p in files
    }


def test_a_new_module_has_to_find_its_section():
    found = build_api.sorted_into_sections(["kl", "worlds.chess", "algorithms.kto"])
    assert {section.heading: names for section, names in found if names} == {
        "KL divergence": ["kl"],
        "Worlds": ["worlds.chess"],
        "Algorithms": ["algorithms.kto"],
    }
    with pytest.raises(ValueError, match=r"no section of tools/build_api\.py takes magic"):
        build_api.sorted_into_sections(["kl", "magic"])
