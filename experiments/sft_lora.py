"""Record the sweeps of sft_lora over seeds, learning rates and ranks:
rlhf_helpers/assets/results/sft_lora.json."""

import copy
import time
from dataclasses import asdict

import torch

from rlhf_helpers import models, settings, worlds
from rlhf_helpers.algorithms import sft
from rlhf_helpers.algorithms._loop import TrainingStopped
from rlhf_helpers.book.notebook import record_sweep

SEEDS = [0, 1, 2, 3, 4]
SWEEP_SEEDS = [0, 1, 2]
FULL_RATES = [1e-5, 1e-4, 1e-3, 3e-3, 1e-2]
LORA_RATES = [1e-4, 1e-3, 1e-2, 3e-2, 1e-1]
RANKS = [2, 8, 32]
# what an adapter is added to: query, key and value of the attention, or every matrix
TARGETS = {"attention": None, "all matrices": "all-linear"}


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "examples": sft.EXAMPLES[run.scale],
        "sft_learning_rate": sft.AT_SCALE[run.scale]["learning_rate"],
        "lora_learning_rate": sft.LORA_AT_SCALE[run.scale]["learning_rate"],
        "config": asdict(sft.Config()),
        "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS,
        "full_rates": FULL_RATES,
        "lora_rates": LORA_RATES,
        "ranks": RANKS,
    }


def main():
    torch.set_num_threads(1)
    run = settings.load()
    model, tokenizer = models.load(run.model)
    world = worlds.load(run.world)
    requests = world.instructions("held_out", 200)
    start = time.perf_counter()

    def fine_tune(
        seed, learning_rate, rank=None, loss_on="response", target="all matrices", every=10**6
    ):
        policy = copy.deepcopy(model)
        if rank is not None:
            torch.manual_seed(seed)
            policy = models.lora_policy(policy, rank, 2 * rank, TARGETS[target])
        config = sft.Config(
            learning_rate=learning_rate, loss_on=loss_on, seed=seed, evaluate_every=every
        )
        examples = world.instructions("train", sft.EXAMPLES[run.scale], seed)
        try:
            history = list(sft.train(policy, tokenizer, examples, config, requests))
        except TrainingStopped:  # a rate so large that the loss is no number any more
            return [], [float("nan")], policy
        curve = [(m.step, round(m.held_out, 4)) for m in history if m.held_out is not None]
        print(
            f"{time.perf_counter() - start:5.0f} s  rank {rank}  rate {learning_rate:g}  {loss_on}"
            f"  {target}  seed {seed}: {curve[-1][1]:.3f}",
            flush=True,
        )
        return [step for step, _ in curve], [value for _, value in curve], policy

    results = {"before": round(sft.cross_entropy(model, tokenizer, requests), 4)}
    for loss_on in sft.LOSS_ON:
        curves = [
            fine_tune(
                seed,
                sft.AT_SCALE[run.scale]["learning_rate"],
                loss_on=loss_on,
                every=sft.Config.evaluate_every,
            )
            for seed in SEEDS
        ]
        results["steps"] = curves[0][0]
        results[loss_on] = {"held_out": [curve for _, curve, _ in curves]}
    results |= {"full_rates": FULL_RATES, "lora_rates": LORA_RATES, "ranks": RANKS}
    for name, rates, rank in (("full", FULL_RATES, None), ("lora", LORA_RATES, 8)):
        results[f"{name}_by_rate"] = [
            [fine_tune(seed, rate, rank)[1][-1] for seed in SWEEP_SEEDS] for rate in rates
        ]
    results["by_rank"], results["rank_parameters"] = {}, {}
    for target in TARGETS:
        ends, sizes = [], []
        for rank in RANKS:
            tuned = [
                fine_tune(s, sft.LORA_AT_SCALE[run.scale]["learning_rate"], rank, target=target)
                for s in SWEEP_SEEDS
            ]
            ends.append([curve[-1] for _, curve, _ in tuned])
            trained = [p for p in tuned[0][2].parameters() if p.requires_grad]
            sizes.append(sum(p.numel() for p in trained))
        results["by_rank"][target], results["rank_parameters"][target] = ends, sizes

    record_sweep("sft_lora", start, settings_of(run), results)


if __name__ == "__main__":
    main()
