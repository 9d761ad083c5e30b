"""Record more of grpo: rlhf_helpers/assets/results/grpo_more.json.

What sampling alone reaches, what training adds to it, and when answers get longer; rewards that say
nothing; one pass and four at each one's own learning rate. With the names of some parts (before,
hard, gaps, nulls, main, reuse), these alone are made, and printed.
"""

import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import torch
from scipy import stats

from experiments.grpo import LONG, MOSTLY_HARD, config_of, curves, rate, train
from rlhf_helpers import settings
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.rollout import write
from rlhf_helpers.worlds import arithmetic

SEEDS = [0, 1, 2, 3, 4]
FEW_SEEDS = [0, 1, 2]
PROBLEMS = 200
CHUNK = 64  # samples of a problem at once
TRIES = 512  # of a hard problem, and of the untrained model twice as many
KS = [2**i for i in range(10)]
TEMPERATURES = [1.0, 0.7, 0.5, 0.3, 0.1]
VOTES = [8, 64]
TOKENS = {2: 16, 3: 16, 4: LONG}  # at most, by level
HARD_ITERATIONS = 200
LOOK = 16  # samples of a problem where answers with and without steps are told apart
NULL_ITERATIONS = 150
RANDOM_RATE = 0.3  # of answers paid by chance
SHORT = 75  # iterations, a quarter of the samples
RATES = [1.75e-4, 3.5e-4, 7e-4, 1.4e-3, 2.8e-3]
TUNING_SEEDS = [0, 1]  # on which the rate is chosen
MORE_SEEDS = [2]  # on which the best rate is measured, too
FREE = {"clip": 0.999, "clip_high": 1e9}  # a clip that is never reached
REUSE = {  # and the rates that each is tried at
    "one pass": ({}, RATES[2:]),
    "four passes, clipped": ({"epochs": 4}, RATES[1:4]),
    "four passes, not clipped": ({"epochs": 4} | FREE, RATES[:3]),
}


def hard_config(run, seed=0):
    """Problems of which nine in ten add three numbers."""
    return replace(config_of(run, seed), iterations=HARD_ITERATIONS, max_new_tokens=LONG)


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "hard": asdict(hard_config(run)),
        "mostly_hard": {str(level): count for level, count in MOSTLY_HARD.items()},
        "seeds": SEEDS,
        "few_seeds": FEW_SEEDS,
        "problems": PROBLEMS,
        "chunk": CHUNK,
        "tries": TRIES,
        "ks": KS,
        "temperatures": TEMPERATURES,
        "votes": VOTES,
        "tokens": {str(level): count for level, count in TOKENS.items()},
        "look": LOOK,
        "null_iterations": NULL_ITERATIONS,
        "random_rate": RANDOM_RATE,
        "short": SHORT,
        "tuning_seeds": TUNING_SEEDS,
        "more_seeds": MORE_SEEDS,
        "reuse": {name: {"change": one, "rates": rates} for name, (one, rates) in REUSE.items()},
    }


# --- measuring -----------------------------------------------------------------------------------


def texts_of(policy, tokenizer, level, samples, seed=1, **how):
    """Held-out problems, 172 of level 2, and `samples` texts of each."""
    count = min(PROBLEMS, len(arithmetic.problems(level, "held_out")))
    asked = arithmetic.sample(count, level, "held_out")
    luck = torch.Generator().manual_seed(seed)
    prompts = [one.prompt for one in asked]
    new = TOKENS[level]
    texts = write(
        policy, tokenizer, prompts, new, samples_per_prompt=samples, generator=luck, **how
    )
    return asked, [texts[i : i + samples] for i in range(0, len(texts), samples)]


def chain_is_right(problem, text):
    """Whether every term of the chain comes to the answer: no such text is a lucky guess."""
    terms = text.split("=")
    if len(terms) < 2 or arithmetic.well_formed([], [text]) == [0.0]:
        return False
    return all(sum(map(int, term.split("+"))) == int(problem.answer) for term in terms)


def tries(policy, tokenizer, level, count, seed=1):
    """Of each problem, which of `count` tries were right, [problems, count], and which of them by
    steps that are all right."""
    right, chained = [], []
    for begin in range(0, count, CHUNK):
        asked, texts = texts_of(policy, tokenizer, level, CHUNK, seed + begin // CHUNK)
        answers = [one.answer for one in asked]
        found = [
            arithmetic.exact([], some, [answer] * CHUNK)
            for some, answer in zip(texts, answers, strict=True)
        ]
        right.append(torch.tensor(found) == 1.0)
        whole = [
            [ok == 1.0 and chain_is_right(one, text) for ok, text in zip(oks, some, strict=True)]
            for one, some, oks in zip(asked, texts, found, strict=True)
        ]
        chained.append(torch.tensor(whole))
    return torch.cat(right, 1), torch.cat(chained, 1)


def reach(right, ks=KS):
    """pass@k, how many problems no try solved, and of each problem the right tries."""
    ks = [k for k in ks if k <= right.shape[1]]
    found = [round(arithmetic.pass_at_k(right, k), 4) for k in ks]
    counts = right.sum(1)
    return {"pass": found, "never": int((counts == 0).sum()), "counts": counts.tolist()}


def by_problem(counts, n, k):
    """The chance that one of k tries is right, of each problem."""
    return [1 - math.comb(n - c, k) / math.comb(n, k) for c in counts]


def gap(later, before, n, ks=KS):
    """Differences of pass@k, mean over problems, with the half-width of a paired 95 % interval."""
    found = []
    for k in ks:
        pairs = zip(by_problem(later, n, k), by_problem(before, n, k), strict=True)
        differences = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
        half = (
            stats.t.ppf(0.975, len(differences) - 1) * differences.std() / len(differences) ** 0.5
        )
        found.append([round(differences.mean().item(), 4), round(half.item(), 4)])
    return found


def majority(texts, answer):
    """Whether the answer that most texts give is right; a draw counts by halves and thirds."""
    votes = Counter(arithmetic.extract_answer(text) for text in texts)
    votes.pop(None, None)
    best = max(votes.values(), default=0)
    winners = [given for given, count in votes.items() if count == best]
    return winners.count(answer) / len(winners) if winners else 0.0


def without_training(policy, tokenizer, level):
    """What temperature, greedy decoding and majority votes get out of a model as it is."""
    found = {"temperature": {}, "majority": {}}
    for temperature in TEMPERATURES:
        asked, texts = texts_of(policy, tokenizer, level, LOOK, temperature=temperature)
        found["temperature"][f"{temperature:g}"] = share_right(asked, texts)
    found["greedy"] = share_right(*texts_of(policy, tokenizer, level, 1, top_k=1))
    asked, texts = texts_of(policy, tokenizer, level, max(VOTES))
    for votes in VOTES:
        won = [
            majority(some[i : i + votes], one.answer)
            for one, some in zip(asked, texts, strict=True)
            for i in range(0, max(VOTES), votes)
        ]
        found["majority"][str(votes)] = round(sum(won) / len(won), 4)
    return found


def share_right(asked, texts):
    right = [
        given
        for one, some in zip(asked, texts, strict=True)
        for given in arithmetic.exact([], some, [one.answer] * len(some))
    ]
    return round(sum(right) / len(right), 4)


def steps(policy, tokenizer, level):
    """How many answers have steps, how long they are, and how often those with and without steps
    are right; and some of them."""
    asked, texts = texts_of(policy, tokenizer, level, LOOK)
    rows = [
        (len(text), "=" in text, arithmetic.exact([], [text], [one.answer])[0])
        for one, some in zip(asked, texts, strict=True)
        for text in some
    ]

    def mean(values):
        values = list(values)
        return round(sum(values) / len(values), 4) if values else None

    return {
        "worked": mean(worked for _, worked, _ in rows),
        "characters": mean(length for length, _, _ in rows),
        "right": mean(right for _, _, right in rows),
        "right_worked": mean(right for _, worked, right in rows if worked),
        "right_at_once": mean(right for _, worked, right in rows if not worked),
        "examples": [
            (one.prompt, some[:2], one.answer)
            for one, some in zip(asked[:3], texts[:3], strict=True)
        ],
    }


# --- parts ---------------------------------------------------------------------------------------


def before(run):
    """The untrained model, against itself too."""
    policy, tokenizer = shipped.adder(run)
    found = {"steps": {}, "without_training": {}, "reach": {}, "null": {}}
    for level in TOKENS:
        found["steps"][str(level)] = steps(policy, tokenizer, level)
    for level, count in ((3, CHUNK), (4, TRIES)):
        key = str(level)
        found["without_training"][key] = without_training(policy, tokenizer, level)
        right, chained = tries(policy, tokenizer, level, 2 * count)
        one, other = right[:, :count], right[:, count:]
        ks = [k for k in KS if k <= count]
        found["reach"][key] = reach(one)
        found["reach"][key]["chained"] = reach(chained[:, :count])
        missed = ~one[:, :64].any(1)
        found["null"][key] = reach(other) | {
            "chained": reach(chained[:, count:]),
            "gap": gap(other.sum(1).tolist(), one.sum(1).tolist(), count, ks),
            "missed_in_64": int(missed.sum()),
            "of_these_solved_in_64_more": int((missed & other[:, :64].any(1)).sum()),
        }
    answers = {
        sum(one.operands) for split in arithmetic.SPLITS for one in arithmetic.problems(4, split)
    }
    found["answers"] = len(answers)
    found["guessing"] = [round(1 - (1 - 1 / len(answers)) ** k, 4) for k in KS]
    return found


def main_run(run, seed):
    """The chapter's main run, with its entropy and lengths."""
    policy, tokenizer, history, seconds, _ = train(run, config_of(run, seed))
    names = ("reward", "constant", "entropy", "length", "length_right", "length_wrong")
    found = {"seconds": round(seconds, 1), "steps": steps(policy, tokenizer, 3)}
    return found | curves(history, *names) | {"reach": reach(tries(policy, tokenizer, 3, CHUNK)[0])}


def hard_run(run, seed):
    """Training on the mostly hard set, and what became of answers to hard sums."""
    pool = []
    for level, count in MOSTLY_HARD.items():
        pool += arithmetic.sample(count, level, "train", seed)
    policy, tokenizer, history, seconds, _ = train(run, hard_config(run, seed), pool=pool)
    right, chained = tries(policy, tokenizer, 4, TRIES)
    found = {"seconds": round(seconds, 1), "reach": reach(right), "steps": {}}
    found["reach"]["chained"] = reach(chained)
    found["greedy"] = share_right(*texts_of(policy, tokenizer, 4, 1, top_k=1))
    for level in TOKENS:
        found["steps"][str(level)] = steps(policy, tokenizer, level)
    return found | curves(history, "reward", "entropy", "length", "constant")


def gaps(found):
    """How far the trained models are ahead of the untrained one at each k, by seed."""
    start = found["before"]["reach"]["4"]
    kinds = {"right": lambda reach: reach["counts"], "chained": lambda r: r["chained"]["counts"]}
    return {
        kind: {
            name: [gap(counts(one["reach"]), counts(start), TRIES) for one in runs]
            for name, runs in found["hard"].items()
        }
        for kind, counts in kinds.items()
    }


def by_chance(seed):
    """A reward that does not look at the answer."""
    luck = torch.Generator().manual_seed(1000 + seed)

    def reward(prompts, completions, **columns):
        return (torch.rand(len(completions), generator=luck) < RANDOM_RATE).double().tolist()

    return reward


def null_run(run, seed, name):
    """Training on a reward that says nothing about right and wrong."""
    reward = by_chance(seed) if name == "random" else arithmetic.well_formed
    config = replace(config_of(run, seed), iterations=NULL_ITERATIONS)
    looks = range(50, config.iterations + 1, 50)
    policy, tokenizer, history, seconds, seen = train(run, config, reward, looks=looks)
    groups = round(sum(1 - one.constant for one in history) * config.prompts)
    found = {"curve": seen, "mixed_groups": groups, "steps": steps(policy, tokenizer, 3)}
    found["seconds"] = round(seconds, 1)
    return found | curves(history, "reward", "constant", "entropy", "length")


def reuse_run(run, seed, rate_of, **change):
    """A quarter of the samples, used once or several times."""
    config = replace(config_of(run, seed), iterations=SHORT, learning_rate=rate_of, **change)
    policy, tokenizer, history, seconds, _ = train(run, config)
    one = {"seed": seed, "seconds": round(seconds, 1)}
    one["rate"] = rate(policy, tokenizer, problems=PROBLEMS)
    one["lowest"] = round(min(each.reward for each in history[10:]), 4)
    return one | curves(history, "reward", "clip_fraction", "entropy")


def best_rate(found, name):
    """The learning rate with the highest pass@1 on the tuning seeds."""
    rows = {key: runs[: len(TUNING_SEEDS)] for key, runs in found["reuse"][name].items()}
    return float(max(rows, key=lambda key: sum(one["rate"] for one in rows[key])))


def tasks(run, found):
    """Where each result goes, and what makes it; `found` holds those before it. A last part that is
    None stands for no list."""
    yield ("before", None), partial(before, run)
    for seed in FEW_SEEDS:
        yield ("hard", "random order", seed), partial(hard_run, run, seed)
    if "hard" in found and "before" in found:
        yield ("gaps", None), partial(gaps, found)
    for name in ("random", "format"):
        for seed in FEW_SEEDS:
            yield ("nulls", name, seed), partial(null_run, run, seed, name)
    for name, (change, rates) in REUSE.items():
        for each in rates:
            for seed in TUNING_SEEDS:
                place = ("reuse", name, f"{each:g}", seed)
                yield place, partial(reuse_run, run, seed, each, **change)
    tuned = len(found.get("reuse", ())) == len(REUSE)  # not so if this part is not made
    for name, (change, _) in REUSE.items() if tuned else ():
        each = best_rate(found, name)
        for seed in MORE_SEEDS:
            place = ("reuse", name, f"{each:g}", seed)
            yield place, partial(reuse_run, run, seed, each, **change)
    for seed in SEEDS:
        yield ("main", seed), partial(main_run, run, seed)


def put(results, place, value):
    """Store a result under its names; those of several seeds make a list."""
    *names, last = place
    for name in names[:-1]:
        results = results.setdefault(name, {})
    if last is None:
        results[names[-1]] = value
    else:
        results.setdefault(names[-1], []).append(value)


def record(chapter, tasks, settings_of):
    """Make all results of a file, or with names on the command line those parts, and print them."""
    torch.set_num_threads(1)
    run, start, results = settings.load(), time.perf_counter(), {}
    for place, make in tasks(run, results):
        if sys.argv[1:] and place[0] not in sys.argv[1:]:
            continue
        put(results, place, make())
        name = ", ".join(map(str, place))
        print(f"{time.perf_counter() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
    if sys.argv[1:]:
        print(json.dumps(results))
    else:
        record_sweep(chapter, start, settings_of(run), results)


def main():
    record("grpo_more", tasks, settings_of)


if __name__ == "__main__":
    main()
