"""Build book/errors.md, the page of famous bugs: from `experiments.bugs`, what they are, and
`experiments.errors`, what they do to a run."""

import inspect
import json
import sys
from pathlib import Path

import contents

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # a script sees its own folder alone

from experiments.bugs import BUGS  # noqa: E402

HEADER = """# Famous bugs

**What does it do to a run, how would you notice, and which test catches it?**

Each bug on this page has been made by somebody who knew what they were doing, and most of them
crash nothing. For each you see the wrong and the right lines, one number of a run with the bug and
of the same run without it, the diagnostic that gives it away, and the test that watches the same
place in this book's package. All wrong lines here are run: a test asserts that each fails a check
of its own and that the right ones pass. The numbers come from small runs that take seconds. They
show that the bug does harm and in which direction; they are no measure of how much it would do to
your model. Symptoms are words to search by: not every one of them was produced here.

## What do you see?

| symptom | it may be |
|---|---|
"""
NO_BUG = """
## It looks like a bug and is none

| what you see | why it is right |
|---|---|
"""
RIGHT = [
    (
        "GRPO's loss is 0",
        "the advantages of a group add up to 0, and in the first pass every ratio is 1; the"
        " gradient is not 0. [GRPO](../notebooks/grpo.ipynb)",
    ),
    (
        "DPO makes the chosen response *less* likely",
        "the loss sees the difference of two log-ratios, and both may fall."
        " [DPO](../notebooks/dpo_derivation.ipynb)",
    ),
    (
        "the KL of one batch is negative",
        "the mean of log-ratios over few samples can be; its mean over many cannot."
        " [KL, entropy and the critic](../notebooks/kl_and_critics.ipynb)",
    ),
    (
        "the KL of the first iteration is exactly 0",
        "policy and reference are still the same model; from the second on it must not be",
    ),
    (
        "the entropy falls while the reward rises",
        "whoever knows better is less undecided; it is an alarm only when it falls to 0",
    ),
    (
        "the loss of PPO does not fall",
        "it is another function after each batch; look at the reward, the KL and the texts",
    ),
]
LEVELS = {
    3: "Nothing looks wrong for a whole run",
    2: "You see it if you look",
    1: "You see it in the first minutes",
}


def code(function):
    """A function's lines without the word in its name that gives it away."""
    given_away = f"def {function.__name__}("
    return inspect.getsource(function).rstrip().replace(given_away, f"def {name(function)}(")


def name(function):
    return function.__name__.split("_", 1)[1]


def number(value):
    return f"{value:.3g}".replace("-", "−")


def entry(bug, harm, titles):
    chapter = f"[{titles[bug.chapter]}](../notebooks/{bug.chapter}.ipynb)"
    return f"""
({bug.name})=
### {bug.title}

Symptoms: {"; ".join(bug.symptoms)}. The chapter: {chapter}.

Wrong:

```python
{code(bug.wrong)}
```

Right:

```python
{code(bug.right)}
```

| what it does | with the bug | without |
|---|---|---|
| {harm["what"]} | {number(harm["wrong"])} | {number(harm["right"])} |

What shows it: {bug.shows}.

The test that watches this place: `{bug.test}`.
"""


def symptoms():
    """One row per symptom, in alphabetical order: the bugs that show it."""
    found = {}
    for bug in BUGS:
        for symptom in bug.symptoms:
            found.setdefault(symptom, []).append(f"{{ref}}`{bug.name}`")
    return [f"| {symptom} | {'; '.join(links)} |" for symptom, links in sorted(found.items())]


def build(root=ROOT):
    record = root / "rlhf_helpers" / "assets" / "results" / "errors.json"
    harms = json.loads(record.read_text(encoding="utf-8"))["results"]
    titles = {path.stem: contents.title(path) for path in contents.notebooks(root)}
    no_bugs = [f"| {seen} | {why} |" for seen, why in RIGHT]
    parts = [HEADER, "\n".join(symptoms()), "\n", NO_BUG, "\n".join(no_bugs), "\n"]
    for level, heading in LEVELS.items():
        parts.append(f"\n## {heading}\n")
        parts += [entry(bug, harms[bug.name], titles) for bug in BUGS if bug.hidden == level]
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "book" / "errors.md").write_text(build(), encoding="utf-8")
