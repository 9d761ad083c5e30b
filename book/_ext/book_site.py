"""What the site needs beyond its configuration: the footer line, and docstrings written as plain
text."""

import re
from importlib.metadata import version

from docutils import nodes
from sphinx.util.i18n import format_date

FIELD = re.compile(r"(Args|Attributes|Equation|Raises|Returns|Source|Yields):\s*(.*)")


def add_footer(app, config):
    # format_date takes the day from SOURCE_DATE_EPOCH where it is set, so a build can be repeated
    # byte for byte.
    config.release = version("rlhf_helpers")
    built = format_date("%Y-%m-%d", language="en")
    licence = "Code under the MIT licence, prose under CC BY 4.0."
    config.html_theme_options["extra_footer"] = (
        f"<p>Version {config.release}, built {built}. {licence}</p>"
    )


def escape(text):
    text = re.sub(r"([*|\\])", r"\\\1", text)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text)
    return re.sub(r"_(?=\W|$)", r"\_", text)


def to_rst(lines):
    """Docstrings are read in a terminal first, so |d| and [*shape] stand unescaped there, and
    fields follow each other without blank lines. Here they become reStructuredText: a field list,
    with each argument an item."""
    result, in_fields, in_items = [], False, False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        field = FIELD.match(text) if indent == 0 else None
        item = re.match(r"([\w, *]+):\s+(.*)", text) if in_items and indent == 4 else None
        if field:
            body = (
                re.sub(r"eq:[\w-]+", r":eq:`\g<0>`", text)
                if field[1] == "Equation"
                else escape(text)
            )
            result += ([] if in_fields else [""]) + [f":{body}"]
            in_fields, in_items = True, field[1] in ("Args", "Attributes")
        elif item:
            result += ["", f"    - ``{item[1]}``: {escape(item[2])}"]
        elif in_fields and text and indent:
            result.append(("      " if in_items else "    ") + escape(text))
        else:
            in_fields = in_fields and not text
            result += [" " * indent + escape(text)]
    return [*result, ""]


def rewrite_docstring(app, what, name, obj, options, lines):
    lines[:] = to_rst(lines)


def link_within_the_site(app, doctree, docname):
    """Notebooks link prose pages by their address on the site, which Colab can follow; on the site
    itself, and offline, that is a page beside this one."""
    site = app.config.html_baseurl
    for link in doctree.findall(nodes.reference):
        address, _, anchor = link.get("refuri", "").partition("#")
        name = address.removeprefix(site).removesuffix(".html")
        if address.startswith(site) and name in app.env.found_docs:
            target = app.builder.get_relative_uri(docname, name)
            link["refuri"] = f"{target}#{anchor}" if anchor else target
            link["internal"] = True


def setup(app):
    app.connect("config-inited", add_footer)
    app.connect("autodoc-process-docstring", rewrite_docstring)
    app.connect("doctree-resolved", link_within_the_site)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
