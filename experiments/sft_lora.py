"""Record the runs of sft_lora over seeds, learning rates, passes and adapters:
rlhf_helpers/assets/results/sft_lora.json."""

import copy
import time
from dataclasses import asdict, replace
from functools import cache
from typing import NamedTuple

import torch

from rlhf_helpers import models, settings, worlds
from rlhf_helpers.algorithms import sft
from rlhf_helpers.algorithms._loop import TrainingStopped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.rollout import write
from rlhf_helpers.worlds.reviews import kept_back

SEEDS = [0, 1, 2, 3, 4]
TUNING_SEEDS = SEEDS[:3]
# a rate that is often copied, and four to choose from, a factor of two apart
COPIED_RATE = 1e-5
FULL_RATES = [5e-4, 1e-3, 2e-3, 4e-3]
LORA_RATES = [2.5e-3, 5e-3, 1e-2, 2e-2]
# rank, and what the adapter is added to: query, key and value of the attention, or every matrix
ADAPTERS = {
    "attention, rank 32": (32, None),
    "all matrices, rank 8": (8, "all-linear"),
    "all matrices, rank 32": (32, "all-linear"),
}
PASSES = [1, 2, 4]
REQUESTS = 200  # that the model is asked, of each kind
MEASURED = [
    0,
    5,
    10,
    20,
    40,
    60,
    80,
    100,
    125,
    150,
    175,
]  # steps of the curve; it ends at about 200


class Run(NamedTuple):
    """One training run."""

    rate: float
    seed: int
    loss_on: str = "response"
    adapter: str = ""  # of ADAPTERS; "" trains all weights
    passes: int = 1
    every_kind: bool = False  # nothing is kept back; as many examples

    @property
    def name(self) -> str:
        """What it has in common with the runs of other seeds."""
        what = self.adapter or ("all weights" if self.loss_on == "response" else "all tokens")
        more = f", {self.passes} passes" if self.passes > 1 else ""
        more += ", every kind" if self.every_kind else ""
        return f"{what}{more}, rate {self.rate:g}"


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "examples": sft.EXAMPLES[run.scale],
        "sft_learning_rate": sft.AT_SCALE[run.scale]["learning_rate"],
        "lora_learning_rate": sft.LORA_AT_SCALE[run.scale]["learning_rate"],
        "config": asdict(sft.Config()),
        "seeds": SEEDS,
        "tuning_seeds": TUNING_SEEDS,
        "copied_rate": COPIED_RATE,
        "full_rates": FULL_RATES,
        "lora_rates": LORA_RATES,
        "adapters": {name: list(how) for name, how in ADAPTERS.items()},
        "passes": PASSES,
        "requests": REQUESTS,
    }


@cache
def world_of():
    run = settings.load()
    return run, *models.load(run.model), worlds.load(run.world)


@cache
def requests_of(split, kept):
    """Requests of kinds that are kept out of training, or of the others."""
    _, _, _, world = world_of()
    found = world.instructions(split, 5 * REQUESTS)
    return [one for one in found if kept_back(one) == kept][:REQUESTS]


def policy_of(one):
    policy = copy.deepcopy(world_of()[1])
    if one.adapter:
        torch.manual_seed(one.seed)
        rank, target = ADAPTERS[one.adapter]
        policy = models.lora_policy(policy, rank, 2 * rank, target)
    return policy


def trained(one, curve=None):
    """The policy after the run; fills `curve` with the cross-entropy on kept-back requests."""
    run, _, tokenizer, world = world_of()
    policy = policy_of(one)
    config = replace(
        sft.Config(), learning_rate=one.rate, loss_on=one.loss_on, seed=one.seed, epochs=one.passes
    )
    drawn = world.instructions("train", sft.EXAMPLES[run.scale], one.seed)
    examples = [each for each in drawn if not kept_back(each)]
    if one.every_kind:
        examples = drawn[: len(examples)]

    def measure(step):
        if curve is not None and step in MEASURED:
            curve.append(sft.cross_entropy(policy, tokenizer, requests_of("held_out", True)))

    measure(0)
    for step, _ in enumerate(sft.train(policy, tokenizer, examples, config), 1):
        measure(step)
    return policy


def measured(one, started, curve=None):
    """Of a finished run: cross-entropy on three sets of requests, and the shares it follows."""
    run, _, tokenizer, world = world_of()
    try:
        policy = trained(one, curve)
    except TrainingStopped:  # a rate so large that the loss is no number any more
        return None
    sets = {"new": requests_of("held_out", True), "seen": requests_of("held_out", False)}
    found = {f"nats_{name}": sft.cross_entropy(policy, tokenizer, r) for name, r in sets.items()}
    found["nats_validation"] = sft.cross_entropy(
        policy, tokenizer, requests_of("validation", False)
    )
    for name, requests in sets.items():
        generator = torch.Generator().manual_seed(one.seed)
        prompts = [request.prompt for request in requests]
        texts = write(policy, tokenizer, prompts, run.max_new_tokens, generator=generator)
        pairs = zip(requests, texts, strict=True)
        found[f"followed_{name}"] = sum(world.follows(r, t) for r, t in pairs) / len(requests)
    found = {name: round(value, 4) for name, value in found.items()}
    print(
        f"{time.perf_counter() - started:5.0f} s  {one.name}  seed {one.seed}: {found}", flush=True
    )
    return found


def grids():
    """Every run that learning rates are chosen from, and the copied rate."""
    for seed in TUNING_SEEDS:
        yield Run(COPIED_RATE, seed)
        for loss_on in sft.LOSS_ON:
            yield from (Run(rate, seed, loss_on) for rate in FULL_RATES)
        for adapter in ADAPTERS:
            yield from (Run(rate, seed, adapter=adapter) for rate in LORA_RATES)


def best(found, like):
    """The rate with the lowest mean cross-entropy on validation requests, of the runs whose other
    settings are those of `like`."""
    ends = {}
    for one, values in found.items():
        if one._replace(rate=0, seed=0) == like._replace(rate=0, seed=0) and one.seed in (
            TUNING_SEEDS
        ):
            nats = float("inf") if values is None else values["nats_validation"]
            ends.setdefault(one.rate, []).append(nats)
    return min(ends, key=lambda rate: sum(ends[rate]))


def chosen(found):
    """The remaining seeds of what is compared at its best rate; and runs with more passes, and
    with every kind of request."""
    adapters = (Run(0, 0, adapter=adapter) for adapter in ADAPTERS)
    for like in (*(Run(0, 0, loss_on) for loss_on in sft.LOSS_ON), *adapters):
        rate = best(found, like)
        yield from (like._replace(rate=rate, seed=seed) for seed in SEEDS)
    rate = sft.Config.learning_rate
    for seed in SEEDS:
        yield from (Run(rate, seed, passes=passes) for passes in PASSES)
        yield Run(rate, seed, every_kind=True)


def curve_of(seed, found, started):
    """Records the run of the chapter once more, with its curve."""
    curve, one = [], Run(sft.Config.learning_rate, seed)
    found[one] = measured(one, started, curve)
    return [*(round(value, 4) for value in curve), found[one]["nats_new"]]


def summary(found, curves):
    """What the notebook reads: for each setting one list per measure, in the order of the seeds."""
    _, model, tokenizer, world = world_of()
    requests = requests_of("held_out", True)
    tokens = sum(len(one.response) for one in sft.encode(tokenizer, requests))
    results = {
        "before": round(sft.cross_entropy(model, tokenizer, requests), 4),
        "floor": round(sum(world.surprise(requests)) / tokens, 4),
        "steps": [*MEASURED, 200],
        "curves": curves,
        "runs": {},
        "weights": {},
    }
    for one in sorted(found, key=lambda one: one.seed):
        row = results["runs"].setdefault(one.name, {"rate": one.rate, "seeds": []})
        if found[one] is not None:
            row["seeds"].append(one.seed)
            for name, value in found[one].items():
                row.setdefault(name, []).append(value)
    for adapter in ADAPTERS:
        moving = [p for p in policy_of(Run(0, 0, adapter=adapter)).parameters() if p.requires_grad]
        results["weights"][adapter] = sum(p.numel() for p in moving)
    return results


def main():
    torch.set_num_threads(1)
    started, found = time.perf_counter(), {}
    curves = [curve_of(seed, found, started) for seed in SEEDS]
    for one in grids():
        if one not in found:
            found[one] = measured(one, started)
    for one in chosen(found):
        if one not in found:
            found[one] = measured(one, started)
    record_sweep("sft_lora", started, settings_of(world_of()[0]), summary(found, curves))


if __name__ == "__main__":
    main()
