"""Record the sweeps of reward_model over seeds, numbers of pairs and modelling choices:
rlhf_helpers/assets/results/reward_model.json."""

import random
import time
from dataclasses import asdict, replace

import torch

from rlhf_helpers import models, preferences, rewards, settings, worlds
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.losses import bradley_terry_loss
from rlhf_helpers.rollout import write

SEEDS = [0, 1, 2]
ANNOTATORS = 5
SIZES = [250, 500, 1000, 2000, 4000, 8000]  # the notebook itself runs one of them
HELD_OUT = 2000
LENGTH_BIAS = 0.4  # log-odds a word
TIE_THRESHOLD = 0.8
MARGIN = 0.5  # of the strength that was felt
CENTRING = 0.01


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "pairs": rm.PAIRS,
        "temperature": run.annotator_temperature,
        "learning_rate": rm.AT_SCALE[run.scale]["learning_rate"],
        "config": asdict(rm.Config()),
        "seeds": SEEDS,
        "annotators": ANNOTATORS,
        "sizes": SIZES,
        "held_out": HELD_OUT,
        "length_bias": LENGTH_BIAS,
        "tie_threshold": TIE_THRESHOLD,
        "margin": MARGIN,
        "centring": CENTRING,
    }


class Bench:
    """Pairs, labels and measurements of one seed."""

    def __init__(self, run, seed):
        self.run, self.seed = run, seed
        self.policy, self.tokenizer = models.load(run.model)
        self.world, self.utility = worlds.load(run.world), rewards.true_utility(run)
        self.config = rm.Config(**rm.AT_SCALE[run.scale], seed=seed, evaluate_every=10**6)
        self.held_out = self.pairs("held_out", HELD_OUT)
        self.annotators = preferences.crowd(run.annotator_temperature, ANNOTATORS)
        one = self.annotators[:1]
        self.truth = preferences.choice_probabilities(*self.held_out, self.utility, one)[:, 0]
        said = preferences.annotate(*self.held_out, self.utility, one, seed=1000 + seed)
        self.labels = said.preferences[:, 0]

    def pairs(self, split, n):
        generator = torch.Generator().manual_seed(self.seed)
        prompts = self.world.openings(split, n, self.seed)
        return preferences.sample_pairs(
            self.policy, self.tokenizer, prompts, self.run.max_new_tokens, generator
        )

    def say(self, pairs, annotators):
        return preferences.annotate(*pairs, self.utility, annotators, self.seed)

    def train(self, data, **change):
        model, _ = rm.load(self.run.model)
        *_, last = rm.train(model, self.tokenizer, data, replace(self.config, **change))
        return model, last

    def measure(self, model, last=None):
        """What is known of a model on the held-out pairs."""
        prompts, first, second = self.held_out
        a, b = (rm.scores(model, self.tokenizer, prompts, texts) for texts in (first, second))
        gaps, p = (a - b).double(), self.truth[:, 0]
        longer = torch.tensor(
            [len(x.split()) - len(y.split()) for x, y in zip(first, second, strict=True)]
        )
        uneven = longer != 0
        found = {
            "accuracy": rm.accuracy(gaps, p),
            "ceiling": preferences.ceiling(self.truth),
            "label_accuracy": rm.accuracy(gaps, self.labels),
            "loss": bradley_terry_loss(gaps, torch.zeros_like(gaps), preference=p).item(),
            "calibration_error": rm.expected_calibration_error(gaps, self.labels),
            "temperature": rm.fit_temperature(gaps, self.labels),
            "mean_score": torch.cat([a, b]).mean().item(),
            "prefers_longer": ((gaps > 0) == (longer > 0))[uneven].double().mean().item(),
            "threshold": None if last is None else last.threshold,
        }
        return {name: value if value is None else round(value, 4) for name, value in found.items()}


def choices(bench, pairs):
    """Modelling choices, each as (name, comparisons, changes to the settings)."""
    small = [column[: rm.PAIRS] for column in pairs]
    said = bench.say(small, bench.annotators)
    felt = bench.say(small, bench.annotators[:1]).pairs
    first_only = rm.comparisons(felt)
    majority = (said.preferences.mean(1) > 0.5).double()
    biased = [replace(bench.annotators[0], length_bias=LENGTH_BIAS)]
    tying = bench.say(small, [replace(bench.annotators[0], tie_threshold=TIE_THRESHOLD)]).pairs
    ties = rm.comparisons(tying)
    with_margin = [
        one._replace(margin=MARGIN * strength)
        for one, strength in zip(first_only, felt["strength"], strict=True)
    ]
    return [
        ("one annotator", first_only, {}),
        ("five annotators, majority", rm.labelled(*small, majority), {}),
        ("five annotators, soft labels", rm.labelled(*small, said.preferences.mean(1)), {}),
        ("margin from the strength felt", with_margin, {}),
        ("centring", first_only, {"centring": CENTRING}),
        ("two epochs", first_only, {"epochs": 2}),
        ("four epochs", first_only, {"epochs": 4}),
        ("ties thrown away", [one for one in ties if one.preference != 0.5], {}),
        ("ties as half a win", ties, {}),
        ("ties by Rao-Kupper", ties, {"loss": "rao-kupper"}),
        ("length-biased annotator", rm.comparisons(bench.say(small, biased).pairs), {}),
    ]


def rankings(bench):
    """As many texts as the pairs of the other choices have, in rankings of four, drawn by
    Plackett-Luce."""
    prompts = bench.world.openings("train", rm.PAIRS // 2, bench.seed)
    generator = torch.Generator().manual_seed(bench.seed)
    texts = write(
        bench.policy,
        bench.tokenizer,
        prompts,
        bench.run.max_new_tokens,
        samples_per_prompt=4,
        generator=generator,
    )
    utilities = torch.tensor(bench.utility([p for p in prompts for _ in range(4)], texts))
    rng = random.Random(bench.seed)
    gumbel = torch.tensor([-torch.tensor(rng.expovariate(1)).log().item() for _ in texts])
    order = (
        (utilities / bench.run.annotator_temperature + gumbel)
        .view(-1, 4)
        .argsort(1, descending=True)
    )
    return [
        rm.Comparison(prompt, tuple(texts[4 * i + k] for k in ranks))
        for i, (prompt, ranks) in enumerate(zip(prompts, order.tolist(), strict=True))
    ]


def main():
    torch.set_num_threads(1)
    run = settings.load()
    start = time.perf_counter()
    results = {"sizes": SIZES, "by_size": [], "choices": {}, "seconds": []}
    for seed in SEEDS:
        bench = Bench(run, seed)
        pairs = bench.pairs("train", SIZES[-1])
        soft = rm.labelled(*pairs, bench.say(pairs, bench.annotators).preferences.mean(1))

        def note(name, found, seed=seed):
            print(f"{time.perf_counter() - start:5.0f} s  seed {seed}  {name}: {found}", flush=True)
            return found

        by_size = []
        for size in SIZES:
            begin = time.perf_counter()
            model, _ = bench.train(soft[:size])
            took = time.perf_counter() - begin
            by_size.append(note(f"{size} pairs", bench.measure(model)))
        results["by_size"].append(by_size)
        results["seconds"].append(round(took))
        for name, data, change in choices(bench, pairs):
            results["choices"].setdefault(name, []).append(
                note(name, bench.measure(*bench.train(data, **change)))
            )
        ranked = bench.train(rankings(bench), loss="plackett-luce", batch_size=16)
        results["choices"].setdefault("rankings of four", []).append(
            note("rankings of four", bench.measure(*ranked))
        )
    record_sweep("reward_model", start, settings_of(run), results)


if __name__ == "__main__":
    main()
