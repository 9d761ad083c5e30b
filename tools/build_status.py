"""Build book/status.md: what each notebook needs, and how much of its output the tests compare."""

import json
from pathlib import Path

import contents

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Status of the notebooks

Recorded by `make refresh RECORD=1` at scale tiny: time and peak memory are rounded up to a coarse
step, so a run should stay below them. A cell is compared when the tests execute it again and hold
its text to what is stored; the others print values that move with the processor, and their claims
are checked in bands at the end of the chapter.

| Notebook | Time | Memory | Device | Code cells compared |
|---|---|---|---|---|
"""


def compared(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    skipped = {"nbval-ignore-output", "nbval-skip"}
    strict = [cell for cell in code if not skipped & set(cell["metadata"].get("tags", []))]
    return f"{len(strict)} of {len(code)}"


def table_row(path, measured):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    run = measured.get(path.stem, {}).get("tiny")
    cost = (
        f"{run['seconds']} s | {run['memory_mib']} MiB | {run['device']}"
        if run
        else "not yet measured | |"
    )
    return f"| [{contents.title(path)}](../notebooks/{path.name}) | {cost} | {compared(cells)} |"


def build(root=ROOT):
    recorded = root / "rlhf_helpers" / "assets" / "measured.json"
    measured = json.loads(recorded.read_text()) if recorded.exists() else {}
    rows = [table_row(path, measured) for path in contents.notebooks(root)]
    return HEADER + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "book" / "status.md").write_text(build(), encoding="utf-8")
