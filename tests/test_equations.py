"""Every labelled equation has one place, a function and a test with an oracle; and the check that
says so can fail."""

import build_equations
import pytest

PAGE = "# Page\n\n$$\nx = 1\n$$ (eq:one)\n"
MODULE = '"""m"""\n\n\ndef one():\n    """One.\n\n    Equation: eq:one\n    """\n'
TEST = (
    'import pytest\n\n\n@pytest.mark.equation("eq:one")\ndef test_one():\n    """Oracle:'
    ' counting."""\n'
)


def test_every_equation_is_displayed_once_implemented_and_tested():
    assert build_equations.problems() == []


@pytest.fixture
def book(tmp_path):
    """The smallest book: one equation, one function, one test."""
    for name, text in {
        "_toc.yml": "root: book/page\n",
        "book/page.md": PAGE,
        "rlhf_helpers/losses.py": MODULE,
        "tests/test_one.py": TEST,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_smallest_book_has_no_problem(book):
    assert build_equations.problems(book) == []
    assert build_equations.checks(book) == [("eq:one", "test_one.py", "test_one", "counting.")]


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("book/page.md", "(eq:one)", "", "eq:one is displayed 0 times"),
        ("book/page.md", PAGE, PAGE + "\n$$ x = 2 $$ (eq:one)\n", "eq:one is displayed 2 times"),
        ("book/page.md", PAGE, PAGE + "\n$$ y = 2 $$ (eq:two)\n", "eq:two has no function"),
        (
            "rlhf_helpers/losses.py",
            "    Equation: eq:one\n",
            "",
            "rlhf_helpers.losses.one names no equation",
        ),
        ("rlhf_helpers/losses.py", "eq:one", "eq:other", "eq:one has no function"),
        ("tests/test_one.py", '@pytest.mark.equation("eq:one")\n', "", "eq:one has no test"),
        ("tests/test_one.py", "eq:one", "eq:unknown", "eq:unknown is displayed 0 times"),
        (
            "tests/test_one.py",
            "Oracle: ",
            "",
            "test_one.py::test_one does not say what its oracle is",
        ),
    ],
)
def test_each_broken_tie_is_found(book, file, old, new, problem):
    text = (book / file).read_text()
    assert old in text
    (book / file).write_text(text.replace(old, new))
    assert problem in build_equations.problems(book)


def test_private_functions_and_other_files_need_no_label(book):
    (book / "rlhf_helpers" / "losses.py").write_text(MODULE + "\n\ndef _helper():\n    pass\n")
    (book / "rlhf_helpers" / "rewards.py").write_text("def length():\n    pass\n")
    assert build_equations.problems(book) == []
