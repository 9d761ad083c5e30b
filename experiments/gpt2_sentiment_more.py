"""Record what else PPO was tried against: REINFORCE at other learning rates, and a harder setting
with and without a part of PPO: rlhf_helpers/assets/results/gpt2_sentiment_more.json."""

import math
from dataclasses import asdict

import torch

from experiments.gpt2_sentiment_ppo import REINFORCE, SWEEP_SEEDS, Bench, config_of
from rlhf_helpers.book.notebook import record_sweep

# tried besides the one of the other runs
REINFORCE_RATES = [5e-4, 1e-3, 4e-3]
# what a run does without; the part is named in the table
PARTS = {
    "all parts": {},
    "no clipping": {"clip": math.inf},
    "no whitening": {"whiten": False},
    "no value function": {"baseline": "none"},
    "one epoch": {"epochs": 1},
}
HARD = {"four times the rate": {"learning_rate": 2e-3}}


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "sweep_seeds": SWEEP_SEEDS,
        "reinforce_rates": REINFORCE_RATES,
        "hard": HARD,
    }


# --- the runs ------------------------------------------------------------------------------------


def brief(run):
    """What a table needs of a run."""
    end = {name: value for name, value in run["end"].items() if name != "texts"}
    rest = {name: run[name] for name in ("seconds", "stopped") if name in run}
    drift = sum(run["curves"]["approx_kl"]) / len(run["curves"]["approx_kl"])
    return {"end": end | {"texts": run["end"]["texts"][:1]}, "approx_kl": round(drift, 4)} | rest


def seeds_of(bench, name, **change):
    """The same run with several seeds, in brief."""
    return [brief(bench.trained(name, seed, **change)) for seed in SWEEP_SEEDS]


def rate_runs(bench):
    """REINFORCE at the other learning rates that were tried."""
    return {
        "REINFORCE": {
            rate: seeds_of(bench, f"REINFORCE {rate}", learning_rate=rate, **REINFORCE)
            for rate in REINFORCE_RATES
        }
    }


def hard_runs(bench):
    """Each setting with all parts of PPO, and without one of them."""
    return {
        setting: {
            part: seeds_of(bench, f"{setting}, {part}", **change | without)
            for part, without in PARTS.items()
        }
        for setting, change in HARD.items()
    }


# what the chapter reads, by key
RESULTS = {
    "rates": rate_runs,
    "hard": hard_runs,
}


def main():
    torch.set_num_threads(1)
    bench = Bench()
    results = {key: make(bench) for key, make in RESULTS.items()}
    record_sweep("gpt2_sentiment_more", bench.start, settings_of(bench.run), results)


if __name__ == "__main__":
    main()
