"""Every notebook keeps the conventions a reader relies on, here, in Colab and on GitHub."""

import ast
import re
import statistics

import contents
import fold
import nbrun
import pytest
import set_repo

NOTEBOOKS = nbrun.find_notebooks()
LONG_CELLS = (nbrun.ROOT / "tests" / "long_report_cells.txt").read_text().split("\n")
LONG_CELLS = [line for line in LONG_CELLS if line and not line.startswith("#")]
ELSEWHERE = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|tmp|private|Users|mnt|srv|work|workspace)/\w|[A-Z]:\\\\Users"
)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbrun.read(path).cells if cell.cell_type == "code"]


def lines_of(cell):
    """Lines of code; the title of a report cell is none."""
    lines = [line for line in cell.source.splitlines() if line.strip()]
    return lines[1:] if lines and lines[0].startswith(fold.TITLE) else lines


def too_long(cell):
    return any(len(line) > 100 for line in cell.source.splitlines())


def figures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def test_it_is_in_the_table_of_contents(path):
    assert f"notebooks/{path.stem}" in contents.pages(contents.contents())


def test_it_says_what_it_asks_and_whether_it_needs_a_language_model(path):
    assert contents.question(path), "the first cell needs a question in bold on a line of its own"
    assert isinstance(nbrun.read(path).metadata["needs_model"], bool)


def test_code_cells_are_short(path):
    lengths = [len(lines_of(cell)) for cell in code_cells(path)]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 25


def test_lines_are_at_most_100_characters_but_in_listed_cells(path):
    """The list holds report cells of the first edition. It only gets shorter: a cell whose lines
    fit has to leave it."""
    long = {f"{path.stem} {cell.id}" for cell in code_cells(path) if too_long(cell)}
    allowed = {line for line in LONG_CELLS if line.split()[0] == path.stem}
    assert long == allowed


def test_report_cells_are_closed_in_jupyter_and_colab_too(path):
    assert fold.fold(nbrun.read(path)) == 0, f"run `make fold NOTEBOOK={path.stem}`"


def parsed(cell):
    """The syntax tree of a cell; lines that only IPython knows do nothing."""
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M))


def named(call):
    """What a call calls, without what stands before a dot."""
    return getattr(call.func, "id", None) or getattr(call.func, "attr", None)


def test_no_claim_is_a_number_from_the_source(path):
    """Where a scale measures nothing, the number of a claim is None; never one that was written
    down to lie in the band."""
    for cell in code_cells(path):
        for call in ast.walk(parsed(cell)):
            if not (isinstance(call, ast.Call) and named(call) == "claims"):
                continue
            for claim, value, *_ in (row.elts for row in call.args):
                assert any(isinstance(node, ast.Name) for node in ast.walk(value)), claim.value
                for node in ast.walk(value):
                    assert not isinstance(node, ast.BoolOp), claim.value
                    if isinstance(node, ast.IfExp):
                        assert ast.unparse(node.orelse) == "None", claim.value


def test_no_number_stands_in_for_what_was_not_recorded(path):
    for cell in code_cells(path):
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.IfExp) and ast.unparse(node.test) == "sweep":
                assert ast.unparse(node.orelse) in ("None", "()"), ast.unparse(node)


def test_every_claim_is_measured_at_scale_tiny(path):
    for cell in code_cells(path):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        assert "not measured at this scale" not in printed


def shows(node):
    return any(
        isinstance(call, ast.Call) and named(call) in ("say", "table", "show", "print")
        for call in ast.walk(node)
    )


def test_a_cell_without_recorded_results_says_so(path):
    """A cell that shows only what was recorded has a sentence for a scale without."""
    for cell in code_cells(path):
        body = parsed(cell).body
        ifs = [n for n in body if isinstance(n, ast.If) and ast.unparse(n.test) == "sweep"]
        others = [n for n in body if n not in ifs and not isinstance(n, ast.FunctionDef)]
        if any(map(shows, ifs)) and not any(map(shows, others)):
            assert any(map(shows, [end for one in ifs for end in one.orelse])), cell.source


# Where texts come from that nobody here wrote: calls, and fields of what is returned.
WRITERS = ("write", "respond", "texts", "decode", "batch_decode", "convert_ids_to_tokens")
WRITTEN = ("texts", "prompt", "response", "completion", "chosen", "rejected")
# What leaves a text the text that it is.
SAME = ("strip", "join", "replace", "removesuffix", "removeprefix", "list", "tuple", "sorted")


def raw(node, names):
    """Whether an expression is or holds a text of a model or of data, as it was written."""
    if isinstance(node, ast.Call):
        inside = [*node.args, getattr(node.func, "value", None)]
        return named(node) in WRITERS or (
            named(node) in SAME and any(raw(one, names) for one in inside)
        )
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in WRITTEN
    if isinstance(node, ast.Subscript):
        return raw(node.value, names) or ast.unparse(node.slice) in map(repr, WRITTEN)
    if isinstance(node, ast.FormattedValue):
        return node.format_spec is None and raw(node.value, names)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        inner = names | {
            name.id
            for loop in node.generators
            if raw(loop.iter, names)
            for name in ast.walk(loop.target)
            if isinstance(name, ast.Name)
        }
        return raw(node.elt, inner)
    kinds = (ast.JoinedStr, ast.List, ast.Tuple, ast.BinOp, ast.Starred, ast.IfExp)
    return isinstance(node, kinds) and any(raw(one, names) for one in ast.iter_child_nodes(node))


def test_texts_of_a_model_or_of_data_are_shown_through_literal(path):
    """`brief`, `literal` and `code` make any text words; without them it could become an element of
    the page."""
    names = set()
    for cell in code_cells(path):
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.Assign) and raw(node.value, names):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.Call) and named(node) in ("say", "table", "append"):
                found = [ast.unparse(one) for one in node.args if raw(one, names)]
                assert not found, cell.source


def test_no_cell_writes_a_table_by_hand(path):
    assert not [cell.source for cell in code_cells(path) if re.search(r"\|\s*:?--", cell.source)]


def test_it_was_run_once_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_is_stored(path):
    for cell in code_cells(path):
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert not [output.ename for output in cell.outputs if output.output_type == "error"]


@pytest.mark.whole
def test_it_has_three_figures(path):
    assert sum(len(figures(cell)) for cell in code_cells(path)) >= 3


def test_each_figure_says_what_it_shows(path):
    drawings = [cell for cell in code_cells(path) if "\ndrawing(" in f"\n{cell.source}"]
    for cell in [*filter(figures, code_cells(path)), *drawings]:
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt.split()) >= 4, cell.source
        assert not re.search(r"\d\.\d", alt), (
            "numbers stand in the generated sentence, not in the alt text"
        )


@pytest.mark.whole
def test_its_length_is_that_of_a_chapter(path):
    words = sum(
        len(cell.source.split()) for cell in nbrun.read(path).cells if cell.cell_type == "markdown"
    )
    assert 1800 <= words <= 4400


def test_no_path_of_a_machine_is_stored(path):
    text = path.read_text(encoding="utf-8")
    assert str(nbrun.ROOT) not in text
    for cell in nbrun.read(path).cells:
        shown = [
            str(
                {
                    **output,
                    "data": {k: v for k, v in output.get("data", {}).items() if "image" not in k},
                }
            )
            for output in cell.get("outputs", [])
        ]
        assert not ELSEWHERE.search("\n".join([cell.source, *shown])), cell.source


def test_the_first_cell_links_to_colab_in_words(path):
    first = nbrun.read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert f"[Open in Colab]({set_repo.colab_url(path.stem)})" in first.source


def test_the_set_up_cell_installs_on_colab_only(path):
    source = code_cells(path)[0].source
    # what only the chapters with a language model need is an extra
    extra = "rlhf_helpers[lm]@" if nbrun.read(path).metadata["needs_model"] else ""
    install = f'%pip install -q "{extra}{set_repo.install_url()}"'
    assert re.search(
        rf'^if "google\.colab" in sys\.modules:\n    {re.escape(install)}$', source, re.M
    )


def test_nothing_is_asked_from_another_host(path):
    markdown = [cell.source for cell in nbrun.read(path).cells if cell.cell_type == "markdown"]
    assert not re.search(
        r"!\[[^\]]*\]\(https?:|<(?:img|script|iframe)\b[^>]*https?:", "\n".join(markdown)
    )


def test_no_line_ends_in_a_semicolon(path):
    # The regression test runs cells without history, where a trailing semicolon hides nothing.
    assert not [
        line for cell in code_cells(path) for line in lines_of(cell) if line.rstrip().endswith(";")
    ]


def test_it_needs_no_widgets(path):
    assert "widgets" not in nbrun.read(path).metadata
    for cell in code_cells(path):
        assert "ipywidgets" not in cell.source
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert not [kind for kind in kinds if "widget" in kind]


def test_the_kernel_is_the_one_every_machine_has(path):
    assert nbrun.read(path).metadata["kernelspec"]["name"] == "python3"


def test_most_cells_are_compared(path):
    cells = code_cells(path)
    ignored = [
        cell
        for cell in cells
        if {"nbval-ignore-output", "nbval-skip"} & set(cell.metadata.get("tags", []))
    ]
    assert len(ignored) < len(cells) / 2


def test_no_myst_only_syntax(path):
    markdown = "\n".join(
        cell.source for cell in nbrun.read(path).cells if cell.cell_type == "markdown"
    )
    assert not re.search(r"^:::|^```\{|(?<!\$)\{[a-z:]+\}`", markdown, re.M)
