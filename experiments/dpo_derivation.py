"""Record the sweeps of dpo_derivation, on the exact language and on reviews:
rlhf_helpers/assets/results/dpo_derivation.json."""

import copy
import time
from dataclasses import asdict, replace
from functools import cache, cached_property

import torch
from torch import nn

from rlhf_helpers import models, preferences, rewards, settings, worlds
from rlhf_helpers.algorithms import dpo, ppo, reward_model, sampling
from rlhf_helpers.algorithms._loop import set_learning_rate
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.losses import bradley_terry_loss
from rlhf_helpers.worlds import enumerable

SEEDS = [0, 1, 2, 3, 4]
SWEEP_SEEDS = [0, 1, 2]
REJECTION_SEEDS = [0]  # 32,000 samples each
EXACT_SEEDS = [1, 2, 3, 4, 5]  # of languages; the first is that of the token MDP
PPO_SEEDS = [1, 2]  # those on which the loop of PPO runs, too
BETAS = [0.02, 0.05, 0.3, 1.0]  # and the one of the settings
HELD_OUT = 64
HELD_OUT_PAIRS = 500
LENGTH_BIAS = 0.4  # log-odds a word
DEAR = 8.0  # β of length-normalised DPO that drifts about as far as the main run
WRONG = 0.3  # share of the labels that are turned round
# the language of the token MDP, with utilities that put the optimum two nats away
EXACT = {
    "vocabulary": 5,
    "length": 4,
    "beta": 0.75,
    "scale": 1.5,
    "structure": 0.5,
    "width": 32,
    "spread": 1.0,
}
PAIRS = [10, 100, 1000, 10_000, 30_000, 100_000, 300_000]
STEPS = 400  # for each number of pairs
SPREADS = [0.75, 1.5, 3.0]  # of the prior on strengths; the middle one is the utilities' own
SUPPORT = [1.0, 0.9, 0.75, 0.5, 0.25]  # share of the sequences that pairs are drawn from
TEMPERATURE = 2.0  # of the labeller that the model does not know of
MANY = 100_000


def config_of(run, seed=0):
    """The settings of the chapter's main run."""
    return dpo.Config(**dpo.AT_SCALE[run.scale], seed=seed)


def table_config(seed=0):
    """DPO of a table on the exact language; a pass is a step."""
    return dpo.Config(
        learning_rate=0.3, epochs=STEPS, max_grad_norm=1e9, beta=EXACT["beta"], seed=seed
    )


def network_config(seed=0):
    """The same for a small GPT-2."""
    return replace(table_config(seed), learning_rate=3e-3, max_grad_norm=1.0)


def ppo_config(seed=0):
    """PPO on the exact language."""
    return ppo.Config(
        iterations=500,
        prompts=4,
        samples_per_prompt=64,
        max_new_tokens=EXACT["length"],
        learning_rate=3e-3,
        value_learning_rate=3e-3,
        lam=1.0,
        kl_coefficient=EXACT["beta"],
        seed=seed,
    )


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "pairs_of_reviews": reward_model.PAIRS,
        "temperature": run.annotator_temperature,
        "reward": reward_model.AT_SCALE[run.scale]["learning_rate"],
        "exact": EXACT,
        "table": asdict(table_config()),
        "network": asdict(network_config()),
        "ppo": asdict(ppo_config()),
        "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS,
        "rejection_seeds": REJECTION_SEEDS,
        "exact_seeds": EXACT_SEEDS,
        "ppo_seeds": PPO_SEEDS,
        "betas": BETAS,
        "held_out": HELD_OUT,
        "held_out_pairs": HELD_OUT_PAIRS,
        "length_bias": LENGTH_BIAS,
        "dear": DEAR,
        "wrong": WRONG,
        "pairs": PAIRS,
        "spreads": SPREADS,
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
        utilities = enumerable.utilities(self.language, seed, EXACT["structure"])
        self.utilities = EXACT["scale"] * utilities
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

    def wins(self, chosen, rejected):
        """[Y, Y], how often the one of a row was preferred to that of a column."""
        count, one = len(self.reference), torch.ones(len(chosen), dtype=torch.float64)
        found = torch.zeros(count, count, dtype=torch.float64)
        return found.index_put_((chosen, rejected), one, accumulate=True)

    def steps(self, log_probs, parameters, wins, config):
        """DPO on all pairs at once, so that a step costs the same however many there are: the
        policy after each step."""
        parameters = list(parameters)
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        for step in range(config.epochs):
            set_learning_rate(optimizer, step, config.epochs, config.warm_up)
            implicit = config.beta * (log_probs().double() - self.reference)
            first, second = torch.broadcast_tensors(implicit[:, None], implicit)
            loss = bradley_terry_loss(first, second, weight=wins)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            yield log_probs().detach().double()

    def dpo_steps(self, chosen, rejected):
        table = nn.Parameter(self.table.clone())
        config = table_config(self.seed)
        wins = self.wins(chosen, rejected)
        yield from self.steps(
            lambda: enumerable.sequence_log_probs(table, self.language), [table], wins, config
        )

    def dpo(self, chosen, rejected):
        *_, policy = self.dpo_steps(chosen, rejected)
        return policy

    def dpo_network(self, chosen, rejected):
        network, config = self.network(), network_config(self.seed)
        wins = self.wins(chosen, rejected)
        *_, policy = self.steps(
            lambda: enumerable.model_log_probs(network, self.language),
            network.parameters(),
            wins,
            config,
        )
        return policy

    def strengths(self, chosen, rejected, spread=None):
        """The reward of each sequence that fits the pairs best, 0 where there are none; None where
        no finite one does. With a spread, the most probable under a normal prior."""
        seen = torch.cat([chosen, rejected]).unique()
        try:
            fitted = preferences.fit_strengths(self.wins(chosen, rejected)[seen][:, seen], spread)
        except ValueError:
            return None
        found = torch.zeros_like(self.reference)
        found[seen] = fitted
        return found

    def optimum_of(self, strengths):
        return enumerable.optimal_policy(self.reference, strengths, self.beta)

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
        value, start, end = (
            enumerable.regularised_objective(p, self.reference, self.utilities, self.beta).item()
            for p in (log_probs, self.reference, self.best)
        )
        return {
            "kl": nats(log_probs, self.best),
            "closed": round((value - start) / (end - start), 5),
        }


def nats(log_p, log_q):
    # between nearly equal policies rounding could leave a little below 0
    return round(max(0.0, enumerable.kl(log_p, log_q).item()), 5)


def few(case, count):
    """One number of pairs: DPO, stopped or not, and fits with and without a prior."""
    chosen, rejected = case.pairs(count)
    path = list(case.dpo_steps(chosen, rejected))
    distances = [nats(case.reference, case.best), *(nats(p, case.best) for p in path)]
    best = min(range(len(distances)), key=distances.__getitem__)
    fitted = case.strengths(chosen, rejected)
    found = {"dpo": case.describe(path[-1]), "best step": {"kl": distances[best], "step": best}}
    found["held-out step"] = held_out_step(case, chosen, rejected)
    found["fit"] = fitted if fitted is None else case.describe(case.optimum_of(fitted))
    found["dpo from fit"] = None if fitted is None else nats(path[-1], case.optimum_of(fitted))
    found["prior"] = {
        str(spread): case.describe(case.optimum_of(case.strengths(chosen, rejected, spread)))["kl"]
        for spread in SPREADS
    }
    return found | {"winners": winners(case, path[-1], chosen, rejected)}


def held_out_step(case, chosen, rejected):
    """DPO on four fifths of the pairs, stopped where the loss on the last fifth is smallest."""
    kept = len(chosen) // 5
    losses, distances = [], []

    def look(policy):
        gap = case.beta * (policy - case.reference)
        z = gap[chosen[:kept]] - gap[rejected[:kept]]
        losses.append(-nn.functional.logsigmoid(z).mean().item())
        distances.append(nats(policy, case.best))

    look(case.reference)
    for policy in case.dpo_steps(chosen[kept:], rejected[kept:]):
        look(policy)
    step = min(range(len(losses)), key=losses.__getitem__)
    return {"kl": distances[step], "step": step}


def winners(case, policy, chosen, rejected):
    """Who holds the probability: the texts that won and never lost, and those that lost and never
    won; and how far from π* the policy would be without the latter."""
    won, lost = (torch.zeros_like(policy, dtype=torch.bool) for _ in range(2))
    won[chosen], lost[rejected] = True, True
    only_won, only_lost = won & ~lost, lost & ~won
    without = case.reference.masked_fill(only_lost, -torch.inf).log_softmax(0)
    part = policy.exp() * (policy - case.best)
    held = {
        name: {
            "won": round(p.exp()[only_won].sum().item(), 4),
            "lost": round(p.exp()[only_lost].sum().item(), 4),
        }
        for name, p in (("dpo", policy), ("reference", case.reference), ("best", case.best))
    }
    return held | {
        "texts": int(only_won.sum()),
        "kl of the winners": round(part[only_won].sum().item(), 4),
        "kl, losers removed": nats(without, case.best),
    }


def exact(seed, tell):
    """All runs on one language."""
    case = Case(seed)
    found = {"start": nats(case.reference, case.best), "pairs": [], "support": []}
    for count in PAIRS:
        found["pairs"].append(few(case, count))
        tell(f"exact {seed}: {count} pairs", found["pairs"][-1])
    for share in SUPPORT:
        found["support"].append(less_support(case, share))
        tell(f"exact {seed}: support {share}", found["support"][-1])
    found["methods"] = methods(case)
    tell(f"exact {seed}: methods", found["methods"])
    careless = case.pairs(MANY, temperature=TEMPERATURE)
    other = enumerable.optimal_policy(case.reference, case.utilities / TEMPERATURE, case.beta)
    policy, fitted = case.dpo(*careless), case.optimum_of(case.strengths(*careless))
    found["careless"] = {
        "dpo": case.describe(policy),
        "fit": case.describe(fitted),
        "dpo from fit": nats(policy, fitted),
        "dpo_from_its_own_optimum": nats(policy, other),
    }
    tell(f"exact {seed}: careless", found["careless"])
    return found


def methods(case):
    """The same pairs in several ways; how far each ends from π* and from the learned reward's own
    optimum, which is where RLHF goes."""
    pairs = case.pairs(MANY)
    learned = case.strengths(*pairs)
    goal = case.optimum_of(learned)
    policies = {
        "DPO, a table": case.dpo(*pairs),
        "DPO, a small GPT-2": case.dpo_network(*pairs),
        "learned reward, exact gradient": case.ascent(learned),
    }
    return {
        name: case.describe(policy) | {"from fit": nats(policy, goal)}
        for name, policy in policies.items()
    }


def by_ppo(seed):
    """The loop of PPO, with the reward that the same pairs teach."""
    case = Case(seed)
    learned = case.strengths(*case.pairs(MANY))
    policy = case.ppo(learned)
    return case.describe(policy) | {"from fit": nats(policy, case.optimum_of(learned))}


def less_support(case, share):
    """Pairs from a random part of the sequences alone; what becomes of the others."""
    count = len(case.reference)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(case.seed))
    known = torch.zeros(count, dtype=torch.bool)
    known[order[: round(share * count)]] = True
    pairs = case.pairs(MANY, case.everywhere.masked_fill(~known, -torch.inf).log_softmax(0))
    policies = {"dpo": case.dpo(*pairs), "fit": case.optimum_of(case.strengths(*pairs))}
    found = {name: case.describe(policy) for name, policy in policies.items()}
    found["dpo from fit"] = nats(policies["dpo"], policies["fit"])
    for name, policy in (*policies.items(), ("reference", case.reference), ("best", case.best)):
        mass = policy.exp()[~known].sum().item() if share < 1 else 0.0
        found.setdefault(name, {})["unseen"] = round(mass, 5)
    return found


# --- reviews -------------------------------------------------------------------------------------


class Reviews:
    """The language model, its judges and its pairs; each method below is one kind of run."""

    def __init__(self, run, tell):
        self.run, self.tell = run, tell
        self.model, self.tokenizer = models.load(run.model)
        self.utility = rewards.true_utility(run)
        self.reward = reward_model.as_reward(shipped.reward_model(run), self.tokenizer)
        self.world = worlds.load(run.world)
        self.prompts = self.world.openings("train", 2000)
        self.held_out = self.world.openings("held_out", HELD_OUT)
        self.pairs = cache(lambda seed: shipped.preference_pairs(run, seed))

    def annotators(self, prompts, completions, **columns):
        """The log-odds that an annotator feels, as a reward."""
        found = self.utility(prompts, completions, **columns)
        return [u / self.run.annotator_temperature for u in found]

    @cached_property
    def test_pairs(self):
        """Pairs about films that nothing was trained on, and the true chances of the first."""
        luck = torch.Generator().manual_seed(0)
        prompts = self.world.openings("held_out", HELD_OUT_PAIRS)
        limit = self.run.max_new_tokens
        pairs = preferences.sample_pairs(self.model, self.tokenizer, prompts, limit, luck)
        people = preferences.crowd(self.run.annotator_temperature, 1)
        return pairs, preferences.choice_probabilities(*pairs, self.utility, people)[:, 0]

    def judged(self, policy, seed):
        judges = {"reward": self.reward, "vader": rewards.vader, "quality": self.utility}
        found = sampling.evaluate(
            policy,
            self.model,
            self.tokenizer,
            self.held_out,
            judges,
            ppo.Config(max_new_tokens=self.run.max_new_tokens),
            seed=1000 + seed,
        )
        means = {name: round(values.mean().item(), 4) for name, values in found.scores.items()}
        words = [len(text.split()) for text in found.texts]
        kl = round(found.kl.mean().item(), 3)
        return means | {"kl": kl, "words": round(sum(words) / len(words), 2)}

    def finished(self, name, seed, policy):
        end = self.judged(policy, seed)
        self.tell(f"{name} seed {seed}", end)
        return {"end": end}

    def trained(self, examples, config):
        policy = copy.deepcopy(self.model)
        return policy, list(dpo.train(policy, self.tokenizer, examples, config))

    def offline(self, name, seed, data=None, **change):
        examples = dpo.encode(self.tokenizer, self.pairs(seed) if data is None else data)
        policy, _ = self.trained(examples, replace(config_of(self.run, seed), **change))
        return self.finished(name, seed, policy)

    def main(self, seed):
        """The main run: what becomes of both log-probabilities, and the implicit reward as a
        reward model."""
        examples = dpo.encode(self.tokenizer, self.pairs(seed))
        policy, history = self.trained(examples, config_of(self.run, seed))
        found = self.finished("main", seed, policy)
        for side in ("chosen", "rejected"):
            values = torch.tensor([getattr(one, f"{side}_log_prob") for one in history])
            found[f"{side}_change"] = round((values[-8:].mean() - values[:8].mean()).item(), 3)
        return found | {"implicit": self.implicit(policy)}

    def implicit(self, policy):
        """β times the log-ratio as a reward model, on held-out pairs, and the reward model."""
        pairs, chances = self.test_pairs
        data = reward_model.labelled(*pairs, torch.ones(len(pairs[0])))
        pad, examples = self.tokenizer.pad_token_id, dpo.encode(self.tokenizer, data)
        now, before = (dpo.reference_log_probs(m, examples, pad) for m in (policy, self.model))
        ratio = config_of(self.run).beta * (now - before)
        of_model = [rewards.score(self.reward, pairs[0], side) for side in pairs[1:]]
        p, top = chances[:, 0], preferences.ceiling(chances)
        gaps = {"policy": ratio[:, 0] - ratio[:, 1], "reward model": of_model[0] - of_model[1]}
        found = {"ceiling": round(top, 4)}
        for name, gap in gaps.items():
            right, tau = (
                reward_model.accuracy(gap.double(), p),
                reward_model.fit_temperature(gap.double(), p),
            )
            skill = (right - 0.5) / (top - 0.5)
            found[name] = {
                "accuracy": round(right, 4),
                "skill": round(skill, 4),
                "temperature": round(tau, 3),
            }
        return found

    def online(self, name, seed, judge):
        policy = copy.deepcopy(self.model)
        config = replace(config_of(self.run, seed), samples_per_prompt=4)
        history = list(dpo.online(policy, self.tokenizer, self.prompts, judge, config))
        curves = {
            f"{side}_curve": [round(getattr(one, f"{side}_log_prob"), 2) for one in history]
            for side in ("chosen", "rejected")
        }
        return self.finished(name, seed, policy) | curves

    def of_reference(self, name, seed, judge):
        """As many pairs as the online loop has, made and labelled in the same way, but of the
        reference's samples."""
        config = replace(config_of(self.run, seed), samples_per_prompt=4)
        luck, examples = torch.Generator().manual_seed(seed), []
        for begin in range(config.iterations):
            rows = range(begin * config.prompts, (begin + 1) * config.prompts)
            some = [self.prompts[i % len(self.prompts)] for i in rows]
            found = dpo.answers(self.model, self.tokenizer, some, judge, config, luck)
            scores = found[1]
            examples += dpo.pairs_of(*found, scores.argmax(1), scores.argmin(1))[0]
        policy, history = self.trained(examples, config)
        return self.finished(name, seed, policy) | {"steps": len(history)}

    def rejection_sampled(self, seed):
        """Sampled in four parts, for want of memory."""
        config = replace(config_of(self.run), beta=0.5, samples_per_prompt=16)
        some, examples = self.world.openings("train", 2000, seed), []
        for part in range(4):
            settings_of_part = replace(config, seed=4 * seed + part)
            openings = some[500 * part : 500 * (part + 1)]
            examples += dpo.rejection_sampled(
                self.model, self.tokenizer, openings, self.reward, settings_of_part
            )
        policy, history = self.trained(examples, config_of(self.run, seed))
        found = self.finished("rejection-sampled", seed, policy)
        return found | {"pairs": len(examples), "steps": len(history)}

    def noisy(self, name, seed, **change):
        """Some labels the wrong way round, and whether the policy follows those."""
        data, wrong = turned(sure(self.pairs(seed)), seed)
        examples = dpo.encode(self.tokenizer, data)
        config = replace(config_of(self.run, seed), **change)
        policy, _ = self.trained(examples, config)
        pad = self.tokenizer.pad_token_id
        now, before = (dpo.reference_log_probs(m, examples, pad) for m in (policy, self.model))
        margin = config.beta * ((now - before)[:, 0] - (now - before)[:, 1])
        learned = (margin[wrong] > 0).float().mean().item()
        found = {"wrong_learned": round(learned, 4), "margin_std": round(margin.std().item(), 4)}
        return self.finished(name, seed, policy) | found

    def biased_pairs(self, seed):
        """The pairs of the reward model, judged by people who like long responses."""
        prompts = self.world.openings("train", reward_model.PAIRS, seed)
        luck, limit = torch.Generator().manual_seed(seed), self.run.max_new_tokens
        pairs = preferences.sample_pairs(self.model, self.tokenizer, prompts, limit, luck)
        people = [
            replace(one, length_bias=LENGTH_BIAS)
            for one in preferences.crowd(self.run.annotator_temperature)
        ]
        said = preferences.annotate(*pairs, self.utility, people, seed).preferences
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


def kinds(bench):
    """Every kind of run on reviews: name -> (seeds, what a seed gives)."""
    simple = {"variant": "length-normalised"}
    certain = cache(lambda seed: sure(bench.pairs(seed)))
    liked_long = cache(bench.biased_pairs)

    def offline(name, data=None, **change):
        def one(seed):
            return bench.offline(name, seed, None if data is None else data(seed), **change)

        return SWEEP_SEEDS, one

    def noisy(name, **change):
        return SWEEP_SEEDS, lambda seed: bench.noisy(name, seed, **change)

    def sampled(kind, name, judge):
        return SWEEP_SEEDS, lambda seed: kind(name, seed, judge)

    return {
        "main": (SEEDS, bench.main),
        **{f"beta {b:g}": offline(f"beta {b:g}", beta=b) for b in BETAS},
        "online": sampled(bench.online, "online", bench.reward),
        "own samples, annotators": sampled(
            bench.online, "own samples, annotators", bench.annotators
        ),
        "reference's samples, reward model": sampled(
            bench.of_reference, "reference's samples, reward model", bench.reward
        ),
        "reference's samples, annotators": sampled(
            bench.of_reference, "reference's samples, annotators", bench.annotators
        ),
        "rejection-sampled": (REJECTION_SEEDS, bench.rejection_sampled),
        "noise, plain": noisy("noise, plain", epochs=3),
        "noise, conservative": noisy("noise, conservative", epochs=3, label_smoothing=WRONG),
        "ipo": offline("ipo", certain, variant="ipo"),
        "hinge": offline("hinge", certain, variant="hinge"),
        "simpo": offline("simpo", certain, variant="simpo", beta=2.0),
        "fair, length-normalised": offline("length-normalised", beta=2.0, **simple),
        "long, sigmoid": offline("long is good", liked_long),
        "long, length-normalised": offline("long is good", liked_long, beta=2.0, **simple),
        "long, length-normalised, dearer": offline("long is good", liked_long, beta=DEAR, **simple),
    }


def reviews(run, tell):
    bench = Reviews(run, tell)
    runs = {name: [one(s) for s in seeds] for name, (seeds, one) in kinds(bench).items()}
    return assembled(runs, bench.judged(bench.model, 0))


def assembled(runs, start):
    """The record of the runs on reviews."""
    found = {"start": start, "betas": BETAS}
    found["by_beta"] = [runs.pop(f"beta {b:g}") for b in BETAS]
    for group in ("noise", "long"):
        names = [name for name in runs if name.startswith(f"{group}, ")]
        found[group] = {name.removeprefix(f"{group}, "): runs.pop(name) for name in names}
    return found | runs


def main():
    torch.set_num_threads(1)
    run = settings.load()
    start = time.perf_counter()

    def tell(name, found):
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {found}", flush=True)

    results = {
        "exact": [exact(seed, tell) for seed in EXACT_SEEDS],
        "exact, PPO": [by_ppo(seed) for seed in PPO_SEEDS],
    }
    results |= reviews(run, tell)
    record_sweep("dpo_derivation", start, settings_of(run), results)


if __name__ == "__main__":
    main()
