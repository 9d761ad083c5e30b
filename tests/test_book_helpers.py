"""What only the notebooks use: the switch of scale, set-up, claims, printed source, intervals."""

import xml.etree.ElementTree as ElementTree

import docutils.core
import nbformat
import numpy as np
import pytest
import torch
import yaml
from docutils import nodes
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from myst_parser.parsers.docutils_ import Parser
from nbclient import NotebookClient
from nbrun import ROOT

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


def test_what_was_not_measured_is_neither_right_nor_wrong(monkeypatch, capsys):
    """Oracle: the printed line; at scale gpt2 nothing is recorded."""
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    claims(("recorded", None, 0, 1), ("measured", 0.5, 0, 1))
    assert capsys.readouterr().out.splitlines() == [
        "– recorded: not measured at this scale",
        "✓ measured: 0.5 (band 0 to 1)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["Agg", "TkAgg"])
def test_figures_are_in_the_notebook_whatever_backend_the_environment_names(backend, monkeypatch):
    """Oracle: a picture in the output of a kernel that was started with the variable."""
    monkeypatch.setenv("MPLBACKEND", backend)
    sources = [
        "import matplotlib.pyplot as plt\nfrom rlhf_helpers.book import setup",
        "_ = setup('no_such_chapter')\nassert plt.rcParams['legend.frameon'] is False",
        "plt.plot([1, 2])\nplt.show()",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    assert [output.output_type for output in notebook.cells[2].outputs] == ["display_data"]
    assert "image/png" in notebook.cells[2].outputs[0].data


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


def test_show_source_shows_code_that_holds_a_fence_of_its_own(monkeypatch):
    """Oracle: a Markdown parser, which must see one block of code and all of it."""
    shown = []
    code = 'def f():\n    """Say\n\n```\n<b>\n```\n"""\n'
    monkeypatch.setattr("rlhf_helpers.book.source.display", lambda m: shown.append(m.data))
    monkeypatch.setattr("rlhf_helpers.book.source.inspect.getsource", lambda thing: code)
    show_source(ppo_clip_loss)
    fences = [t for t in MarkdownIt("commonmark").parse(shown[0]) if t.type == "fence"]
    assert [fence.content for fence in fences] == [code]


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


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)> and <b>bold",
    "<!-- hidden --> &lt; &amp; &#65;",
    "{download}`../../etc/passwd`",
    "![picture](../secret.png) [link](https://e.org)",
    "<https://e.org> https://e.org/x www.e.org e.org",
    "costs $5 and $6, $$x^2$$",
    r"\(x\) \begin{equation}x\end{equation} \*",
    "ends in \\",
    "*one* **two** _three_ __four__ ~~five~~ `six` ``seven`` snake_case_name",
    "a | b | c",
    "{{ name }} {#id .class} {ref}`x` [^1] [x]: y",
    "# title",
    "- item",
    "+ item",
    "+++",
    "1. item",
    "12) item",
    "> quote",
    "---",
    "===",
    ":::{note}\nx\n:::",
    "```{include} ../secret\n```",
    "~~~",
    "% comment",
    "(target)=",
    ": definition",
    "    indented",
    "two\n\nparagraphs\tand\u2028lines",
]


def paragraphs(markdown):
    """What the book's own pages make of Markdown: the texts of all paragraphs, and the kinds of
    everything that is no paragraph."""
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["parse"]
    tree = docutils.core.publish_doctree(
        markdown,
        parser=Parser(),
        settings_overrides={**extensions, "report_level": 5, "_disable_config": True},
    )
    shown = [node.astext() for node in tree.findall(nodes.paragraph)]
    return shown, {type(node) for node in tree.findall()} - {
        *(nodes.document, nodes.paragraph, nodes.Text, nodes.table, nodes.tgroup, nodes.colspec),
        *(nodes.thead, nodes.tbody, nodes.row, nodes.entry),
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_of_a_model_is_shown_letter_by_letter(text, monkeypatch):
    """Oracle: the parser of the pages, which must find words and no element."""
    line = " ".join(text.split())
    assert paragraphs(notebook.literal(text)) == ([line], set())
    assert paragraphs(notebook.brief(text, 12)) == ([line[:12].strip()], set())
    cell = shown(monkeypatch, [[notebook.brief(text), 1]], ["a", "b"])
    assert paragraphs(cell) == (["a", "b", line, "1"], set())
    both = f"'{notebook.literal(text)}' and '{notebook.literal(text)}'"
    assert paragraphs(both) == ([f"'{line}' and '{line}'"], set())
    for github in (MarkdownIt("gfm-like"), MarkdownIt("commonmark")):
        (inline,) = [t for t in github.parse(notebook.literal(text)) if t.type == "inline"]
        assert {child.type for child in inline.children} <= {"text", "text_special"}


@given(st.text(alphabet="ab1 .\n#*_`~$|<>[](){}!\\-+=:%&^\"'/@", max_size=20))
def test_any_text_is_shown_letter_by_letter(text):
    """Oracle: the parser of the pages, on texts drawn from all that Markdown and MyST mean."""
    line = " ".join(text.split())
    assert paragraphs(notebook.literal(text)) == ([line] if line else [], set())


@given(st.text(alphabet="ab` |*$<\\", max_size=20))
def test_any_text_is_a_code_span(text):
    """Oracle: a Markdown parser, by itself and in a table."""
    line = " ".join(text.split())
    parser = MarkdownIt("commonmark").enable("table")
    table = f"| a |\n|---|\n| {notebook.code(text).replace('|', chr(92) + '|')} |\n"
    for markdown, place in ((notebook.code(text), 0), (table, 1)):
        inlines = [t for t in parser.parse(markdown) if t.type == "inline"]
        if line:
            assert [(c.type, c.content) for c in inlines[place].children] == [("code_inline", line)]


def test_words_stay_as_they_are():
    """What the shipped model writes has no letter that would have to be replaced."""
    text = "It's a 3-star film, isn't it? \"Superb!\" (I adored it.) 12+5=17; 50 %"
    assert notebook.literal(text) == text
    assert notebook.code("12+5=17") == "`12+5=17`"


def test_a_brief_text_is_one_line_that_fits_a_cell():
    assert notebook.brief("one |\n two  three", 9) == "one &#124; two"


DRAWINGS = sorted((ROOT / "rlhf_helpers" / "assets" / "drawings").glob("*.svg"))


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_says_in_words_what_it_shows_and_fits_a_page(path):
    """Oracle: the file itself, as an XML parser reads it."""
    root = ElementTree.parse(path).getroot()
    texts = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert texts["title"]
    assert len(texts["desc"].split()) > 20
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width <= 640
    assert height <= 1200
    sizes = [float(e.attrib["font-size"]) for e in root.iter() if "font-size" in e.attrib]
    # of the 390 pixels of a phone about 350 are the drawing's
    assert min(sizes) * min(1.0, 350 / width) >= 8


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_shown_by_a_notebook(path):
    """Oracle: the sources of the notebooks."""
    sources = [one.read_text(encoding="utf-8") for one in (ROOT / "notebooks").glob("*.ipynb")]
    assert any(f'drawing(\\"{path.stem}\\")' in source for source in sources)


def test_drawing_displays_the_file_and_knows_the_others(monkeypatch):
    """Oracle: the file, and the list in the message."""
    seen = []
    monkeypatch.setattr(notebook, "display", seen.append)
    notebook.drawing("bandit")
    file = ROOT / "rlhf_helpers" / "assets" / "drawings" / "bandit.svg"
    assert seen[0].data == file.read_text(encoding="utf-8").strip()
    with pytest.raises(ValueError, match="'bandit'"):
        notebook.drawing("no_such")
