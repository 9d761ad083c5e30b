"""The page checks find each kind of damage: every test below breaks a small site in one place."""

import base64
import hashlib

import check_pages
import nbformat
import pytest

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FIGURE = hashlib.sha256(PIXEL).hexdigest() + ".png"
PAGE = f"""<html><head><link rel="stylesheet" href="s.css"><script src="mathjax.js"></script></head>
<body>
<a href="page.html#here">link</a><h1 id="here">Page</h1>
<div class="math" id="equation-eq-one">x</div><span class="math">y</span>
<div class="cell_output"><pre>forty-two words</pre><p>The mean is <strong>1.5</strong>.</p>
<img src="{FIGURE}"></div>
</body></html>"""


def make_notebook():
    output = nbformat.v4.new_output
    code = nbformat.v4.new_code_cell("run()")
    code.outputs = [
        output("stream", text="forty-two\nwords\n"),
        output(
            "display_data",
            {"text/markdown": "The mean is **1.5**.", "text/plain": "<Markdown object>"},
        ),
        output(
            "display_data",
            {"image/png": base64.b64encode(PIXEL).decode(), "text/plain": "<Figure>"},
        ),
    ]
    prose = nbformat.v4.new_markdown_cell("# Page\n\nA $y$.\n\n$$\nx\n$$ (eq:one)\n")
    return nbformat.v4.new_notebook(cells=[prose, code])


@pytest.fixture
def site(tmp_path):
    """A book of one notebook and its one page."""
    html = tmp_path / "html"
    html.mkdir()
    (tmp_path / "_toc.yml").write_text("root: page\n")
    nbformat.write(make_notebook(), tmp_path / "page.ipynb")
    (html / "page.html").write_text(PAGE)
    (html / "s.css").write_text(
        "/* url(https://example.org/comment.png) */ body { background: url('mathjax.js') }"
    )
    (html / "mathjax.js").write_text("")
    (html / FIGURE).write_bytes(PIXEL)
    return tmp_path


def problems(site):
    return "\n".join(check_pages.check(site, site / "html"))


def test_a_sound_site_has_no_problem(site):
    assert problems(site) == ""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("forty-two words", "forty-three words", "the output of cell 1 is not on the page"),
        ("<strong>1.5</strong>", "<strong>1.6</strong>", "the output of cell 1 is not on the page"),
        (f'<img src="{FIGURE}">', "", "the figure of cell 1 is not on the page"),
        (
            '<div class="math" id="equation-eq-one">x</div>',
            "",
            "formulas in the source, 0 and 1 on the page",
        ),
        ('<span class="math">y</span>', "$y$", "formulas in the source, 1 and 0 on the page"),
        ("equation-eq-one", "equation-eq-two", "the equation eq:one is not on the page"),
        ('<script src="mathjax.js"></script>', "", "no script to typeset them"),
        ("page.html#here", "page.html#there", "leads to no anchor: page.html#there"),
        ("page.html#here", "gone.html", "leads to no file: gone.html"),
        (FIGURE, "gone.png", "loads a file that is not there: gone.png"),
        ("mathjax.js", "mathjax-gone.js", "loads a file that is not there: mathjax-gone.js"),
        ("s.css", "gone.css", "loads a file that is not there: gone.css"),
        (
            "mathjax.js",
            "https://cdn.example.org/mathjax.js",
            "loads from another host: https://cdn.example.org/mathjax.js",
        ),
        ("s.css", "//example.org/s.css", "loads from another host: //example.org/s.css"),
        (
            "<body>",
            '<body><img src="https://example.org/badge.svg">',
            "loads from another host: https://example.org/badge",
        ),
        (
            "<body>",
            '<body><iframe src="https://example.org"></iframe>',
            "loads from another host: https://example.org",
        ),
        (
            "<body>",
            '<body style="background: url(http://example.org/a.png)">',
            "loads from another host: http://example",
        ),
        (
            "<head>",
            '<head><link rel="preconnect" href="https://fonts.example.org">',
            "loads from another host: https://fonts",
        ),
        (
            "<head>",
            "<head><style>@import 'https://example.org/a.css';</style>",
            "loads from another host: https://example.org/a",
        ),
        (
            '<img src="',
            '<img srcset="https://example.org/2x.png 2x" src="',
            "loads from another host: https://example.org/2x",
        ),
    ],
)
def test_damage_to_the_page_is_found(site, old, new, problem):
    assert old in PAGE
    (site / "html" / "page.html").write_text(PAGE.replace(old, new))
    assert problem in problems(site)


@pytest.mark.parametrize(
    ("style", "problem"),
    [
        (
            "@font-face { src: url(https://example.org/a.woff2) }",
            "loads from another host: https://example.org/a.woff2",
        ),
        ("@import '//example.org/a.css';", "loads from another host: //example.org/a.css"),
        ("body { background: url('gone.png') }", "names no file: gone.png"),
    ],
)
def test_damage_to_a_style_sheet_is_found(site, style, problem):
    (site / "html" / "s.css").write_text(style)
    assert problem in problems(site)


def test_a_page_that_was_not_built_is_found(site):
    (site / "html" / "page.html").unlink()
    assert "page.html was not built" in problems(site)


def test_a_page_without_source_is_found(site):
    (site / "_toc.yml").write_text("root: page\nchapters:\n- file: other\n")
    assert "other has no source" in problems(site)


def test_links_that_leave_the_book_are_no_problem(site):
    page = PAGE.replace(
        "<body>",
        '<body><a href="https://example.org/x">paper</a><link rel="canonical"'
        ' href="https://e.org">',
    )
    (site / "html" / "page.html").write_text(page)
    assert problems(site) == ""


def test_a_table_that_is_shown_as_text_is_found(site):
    notebook = make_notebook()
    table = {"text/markdown": "| a | b |\n|---|---|\n| 1 | 2 |\n", "text/plain": "<Markdown>"}
    notebook.cells[1].outputs.append(nbformat.v4.new_output("display_data", table))
    nbformat.write(notebook, site / "page.ipynb")
    page = site / "html" / "page.html"
    page.write_text(PAGE.replace("</body>", "<p>| a | b | |---|---| | 1 | 2 |</p></body>"))
    assert "1 tables in the notebook, 0 on the page" in problems(site)
    page.write_text(PAGE.replace("</body>", "<table><tr><td>a b 1 2</td></tr></table></body>"))
    assert problems(site) == ""
