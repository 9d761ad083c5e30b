"""What the site adds to Sphinx: docstrings written for a terminal read well on the page."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import book_site
from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import roles
from nbrun import ROOT

DOCSTRING = """\
Estimate |d| for [*shape, T] with r_ and `kind`.

Equation: eq:one, eq:two

Plain words.

Args:
    log_probs, ref_log_probs: [..., T], nats, which is a
        long story.
    kind: "k1" or "k2".
Returns: [T], and what follows
    on the next line.
Raises: ValueError on |bad| input.
"""


def equation_role(name, raw, text, *rest):
    return [nodes.inline("", f"equation {text}")], []


def parse(docstring):
    roles.register_local_role("eq", equation_role)
    strict = {"report_level": 2, "halt_level": 2}
    return publish_doctree(
        "\n".join(book_site.to_rst(docstring.splitlines())), settings_overrides=strict
    )


def test_a_docstring_parses_without_a_warning_and_keeps_its_text():
    tree = parse(DOCSTRING)
    text = " ".join(tree.astext().split())
    assert "Estimate |d| for [*shape, T] with r_ and kind." in text
    assert "equation eq:one, equation eq:two Plain words." in text
    assert "[T], and what follows on the next line." in text
    assert "ValueError on |bad| input." in text
    fields = [
        node.children[0].astext() for node in tree.findall(lambda node: node.tagname == "field")
    ]
    assert fields == ["Equation", "Args", "Returns", "Raises"]
    items = [
        " ".join(node.astext().split())
        for node in tree.findall(lambda node: node.tagname == "list_item")
    ]
    assert items == [
        "log_probs, ref_log_probs: [..., T], nats, which is a long story.",
        'kind: "k1" or "k2".',
    ]


def test_the_build_day_can_be_fixed():
    code = textwrap.dedent("""
        import types, book_site
        config = types.SimpleNamespace(html_theme_options={})
        book_site.add_footer(None, config)
        print(config.html_theme_options["extra_footer"])
    """)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "book" / "_ext",
        capture_output=True,
        text=True,
        env={"SOURCE_DATE_EPOCH": "0", "PATH": ""},
        check=True,
    )
    assert "built 1970-01-01" in run.stdout


SITE = "https://some-one.github.io/a-book/"


def linked(address):
    """What becomes of a link on the page notebooks/one, in a book with book/index and
    notebooks/two."""
    link = nodes.reference("", "words", refuri=address)
    document = nodes.paragraph("", "", link)
    app = SimpleNamespace(
        config=SimpleNamespace(html_baseurl=SITE),
        env=SimpleNamespace(found_docs={"book/index", "notebooks/two"}),
        builder=SimpleNamespace(get_relative_uri=lambda _, name: f"../{name}.html"),
    )
    book_site.link_within_the_site(app, document, "notebooks/one")
    return link["refuri"]


def test_a_link_to_a_page_of_the_site_stays_within_it():
    assert linked(f"{SITE}book/index.html") == "../book/index.html"
    assert linked(f"{SITE}book/index.html#terms") == "../book/index.html#terms"


def test_other_links_stay_as_they_are():
    for address in (f"{SITE}gone.html", "https://e.org/book/index.html", "#here", SITE):
        assert linked(address) == address
