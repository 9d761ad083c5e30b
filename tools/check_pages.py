"""Check built pages against their sources.  usage: check_pages.py SOURCE_FOLDER HTML_FOLDER

Each page of _toc.yml exists and holds its outputs and its maths; no internal link, anchor, image,
style or script is broken; nothing is loaded from another host.
"""

import base64
import hashlib
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import contents
import nbformat
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

ELSEWHERE = re.compile(r"(?:https?:)?//", re.I)
LOADED = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "embed": ["src"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "object": ["data"],
    "track": ["src"],
    "input": ["src"],
}
# Links that a browser fetches by itself, unlike rel=canonical or rel=next.
FETCHED_LINKS = {
    "stylesheet",
    "icon",
    "shortcut",
    "preload",
    "modulepreload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "manifest",
    "apple-touch-icon",
    "mask-icon",
}
MARKDOWN = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)


def letters(text):
    """What is left when markup, spacing and typographic quotes no longer matter."""
    return "".join(re.findall(r"[^\W_]+", text))


def read_html(root):
    pages = (
        page
        for page in sorted(root.rglob("*.html"))
        if "_static" not in page.relative_to(root).parts
    )
    return {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages}


# --- what a page must hold -----------------------------------------------------------------------


def markdown_texts(source):
    """The plain words of a Markdown text, piece by piece, without its formulas."""
    for token in MARKDOWN.parse(source):
        for child in token.children or []:
            if child.type in ("text", "code_inline"):
                yield child.content


def output_texts(output):
    """The texts an output shows on the page: of several formats the one the page prefers."""
    if output.output_type == "stream":
        return [re.sub(r"\x1b\[[\d;]*m", "", output.text)]
    if output.output_type == "error":
        return [output.evalue]
    data = output.get("data", {})
    if "text/html" in data:
        return [BeautifulSoup(data["text/html"], "html.parser").get_text(" ")]
    if any(kind.startswith("image/") for kind in data):
        return []
    if "text/markdown" in data:
        return list(markdown_texts(data["text/markdown"]))
    return [data.get("text/plain", "")]


def missing_outputs(notebook, html):
    page, words = (
        {Path(image["src"]).name for image in html.find_all("img")},
        letters(html.get_text(" ")),
    )
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or {"remove-output", "remove-cell"} & set(
            cell.metadata.get("tags", [])
        ):
            continue
        for output in cell.outputs:
            png = output.get("data", {}).get("image/png")
            # The builder names a figure by the digest of its bytes, so this finds a figure of an
            # earlier run too.
            if png and f"{hashlib.sha256(base64.b64decode(png)).hexdigest()}.png" not in page:
                yield f"the figure of cell {number} is not on the page"
            for text in output_texts(output):
                if letters(text) not in words:
                    yield f"the output of cell {number} is not on the page: {text.strip()[:60]!r}"


def missing_tables(notebook, html):
    """Tables that prose or outputs write in Markdown and the page shows as text."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in notebook.cells:
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        texts += [one["text/markdown"] for one in data if "text/markdown" in one]
    wanted = sum(token.type == "table_open" for text in texts for token in MARKDOWN.parse(text))
    shown = len(html.select("table"))
    if shown < wanted:
        yield f"{wanted} tables in the notebook, {shown} on the page"


def missing_maths(sources, html):
    tokens = [token for source in sources for token in MARKDOWN.parse(source)]
    inline = sum(child.type == "math_inline" for token in tokens for child in token.children or [])
    blocks = [token for token in tokens if token.type in ("math_block", "math_block_label")]
    shown = len(html.select("div.math")), len(html.select("span.math"))
    if shown[0] < len(blocks) or shown[1] < inline:
        wanted = f"{len(blocks)} displayed and {inline} inline formulas in the source"
        yield f"{wanted}, {shown[0]} and {shown[1]} on the page"
    for token in blocks:
        if token.info and not html.find(
            id=f"equation-{re.sub('[^a-z0-9]+', '-', token.info.lower())}"
        ):
            yield f"the equation {token.info} is not on the page"
    if (blocks or inline) and not html.find("script", src=re.compile("mathjax")):
        yield "formulas, but no script to typeset them"


def check_page(name, source_root, html_root, html):
    """Problems of one page of the table of contents."""
    source = contents.source(name, source_root)
    if source is None:
        return [f"{name} has no source"]
    page = html.get(html_root / f"{name}.html")
    if page is None:
        return [f"{name}.html was not built"]
    if source.suffix == ".md":
        return list(missing_maths([source.read_text(encoding="utf-8")], page))
    notebook = nbformat.read(source, as_version=4)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [
        *missing_maths(prose, page),
        *missing_outputs(notebook, page),
        *missing_tables(notebook, page),
    ]


# --- links and loads -----------------------------------------------------------------------------


def broken_target(page, target, html):
    """Why an address on a page leads nowhere, or None."""
    if ELSEWHERE.match(target) or re.match(r"(mailto|data|javascript):", target):
        return None
    path, anchor = urldefrag(target)
    goal = (page.parent / unquote(path.split("?")[0])).resolve() if path else page
    if not goal.exists():
        return f"leads to no file: {target}"
    if anchor and goal in html and not html[goal].find(id=unquote(anchor)):
        return f"leads to no anchor: {target}"
    return None


def loads(html):
    """Every address that a browser fetches by itself for this page, apart from what its style
    sheets name."""
    for tag, attributes in LOADED.items():
        for element in html.find_all(tag):
            for attribute in attributes:
                for part in (element.get(attribute) or "").split(","):
                    if part.strip() and not part.strip().startswith("data:"):
                        yield part.split()[0]
    for link in html.find_all("link", href=True):
        if FETCHED_LINKS & set(link.get("rel", [])):
            yield link["href"]


def style_loads(text):
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(
        r"@import\s+['\"]([^'\"]+)", text
    )
    return [address.strip() for address in found if not address.startswith(("data:", "#"))]


def check_style(address, page):
    """Problems of one style sheet that a page uses, and of what the sheet names in turn."""
    sheet = (page.parent / unquote(urldefrag(address)[0].split("?")[0])).resolve()
    if not sheet.exists():
        return
    for inner in style_loads(sheet.read_text(encoding="utf-8")):
        if ELSEWHERE.match(inner):
            yield f"{sheet.name} loads from another host: {inner}"
        elif not (sheet.parent / urldefrag(inner)[0].split("?")[0]).exists():
            yield f"{sheet.name} names no file: {inner}"


def check_loads(page, html):
    soup = html[page]
    inline = " ".join(style.get_text() for style in soup.find_all("style"))
    inline += " ".join(element["style"] for element in soup.find_all(style=True))
    for address in [*loads(soup), *style_loads(inline)]:
        if ELSEWHERE.match(address):
            yield f"loads from another host: {address}"
        elif broken_target(page, address, html):
            yield f"loads a file that is not there: {address}"
    for link in soup.find_all("link", rel="stylesheet", href=True):
        if not ELSEWHERE.match(link["href"]):
            yield from check_style(link["href"], page)


def leads_and_loads(page, html):
    """Why links of a page lead nowhere, and what it loads that is not there or from elsewhere."""
    targets = dict.fromkeys(link["href"] for link in html[page].find_all("a", href=True))
    broken = [problem for target in targets if (problem := broken_target(page, target, html))]
    return [*broken, *check_loads(page, html)]


def check_one(name, source_root, html_root):
    """Every problem of one built page; anchors on other pages are not looked up."""
    html_root = Path(html_root).resolve()
    page = html_root / f"{name}.html"
    if not page.exists():
        return [f"{name}.html was not built"]
    html = {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")}
    return check_page(name, Path(source_root), html_root, html) + leads_and_loads(page, html)


def check(source_root, html_root):
    """Every problem of the built pages, one line each."""
    html_root = Path(html_root).resolve()
    html = read_html(html_root)
    found = [
        f"{name}: {problem}"
        for name in contents.pages(contents.contents(source_root))
        for problem in check_page(name, Path(source_root), html_root, html)
    ]
    found += [
        f"{page.relative_to(html_root)}: {problem}"
        for page in html
        for problem in leads_and_loads(page, html)
    ]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    problems = check(*sys.argv[1:])
    print(*problems, f"{len(problems)} problems on the pages", sep="\n")
    sys.exit(bool(problems))
