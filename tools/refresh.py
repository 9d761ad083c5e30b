"""Execute notebooks in place and store their outputs.  usage: [RECORD=1] refresh.py [bandit ...]

Without names, every notebook. With RECORD=1 time and memory are recorded too: on a busy machine
they would mislead. Outputs are stored at scale tiny only; at another scale there is nothing to do
without RECORD=1.
"""

import json
import os
import re
import sys

import fold
import nbrun

MEASURED = nbrun.ROOT / "rlhf_helpers" / "assets" / "measured.json"
# Each rung is at most 1.5 times the one below, so a rung above the headroom is never far above the
# measured value.
SECONDS = [10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 600, 900, 1200]
# A measured time in a sentence: a number and its unit.
TIMES = re.compile(r"\d[\d,.]*(?= (?:CPU )?s\b)")
MEBIBYTES = [400, 600, 800, 1200, 1600, 2400, 3200, 4800, 6400, 9600, 12800, 16000, 24000]


def rung(measured, stored, ladder):
    """The stored value as long as it still describes what was measured; else the first rung with
    room to spare.

    Two runs of one notebook differ by tens of per cent; without this play each refresh would change
    the file.
    """
    if stored is not None and 0.4 * stored < measured <= stored:
        return stored
    return next((step for step in ladder if step >= 1.4 * measured), ladder[-1])


def device_name():
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()}-core CPU"


def record(name, scale, seconds, mebibytes, path):
    """Write the measurement; return whether the file changed."""
    table = json.loads(path.read_text()) if path.exists() else {}
    old = table.get(name, {}).get(scale, {})
    if old.get("device") != device_name():
        old = {}
    new = {
        "seconds": rung(seconds, old.get("seconds"), SECONDS),
        "memory_mib": rung(mebibytes, old.get("memory_mib"), MEBIBYTES),
        "device": device_name(),
    }
    if new == old:
        return False
    table.setdefault(name, {})[scale] = new
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return True


def without_times(text):
    return TIMES.sub("…", text)


def keep_times(new, old):
    """Where a cell's output differs from the stored one in measured seconds alone, keep that."""
    stored = {cell.id: cell for cell in old.cells if cell.cell_type == "code"}
    for cell in new.cells:
        before = stored.get(cell.id)
        if cell.cell_type != "code" or before is None or before.source != cell.source:
            continue
        now, then = (json.dumps(one.outputs, sort_keys=True) for one in (cell, before))
        if now != then and without_times(now) == without_times(then):
            cell.outputs = before.outputs


def refresh(path, scale, recording=False, measured=MEASURED):
    nb, seconds, mebibytes = nbrun.execute(path)
    if recording and record(path.stem, scale, seconds, mebibytes, measured):
        # The set-up cell prints the recorded values, so the stored output has to be made again.
        nb, _, _ = nbrun.execute(path)
    if scale == "tiny":
        fold.fold(nb)
        if not recording:
            keep_times(nb, nbrun.read(path))
        nbrun.write(nbrun.normalise(nb), path)
    print(f"{path.stem}: {seconds:.1f} s, {mebibytes:.0f} MiB", flush=True)


def main(names):
    scale = os.environ.setdefault("RLHF_SCALE", "tiny")
    for path in nbrun.chosen(names):
        refresh(path, scale, recording=bool(os.environ.get("RECORD")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
