"""Build book/which_method.md: a decision on top, and below it what the recorded runs say."""

import json
from pathlib import Path

import contents
import numpy as np
from scipy import stats

from rlhf_helpers.algorithms import best_of_n

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Which method when

**You have some kind of feedback and some amount of computing. Which method do you start with?**

## Decide

Go down the list and stop at the first line that describes what you have.

1. **A program that tells right from wrong** (a test suite, a solved exercise, a rule that cannot be
   argued with). First sample a few hundred answers and look at pass@k. If the model is never right,
   no method here helps: write demonstrations. If it is right sometimes, begin with *rejection
   sampling and fine-tuning*, the simplest loop there is; then {grpo}, without a price on KL if you
   trust the checker. Read what it pays for.
2. **A judge that scores any text**, such as a reward model or a larger model with instructions.
   Measure *best of n* first: it trains nothing, and it tells you what the judge likes before a
   policy has learned to please it. Then {gpt2_sentiment_ppo}, or REINFORCE with the mean of the
   prompt's other samples as baseline, each with a price on KL. Take the value model only if answers
   are long and parts of them can be told apart.
3. **Comparisons of two responses.** If you cannot sample during training: {dpo_derivation},
   offline, and stop early when pairs are few. If you can: fit a reward model
   ({reward_model}) and go to line 2, or run DPO online against it.
4. **Thumbs up or down on single responses.** A loss for unpaired labels (KTO, in
   {dpo_derivation}), or a classifier trained on them as the judge of line 2.
5. **Good answers written by people.** {sft_lora}. It comes before all of the above, too: every
   other method needs a model that is sometimes right.
6. **None of these.** Then you have no feedback yet. Twenty pairs labelled by yourself are a
   beginning.

Two questions more decide about the rest:

| question | if not | if so |
|---|---|---|
| Can you sample often? | offline DPO, fine-tuning on the best samples | online DPO, PPO, GRPO |
| Does memory hold a second model? | an adapter; without it, the model is its reference | a copy |

"""
REVIEWS = """## Evidence: a judge of film reviews

All rows start from the same tiny model and are measured on the same 64 held-out prompts. The reward
is the learned one; the true quality is what the world says, which no method sees. Values are means
over seeds with 95 % intervals. The judge was fitted to 2,000 comparisons.

"""
HEDGES = """
## What these tables do not say

- One tiny model, two small worlds, short answers with the reward at the end. Nothing here ranks the
  methods in general.
- In the first table settings were found by searches of a few values per method; in the second each
  method ran with one.
- Memory and time of a large model are counted in {scaling_out}; the seconds here are those of
  105,000 and 1.2 million parameters on one core.
- A value model is expected to pay where answers are long. No run of this book shows it.
- Both tables measure what was trained for. What a method unlearns on the way stands in its chapter.
"""


def results(chapter, root=ROOT):
    path = root / "rlhf_helpers" / "assets" / "results" / f"{chapter}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def spread(values):
    """Mean and half-width of the 95 % Student interval."""
    values = np.asarray(values, dtype=float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), half


def told(values, digits=2, percent=False):
    scale, unit = (100, " %") if percent else (1, "")
    if len(values) < 3:
        return f"{scale * np.mean(values):.{digits}f}{unit}, no interval".replace("-", "−")
    mean, half = spread(values)
    return f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}{unit}".replace("-", "−")


def gap(first, second, digits=2, percent=False):
    """Difference of runs with the same seeds, with its own 95 % interval."""
    count = min(len(first), len(second))
    if count < 3:
        return ""
    mean, half = spread(np.subtract(first[:count], second[:count]))
    scale, unit = (100, " points") if percent else (1, "")
    return f"{scale * mean:+.{digits}f} ± {scale * half:.{digits}f}{unit}".replace("-", "−")


def lines(columns, rows):
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(head + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def ends(runs, field):
    return [run["end"][field] for run in runs]


def reviews(root=ROOT):
    ppo, dpo = results("gpt2_sentiment_ppo", root), results("dpo_derivation", root)
    others, both = ppo["others"], "policy, reference"
    kinds = [
        ("DPO, offline", "comparisons", "policy", dpo["main"]),
        ("DPO on rejection-sampled pairs", "judge", "policy", dpo["rejection-sampled"]),
        ("DPO, online", "judge", both, dpo["online"]),
        (
            "REINFORCE, the others' mean as baseline",
            "judge",
            both,
            others["REINFORCE with baseline"],
        ),
        ("PPO without a value model", "judge", both, others["no value function"]),
        ("PPO", "judge", f"{both}, value", ppo["main"]),
    ]
    before, best = ppo["start"], ppo["best_of"]["16"]
    rows = [
        ["the model before", "", "", "", f"{before['quality']:.2f}".replace("-", "−"), "", "0"],
        [
            "best of 16",
            "judge",
            "policy",
            "",
            f"{best['quality']:.2f}",
            "",
            f"{best_of_n.kl_bound(16):.1f} at most",
        ],
    ]
    for name, needs, held, runs in kinds:
        quality = ends(runs, "quality")
        rest = "" if runs is ppo["main"] else gap(quality, ends(ppo["main"], "quality"))
        kl = told(ends(runs, "kl"), 1)
        rows.append([name, needs, held, len(runs), told(quality), rest, kl])
    columns = ["method", "needs", "models besides the judge", "seeds", "true quality"]
    return lines([*columns, "less PPO's", "KL, nats per response"], rows)


def sums(root=ROOT):
    found = results("grpo", root)
    kinds = [
        ("rejection sampling and fine-tuning", "policy", "rejection-sampled"),
        ("REINFORCE, the others' mean as baseline", "policy", "leave-one-out"),
        ("GRPO", "policy", "main"),
        ("PPO", "policy, value", "ppo"),
    ]
    once = {name: [run["pass"][0] for run in found[name]] for _, _, name in kinds}
    rows = [["the model before", "", "", f"{100 * found['before']['pass'][0]:.1f} %", "", ""]]
    for label, held, name in kinds:
        rest = "" if name == "main" else gap(once[name], once["main"], 1, percent=True)
        cost = f"{np.mean([run['seconds'] for run in found[name]]):.0f}"
        rows.append([label, held, len(once[name]), told(once[name], 1, True), rest, cost])
    columns = ["method", "models", "seeds", "right at the first try", "less GRPO's", "CPU seconds"]
    return lines(columns, rows)


def build(root=ROOT):
    links = {
        path.stem: f"[{contents.title(path)}](../notebooks/{path.name})"
        for path in contents.notebooks(root)
    }
    middle = f"""
## Evidence: sums that a program checks

Problems of level 3 of {links["grpo"]}; the same number of sampled answers for each method, no price
on KL.

"""
    parts = [HEADER.format(**links), REVIEWS, reviews(root), middle, sums(root)]
    return "".join(parts) + HEDGES.format(**links)


if __name__ == "__main__":
    (ROOT / "book" / "which_method.md").write_text(build(), encoding="utf-8")
