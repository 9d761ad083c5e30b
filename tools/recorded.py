"""Whether recorded results still belong to the code: every setting that was recorded must be what
the code has now.

A setting that the record does not know is new, and no difference: its default left the old runs as
they were.
"""

import importlib
import json
from pathlib import Path

from rlhf_helpers import settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "rlhf_helpers" / "assets" / "results"


def differences(recorded, now, name=""):
    """One sentence for each recorded setting that the code has otherwise or no more."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        found = []
        for key, value in recorded.items():
            place = f"{name}.{key}" if name else key
            if key in now:
                found += differences(value, now[key], place)
            else:
                found.append(f"{place} was recorded as {value!r}; the code has no such setting")
        return found
    if recorded == now:
        return []
    return [f"{name} was recorded as {recorded!r}; the code has {now!r}"]


def problems(chapter):
    """What stands between the record of a chapter and the code, at scale tiny."""
    script = importlib.import_module(f"experiments.{chapter}")
    recorded = json.loads((FOLDER / f"{chapter}.json").read_text(encoding="utf-8"))["settings"]
    # tuples and the like become what a file can hold
    now = json.loads(json.dumps(script.settings_of(settings.load())))
    return differences(recorded, now)
