"""The page of famous bugs: each is one, and each is caught."""

import ast
from pathlib import Path

import build_errors
import contents
import pytest

from experiments import errors
from experiments.bugs import BUGS

ROOT = Path(__file__).resolve().parents[1]
EACH = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


@EACH
def test_the_check_of_a_bug_fails_on_the_wrong_lines_alone(bug):
    bug.check(bug.right)
    with pytest.raises(AssertionError):
        bug.check(bug.wrong)


@EACH
def test_the_test_that_a_bug_names_exists(bug):
    file, name = bug.test.split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@EACH
def test_the_lines_of_a_bug_are_few_and_differ(bug):
    wrong, right = build_errors.code(bug.wrong), build_errors.code(bug.right)
    assert wrong != right
    ast.parse(wrong), ast.parse(right)  # a name without its prefix may be a word of Python
    assert max(len(text.splitlines()) for text in (wrong, right)) <= 8
    assert bug.symptoms
    assert bug.hidden in build_errors.LEVELS


def test_names_are_different_and_chapters_exist():
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
    assert {bug.chapter for bug in BUGS} <= {path.stem for path in contents.notebooks()}


@pytest.mark.parametrize(
    "name",
    [
        "score-of-the-padding",
        "off-by-one",
        "mean-over-padding",
        "prompt-is-paid",
        "two-temperatures",
        "half-precision",
        "optimistic-clip",
        "k1-as-a-loss",
        "sign-of-the-price",
        "long-wrong-answers",
        "equal-rewards",
        "answers-put-back",
        "answer-somewhere",
    ],
)
def test_a_recorded_harm_is_what_a_run_finds(name):
    """Oracle: the run, made again; those that take a few seconds."""
    bug = next(bug for bug in BUGS if bug.name == name)
    found = errors.HARMS[name](bug)
    recorded = errors.of("errors")[name]
    assert found.what == recorded["what"]
    assert found.wrong == pytest.approx(recorded["wrong"], rel=0.1, abs=0.01)
    assert found.right == pytest.approx(recorded["right"], rel=0.1, abs=0.01)


def test_every_recorded_harm_is_one():
    for name, harm in errors.of("errors").items():
        assert abs(harm["wrong"] - harm["right"]) > 0.05, name
