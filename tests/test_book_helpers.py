"""What only the notebooks use: the switch of scale, set-up, claims, printed source, intervals."""

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt

from rlhf_helpers import settings
from rlhf_helpers.book import claims, notebook, plots, show_source
from rlhf_helpers.losses import ppo_clip_loss


def test_setup_line_switches_the_scale(monkeypatch, capsys):
    """Oracle: what is printed, and what everything after it loads."""
    monkeypatch.setenv("RLHF_SCALE", "tiny")
    assert notebook.setup("no_such_chapter", scale="gpt2").scale == "gpt2"
    assert "scale gpt2" in capsys.readouterr().out
    assert settings.load().scale == "gpt2"


def test_an_unmeasured_notebook_says_so():
    """Oracle: the words."""
    assert notebook.recorded("no_such_chapter", "tiny") == "time and memory not yet measured"


def test_a_claim_outside_its_band_stops_the_notebook_at_scale_tiny(monkeypatch, capsys):
    """Oracle: an error that names the failing claim alone, after all are printed."""
    monkeypatch.setenv("RLHF_SCALE", "tiny")
    with pytest.raises(AssertionError, match="b is small") as error:
        claims(("a is large", 5.0, 1, 10), ("b is small", 5.0, 0, 1))
    assert "a is large" not in str(error.value)
    assert capsys.readouterr().out.splitlines() == [
        "✓ a is large: 5 (band 1 to 10)",
        "✗ b is small: 5 (band 0 to 1)",
    ]


def test_nan_fails_a_claim(monkeypatch):
    """Oracle: NaN lies in no band."""
    monkeypatch.setenv("RLHF_SCALE", "tiny")
    with pytest.raises(AssertionError):
        claims(("a number", float("nan"), -1e9, 1e9))


def test_bands_belong_to_scale_tiny(monkeypatch, capsys):
    """Oracle: the same claim at the other scale is printed and raises nothing."""
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    claims(("b is small", 5.0, 0, 1))
    assert "✗ b is small" in capsys.readouterr().out


def test_show_source_prints_the_file_that_is_tested(monkeypatch):
    """Oracle: the text of the function in its own file."""
    shown = []
    monkeypatch.setattr("rlhf_helpers.book.source.display", lambda m: shown.append(m.data))
    show_source(ppo_clip_loss)
    assert shown[0].startswith("`rlhf_helpers/losses.py`")
    with open(ppo_clip_loss.__code__.co_filename, encoding="utf-8") as file:
        source = file.read()
    body = shown[0].split("```python\n")[1].removesuffix("\n```")
    assert body.startswith("def ppo_clip_loss(")
    assert body in source


def test_show_source_refuses_code_that_is_not_tested_here():
    """Oracle: the message."""
    with pytest.raises(ValueError, match="not part of rlhf_helpers"):
        show_source(np.mean)


def test_interval_covers_the_mean_as_often_as_it_says():
    """Oracle: coverage over 4,000 repetitions of five normal runs is 95 % within five binomial
    errors."""
    runs = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 4000))
    _, low, high = plots.interval(runs)
    covered = ((low < 3.0) & (high > 3.0)).mean()
    assert abs(covered - 0.95) < 5 * (0.95 * 0.05 / 4000) ** 0.5


def test_interval_needs_three_runs():
    """Oracle: the message."""
    with pytest.raises(ValueError, match="three or more"):
        plots.interval(torch.zeros(2, 4))


def shown(monkeypatch, *arguments):
    """The Markdown that `table` displays."""
    texts = []
    monkeypatch.setattr(notebook, "display", lambda markdown: texts.append(markdown.data))
    notebook.table(*arguments)
    (text,) = texts
    return text


def test_a_table_has_its_rows_under_its_columns(monkeypatch):
    """Oracle: a Markdown parser that this code does not use, cell by cell."""
    rows = [["DPO", f"{1.5:.2f}", ""], ["KL(π|π_ref)", 3, "two\nlines"]]
    text = shown(monkeypatch, rows, ["", "loss", "note"], "Recorded, five seeds.")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [t.content for t in tokens if t.type == "inline"]
    assert cells == [
        "Recorded, five seeds.",
        *["", "loss", "note"],
        *["DPO", "1.50", ""],
        *["KL(π|π_ref)", "3", "two lines"],
    ]


def test_a_table_without_a_title_is_the_table_alone(monkeypatch):
    assert shown(monkeypatch, [[1, 2]], ["a", "b"]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_a_row_that_does_not_fit_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells for 2 columns"):
        notebook.table([[1, 2], [3]], ["a", "b"])


def test_a_brief_text_is_one_line_that_fits_a_cell():
    assert notebook.brief("one |\n two  three", 9) == "one / two"
