"""Record for contextual_bandit_ppo what more runs and other draws of the stretched world give:
rlhf_helpers/assets/results/contextual_bandit_ppo.json."""

import math
import time
from dataclasses import asdict

import torch

from rlhf_helpers.algorithms import contextual_bandit
from rlhf_helpers.algorithms.contextual_bandit import Config
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.worlds.bandits import fan, stretched

DRAWS = [1, 2, 3, 4, 5, 6]  # the notebook shows draw 0
CHOOSING = 10  # runs that choose the rate; the others are reported
RUNS = {"fan": 110, "stretched": 40}
METHODS = {  # changes of the config, lowest of four rates in each world
    "one step": ({"epochs": 1, "clip": math.inf}, {"fan": 0.4, "stretched": 0.2}),
    "16 without ratio": ({"method": "reinforce"}, {"fan": 0.025, "stretched": 0.0125}),
    "16 with ratio": ({"clip": math.inf}, {"fan": 0.025, "stretched": 0.025}),
    "16 with clip": ({}, {"fan": 0.1, "stretched": 0.1}),
}
REMEDIES = {
    "clip": {},
    "no clip": {"clip": math.inf},
    "no clip, 4 epochs": {"clip": math.inf, "epochs": 4},
    "no clip, 2 epochs, twice the rate": {"clip": math.inf, "epochs": 2, "learning_rate": 0.4},
    "no clip, a quarter of the rate": {"clip": math.inf, "learning_rate": 0.05},
    "no clip, four times the samples": {"clip": math.inf, "batch_size": 256},
    "clip, four times the samples": {"batch_size": 256},
    "no clip, stop at 0.02 nats": {"clip": math.inf, "stop_kl": 0.02},
}
BASE = Config(iterations=30, epochs=16, learning_rate=0.2)


def settings_of(_run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(BASE),
        "draws": DRAWS,
        "runs": RUNS,
        "lowest_rates": {name: lowest for name, (_, lowest) in METHODS.items()},
    }


def train(world, runs, changes):
    """Histories of `runs` runs, and the regret of the last ten rollouts of each: [runs]."""
    policy = torch.zeros(runs, *world.weights.shape)
    config = Config(**{**asdict(BASE), **changes})
    history = list(contextual_bandit.train(policy, world, config))
    held_out = world.contexts(
        1000, generator=torch.Generator().manual_seed(contextual_bandit.HELD_OUT_SEED)
    )
    best = world.mean_rewards(held_out).max(-1).values.mean()
    earned = torch.stack([metrics.reward for metrics in history[-10:]], 1).mean(1)
    return history, best - earned


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


def at_best_rate(world, kind, name):
    """The rate that is best in the first runs, and the regret of the others."""
    changes, lowest = METHODS[name]
    rates = [lowest[kind] * 2**i for i in range(4)]
    ends = [train(world, RUNS[kind], changes | {"learning_rate": rate})[1] for rate in rates]
    chosen = min(range(4), key=lambda i: ends[i][:CHOOSING].mean().item())
    return {"rate": rates[chosen], "regret": rounded(ends[chosen][CHOOSING:])}


def remedy(changes):
    history, regret = train(fan(8), 100, changes)
    return {
        "first_kl": round(history[0].approx_kl.mean().item(), 3),
        "last_entropy": round(history[-1].entropy.mean().item(), 3),
        # of all updates, on the samples they were made from and over all arms
        "approx_kl": round(torch.stack([one.approx_kl for one in history]).mean().item(), 4),
        "step_kl": round(torch.stack([one.step_kl for one in history]).mean().item(), 4),
        "regret": rounded(regret),
    }


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    start = time.perf_counter()
    results = {"remedies": {name: remedy(changes) for name, changes in REMEDIES.items()}}
    print(f"{time.perf_counter() - start:4.0f} s  remedies", flush=True)
    results["fan"] = {name: at_best_rate(fan(8), "fan", name) for name in METHODS}
    print(f"{time.perf_counter() - start:4.0f} s  fan", flush=True)
    results["draws"] = {}
    for draw in DRAWS:
        world = stretched(seed=draw)
        results["draws"][draw] = {name: at_best_rate(world, "stretched", name) for name in METHODS}
        print(f"{time.perf_counter() - start:4.0f} s  draw {draw}", flush=True)
    record_sweep("contextual_bandit_ppo", start, settings_of(None), results)


if __name__ == "__main__":
    main()
