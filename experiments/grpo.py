"""Record the sweeps of grpo, on sums and on the exact language:
rlhf_helpers/assets/results/grpo.json.

With the names of some parts (methods, bias, signal, hard, difficulty, weak, exact), these alone are
made, and printed.
"""

import copy
import json
import math
import sys
import time
from dataclasses import asdict, replace

import torch
from torch import nn

from experiments.dpo_derivation import EXACT as LANGUAGE
from experiments.dpo_derivation import Case, ppo_config
from rlhf_helpers import settings
from rlhf_helpers.algorithms import grpo, ppo, sampling, sft
from rlhf_helpers.algorithms._loop import prompt_indices
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.rollout import write
from rlhf_helpers.worlds import arithmetic, enumerable

SEEDS = [0, 1, 2, 3, 4]
SWEEP_SEEDS = [0, 1, 2]
LEVEL = 3
HELD_OUT = 200
SAMPLES = 64  # of a problem, before and after
KS = [1, 2, 4, 8, 16, 32, 64]
EVERY = 50  # iterations from one look at held-out problems to the next
LOOK = {"problems": 100, "samples": 8}
LONG = 32  # tokens, where answers may become long
ROUNDS = 10  # of rejection sampling and fine-tuning
SHORT = 75  # iterations, a quarter of the samples
# several passes over a batch, and what keeps them in bounds
REUSE = {
    "one pass": {},
    "four passes": {"epochs": 4},
    "four passes, no clipping": {"epochs": 4, "clip": 0.999, "clip_high": 1e9},
    "four passes, sequence ratio, ε = 0.2": {"epochs": 4, "importance": "sequence"},
    "four passes, sequence ratio, ε = 0.003": {
        "epochs": 4,
        "importance": "sequence",
        "clip": 3e-3,
        "clip_high": 4e-3,
    },
    "four passes, clip higher": {"epochs": 4, "clip_high": 0.28},
}
# advantages and weights, at the full number of samples
WEIGHTS = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "clip_high": 0.28, "constant_groups": "resample"},
    "dr_grpo, divided by std": {"loss_type": "dr_grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale": "none"},
}
# a data set of which most is too hard: how many problems of each level
MOSTLY_HARD = {1: 80, 2: 600, 3: 600, 4: 12_000}
EVENLY = {2: 700, 3: 700, 4: 700}
HARD_ITERATIONS = 200
# how fast is a policy that solves this share? ten small steps from policies along a run
STOPS = [5, 12, 20, 40, 80, 160, 280]
SPEED = {"iterations": 10, "learning_rate": 1e-4, "warm_up": 0.0}
WEAK = ["grpo", "bnpo"]  # how tokens are weighed while a weak checker pays
EXACT = {
    "iterations": 500,
    "prompts": 4,
    "samples_per_prompt": 64,
    "learning_rate": 3e-3,
    "warm_up": 0.1,
}
OFTEN = {"epochs": 2, "mini_batches": 4}  # as many updates as PPO there
EXACT_SEEDS = [1, 2, 3]  # languages that DPO is measured on, too
PRICED_SEEDS = [1, 2, 3]  # the same, where nothing is sampled
PRICES = [0.1, 0.2, 0.375, 0.75, 1.5, 3.0]  # β at which the two places of the price are compared


def config_of(run, seed=0):
    """The settings of the chapter's main run."""
    return grpo.Config(**grpo.AT_SCALE[run.scale], seed=seed)


def value_config(run, seed=0):
    """PPO with a value function, for as many samples; like GRPO here it pays nothing for KL."""
    config = config_of(run, seed)
    return ppo.Config(
        iterations=config.iterations,
        prompts=config.prompts,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        learning_rate=config.learning_rate,
        value_learning_rate=1e-3,
        epochs=1,
        mini_batches=1,
        warm_up=config.warm_up,
        kl_coefficient=0.0,
        seed=seed,
    )


def fit_config(seed=0):
    """Fine-tuning on a round's right answers."""
    return sft.Config(learning_rate=1e-3, batch_size=128, seed=seed)


def exact_config(seed=0):
    """GRPO on the language that can be listed, with a price on KL."""
    case = {"max_new_tokens": LANGUAGE["length"], "beta": LANGUAGE["beta"]}
    return grpo.Config(**EXACT, **case, scale="none", loss_type="dr_grpo", seed=seed)


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "ppo": asdict(value_config(run)),
        "sft": asdict(fit_config()),
        "exact": asdict(exact_config()),
        "exact_ppo": asdict(ppo_config()),
        "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS,
        "level": LEVEL,
        "held_out": HELD_OUT,
        "samples": SAMPLES,
        "every": EVERY,
        "look": LOOK,
        "long": LONG,
        "rounds": ROUNDS,
        "short": SHORT,
        "reuse": REUSE,
        "weights": WEIGHTS,
        "mostly_hard": {str(level): count for level, count in MOSTLY_HARD.items()},
        "evenly": {str(level): count for level, count in EVENLY.items()},
        "hard_iterations": HARD_ITERATIONS,
        "stops": STOPS,
        "speed": SPEED,
        "weak": WEAK,
        "exact_seeds": EXACT_SEEDS,
        "priced_seeds": PRICED_SEEDS,
        "often": OFTEN,
        "prices": PRICES,
    }


# --- measuring -----------------------------------------------------------------------------------


def rate(
    policy,
    tokenizer,
    level=LEVEL,
    new=16,
    problems=LOOK["problems"],
    samples=LOOK["samples"],
    seed=1,
):
    """Share of samples at temperature 1 that solve held-out problems."""
    held_out = arithmetic.problems(level, "held_out")
    if problems < len(held_out):
        held_out = arithmetic.sample(problems, level, "held_out")
    found = sampling.solve(policy, tokenizer, held_out, samples, new, seed=seed)
    return round(found.double().mean().item(), 4)


def ability(policy, tokenizer, level=LEVEL, new=16):
    """pass@k for all k, greedy accuracy, and how many held-out problems no sample solved."""
    held_out = arithmetic.sample(HELD_OUT, level, "held_out")
    right = sampling.solve(policy, tokenizer, held_out, SAMPLES, new, seed=1)
    greedy = sampling.solve(policy, tokenizer, held_out, 1, new, greedy=True)
    return {
        "pass": [round(arithmetic.pass_at_k(right, k), 4) for k in KS],
        "greedy": round(greedy.double().mean().item(), 4),
        "never": int((~right.any(1)).sum()),
    }


def curves(history, *names):
    """Metrics by name; None where one is not a number, as the length of right answers if none
    was."""
    rows = [[getattr(one, name) for one in history] for name in names]
    rounded = [[None if math.isnan(x) else round(x, 4) for x in row] for row in rows]
    return dict(zip(names, rounded, strict=True))


# --- training ------------------------------------------------------------------------------------


def columns_of(pool):
    """Prompts of problems, and the answers that the reward function is given."""
    return [one.prompt for one in pool], {"answer": [one.answer for one in pool]}


def train(run, config, reward=arithmetic.exact, pool=None, kinds=None, looks=()):
    """GRPO on problems; the policy, its tokenizer, the history, CPU seconds without the looks, and
    pass@1 on held-out problems after the iterations in `looks`."""
    policy, tokenizer = shipped.adder(run)
    pool = arithmetic.problems(LEVEL, "train") if pool is None else pool
    prompts, answers = columns_of(pool)
    history, seen, seconds, begin = [], [], 0.0, time.process_time()
    for metrics in grpo.train(policy, tokenizer, prompts, reward, config, answers, kinds):
        history.append(metrics)
        if metrics.iteration in looks:
            seconds += time.process_time() - begin
            seen.append(rate(policy, tokenizer, new=config.max_new_tokens))
            begin = time.process_time()
    return policy, tokenizer, history, seconds + time.process_time() - begin, seen


def main_run(run, seed, **change):
    config = replace(config_of(run, seed), **change)
    looks = range(EVERY, config.iterations + 1, EVERY)
    policy, tokenizer, history, seconds, seen = train(run, config, looks=looks)
    found = ability(policy, tokenizer) | {"curve": seen, "seconds": round(seconds, 1)}
    names = ("reward", "constant", "length_right", "length_wrong")
    found["sampled"] = sum(one.sampled for one in history)
    return found | curves(history, *names)


def with_values(run, seed):
    """PPO."""
    policy, tokenizer = shipped.adder(run)
    prompts, answers = columns_of(arithmetic.problems(LEVEL, "train"))
    seen, explained = [], []
    begin, seconds = time.process_time(), 0.0
    config = value_config(run, seed)
    for metrics in ppo.train(policy, tokenizer, prompts, arithmetic.exact, config, columns=answers):
        explained.append(metrics.explained_variance)
        if metrics.iteration % EVERY == 0:
            seconds += time.process_time() - begin
            seen.append(rate(policy, tokenizer))
            begin = time.process_time()
    found = ability(policy, tokenizer) | {"curve": seen, "seconds": round(seconds, 1)}
    return found | {"explained_variance": [round(x, 4) for x in explained]}


def rejection_sampled(run, seed):
    """Rounds of sampling, and of fine-tuning on the answers that were right."""
    policy, tokenizer = shipped.adder(run)
    pool, config = arithmetic.problems(LEVEL, "train"), config_of(run, seed)
    luck = torch.Generator().manual_seed(seed)
    seen, kept, begin, seconds = [], [], time.process_time(), 0.0
    for index in range(config.iterations):
        chosen = [pool[i] for i in prompt_indices(len(pool), index, config)]
        some, answers = columns_of(chosen)
        group, new = config.samples_per_prompt, config.max_new_tokens
        found = sampling.respond(
            policy, tokenizer, some, arithmetic.exact, luck, group, new, 1.0, answers
        )
        right = (found.scores == 1) & found.ended
        kept += [(some[i // group], text) for i, text in enumerate(found.texts) if right[i]]
        if (index + 1) % (config.iterations // ROUNDS) == 0:
            for _ in sft.train(policy, tokenizer, kept, fit_config(seed + index)):
                pass
            kept = []
        if (index + 1) % EVERY == 0:
            seconds += time.process_time() - begin
            seen.append(rate(policy, tokenizer))
            begin = time.process_time()
    return ability(policy, tokenizer) | {"curve": seen, "seconds": round(seconds, 1)}


def levels(policy, tokenizer):
    return {str(level): rate(policy, tokenizer, level, LONG, 150) for level in arithmetic.LEVELS}


def mixture(run, seed, counts, curriculum=False, **change):
    """Training on problems of several levels, in a random order or by the curriculum."""
    pool = []
    for level, count in counts.items():
        pool += arithmetic.sample(count, level, "train", seed)
    kinds = [f"level {one.level}" for one in pool] if curriculum else None
    config = replace(config_of(run, seed), iterations=HARD_ITERATIONS, max_new_tokens=LONG)
    config = replace(config, **change)
    policy, tokenizer, history, seconds, _ = train(run, config, pool=pool, kinds=kinds)
    hardest = [one.shares.get("level 4", 0.0) for one in history]
    found = {"levels": levels(policy, tokenizer), "seconds": round(seconds, 1)}
    found["ability"] = ability(policy, tokenizer, 4, LONG)
    return found | {"hardest": hardest if curriculum else None}


def speeds(run, tell):
    """Of policies that solve different shares of their problems: what ten small steps gain."""
    config = config_of(run, SEEDS[-1] + 1)
    start, tokenizer = shipped.adder(run)
    places = [("level 2", start, 2, 16), ("level 3", start, 3, 16), ("level 4", start, 4, LONG)]
    policy = copy.deepcopy(start)
    prompts, answers = columns_of(arithmetic.problems(LEVEL, "train"))
    for metrics in grpo.train(policy, tokenizer, prompts, arithmetic.exact, config, answers):
        if metrics.iteration in STOPS:
            places.append((f"level 3 after {metrics.iteration}", copy.deepcopy(policy), 3, 16))
    found = []
    for name, at, level, new in places:
        before = rate(at, tokenizer, level, new, 170, 32)
        one = {"name": name, "level": level, "before": before, "gains": [], "constant": []}
        for seed in SWEEP_SEEDS:
            policy = copy.deepcopy(at)
            prompts, answers = columns_of(arithmetic.problems(level, "train"))
            small = replace(config, **SPEED, max_new_tokens=new, seed=seed)
            history = list(grpo.train(policy, tokenizer, prompts, arithmetic.exact, small, answers))
            one["gains"].append(round(rate(policy, tokenizer, level, new, 170, 32) - before, 4))
            one["constant"].append(round(sum(m.constant for m in history) / len(history), 4))
        found.append(one)
        tell("speed", one)
    return found


def weak_checker(run, seed, loss_type):
    """Training on a checker that finds the answer anywhere in the text."""
    config = replace(config_of(run, seed), max_new_tokens=LONG, loss_type=loss_type)
    looks = range(EVERY, config.iterations + 1, EVERY)
    found = train(run, config, arithmetic.contains_answer, looks=looks)
    policy, tokenizer, history, seconds, seen = found
    asked = arithmetic.sample(4, LEVEL, "held_out")
    texts = write(
        policy,
        tokenizer,
        [one.prompt for one in asked],
        LONG,
        generator=torch.Generator().manual_seed(0),
    )
    examples = [(one.prompt, text, one.answer) for one, text in zip(asked, texts, strict=True)]
    found = {"curve": seen, "seconds": round(seconds, 1), "examples": examples}
    return found | curves(history, "reward", "length", "unended")


# --- the language that can be listed -------------------------------------------------------------


def fixed_point(case):
    """Where a price in the loss ends that charges each token for itself: in each state the
    reference times e^(Q/β), with the expected reward Q and without the price of what comes
    later."""
    table = case.table.log_softmax(-1)
    start = table.clone()
    for _ in range(case.language.length + 1):
        _, worth = enumerable.values(table, case.utilities, case.language)
        table = (start + worth / case.beta).log_softmax(-1)
    return enumerable.sequence_log_probs(table, case.language)


def in_full(case, correct, steps=1500):
    """GRPO on a table, its loss summed over all texts with their probabilities instead of
    sampled."""
    language, start = case.language, case.table.log_softmax(-1)
    table = nn.Parameter(case.table.clone())
    optimizer = torch.optim.Adam([table], lr=0.1)
    ref = start[language.states, language.tokens]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        log_probs = table.log_softmax(-1)[language.states, language.tokens]
        chance = (log_probs.detach() * language.mask).sum(1).exp()
        advantages = case.utilities - chance @ case.utilities
        kl = (ref - log_probs).exp() - 1 - (ref - log_probs)
        ratio = (log_probs - log_probs.detach()).exp()
        terms = ratio * advantages[:, None] - case.beta * kl * (ratio if correct else 1.0)
        loss = -(chance[:, None] * terms * language.mask).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return enumerable.sequence_log_probs(table, language).detach()


def exact(seed, tell):
    """GRPO and PPO with the true utilities."""
    case = Case(seed)
    judge, tokenizer = (
        enumerable.reward(case.language, case.utilities),
        enumerable.tokenizer(case.language),
    )

    def sampled(train, config):
        network = case.network()
        for _ in train(network, tokenizer, [""], judge, config):
            pass
        return enumerable.model_log_probs(network, case.language).detach().double()

    config = exact_config(seed)
    policies = {
        "start": case.reference,
        "fixed point": fixed_point(case),
        "in full": in_full(case, True),
        "in full, plain k3": in_full(case, False),
        "GRPO": sampled(grpo.train, config),
        "GRPO, divided by std": sampled(grpo.train, replace(config, scale="group")),
        "GRPO, as many updates as PPO": sampled(grpo.train, replace(config, **OFTEN)),
        "PPO": sampled(ppo.train, ppo_config(seed)),
    }
    found = {name: case.describe(policy) for name, policy in policies.items()}
    tell(f"exact {seed}", found)
    return found


def priced(seed):
    """KL(fixed point‖π*) at several prices: how far from the optimum a price in the loss ends."""
    found = []
    for price in PRICES:
        case = Case(seed)
        case.beta = price
        best = enumerable.optimal_policy(case.reference, case.utilities, price)
        apart = [enumerable.kl(policy, best) for policy in (fixed_point(case), case.reference)]
        found.append([round(float(x), 5) for x in apart])
    return found


# --- all -----------------------------------------------------------------------------------------


def methods(run, tell):
    def told(name, seed, found):
        tell(f"{name} {seed}", {k: found[k] for k in ("pass", "greedy", "curve", "seconds")})
        return found

    start, tokenizer = shipped.adder(run)
    found = {"ks": KS, "before": ability(start, tokenizer) | {"look": rate(start, tokenizer)}}
    tell("before", found["before"])
    found["main"] = [told("main", s, main_run(run, s)) for s in SEEDS]
    loo = {"scale": "leave-one-out", "loss_type": "dr_grpo"}
    found["leave-one-out"] = [
        told("leave-one-out", s, main_run(run, s, **loo)) for s in SWEEP_SEEDS
    ]
    found["ppo"] = [told("ppo", s, with_values(run, s)) for s in SWEEP_SEEDS]
    found["rejection-sampled"] = [
        told("rejection-sampled", s, rejection_sampled(run, s)) for s in SWEEP_SEEDS
    ]
    return found


def bias(run, tell):
    """How tokens are weighed, and how often a batch is used."""
    found = {"weights": {}, "reuse": {}}
    for name, change in WEIGHTS.items():
        found["weights"][name] = [main_run(run, s, **change) for s in SWEEP_SEEDS]
        tell(
            name,
            [
                (x["pass"][0], x["length_right"][-1], x["length_wrong"][-1])
                for x in found["weights"][name]
            ],
        )
    for name, change in REUSE.items():
        found["reuse"][name] = []
        for seed in SWEEP_SEEDS:
            config = replace(config_of(run, seed), iterations=SHORT, **change)
            policy, tokenizer, history, seconds, _ = train(run, config)
            one = {"rate": rate(policy, tokenizer, problems=HELD_OUT), "seconds": round(seconds, 1)}
            found["reuse"][name].append(one | curves(history, "reward", "clip_fraction"))
        tell(name, [x["rate"] for x in found["reuse"][name]])
    return found


def signal(run, tell):
    """Where there is something to learn."""
    return {"speed": speeds(run, tell)}


def hard(run, tell):
    """A set of which most is too hard, with and without the curriculum."""
    found = {"hard": {}}
    for name, curriculum in (("random order", False), ("curriculum", True)):
        found["hard"][name] = [mixture(run, s, MOSTLY_HARD, curriculum) for s in SWEEP_SEEDS]
        tell(name, [x["levels"] for x in found["hard"][name]])
    start, tokenizer = shipped.adder(run)
    found["hard"]["before"] = {
        "levels": levels(start, tokenizer),
        "ability": ability(start, tokenizer, 4, LONG),
    }
    return found


def difficulty(run, tell):
    """As many problems of each difficulty, with the division by the standard deviation and
    without."""
    found = {}
    for scale in ("group", "none"):
        found[scale] = [mixture(run, s, EVENLY, scale=scale) for s in SWEEP_SEEDS]
        tell(f"difficulty, {scale}", [one["levels"] for one in found[scale]])
    return {"difficulty": found}


def weak(run, tell):
    """What a checker that can be cheated teaches, by how tokens are weighed."""
    found = {}
    for loss_type in WEAK:
        found[loss_type] = [weak_checker(run, seed, loss_type) for seed in SWEEP_SEEDS]
        tell(f"weak, {loss_type}", [(one["curve"], one["examples"]) for one in found[loss_type]])
    return {"weak": found}


PARTS = {
    "methods": methods,
    "bias": bias,
    "signal": signal,
    "hard": hard,
    "difficulty": difficulty,
    "weak": weak,
    "exact": lambda run, tell: {
        "exact": [exact(seed, tell) for seed in EXACT_SEEDS],
        "priced": [priced(seed) for seed in PRICED_SEEDS],
    },
}


def main():
    torch.set_num_threads(1)
    run = settings.load()
    start = time.perf_counter()

    def tell(name, found):
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {found}", file=sys.stderr, flush=True)

    results = {}
    for part in sys.argv[1:] or PARTS:
        results |= PARTS[part](run, tell)
    if sys.argv[1:]:
        print(json.dumps(results))
    else:
        record_sweep("grpo", start, settings_of(run), results)


if __name__ == "__main__":
    main()
