"""The pages built from the stored outputs: no warning, nothing missing, nothing broken, nothing
from elsewhere."""

import subprocess

import build_api
import build_equations
import build_errors
import build_status
import build_which_method
import check_pages
import nbrun
import pytest

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def html():
    run = subprocess.run(["make", "html"], cwd=nbrun.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return nbrun.ROOT / "_build" / "html"


def test_the_built_pages_hold_what_they_must(html):
    assert check_pages.check(nbrun.ROOT, html) == []


def test_the_footer_names_version_and_day(html):
    from rlhf_helpers import __version__

    assert f"Version {__version__}, built 20" in (html / "book" / "index.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "builder",
    [build_api, build_equations, build_errors, build_status, build_which_method],
    ids=["api", "equations", "errors", "status", "which_method"],
)
def test_the_built_sources_are_current(builder):
    name = builder.__name__.removeprefix("build_")
    stored = (nbrun.ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
    assert stored == builder.build(), f"book/{name}.md is out of date: run `make tables`"
