"""Sampling against the exact distribution of whole completions, and against Hugging Face's
generate."""

import copy
import gc
import math
import warnings
import weakref

import peft
import pytest
import torch
from architectures import (
    CONFIGS,
    CONTEXT,
    EOS,
    FIVE,
    OTHERS,
    VOCABULARY,
    WRAPPERS,
    build,
    left_padded,
    replaced,
    scored_alone,
    with_cache_called,
)
from scipy.stats import chi2
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.losses import ppo_clip_loss
from rlhf_helpers.models import ValueModel
from rlhf_helpers.rollout import _choose, sample

P = 6
SAME = {"rtol": 1e-5, "atol": 1e-5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rollout(model, lengths=(6, 2, 4), new=12, **options):
    options = {"eos_token_id": EOS, "pad_token_id": EOS, "generator": seeded(), **options}
    return sample(model, *left_padded(lengths, P), new, **options)


# What is sampled


def exact_completions(model, prompt, new, warpers):
    """Probability of every completion of at most `new` tokens, by running each beginning alone."""
    open_ones, ended = {(): 1.0}, {}
    for _ in range(new):
        following = {}
        for beginning, probability in open_ones.items():
            ids = torch.tensor([[*prompt, *beginning]])
            logits = model(ids).logits[:, -1].double()
            for warper in warpers:
                logits = warper(ids, logits)
            for token, p in enumerate(logits.softmax(-1)[0].tolist()):
                where = ended if token == EOS else following
                where[(*beginning, token)] = probability * p
        open_ones = following
    return {key: value for key, value in {**ended, **open_ones}.items() if value > 0}


def p_value(counts, probabilities):
    """Chi-square test of counts by key; keys expected less than five times are taken together."""
    total = sum(counts.values())
    assert counts.keys() <= probabilities.keys(), "sampled what has probability 0"
    cells = [[0.0, 0.0]]
    for key, probability in probabilities.items():
        expected = total * probability
        if expected < 5:
            cells[0][0] += counts.get(key, 0)
            cells[0][1] += expected
        else:
            cells.append([counts.get(key, 0), expected])
    cells = [cell for cell in cells if cell[1] > 0]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return chi2.sf(statistic, len(cells) - 1)


CASES = [("gpt2", 1.0, 0, 1.0), ("gpt2", 0.7, 0, 1.0), ("gpt2", 1.0, 3, 1.0)]
CASES += [("gpt2", 1.3, 0, 0.8), ("gpt2", 1.3, 4, 0.9), ("openai-gpt", 0.7, 0, 0.9)]
CASES += [("llama", 1.0, 0, 1.0), ("gemma2", 1.5, 0, 1.0)]


@pytest.mark.parametrize(("name", "temperature", "top_k", "top_p"), CASES)
def test_completions_have_exactly_their_probability(name, temperature, top_k, top_p):
    """Oracle: the probability of all completions of three tokens, each beginning run alone, under
    Hugging Face's own filters."""
    count, vocabulary = 3000, 6
    model = build(name, vocab_size=vocabulary, spread=0.2)
    tokens, mask = left_padded([2, 4], 4, vocabulary)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    out = sample(
        model,
        *(tokens, mask, 3),
        **{"eos_token_id": EOS, "pad_token_id": 1, "samples_per_prompt": count},
        **{"generator": seeded(), **options},
    )
    for i in range(2):
        with torch.no_grad():
            exact = exact_completions(model, tokens[i][mask[i].bool()].tolist(), 3, warpers)
        assert sum(exact.values()) == pytest.approx(1.0)
        assert len(exact) > 10
        counts = {}
        for n in range(i * count, (i + 1) * count):
            kept = tuple(out.tokens[n, 4:][out.completion_mask[n]].tolist())
            counts[kept] = counts.get(kept, 0) + 1
        assert p_value(counts, exact) > 1e-3


def test_the_test_of_the_distribution_can_fail():
    """Oracle: counts from another distribution, 5 percent off, are found out."""
    exact = {0: 0.5, 1: 0.3, 2: 0.2}
    assert p_value({0: 1500, 1: 900, 2: 600}, exact) > 0.99
    assert p_value({0: 1650, 1: 900, 2: 450}, exact) < 1e-6


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_log_probs_are_those_of_each_sequence_alone(name, group):
    """Oracle: one sequence at a time, unpadded, log_softmax of the divided logits; some rows end
    early."""
    model = build(name)
    ends = list(range(0, VOCABULARY, 5))
    out = rollout(
        model, (6, 2, 4, 5, 3), eos_token_id=ends, temperature=0.8, samples_per_prompt=group
    )
    length = out.tokens.shape[1] - P
    assert len(set(out.completion_mask.sum(1).tolist())) > 1
    with torch.no_grad():
        expected = scored_alone(model, out.tokens, out.attention_mask, length, 0.8)
    torch.testing.assert_close(out.log_probs, expected, **SAME)
    found = completion_log_probs(
        model, out.tokens, out.attention_mask, length, 0.8, samples_per_prompt=group
    )
    torch.testing.assert_close(found, expected, **SAME)
    assert (out.log_probs[~out.completion_mask] == 0).all()


def test_filters_change_what_is_sampled_and_not_what_is_recorded():
    """Oracle: unfiltered log-probabilities of each sequence alone; all tokens among the three
    likeliest."""
    model = build("gpt2")
    out = rollout(model, top_k=3, samples_per_prompt=4)
    length = out.tokens.shape[1] - P
    with torch.no_grad():
        expected = scored_alone(model, out.tokens, out.attention_mask, length)
        for row, mask in zip(out.tokens, out.attention_mask.bool(), strict=True):
            ids = row[mask].unsqueeze(0)
            ranks = (model(ids).logits[0, :-1].argsort(-1, descending=True)[:, :3]).tolist()
            start = int(mask[:P].sum())
            assert all(ids[0, i + 1] in ranks[i] for i in range(start - 1, ids.shape[1] - 1))
    torch.testing.assert_close(out.log_probs, expected, **SAME)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_first_ratio_is_one_whatever_the_mode_and_the_mode_comes_back(name):
    """Oracle: a ratio of 1 to within 1e-5 in a first PPO update; every submodule's mode from
    before."""
    dropout = {"attention_dropout": 0.1} if name == "llama" else {"resid_pdrop": 0.1}
    model = build(name, **dropout).train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    out = rollout(model, samples_per_prompt=2)
    assert [module.training for module in model.modules()] == modes
    length = out.tokens.shape[1] - P
    new = completion_log_probs(model.eval(), out.tokens, out.attention_mask, length)
    assert ((new - out.log_probs).exp() - 1).abs().max() < 1e-5
    loss = ppo_clip_loss(new, out.log_probs, torch.ones_like(new), out.completion_mask)
    assert loss.clip_fraction == 0
    loss.loss.backward()
    assert not out.log_probs.requires_grad


# Against generate


def generated(model, lengths, ends, new=12):
    """Each prompt alone: old releases of transformers misplace padded prompts of some families."""
    tokens, mask = left_padded(lengths, P)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": EOS}
    rows = []
    for row, seen, n in zip(tokens[:, None], mask[:, None], lengths, strict=True):
        alone = {"attention_mask": seen[:, -n:], "eos_token_id": ends, **options}
        rows.append(model.generate(row[:, -n:], **alone)[0, n:])
    completions = torch.nn.utils.rnn.pad_sequence(rows, True, EOS)
    return torch.cat([tokens, completions], dim=1)


@pytest.mark.parametrize("lengths", [(6, 2, 4), (6, 6, 6)])
@pytest.mark.parametrize("name", FIVE)
def test_greedy_decoding_equals_generate(name, lengths):
    """Oracle: transformers' generate without sampling."""
    model = build(name)
    # an end that one of the three reaches early, so that it leaves the batch
    free = rollout(model, lengths, top_k=1, eos_token_id=None)
    ends = [free.tokens[1, P + 3].item()]
    out = rollout(model, lengths, top_k=1, eos_token_id=ends)
    assert out.completion_mask[1].sum() <= 4
    assert torch.equal(out.tokens, generated(model, lengths, ends))


def test_greedy_decoding_of_an_adapter_equals_generate_on_the_merged_model():
    """Oracle: transformers' generate on the merged model, and on the base model from before."""
    lengths, base = (6, 2, 4), build("gpt2")
    before = copy.deepcopy(base)
    config = peft.LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).eval()
    out = rollout(model, lengths, top_k=1)
    with model.disable_adapter():
        off = rollout(model, lengths, top_k=1)
    assert torch.equal(off.tokens, generated(before, lengths, [EOS]))
    assert torch.equal(out.tokens, generated(model.merge_and_unload(), lengths, [EOS]))
    assert not torch.equal(off.log_probs, out.log_probs)


# Masks and ends


class Scripted(torch.nn.Module):
    """Says a given token at each step and prompt, whatever it is asked."""

    def __init__(self, script):
        super().__init__()
        self.script, self.seen = script, []
        self.embedding = torch.nn.Embedding(VOCABULARY, 1)

    config = CONFIGS["openai-gpt"][0](n_positions=CONTEXT)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask):
        self.seen.append(input_ids[:, 0].tolist())
        logits = torch.full((*input_ids.shape, VOCABULARY), -50.0)
        for i, row in enumerate(input_ids):
            script = self.script[row[0].item()]
            logits[i, -1, script[input_ids.shape[1] - 1]] = 50.0
        return type("Output", (), {"logits": logits})


def say(*scripts, ends=EOS, pad=EOS, new=4, group=1):
    """Each prompt is one token: the number of its script."""
    model = Scripted({i + 10: script for i, script in enumerate(scripts)})
    prompts = torch.arange(10, 10 + len(scripts)).unsqueeze(1)
    out = sample(
        model,
        prompts,
        torch.ones_like(prompts),
        new,
        eos_token_id=ends,
        pad_token_id=pad,
        samples_per_prompt=group,
    )
    return out, model


@pytest.mark.parametrize("pad", [EOS, 1])
def test_masks_count_the_end_and_nothing_after(pad):
    """Oracle: scripts written out; pad may be the end token, a token of the script, or neither."""
    out, model = say([5, 0], [0], [1, 7, 8, 9], [0], [4, 4, 0], pad=pad)
    assert out.tokens[:, 1:].tolist() == [
        [5, 0, pad, pad],
        [0, pad, pad, pad],
        [1, 7, 8, 9],
        [0, pad, pad, pad],
        [4, 4, 0, pad],
    ]
    lengths = [2, 1, 4, 1, 3]
    assert out.completion_mask.tolist() == [[i < n for i in range(4)] for n in lengths]
    assert out.attention_mask.tolist() == [[int(i <= n) for i in range(5)] for n in lengths]
    assert out.prompt_length == 1
    # who ended is run no more
    assert [sorted(rows) for rows in model.seen] == [
        [10, 11, 12, 13, 14],
        [10, 12, 14],
        [12, 14],
        [12],
    ]


def test_several_ends_or_none():
    """Oracle: scripts written out."""
    scripts = [5, 0, 6, 6], [4, 4, 9, 4]
    out, _ = say(*scripts, ends=[9, 0])
    assert out.completion_mask.sum(1).tolist() == [2, 3]
    assert out.tokens.shape[1] == 1 + 3, "stops when all have ended"
    for none in (None, []):
        out, _ = say(*scripts, ends=none)
        assert out.tokens[:, 1:].tolist() == list(scripts)
        assert out.completion_mask.all()


def test_one_new_token():
    """Oracle: scripts written out."""
    out, model = say([5], [0], new=1)
    assert out.tokens.tolist() == [[10, 5], [11, 0]]
    assert out.completion_mask.all()
    assert len(model.seen) == 1


def test_samples_of_a_prompt_are_neighbours_and_each_prompt_is_run_once():
    """Oracle: the prompts repeated one by one; the shape of the first input that reaches the
    model."""
    out, model = say([5, 0], [0], group=3)
    assert out.tokens[:, 0].tolist() == [10, 10, 10, 11, 11, 11]
    assert model.seen[0] == [10, 11]
    gpt2, shapes = build("gpt2"), []
    gpt2.transformer.register_forward_hook(
        lambda module, args, kwargs, output: (
            shapes.append(tuple(kwargs["input_ids"].shape))
            if "input_ids" in kwargs
            else shapes.append(tuple(args[0].shape))
        ),
        with_kwargs=True,
    )
    out = rollout(gpt2, samples_per_prompt=4, eos_token_id=None, new=3)
    assert shapes == [(3, P), (12, 1), (12, 1)]
    prompts, mask = left_padded((6, 2, 4), P)
    assert torch.equal(out.tokens[:, :P], prompts.repeat_interleave(4, 0))
    assert torch.equal(out.attention_mask[:, :P], mask.repeat_interleave(4, 0))


# Randomness


def test_the_same_seed_gives_the_same_sample_and_the_global_state_is_untouched():
    """Oracle: the state before, and a second run; without a generator the global state decides."""
    model, state = build("gpt2"), torch.get_rng_state()
    first = rollout(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tokens, rollout(model).tokens)
    assert not torch.equal(first.tokens, rollout(model, generator=seeded(1)).tokens)
    torch.manual_seed(3)
    first = rollout(model, generator=None)
    assert not torch.equal(first.tokens, rollout(model, generator=None).tokens)
    torch.manual_seed(3)
    assert torch.equal(first.tokens, rollout(model, generator=None).tokens)
    torch.set_rng_state(state)


def test_that_others_end_changes_no_sample():
    """Oracle: the same seed without an end: the beginnings are equal, token by token."""
    model = build("gpt2")
    ended = rollout(model, samples_per_prompt=8, eos_token_id=[0, 3, 5, 9])
    free = rollout(model, samples_per_prompt=8, eos_token_id=None)
    mask = ended.completion_mask
    assert 0 < mask[:, -1].sum() < len(mask)
    length = mask.shape[1]
    assert torch.equal(ended.tokens[:, P:][mask], free.tokens[:, P : P + length][mask])


# Refusals


def change(array, index, value):
    array = array.clone()
    array[index] = value
    return array


TOKENS, MASK = left_padded([6, 2, 4], P)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": CONTEXT - P + 1}, "max_new_tokens: 49 .*context of 48.*lower"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0.*top_k=1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"prompt_tokens": TOKENS[:, :0], "prompt_mask": MASK[:, :0]}, "prompt_tokens.*beginning"),
        ({"prompt_tokens": TOKENS[:0], "prompt_mask": MASK[:0]}, "prompt_tokens"),
        ({"prompt_tokens": TOKENS[0], "prompt_mask": MASK[0]}, "prompt_tokens has shape"),
        ({"prompt_mask": change(MASK, 1, 0)}, "prompt_mask: row 1 is an empty prompt"),
        ({"prompt_mask": change(MASK, (0, P - 1), 0)}, "prompt_mask.*row 0.*left"),
        ({"prompt_mask": change(MASK, (0, 2), 0)}, "prompt_mask.*row 0.*left"),
        ({"prompt_mask": MASK[:, 1:]}, "prompt_mask"),
        ({"prompt_tokens": change(TOKENS, (2, 3), VOCABULARY)}, r"prompt_tokens.*\[0, 29\)"),
        ({"prompt_tokens": change(TOKENS, (2, 3), -1)}, r"prompt_tokens.*\[0, 29\)"),
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"pad_token_id": VOCABULARY}, "pad_token_id"),
        ({"eos_token_id": [0, -1]}, "eos_token_id"),
        (
            {"generator": type("Other", (torch.Generator,), {"device": torch.device("cuda")})()},
            "generator is on cuda",
        ),
    ],
)
def test_bad_input_is_refused(changes, message):
    """Oracle: the specification: ValueError that names the argument and what to do; the mode is
    kept."""
    model = build("gpt2").train()
    arguments = {"prompt_tokens": TOKENS, "prompt_mask": MASK, "max_new_tokens": 4, **changes}
    arguments = {"eos_token_id": EOS, "pad_token_id": EOS, **arguments}
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_that_says_where_and_the_mode_is_restored(bad):
    """Oracle: the step and the row at which a hook puts the value."""
    model, calls = build("gpt2").train(), []

    def spoil(_module, _args, output):
        calls.append(1)
        if len(calls) == 3:
            output = output.clone()
            output[1, -1, 4] = bad
        return output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="step 3 in row 1"):
        rollout(model, eos_token_id=None)
    assert all(module.training for module in model.modules())


def test_broken_logits_are_named_by_the_callers_row_once_others_have_ended():
    """Oracle: by hand. The first of three sequences ends at once and leaves; the tokens of the one
    in its place tell whose row the hook spoils."""
    model, places = build("gpt2"), []

    def watch(_module, args, _kwargs):
        places.append(args[0] if args else _kwargs["input_ids"])

    def spoil(_module, _args, output):
        output = output.clone()
        if len(places) == 1:
            output[0, -1, EOS] = 1e4
            output[1:, -1, EOS] = -1e4
        if len(places) == 2:
            output[0, -1, 4] = float("nan")
        return output

    model.register_forward_pre_hook(watch, with_kwargs=True)
    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="step 2 in row 2"):
        rollout(model)
    assert len(places[1]) == 2


def test_a_token_that_is_ruled_out_is_never_sampled():
    """Oracle: a logit of minus infinity for all tokens but two."""
    model = build("gpt2")

    def rule_out(_module, _args, output):
        output = output.clone()
        output[..., 2:] = -float("inf")
        return output

    model.lm_head.register_forward_hook(rule_out)
    out = rollout(model, samples_per_prompt=20, eos_token_id=None, pad_token_id=5)
    assert set(out.tokens[:, P:].unique().tolist()) == {0, 1}


def test_the_context_may_be_filled_to_its_end():
    """Oracle: the model's number of positions; padding does not count."""
    for name in ("gpt2", "llama"):
        model = build(name)
        out = sample(
            model,
            *left_padded([40, 8], CONTEXT),
            CONTEXT - 40,
            eos_token_id=None,
            pad_token_id=EOS,
        )
        assert out.attention_mask.sum(1).tolist() == [CONTEXT, 16]


def test_half_precision_records_in_float32():
    """Oracle: log_softmax in float64 of the model's own bfloat16 logits, the widest gap that
    rounding explains."""
    model = build("gpt2", torch.bfloat16)
    out = rollout(model, (6, 6, 6), eos_token_id=None)
    logits = model(out.tokens).logits[:, P - 1 : -1].double()
    expected = logits.log_softmax(-1).gather(-1, out.tokens[:, P:, None]).squeeze(-1)
    assert out.log_probs.dtype == torch.float32
    assert (out.log_probs - expected).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_vocabulary_is_not_rounded_away(dtype):
    """Oracle: the cumulative distribution of the same logits in float64; a hundred uniform numbers,
    which rounding in between would send to other tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50_257, generator=generator).to(dtype)
    uniforms = torch.rand(100, generator=generator, dtype=torch.float64)
    wanted = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniforms, right=True)
    found = _choose(logits.expand(100, -1), uniforms, 1.0, 0, 1.0)
    assert (found == wanted).sum() >= 97


def test_unlikely_tokens_after_a_likely_one_are_not_rounded_away():
    """Oracle: by hand. One token of weight 1 stands before 200,000 of weight 2e-8, whose running
    sums single precision cannot tell apart; uniform numbers in the middle of five tokens."""
    logits = torch.full((200_001,), 2e-8).log()
    logits[0] = 0.0
    weight = logits[1].double().exp()
    wanted = torch.tensor([0, 1, 77_777, 123_456, 199_000])
    below = torch.where(wanted == 0, 0.5, 1 + weight * (wanted.double() - 0.5))
    found = _choose(logits.expand(5, -1), below / (1 + weight * 200_000), 1.0, 0, 1.0)
    assert torch.equal(found, wanted)


def test_top_p_ends_with_the_token_that_reaches_it():
    """Oracle: by hand, in numbers without rounding: 0.5 is reached by the first token, 0.75 by the
    second. top_k may be larger than the vocabulary."""
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64).log2() * math.log(2)
    numbers = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    chosen = [_choose(logits.expand(3, -1), numbers, 1.0, 9, top_p) for top_p in (0.5, 0.75, 0.8)]
    assert [one.tolist() for one in chosen[:2]] == [[1, 1, 1], [1, 1, 0]]
    assert set(chosen[2].tolist()) > {1}


def test_all_pairs_of_uniform_numbers_and_weights_pick_the_right_token():
    """Oracle: the interval of each token in the cumulative distribution, ends included."""
    weights = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    found = _choose(weights.log().expand(6, -1), numbers, 1.0, 0, 1.0)
    assert found.tolist() == [0, 0, 2, 2, 3, 3]


# Wrappers, and models of other kinds


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "llama"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_samples_as_the_plain_one_and_as_fast(wrapper, name):
    """Oracle: the plain model: the same tokens, each sequence scored alone; the widths of the
    inputs that reach the embedding."""
    plain, model, widths = build(name), build(name), []
    expected = rollout(plain, samples_per_prompt=2, new=6)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    # as compiled, without the wait for the compiler
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("error")
        out = rollout(WRAPPERS[wrapper](model), samples_per_prompt=2, new=6)
    assert torch.equal(out.tokens, expected.tokens)
    length = out.tokens.shape[1] - P
    with torch.no_grad():
        alone = scored_alone(plain, out.tokens, out.attention_mask, length)
    torch.testing.assert_close(out.log_probs, alone, **SAME)
    if name != "openai-gpt":
        assert widths[-5:] == [1] * 5, "only the last token is run"


def test_nothing_keeps_a_model_alive_whose_forward_was_replaced():
    """Oracle: a weak reference."""
    model = replaced(build("gpt2"))
    rollout(model, new=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_used_whatever_it_is_called(name):
    """Oracle: the plain model, and the widths of the inputs."""
    model, widths = with_cache_called(name), []
    expected = rollout(build("gpt2"), samples_per_prompt=2, eos_token_id=None)
    model.transformer.wte.register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # lengths are equal, so that the model is not tried with padding first
        out = rollout(model, (6, 6, 6), samples_per_prompt=2, eos_token_id=None)
        assert widths == [6] + [1] * 11
        out = rollout(model, samples_per_prompt=2, eos_token_id=None)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs, **SAME)


@pytest.mark.parametrize("how", ["another name", "never filled"])
def test_a_cache_that_cannot_be_used_is_said_once_and_changes_no_number(how):
    """Oracle: the plain model; a cache of a name that no one knows, or that the model forgets."""
    expected = rollout(build("gpt2"), samples_per_prompt=2)
    if how == "another name":
        model = with_cache_called("memory")
    else:
        model = with_cache_called("cache")
        forward = type(model).forward

        class Forgets(type(model)):
            def forward(
                self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None
            ):
                return forward(self, input_ids, attention_mask, position_ids)

        model.__class__ = Forgets
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            out = rollout(model, samples_per_prompt=2)
            length = out.tokens.shape[1] - P
            found = completion_log_probs(
                model, out.tokens, out.attention_mask, length, samples_per_prompt=2
            )
    kind = type(model).__name__
    assert [str(each.message).split(":")[0] for each in said] == [f"{kind} runs without a cache"]
    torch.testing.assert_close(found, expected.log_probs, **SAME)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs, **SAME)


def test_a_model_that_reads_padding_is_refused_with_unequal_prompts_and_right_with_equal_ones():
    """Oracle: one sequence at a time; RWKV takes masked tokens into its state."""
    model = build("rwkv")
    with pytest.raises(ValueError, match=r"prompt_mask holds padding, and Rwkv.*of one length"):
        rollout(model)
    out = rollout(model, (6, 6), eos_token_id=None, new=4, samples_per_prompt=2)
    with torch.no_grad():
        expected = scored_alone(model, out.tokens, out.attention_mask, 4)
    torch.testing.assert_close(out.log_probs, expected, **SAME)


@pytest.mark.parametrize("name", ["gemma3", "got_ocr2"])
def test_the_context_of_a_model_of_text_and_images_is_kept(name):
    """Oracle: the configuration of the text, which a random model of the same size obeys."""
    model = build(name)
    with pytest.raises(ValueError, match=r"max_new_tokens: 49 .*context of 48"):
        rollout(model, new=CONTEXT - P + 1)
    tokens = torch.ones(1, CONTEXT + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"tokens: 49 .*context of 48"):
        completion_log_probs(model, tokens, tokens, 2)
    with pytest.raises(ValueError, match=r"tokens: 49 .*context of 48"):
        ValueModel(model)(tokens, tokens, 2)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_sampled_as_each_sequence_alone_or_refused(name):
    """Oracle: one sequence at a time, unpadded; the families that read padding are known."""
    model = build(name)
    lengths = (6, 6, 6) if name in ("rwkv", "bart") else (6, 2, 4)
    out = rollout(model, lengths, eos_token_id=None, new=5, samples_per_prompt=2)
    with torch.no_grad():
        expected = scored_alone(model, out.tokens, out.attention_mask, 5)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_answers_with_a_tuple_is_sampled():
    """Oracle: the same model with named answers."""
    expected = rollout(build("gpt2"), samples_per_prompt=2)
    out = rollout(build("gpt2", return_dict=False), samples_per_prompt=2)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs, **SAME)


def test_a_model_with_virtual_tokens_samples_with_them():
    """Oracle: the wrapped model's own logits, one sequence at a time, without a cache."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config).eval()
    out = rollout(model, (6, 6), eos_token_id=None, new=4)
    logits = model(out.tokens, attention_mask=out.attention_mask).logits[:, P + 3 - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, out.tokens[:, P:, None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, expected.detach(), **SAME)
