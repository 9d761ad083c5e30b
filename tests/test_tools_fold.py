"""Report cells are closed in Jupyter and Colab as they are on the pages."""

import fold
import nbformat


def notebook(*cells):
    """Cells as (source, tags); without tags, prose."""
    made = [
        nbformat.v4.new_markdown_cell(source)
        if tags is None
        else nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        for source, tags in cells
    ]
    return nbformat.v4.new_notebook(cells=made)


def test_a_report_cell_is_closed_under_the_heading_above():
    nb = notebook(
        ("# Page\n\n## The [best](a.ipynb) $\\pi$ of `all`\n\nProse.", None),
        ("x = 1", []),
        ("say(x)", ["remove-input", "nbval-ignore-output"]),
    )
    assert fold.fold(nb) == 1
    plain, report = nb.cells[1:]
    assert (plain.source, dict(plain.metadata)) == ("x = 1", {"tags": []})
    assert report.source == "# @title The best pi of all\nsay(x)"
    assert report.metadata.jupyter.source_hidden is True
    assert report.metadata.cellView == "form"
    assert report.metadata.tags == ["remove-input", "nbval-ignore-output"]


def test_a_title_that_is_there_stays_and_twice_is_once():
    nb = notebook(("## Heading", None), ("# @title Mine\nsay(1)", ["hide-input"]))
    assert fold.fold(nb) == 1
    assert nb.cells[1].source == "# @title Mine\nsay(1)"
    assert fold.fold(nb) == 0
    nbformat.validate(nb)


def test_other_settings_of_a_cell_survive():
    nb = notebook(("say(1)", ["hide-input"]))
    nb.cells[0].metadata["jupyter"] = {"outputs_hidden": False}
    nb.cells[0].metadata["mystnb"] = {"image": {"alt": "a line"}}
    fold.fold(nb)
    assert nb.cells[0].metadata.jupyter == {"outputs_hidden": False, "source_hidden": True}
    assert nb.cells[0].metadata.mystnb == {"image": {"alt": "a line"}}
