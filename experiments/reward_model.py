"""Record the sweeps of reward_model over seeds: numbers of pairs, passes, choices, raters, length
bias, and pairs of a policy that has moved: rlhf_helpers/assets/results/reward_model.json."""

import random
import time
from dataclasses import asdict, replace

import torch

from rlhf_helpers import models, preferences, rewards, settings, worlds
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.losses import bradley_terry_loss
from rlhf_helpers.rollout import write

SEEDS = [0, 1, 2, 3, 4]
ANNOTATORS = 5
SIZES = [250, 500, 1000, 2000]
HELD_OUT = 600
FEW = {"pairs": 800, "epochs": 1, "batch_size": 16}  # of everything but sizes and passes
OPENINGS, SAMPLES = 64, 16  # of best of n
LENGTH_BIASES = [0.0, 0.1, 0.4]  # log-odds per word
LENGTH_RATE = 0.1  # learning rate of the length's coefficient
SAME_LENGTH = 2  # words
TIE_THRESHOLD = 0.8
GRADES = (0.5, 2.0)  # felt less: about the same; less: slightly; else significantly better
MARGINS = (0.0, 1 / 3, 1.0)  # by grade, as in Llama 2
CENTRING = 0.01
WEIGHT_DECAY = 0.1
NOISE, POSITION_BIAS = 0.3, 1.0
PRAISE = (" A masterpiece.", " I recommend it.", " See it twice.")
BLAME = (" Avoid it.", " A waste of time.")
BEST_OF = 4  # responses of which the moved policy keeps one


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "pairs": rm.PAIRS,
        "passes": rm.PASSES,
        "few": FEW,
        "temperature": run.annotator_temperature,
        "learning_rate": rm.AT_SCALE[run.scale]["learning_rate"],
        "config": asdict(rm.Config()),
        "seeds": SEEDS,
        "annotators": ANNOTATORS,
        "sizes": SIZES,
        "held_out": HELD_OUT,
        "best_of_n": [OPENINGS, SAMPLES],
        "length": [*LENGTH_BIASES, LENGTH_RATE, SAME_LENGTH],
        "ties": TIE_THRESHOLD,
        "grades": [*GRADES, *MARGINS],
        "others": [CENTRING, WEIGHT_DECAY, NOISE, POSITION_BIAS],
        "verdicts": [*PRAISE, *BLAME],
        "moved": BEST_OF,
    }


class Bench:
    """Pairs, labels and measurements of one seed."""

    def __init__(self, run, seed):
        self.run, self.seed = run, seed
        self.policy, self.tokenizer = models.load(run.model)
        self.world, self.utility = worlds.load(run.world), rewards.true_utility(run)
        self.config = rm.Config(**rm.AT_SCALE[run.scale], seed=seed, evaluate_every=10**6)
        self.few = replace(self.config, epochs=FEW["epochs"], batch_size=FEW["batch_size"])
        self.held_out = self.pairs("held_out", HELD_OUT)
        self.people = preferences.crowd(run.annotator_temperature, ANNOTATORS)
        self.truth = self.chances(self.held_out, self.people[0])
        self.labels = self.say(self.held_out, self.people[:1], 1000).preferences[:, 0]

    def pairs(self, split, n):
        generator = torch.Generator().manual_seed(self.seed)
        prompts = self.world.openings(split, n, self.seed)
        return preferences.sample_pairs(
            self.policy, self.tokenizer, prompts, self.run.max_new_tokens, generator
        )

    def samples(self, split, prompts, each):
        """[prompts] openings, each with as many responses of the policy."""
        openings = self.world.openings(split, prompts, self.seed)
        luck = torch.Generator().manual_seed(self.seed)
        limit, both = self.run.max_new_tokens, {"samples_per_prompt": each, "generator": luck}
        texts = write(self.policy, self.tokenizer, openings, limit, **both)
        return openings, [list(texts[i : i + each]) for i in range(0, len(texts), each)]

    def say(self, pairs, annotators, shift=0):
        return preferences.annotate(*pairs, self.utility, annotators, self.seed + shift)

    def chances(self, pairs, annotator):
        return preferences.choice_probabilities(*pairs, self.utility, [annotator])[:, 0]

    def quality(self, prompts, texts):
        return rewards.score(self.utility, prompts, texts)

    def train(self, data, config=None, **change):
        model, _ = rm.load(self.run.model)
        *_, last = rm.train(model, self.tokenizer, data, replace(config or self.few, **change))
        return model, last

    def gaps(self, model, pairs):
        prompts, first, second = pairs
        a, b = (rm.scores(model, self.tokenizer, prompts, texts) for texts in (first, second))
        return a.double(), b.double()

    def measure(self, model, last=None):
        """What is known of a model on the held-out pairs, against a fair annotator's truth."""
        a, b = self.gaps(model, self.held_out)
        gaps, p = a - b, self.truth[:, 0]
        longer = words(self.held_out)
        right = ((gaps > 0) == (p > 0.5)).double()
        better = (p - 0.5) * longer
        found = {
            "way": way(gaps, self.truth),
            "label_accuracy": rm.accuracy(gaps, self.labels),
            "loss": bradley_terry_loss(gaps, torch.zeros_like(gaps), preference=p).item(),
            "calibration_error": rm.expected_calibration_error(gaps, self.labels),
            "temperature": rm.fit_temperature(gaps, p),
            "mean_score": torch.cat([a, b]).mean().item(),
            "better_longer": right[better > 0].mean().item(),
            "better_shorter": right[better < 0].mean().item(),
            "threshold": None if last is None else last.threshold,
        }
        return {name: value if value is None else round(value, 4) for name, value in found.items()}


def way(gaps, truth):
    """Accuracy as a share of the way from a coin toss to the noise ceiling."""
    best = preferences.ceiling(truth)
    return (rm.accuracy(gaps, truth[:, 0]) - 0.5) / (best - 0.5)


def words(pairs):
    """How many words the first response has more than the second."""
    return torch.tensor([len(x.split()) - len(y.split()) for x, y in zip(*pairs[1:], strict=True)])


def cut(pairs, count):
    return [column[:count] for column in pairs]


def mean(values):
    return round(values.mean().item(), 4)


# --- parts, each of one seed ---------------------------------------------------------------------


def by_size(bench):
    """Number of pairs: accuracy, and what the best of n by this score is truly worth."""
    pairs = bench.pairs("train", SIZES[-1])
    soft = rm.labelled(*pairs, bench.say(pairs, bench.people).preferences.mean(1))
    openings, texts = bench.samples("held_out", OPENINGS, SAMPLES)
    flat = [text for row in texts for text in row]
    prompts = [prompt for prompt in openings for _ in range(SAMPLES)]
    quality = bench.quality(prompts, flat).view(OPENINGS, SAMPLES)

    def worth(model):
        found = rm.scores(model, bench.tokenizer, prompts, flat).view(OPENINGS, SAMPLES)
        return mean(quality.gather(1, found.argmax(1, keepdim=True)))

    rows = []
    for size in SIZES:
        model, _ = bench.train(soft[:size], bench.config, epochs=rm.PASSES)
        rows.append(bench.measure(model) | {"best_of_n": worth(model)})
    few = cut(pairs, FEW["pairs"])
    biased = replace(bench.people[0], length_bias=LENGTH_BIASES[-1])
    model, _ = bench.train(rm.comparisons(bench.say(few, [biased]).pairs))
    return {
        "sizes": rows,
        "length_biased": bench.measure(model) | {"best_of_n": worth(model)},
        "random": mean(quality),
        "perfect": mean(quality.amax(1)),
    }


def passes(bench):
    """How far scores rise from quality 1 to 2 and from −2 to −1, where the truth is 1/τ."""
    pairs = bench.pairs("train", rm.PAIRS)
    said = bench.say(pairs, bench.people).preferences.mean(1)
    truth = bench.chances(pairs, bench.people[0])[:, 0]
    test = bench.samples("held_out", 750, 2)
    prompts = [prompt for prompt in test[0] for _ in range(2)]
    texts = [text for row in test[1] for text in row]
    quality = bench.quality(prompts, texts)
    ways = {
        "one pass": (said, 1),
        "three passes": (said, rm.PASSES),
        "one pass, exact": (truth, 1),
        "three passes, exact": (truth, rm.PASSES),
    }
    found = {}
    for name, (labels, epochs) in ways.items():
        model, _ = bench.train(rm.labelled(*pairs, labels), bench.config, epochs=epochs)
        score = rm.scores(model, bench.tokenizer, prompts, texts)
        at = {level: mean(score[quality == level]) for level in (-2, -1, 1, 2)}
        steps = {"top": round(at[2] - at[1], 4), "bottom": round(at[-1] - at[-2], 4)}
        found[name] = bench.measure(model) | steps
    counts = {str(level): int((quality == level).sum()) for level in (-2, -1, 1, 2)}
    return found | {"counts": counts}


def choices(bench):
    """What is made of answers, all about the same pairs."""
    pairs = bench.pairs("train", 2 * FEW["pairs"])
    few = cut(pairs, FEW["pairs"])
    said = bench.say(few, bench.people)
    votes = said.preferences.mean(1)
    majority = (votes > 0.5).double()
    felt = bench.say(few, bench.people[:1]).pairs
    first_only = rm.comparisons(felt)
    ties = rm.comparisons(bench.say(pairs, [tying(bench)]).pairs)
    decided = [one for one in ties if one.preference != 0.5][: FEW["pairs"]]
    certain = [
        one._replace(weight=abs(2 * share - 1))
        for one, share in zip(rm.labelled(*few, majority), votes.tolist(), strict=True)
    ]
    grades = [sum(strength > edge for edge in GRADES) for strength in felt["strength"]]
    kept = agreed(bench, few, grades)
    rows = {
        "one person": (first_only, {}),
        "one person, two passes": (first_only, {"epochs": 2}),
        "one person, four passes": (first_only, {"epochs": 4}),
        "five people, majority": (rm.labelled(*few, majority), {}),
        "five people, majority weighted": (certain, {}),
        "five people, shares": (rm.labelled(*few, votes), {}),
        "grades as margins": (with_field(first_only, "margin", grades, MARGINS), {}),
        "grades as soft labels": (with_field(first_only, "preference", grades, kept), {}),
        "ties thrown away": (decided, {}),
        "ties as half a win": (ties[: FEW["pairs"]], {}),
        "ties by Rao-Kupper": (ties[: FEW["pairs"]], {"loss": "rao-kupper"}),
        "rankings of four": (rankings(bench), {"loss": "plackett-luce", "batch_size": 8}),
        "centring": (first_only, {"centring": CENTRING}),
        "weight decay": (first_only, {"weight_decay": WEIGHT_DECAY}),
    }
    rows |= {name: (data, {}) for name, data in others(bench, few).items()}
    found = {
        name: bench.measure(*bench.train(data, **change)) for name, (data, change) in rows.items()
    }
    return found | {"grades": [round(share, 3) for share in kept]}


def tying(bench):
    return replace(bench.people[0], tie_threshold=TIE_THRESHOLD)


def with_field(data, field, grades, values):
    return [one._replace(**{field: values[grade]}) for one, grade in zip(data, grades, strict=True)]


def agreed(bench, pairs, grades):
    """How often a second person agrees with an answer of each grade."""
    both = bench.say(pairs, bench.people[:2]).preferences
    same, grade = (both[:, 0] == both[:, 1]).double(), torch.tensor(grades)
    return [same[grade == g].mean().item() for g in range(len(MARGINS))]


def rankings(bench):
    """As many texts as the pairs of the other choices have, in rankings of four, drawn by
    Plackett-Luce."""
    prompts, texts = bench.samples("train", FEW["pairs"] // 2, 4)
    flat = [text for row in texts for text in row]
    utilities = bench.quality([p for p in prompts for _ in range(4)], flat)
    rng = random.Random(bench.seed)
    gumbel = torch.tensor([-torch.tensor(rng.expovariate(1)).log().item() for _ in flat])
    felt = (utilities / bench.run.annotator_temperature + gumbel).view(-1, 4)
    ranked = felt.argsort(1, descending=True).tolist()
    return [
        rm.Comparison(prompt, tuple(row[k] for k in order))
        for prompt, row, order in zip(prompts, texts, ranked, strict=True)
        if len(set(row)) == 4
    ]


def others(bench, pairs):
    """Raters with faults, and raters that are models."""
    careless = replace(bench.people[4], name="careless", noise=1.0)
    group = [*bench.people[:4], careless]
    said = bench.say(pairs, group).preferences
    prompts, first, second = pairs
    vader = [rewards.score(rewards.vader, prompts, texts) for texts in (first, second)]
    judge = [verdicts(bench.policy, bench.tokenizer, prompts, texts) for texts in (first, second)]

    def by_one(**fault):
        return rm.comparisons(bench.say(pairs, [replace(bench.people[0], **fault)]).pairs)

    def by(scores):
        return rm.labelled(*pairs, 0.5 + 0.5 * (scores[0] - scores[1]).sign())

    return {
        "answers without looking": by_one(noise=NOISE),
        "prefers what is shown first": by_one(position_bias=POSITION_BIAS),
        "five people, one careless": rm.labelled(*pairs, said.mean(1)),
        "the same without the careless one": rm.labelled(*pairs, said[:, :4].mean(1)),
        "the language model as a rater": by(judge),
        "VADER as a rater": by(vader),
    }


@torch.no_grad()
def verdicts(model, tokenizer, prompts, texts, batch=64):
    """Log-odds of praise against blame as the next sentence of each review, by a language model."""
    whole, found = [a + b for a, b in zip(prompts, texts, strict=True)], []
    for verdict in (*PRAISE, *BLAME):
        ending = tokenizer(verdict).input_ids
        column = []
        for start in range(0, len(whole), batch):
            ids = [tokenizer(text).input_ids + ending for text in whole[start : start + batch]]
            tokens, mask = rm.collate(ids, tokenizer.pad_token_id, "left")
            column.append(completion_log_probs(model, tokens, mask, len(ending)).sum(1))
        found.append(torch.cat(column))
    praise, blame = torch.stack(found).double().split([len(PRAISE), len(BLAME)])
    return praise.logsumexp(0) - blame.logsumexp(0)


def length(bench):
    """A rater who likes long responses, and what can be done about it."""
    few = bench.pairs("train", FEW["pairs"])
    longer = words(few)
    found = {}
    for bias in LENGTH_BIASES:
        rater = replace(bench.people[0], length_bias=bias)
        data = rm.comparisons(bench.say(few, [rater]).pairs)
        said = bench.say(few, [rater]).preferences[:, 0]
        own = bench.chances(bench.held_out, rater)
        model, _ = bench.train(data)
        a, b = bench.gaps(model, bench.held_out)
        found[f"bias {bias:g}"] = bench.measure(model) | {
            "own_way": round(way(a - b, own), 4),
            "own_ceiling": round(preferences.ceiling(own), 4),
            "agrees": agrees(bench, few, rater),
            "prefers_longer": mean(
                (said - 0.5).sign()[longer != 0] * longer[longer != 0].sign() / 2 + 0.5
            ),
        }
        model, coefficient = without_length(bench, few, said)
        found[f"bias {bias:g}, length term"] = bench.measure(model) | {"coefficient": coefficient}
    close = [i for i, more in enumerate(longer.tolist()) if abs(more) <= SAME_LENGTH]
    fair = rm.comparisons(bench.say(few, bench.people[:1]).pairs)
    half = len(data) // 2
    remedies = {
        "pairs of one length": [data[i] for i in close],
        "as many pairs of any length": data[: len(close)],
        "half asked again": fair[:half] + data[half:],
    }
    for name, rows in remedies.items():
        found[name] = bench.measure(bench.train(rows)[0]) | {"pairs": len(rows)}
    return found


def agrees(bench, pairs, rater):
    """How often a rater and a fair one give the same answer, by their probabilities."""
    p, q = bench.chances(pairs, bench.people[0])[:, 0], bench.chances(pairs, rater)[:, 0]
    return mean(p * q + (1 - p) * (1 - q))


def without_length(bench, pairs, said):
    """A model trained with a coefficient for the difference in words, which is then dropped."""
    model, _ = rm.load(bench.run.model)
    prompts, first, second = pairs
    texts = [rm.encode(bench.tokenizer, prompts, column) for column in (first, second)]
    longer, coefficient = words(pairs).float(), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters()}, {"params": [coefficient], "lr": LENGTH_RATE}],
        lr=bench.config.learning_rate,
        weight_decay=0.0,
        betas=rm.BETAS,
    )
    size = FEW["batch_size"]
    steps = len(first) // size
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(bench.seed))
    for rows in order[: steps * size].split(size):
        ids = [side[i] for side in texts for i in rows.tolist()]
        scores = rm.last_scores(model, *rm.collate(ids, bench.tokenizer.pad_token_id))
        gaps = scores[:size] - scores[size:] + coefficient * longer[rows]
        loss = bradley_terry_loss(gaps, torch.zeros_like(gaps), preference=said[rows].float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), bench.config.max_grad_norm)
        optimizer.step()
        falling.step()
    return model, round(coefficient.item(), 4)


def moved(bench):
    """Pairs of the policy as it was, judged on pairs of one that has moved: the best of a few by a
    first reward model. The second half of the pairs is from either."""
    half = FEW["pairs"] // 2
    old = bench.pairs("train", 2 * half)
    first, _ = bench.train(rm.labelled(*old, bench.say(old, bench.people).preferences.mean(1)))

    def best(split, n):
        openings, texts = bench.samples(split, n, 2 * BEST_OF)
        rows = []
        for prompt, row in zip(openings, texts, strict=True):
            score = rm.scores(first, bench.tokenizer, [prompt] * len(row), row).view(2, BEST_OF)
            one, two = (row[i * BEST_OF + int(k)] for i, k in enumerate(score.argmax(1)))
            if preferences.pair_problem(one, two) is None:
                rows.append((prompt, one, two))
        return [list(column) for column in zip(*rows, strict=True)]

    new_test, new = best("held_out", HELD_OUT // 2), best("train", half)
    truth = bench.chances(new_test, bench.people[0])
    mixed = [a[:half] + b for a, b in zip(old, new, strict=True)]
    again, _ = bench.train(rm.labelled(*mixed, bench.say(mixed, bench.people).preferences.mean(1)))

    def on_new(model):
        a, b = bench.gaps(model, new_test)
        return round(way(a - b, truth), 4)

    openings, texts = new_test[0] * 2, new_test[1] + new_test[2]
    return {
        "quality": [
            mean(bench.quality(bench.held_out[0] * 2, bench.held_out[1] + bench.held_out[2])),
            mean(bench.quality(openings, texts)),
        ],
        "ceilings": [round(preferences.ceiling(t), 4) for t in (bench.truth, truth)],
        "old pairs": [bench.measure(first)["way"], on_new(first)],
        "half new pairs": [bench.measure(again)["way"], on_new(again)],
    }


PARTS = (by_size, passes, choices, length, moved)


def main():
    torch.set_num_threads(1)
    run = settings.load()
    start = time.perf_counter()
    results = {part.__name__: [] for part in PARTS}
    for seed in SEEDS:
        bench = Bench(run, seed)
        for part in PARTS:
            results[part.__name__].append(part(bench))
            print(f"{time.perf_counter() - start:5.0f} s  seed {seed}  {part.__name__}", flush=True)
    record_sweep("reward_model", start, settings_of(run), results)


if __name__ == "__main__":
    main()
