"""Build book/api.md: every public module of the package under the section it belongs to.

A new module shows up by itself; one that no section takes is an error.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Functions of the package

The chapters print these functions as they go; this page lists them all, with their arguments,
shapes and errors. Tensors go in and tensors come out. In every mask, 1 or `True` means that the
entry counts. Losses are scalars to minimise, and log-probabilities are in {term}`nats <nat>`. Bad
input raises a `ValueError` that names the argument.

The line *Equation* of an entry leads to the formula it computes; the [table of
equations](equations.md) adds the test of each.
"""


class Section(NamedTuple):
    heading: str
    text: str
    modules: tuple[str, ...]  # names below rlhf_helpers; * stands for all that no earlier one took
    exceptions: tuple[str, ...] = ()


SECTIONS = [
    Section(
        "Log-probabilities",
        "From {term}`logits` to the log-probability of the tokens that were sampled, and means"
        " over what a mask lets through.",
        ("logprobs",),
    ),
    Section(
        "KL divergence",
        "How far one policy is from another: exactly, or estimated from samples, and a controller"
        " that holds it near a target.",
        ("kl",),
    ),
    Section(
        "Returns and advantages",
        "From rewards to the number that says how much better than expected an action was.",
        ("advantages",),
    ),
    Section(
        "Losses",
        "What is minimised: the policy gradient, PPO's clipped loss and the value loss; and the"
        " losses of comparisons, from pairs, rankings, and pairs that may tie.",
        ("losses",),
    ),
    Section(
        "Trust region",
        "The two tools that make TRPO affordable: solving a linear system without its matrix, and"
        " multiplying by a Hessian without forming it.",
        ("trust_region",),
    ),
    Section(
        "Language models",
        "Loading a model with a tokenizer that is safe to use in batches, LoRA, the frozen"
        " reference, the value head; and sampling from it.",
        ("models", "rollout", "conversations"),
    ),
    Section(
        "Worlds",
        "Where rewards come from: bandits whose best policy is known in closed form, small"
        " decision processes in which every term can be computed, a language whose every sequence"
        " can be listed, sums, and film reviews, either from a grammar that knows the probability"
        " of each or from the IMDB.",
        ("worlds", "worlds.bandits", "worlds.mdp", "worlds.enumerable", "worlds.*"),
    ),
    Section(
        "Preferences",
        "Pairs of responses and the files they are kept in, simulated annotators whose faults are"
        " known, agreement between annotators, and strengths from counts of wins.",
        ("preferences",),
    ),
    Section(
        "Rewards",
        "One number for each completion: rules, a lexicon, a classifier from the hub. TRL's"
        " trainers take the same functions.",
        ("rewards",),
    ),
    Section(
        "Algorithms",
        "The loops of the chapters: what is sampled, what is updated, what is reported after each"
        " iteration.",
        (
            "algorithms.reinforce",
            "algorithms.action_values",
            "algorithms.contextual_bandit",
            "algorithms.sft",
            "algorithms.reward_model",
            "algorithms.ppo",
            "algorithms.*",
        ),
        ("algorithms.ppo.TrainingStopped",),
    ),
    Section(
        "Costs",
        "Bytes and operations of a step, counted from the shape of the model and of the batch.",
        ("costs",),
    ),
    Section(
        "Scaling out",
        "The same data and reward functions in TRL's trainers, for one process or many.",
        ("scale_out",),
    ),
    Section("Checkpoints", "Files that a run goes on from after it was killed.", ("checkpoint",)),
    Section("Settings", "The scales, and what the notebooks of one scale share.", ("settings",)),
    Section(
        "Helpers of the notebooks",
        "What only the chapters need: the set-up line, generated sentences and tables, the checks"
        " of the exercises, the figures, the printing of source code, what one chapter makes for a"
        " later one, and the panel for labelling pairs.",
        ("book.notebook", "book.plots", "book.source", "book.shipped", "book.*", "book.checks.*"),
    ),
]


def modules(root=ROOT):
    """Names of the public modules with something in them, below rlhf_helpers."""
    package = root / "rlhf_helpers"
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts = parts[:-1]
            # a package that only gathers names has nothing of its own to show
            if "\ndef " not in path.read_text(encoding="utf-8"):
                continue
        if parts and not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def sorted_into_sections(names):
    """Pairs (section, its modules).

    Raises: ValueError on a module that no section takes.
    """
    left, found = list(names), []
    for section in SECTIONS:
        mine = []
        for wanted in section.modules:
            folder, _, last = wanted.rpartition(".")
            taken = [
                n for n in left if n == wanted or (last == "*" and n.rpartition(".")[0] == folder)
            ]
            mine += taken
            left = [name for name in left if name not in taken]
        found.append((section, mine))
    if left:
        raise ValueError(f"no section of tools/build_api.py takes {', '.join(left)}; add it to one")
    return found


def build(root=ROOT):
    parts = [HEADER]
    for section, names in sorted_into_sections(modules(root)):
        entries = [
            f".. automodule:: rlhf_helpers.{name}\n   :members:\n   :member-order: bysource\n"
            for name in names
        ]
        entries += [f".. autoexception:: rlhf_helpers.{name}\n" for name in section.exceptions]
        body = "\n".join(entries)
        parts.append(f"## {section.heading}\n\n{section.text}\n\n```{{eval-rst}}\n{body}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "book" / "api.md").write_text(build(), encoding="utf-8", newline="\n")
