"""Record the sweeps of dpo_derivation, on the exact language and on reviews:
rlhf_helpers/assets/results/dpo_derivation.json."""

import copy
import time
from dataclasses import asdict, replace
from functools import cache

import torch
from torch import nn

from experiments.gpt2_sentiment_ppo import exact_config
from rlhf_helpers import models, preferences, rewards, settings, worlds
from rlhf_helpers.algorithms import dpo, ppo, reward_model, sampling
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.worlds import enumerable

SEEDS = [0, 1, 2, 3, 4]
SWEEP_SEEDS = [0, 1, 2]
BETAS = [0.02, 0.05, 0.3, 1.0]  # and the one of the settings
HELD_OUT = 64
LENGTH_BIAS = 0.4  # log-odds a word
DEAR = 8.0  # β of length-normalised DPO that drifts about as far as the main run
WRONG = 0.3  # share of the labels that are turned round
EXACT = {"vocabulary": 9, "length": 3, "beta": 0.75, "scale": 1.5, "width": 64, "spread": 0.5}
PAIRS = [10, 100, 1000, 10_000, 30_000, 100_000, 300_000]
SUPPORT = [1.0, 0.9, 0.75, 0.5, 0.25]  # share of the sequences that pairs are drawn from
TEMPERATURE = 2.0  # of the labeller that the model does not know of
MANY = 100_000


def config_of(run, seed=0):
    """The settings of the chapter's main run."""
    return dpo.Config(**dpo.AT_SCALE[run.scale], seed=seed)


def table_config(pairs, seed=0):
    """DPO of a table on the exact language. Large batches: Adam divides by the size of the
    gradient, and rare, large gradients of small ones would move the optimum."""
    return dpo.Config(
        learning_rate=0.3,
        epochs=40,
        batch_size=min(10_000, pairs),
        max_grad_norm=1e9,
        beta=EXACT["beta"],
        seed=seed,
    )


def network_config(seed=0):
    """The same for a small GPT-2."""
    return replace(table_config(MANY, seed), learning_rate=3e-3, max_grad_norm=1.0)


def ppo_config(seed=0):
    """PPO on the exact language, with the settings of the PPO chapter."""
    length, price = EXACT["length"], EXACT["beta"]
    return replace(exact_config(seed), max_new_tokens=length, kl_coefficient=price)


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "pairs_of_reviews": reward_model.PAIRS,
        "temperature": run.annotator_temperature,
        "reward": reward_model.AT_SCALE[run.scale]["learning_rate"],
        "exact": EXACT,
        "table": asdict(table_config(MANY)),
        "network": asdict(network_config()),
        "ppo": asdict(ppo_config()),
        "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS,
        "betas": BETAS,
        "held_out": HELD_OUT,
        "length_bias": LENGTH_BIAS,
        "dear": DEAR,
        "wrong": WRONG,
        "pairs": PAIRS,
        "support": SUPPORT,
        "other_temperature": TEMPERATURE,
    }


# --- the language that can be listed -------------------------------------------------------------


class Case:
    """A language with its reference, true utilities and optimum."""

    def __init__(self, seed):
        self.seed, self.beta = seed, EXACT["beta"]
        self.language = enumerable.language(EXACT["vocabulary"], EXACT["length"])
        self.table = enumerable.next_log_probs(self.network(), self.language).detach().double()
        self.reference = enumerable.sequence_log_probs(self.table, self.language)
        self.utilities = EXACT["scale"] * enumerable.utilities(self.language, seed)
        self.best = enumerable.optimal_policy(self.reference, self.utilities, self.beta)
        self.everywhere = torch.zeros_like(self.reference).log_softmax(0)

    def network(self):
        return enumerable.small_gpt2(
            EXACT["vocabulary"],
            EXACT["length"],
            self.seed,
            width=EXACT["width"],
            spread=EXACT["spread"],
        )

    def pairs(self, count, drawn_from=None, temperature=1.0):
        luck = torch.Generator().manual_seed(self.seed)
        drawn_from = self.everywhere if drawn_from is None else drawn_from
        first, second = enumerable.draw_pairs(drawn_from, count, luck)
        won = enumerable.label_pairs(self.utilities / temperature, first, second, luck)
        return torch.where(won, first, second), torch.where(won, second, first)

    def dpo(self, chosen, rejected):
        table = nn.Parameter(self.table.clone())

        def log_probs():
            return enumerable.sequence_log_probs(table, self.language)

        config = table_config(len(chosen), self.seed)
        for _ in dpo.train_exact(log_probs, [table], self.language, chosen, rejected, config):
            pass
        return log_probs().detach()

    def dpo_network(self, chosen, rejected):
        network = self.network()

        def log_probs():
            return enumerable.model_log_probs(network, self.language)

        arguments = (self.language, chosen, rejected, network_config(self.seed))
        for _ in dpo.train_exact(log_probs, network.parameters(), *arguments):
            pass
        return log_probs().detach().double()

    def strengths(self, chosen, rejected):
        """The reward of each sequence that fits the pairs best, 0 where there are none; None where
        no finite one does."""
        seen = torch.cat([chosen, rejected]).unique()
        place = torch.full((len(self.reference),), -1)
        place[seen] = torch.arange(len(seen))
        wins = torch.zeros(len(seen), len(seen), dtype=torch.float64)
        one = torch.ones(len(chosen), dtype=torch.float64)
        wins.index_put_((place[chosen], place[rejected]), one, accumulate=True)
        try:
            fitted = preferences.fit_strengths(wins)
        except ValueError:
            return None
        found = torch.zeros_like(self.reference)
        found[seen] = fitted
        return found

    def likeliest(self, chosen, rejected):
        fitted = self.strengths(chosen, rejected)
        return (
            None if fitted is None else enumerable.optimal_policy(self.reference, fitted, self.beta)
        )

    def ascent(self, learned):
        """Exact gradient ascent on the regularised objective of a learned reward."""
        table = nn.Parameter(self.table.clone())
        optimizer = torch.optim.Adam([table], lr=0.1)
        for step in range(600):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 600)
            log_probs = enumerable.sequence_log_probs(table, self.language)
            loss = -enumerable.regularised_objective(log_probs, self.reference, learned, self.beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return enumerable.sequence_log_probs(table, self.language).detach()

    def ppo(self, learned):
        network = self.network()
        judge = enumerable.reward(self.language, learned)
        tokenizer = enumerable.tokenizer(self.language)
        for _ in ppo.train(network, tokenizer, [""], judge, ppo_config(self.seed)):
            pass
        return enumerable.model_log_probs(network, self.language).detach().double()

    def describe(self, log_probs):
        if log_probs is None:
            return None
        value, start, end = (
            enumerable.regularised_objective(p, self.reference, self.utilities, self.beta).item()
            for p in (log_probs, self.reference, self.best)
        )
        return {
            "kl": round(enumerable.kl(log_probs, self.best).item(), 5),
            "closed": round((value - start) / (end - start), 5),
        }


def exact(seed, tell):
    """All runs on one language."""
    case = Case(seed)
    found = {"start": case.describe(case.reference)["kl"], "pairs": [], "support": []}
    for count in PAIRS:
        pairs = case.pairs(count)
        one = {"dpo": case.describe(case.dpo(*pairs)), "fit": case.describe(case.likeliest(*pairs))}
        found["pairs"].append(one)
        tell(f"exact {seed}: {count} pairs", one)
    for share in SUPPORT:
        found["support"].append(less_support(case, share))
        tell(f"exact {seed}: support {share}", found["support"][-1])
    pairs = case.pairs(MANY)
    learned = case.strengths(*pairs)
    found["methods"] = {
        "DPO, a table": case.describe(case.dpo(*pairs)),
        "DPO, a small GPT-2": case.describe(case.dpo_network(*pairs)),
        "learned reward, exact gradient": case.describe(case.ascent(learned)),
        "learned reward, PPO": case.describe(case.ppo(learned)),
    }
    tell(f"exact {seed}: methods", found["methods"])
    careless = case.pairs(MANY, temperature=TEMPERATURE)
    other = enumerable.optimal_policy(case.reference, case.utilities / TEMPERATURE, case.beta)
    policy = case.dpo(*careless)
    found["careless"] = {
        "dpo": case.describe(policy),
        "ascent": case.describe(case.ascent(case.strengths(*careless))),
        "dpo_from_its_own_optimum": round(enumerable.kl(policy, other).item(), 5),
    }
    tell(f"exact {seed}: careless", found["careless"])
    return found


def less_support(case, share):
    """Pairs from a random part of the sequences alone; what becomes of the others."""
    count = len(case.reference)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(case.seed))
    known = torch.zeros(count, dtype=torch.bool)
    known[order[: round(share * count)]] = True
    pairs = case.pairs(MANY, case.everywhere.masked_fill(~known, -torch.inf).log_softmax(0))
    policies = {"dpo": case.dpo(*pairs), "ascent": case.ascent(case.strengths(*pairs))}
    found = {name: case.describe(policy) for name, policy in policies.items()}
    for name, policy in (*policies.items(), ("reference", case.reference), ("best", case.best)):
        mass = policy.exp()[~known].sum().item() if share < 1 else 0.0
        found.setdefault(name, {})["unseen"] = round(mass, 5)
    return found


# --- reviews -------------------------------------------------------------------------------------


def biased_pairs(run, seed):
    """The pairs of the reward model, judged by people who like long responses."""
    policy, tokenizer = models.load(run.model)
    prompts = worlds.load(run.world).openings("train", reward_model.PAIRS, seed)
    luck = torch.Generator().manual_seed(seed)
    pairs = preferences.sample_pairs(policy, tokenizer, prompts, run.max_new_tokens, luck)
    people = [
        replace(one, length_bias=LENGTH_BIAS)
        for one in preferences.crowd(run.annotator_temperature)
    ]
    said = preferences.annotate(*pairs, rewards.true_utility(run), people, seed).preferences
    return reward_model.labelled(*pairs, said.mean(1))


def sure(data):
    """What most said, as certain; ties are left out."""
    return [one._replace(preference=round(one.preference)) for one in data if one.preference != 0.5]


def turned(data, seed):
    """Some labels the wrong way round, and which."""
    wrong = torch.rand(len(data), generator=torch.Generator().manual_seed(seed)) < WRONG
    rows = zip(data, wrong.tolist(), strict=True)
    return [
        one._replace(preference=1.0 - one.preference if w else one.preference) for one, w in rows
    ], wrong


def main():
    torch.set_num_threads(1)
    run = settings.load()
    start = time.perf_counter()

    def tell(name, found):
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {found}", flush=True)

    results = {"exact": [exact(seed, tell) for seed in SWEEP_SEEDS]} | reviews(run, tell)
    record_sweep("dpo_derivation", start, settings_of(run), results)


def reviews(run, tell):
    model, tokenizer = models.load(run.model)
    reward = reward_model.as_reward(shipped.reward_model(run), tokenizer)
    judges = {"reward": reward, "vader": rewards.vader, "quality": rewards.true_utility(run)}
    world = worlds.load(run.world)
    prompts, held_out = world.openings("train", 2000), world.openings("held_out", HELD_OUT)

    @cache
    def pairs(seed):
        return shipped.preference_pairs(run, seed)

    def judged(policy, seed):
        config = ppo.Config(max_new_tokens=run.max_new_tokens)
        found = sampling.evaluate(
            policy, model, tokenizer, held_out, judges, config, seed=1000 + seed
        )
        means = {name: round(values.mean().item(), 4) for name, values in found.scores.items()}
        words = [len(text.split()) for text in found.texts]
        kl = round(found.kl.mean().item(), 3)
        return means | {"kl": kl, "words": round(sum(words) / len(words), 2)}

    def train(policy, examples, config):
        for _ in dpo.train(policy, tokenizer, examples, config):
            pass

    def finished(name, seed, policy):
        end = judged(policy, seed)
        tell(f"{name} seed {seed}", end)
        return {"end": end}

    def offline(name, seed, data=None, **change):
        examples = dpo.encode(tokenizer, pairs(seed) if data is None else data)
        policy = copy.deepcopy(model)
        train(policy, examples, replace(config_of(run, seed), **change))
        return finished(name, seed, policy)

    def online(seed):
        policy = copy.deepcopy(model)
        config = replace(config_of(run, seed), samples_per_prompt=4)
        for _ in dpo.online(policy, tokenizer, prompts, reward, config):
            pass
        return finished("online", seed, policy)

    def rejection_sampled(seed):
        config = replace(config_of(run, seed), beta=0.5, samples_per_prompt=16)
        some = world.openings("train", 500, seed)
        examples = dpo.rejection_sampled(model, tokenizer, some, reward, config)
        policy = copy.deepcopy(model)
        train(policy, examples, config_of(run, seed))
        return finished(f"rejection-sampled, {len(examples)} pairs,", seed, policy)

    def noisy(smoothing, seed):
        data, wrong = turned(sure(pairs(seed)), seed)
        examples = dpo.encode(tokenizer, data)
        policy = copy.deepcopy(model)
        config = replace(config_of(run, seed), epochs=3, label_smoothing=smoothing)
        train(policy, examples, config)
        pad = tokenizer.pad_token_id
        now, before = (dpo.reference_log_probs(m, examples, pad) for m in (policy, model))
        margin = config.beta * ((now - before)[:, 0] - (now - before)[:, 1])
        learned = (margin[wrong] > 0).float().mean().item()
        found = {"wrong_learned": round(learned, 4), "margin_std": round(margin.std().item(), 4)}
        return finished(f"smoothing {smoothing}", seed, policy) | found

    found = {"start": judged(model, 0), "betas": BETAS}
    found["main"] = [offline("main", seed) for seed in SEEDS]
    found["by_beta"] = [[offline(f"beta {b}", s, beta=b) for s in SWEEP_SEEDS] for b in BETAS]
    found["online"] = [online(seed) for seed in SWEEP_SEEDS]
    found["rejection-sampled"] = [rejection_sampled(seed) for seed in SWEEP_SEEDS]
    found["ipo"] = [offline("ipo", s, sure(pairs(s)), variant="ipo") for s in SWEEP_SEEDS]
    found["hinge"] = [offline("hinge", s, sure(pairs(s)), variant="hinge") for s in SWEEP_SEEDS]
    found["simpo"] = [
        offline("simpo", s, sure(pairs(s)), variant="simpo", beta=2.0) for s in SWEEP_SEEDS
    ]
    normalised = {"variant": "length-normalised"}
    found["fair, length-normalised"] = [
        offline("length-normalised", s, beta=2.0, **normalised) for s in SWEEP_SEEDS
    ]
    found["length"] = {
        name: [
            offline(f"long is good, {name}", s, biased_pairs(run, s), **change) for s in SWEEP_SEEDS
        ]
        for name, change in {
            "sigmoid": {},
            "length-normalised": {"beta": 2.0} | normalised,
            "length-normalised, dearer": {"beta": DEAR} | normalised,
        }.items()
    }
    found["noise"] = {str(x): [noisy(x, seed) for seed in SWEEP_SEEDS] for x in (0.0, WRONG)}
    return found


if __name__ == "__main__":
    main()
