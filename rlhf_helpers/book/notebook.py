"""The first, the last and the spoken cells of a notebook."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import torch
from IPython import get_ipython
from IPython.display import SVG, Markdown, display

from rlhf_helpers import settings
from rlhf_helpers._validate import check_list, check_text, has, in_range, one_of
from rlhf_helpers.book import plots

# What could begin or end something in Markdown, MyST, HTML or a formula, wherever it stands; a
# colon and a dot only where they make an address; and what means something where a line begins.
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>$|~&#@]|:(?=//)|(?<=\w)\.(?=\w)")
_FIRST = re.compile(r"^(?:[-+=:%]|\((?=.*\)=)|\d+[.)])")


def setup(chapter: str, scale: str | None = None) -> settings.Settings:
    """Prepare a notebook: figures in its cells, their style, quiet warnings; prints scale, device,
    and recorded time and memory.

    Args:
        chapter: the notebook's name without ending, e.g. "bandit".
        scale: "tiny" or "gpt2"; None takes the environment variable RLHF_SCALE, or else "tiny".
    Returns: the settings of the scale in use.
    Raises: ValueError on an unknown scale.
    """
    if scale is not None:
        one_of(scale, settings.SCALES, "scale")
        os.environ["RLHF_SCALE"] = scale
    chosen = settings.load()
    _quiet()
    # tensors here are small: a second thread costs more than it brings, and can change the last
    # digits
    torch.set_num_threads(1)
    shell = get_ipython()
    if hasattr(shell, "kernel"):
        # where MPLBACKEND is set (containers), the kernel leaves figures to that, and none is seen
        shell.run_line_magic("matplotlib", "inline")
    plots.use_style()
    if shell is not None:
        shell.run_line_magic("config", "InlineBackend.figure_format = 'retina'")
    print(f"scale {chosen.scale} · device {chosen.device} · {recorded(chapter, chosen.scale)}")
    return chosen


def _quiet() -> None:
    """No progress bars and no advice from the libraries: what a cell prints is compared letter by
    letter."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    if "transformers" in sys.modules:
        from datasets import disable_progress_bars
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        disable_progress_bars()


def recorded(chapter: str, scale: str) -> str:
    """What a run of this chapter was measured to need at this scale, in words."""
    check_text(chapter, "chapter")
    one_of(scale, settings.SCALES, "scale")
    text = (
        resources.files("rlhf_helpers").joinpath("assets/measured.json").read_text(encoding="utf-8")
    )
    one = json.loads(text).get(chapter, {}).get(scale)
    if one is None:
        return "time and memory not yet measured"
    return f"a run takes up to {one['seconds']} s and {one['memory_mib']} MiB on a {one['device']}"


def recorded_sweep(chapter: str, run: settings.Settings) -> dict | None:
    """What `make results` recorded for this chapter; None at a scale that it was not recorded
    at.

    Raises: ValueError on a chapter without recorded results, at the scale that has them.
    """
    has(run, "run", "the settings, as setup returns them", "scale")
    if run.scale != "tiny":
        return None
    folder = resources.files("rlhf_helpers").joinpath("assets/results")
    one_of(chapter, sorted(Path(one.name).stem for one in folder.iterdir()), "chapter")
    path = folder.joinpath(f"{chapter}.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def record_sweep(chapter: str, started: float, asked: dict, results: dict) -> None:
    """Store what `recorded_sweep` reads.

    Args:
        chapter: the notebook's name without ending.
        started: `time.perf_counter()` at the beginning.
        asked: what the sweep depends on besides its seeds; a test holds it to the code.
        results: numbers, texts, lists and dictionaries.
    """
    torch_version = torch.__version__.split("+")[0]
    record = {
        "command": f"make results CHAPTER={chapter}",
        "machine": (
            f"{os.cpu_count()} cores, {platform.machine()}, torch {torch_version}, one thread"
        ),
        "seconds": round(time.perf_counter() - started),
        "settings": asked,
        "results": results,
    }
    path = Path(__file__).parents[1] / "assets" / "results" / f"{chapter}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def say(sentence: str) -> None:
    """Display a sentence that carries numbers of this run, as Markdown."""
    check_text(sentence, "sentence")
    display(Markdown(sentence))


def drawing(name: str) -> None:
    """Display a drawing that ships with the package, so that it is there wherever a notebook is
    opened alone.

    Args:
        name: of a file in `assets/drawings`, without ending.
    Raises: ValueError on an unknown name, with the list of known ones.
    """
    folder = resources.files("rlhf_helpers").joinpath("assets/drawings")
    known = sorted(Path(one.name).stem for one in folder.iterdir())
    one_of(name, known, "name")
    display(SVG(folder.joinpath(f"{name}.svg").read_text(encoding="utf-8")))


def table(rows: Iterable[Sequence[object]], columns: Sequence[str], title: str = "") -> None:
    """Display a table as Markdown.

    Args:
        rows: each with one cell for each column; a cell is shown as `str` gives it, on one line.
        columns: the names above them; "" leaves one empty.
        title: a sentence above the table; "" for none.
    Raises: ValueError on a row of another length.
    """
    check_list(columns, "columns")
    check_text(title, "title")
    lines = [_row(columns), "|" + "---|" * len(columns)]
    has(rows, "rows", "a list of rows", "__iter__")
    for index, row in enumerate(rows):
        check_list(row, f"rows[{index}]")
        if len(row) != len(columns):
            raise ValueError(f"rows[{index}] has {len(row)} cells for {len(columns)} columns")
        lines.append(_row(row))
    say((title and title + "\n\n") + "\n".join(lines) + "\n")


def _check_claim(row: tuple, name: str) -> None:
    if not isinstance(row, tuple | list) or len(row) != 4:
        raise TypeError(f"{name} is {row!r}; pass (claim, value, low, high)")
    check_text(row[0], f"{name}: claim")
    for part, number in zip(("value", "low", "high"), row[1:], strict=True):
        if number is not None or part != "value":
            has(number, f"{name}: {part}", "a number", "__float__")


def _row(cells: Sequence[object]) -> str:
    texts = (" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"


def literal(text: str) -> str:
    """Any text as Markdown that shows it letter by letter, on one line.

    What a model or a data set wrote may hold what Markdown, MyST, HTML or a formula would take as
    their own: `<script>`, a role that copies a file, two dollar signs. Every text that nobody here
    wrote goes through this, or through `brief` or `code`, before `say` or `table` shows it.
    """
    check_text(text, "text")
    line = " ".join(text.split())
    line = _SPECIAL.sub(_entity, line)
    # of a number that would begin a list, only its dot
    return _FIRST.sub(lambda found: found[0][:-1] + _entity(found), line)


def _entity(found: re.Match) -> str:
    return f"&#{ord(found[0][-1])};"


def brief(text: str, length: int = 160) -> str:
    """The beginning of a text, as `literal` shows it, so that it fits into the cell of a table."""
    check_text(text, "text")
    in_range(length, "length", 0)
    return literal(" ".join(text.split())[:length])


def code(text: str) -> str:
    """Any text as a code span, letter by letter, on one line."""
    check_text(text, "text")
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in (line[:1], line[-1:]) else ""
    return f"{fence}{space}{line}{space}{fence}" if line else ""


def claims(*rows: tuple[str, float | None, float, float]) -> None:
    """Print each claim with this run's number and the band it must lie in.

    At scale tiny a number outside its band is an error, so that a claim that stops being true
    stops the notebook. The
    bands belong to that scale: at any other they are printed and nothing is raised.

    Args:
        rows: (claim, value, low, high), low and high included. None for a value that this scale
            does not measure: that is printed, and neither holds nor fails.
    Raises: AssertionError at scale tiny, naming the claims that failed.
    """
    failed = []
    for index, row in enumerate(rows):
        _check_claim(row, f"rows[{index}]")
        claim, value, low, high = row
        if value is None:
            print(f"– {claim}: not measured at this scale")
            continue
        holds = low <= float(value) <= high
        print(f"{'✓' if holds else '✗'} {claim}: {float(value):.3g} (band {low:g} to {high:g})")
        if not holds:
            failed.append(claim)
    if failed and settings.load().scale == "tiny":
        raise AssertionError("this run does not show: " + "; ".join(failed))
