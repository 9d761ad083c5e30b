"""Counted costs: parameters and bytes against real models and a real AdamW, operations against
torch's counter on this package's own loops, activations against what autograd keeps, the peak
against the allocator."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, OPTConfig

from rlhf_helpers import costs, models, rollout
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sft
from rlhf_helpers.costs import Batch
from rlhf_helpers.logprobs import completion_log_probs

BATCH = Batch(prompts=3, group=4, prompt_tokens=10, new_tokens=6)
PAIRS = BATCH._replace(group=2)


class Words:
    """A tokenizer of one token a word, w1, w2, …; end and pad are one token."""

    eos_token_id = pad_token_id = bos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids if i)


def small(rank=0, attention="sdpa", **changes):
    """A random model that never ends a text."""
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 211, "n_positions": 32}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = GPT2Config(**sizes | special | changes)
    config._attn_implementation = attention
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
        model.transformer.wte.weight[0] = -3.0
    return (models.lora_policy(model, rank) if rank else model), config


def tokens_of(batch, group=None):
    group = group or batch.group
    prompts = torch.randint(1, 211, (batch.prompts, batch.prompt_tokens))
    answers = torch.randint(1, 211, (batch.prompts * group, batch.new_tokens))
    return torch.cat([prompts.repeat_interleave(group, 0), answers], 1)


def texts(batch):
    return [Words().decode(row) for row in tokens_of(batch, 1)[:, : batch.prompt_tokens].tolist()]


def judge(prompts, completions, **_):
    return [float(len(text) % 5) for text in completions]


def started(method, batch, rank=0, kl=True, **changes):
    policy, config = small(rank, **changes)
    module = {"ppo": ppo, "grpo": grpo}[method]
    price = {"kl_coefficient": 0.05} if method == "ppo" else {"beta": 0.05 if kl else 0.0}
    options = module.Config(
        prompts=batch.prompts,
        samples_per_prompt=batch.group,
        max_new_tokens=batch.new_tokens,
        epochs=batch.epochs,
        mini_batches=1,
        learning_rate=1e-4,
        **price,
    )
    run = module.start(policy, Words(), options)
    # a model's head is looked at once, before the first pass
    tokens = tokens_of(batch)
    completion_log_probs(policy, tokens, torch.ones_like(tokens), batch.new_tokens)
    if run.reference is not None:
        with run.reference() as reference:
            completion_log_probs(reference, tokens, torch.ones_like(tokens), batch.new_tokens)
    return module, run, config, options


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_layer": 1, "n_inner": 40}, {"n_embd": 48, "n_positions": 17, "vocab_size": 97}],
)
def test_parameters_are_those_of_a_real_model(changes):
    """Oracle: numel of every parameter."""
    torch.manual_seed(0)
    config = GPT2Config(**{"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 60} | changes)
    model = GPT2LMHeadModel(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    adapted = models.lora_policy(model, 5)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert costs.adapter_parameters(config, 5) == trained


def test_gpt2_has_the_parameters_that_it_is_known_for():
    """Oracle: Radford et al.'s smallest model as it is published, 124,439,808."""
    assert costs.parameters(GPT2Config()) == 124_439_808


def storage_bytes(*modules):
    """Of the parameters, those that modules share once."""
    found = {p.untyped_storage().data_ptr(): p.numel() * 4 for m in modules for p in m.parameters()}
    return sum(found.values())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("method", "kl"), [("ppo", True), ("grpo", True), ("grpo", False)])
def test_what_is_held_is_what_a_run_holds(method, kl, rank):
    """Oracle: bytes of the parameters of a real run, of their gradients, and of AdamW's state after
    a step."""
    _, run, config, _ = started(method, BATCH, rank, kl)
    found = costs.memory(config, method, BATCH, rank, kl)
    if run.reference is not None:
        with run.reference() as reference:
            assert found.policy + found.reference == storage_bytes(run.policy, reference)
    else:
        assert (found.policy, found.reference) == (storage_bytes(run.policy), 0)
    value_model = getattr(run, "value_model", None)
    assert found.value_model == (storage_bytes(value_model) if value_model else 0)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    gradients = [p.grad for group in run.optimizer.param_groups for p in group["params"]]
    assert found.gradients == sum(g.nbytes for g in gradients)
    moments = [s[k] for s in run.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert found.moments == sum(m.nbytes for m in moments)


def test_a_reward_model_has_a_head_and_may_be_held_as_judge():
    """Oracle: bytes of the library's classifier with one label."""
    _, config = small()
    config.num_labels = 1
    real = storage_bytes(GPT2ForSequenceClassification(config))
    trained = costs.memory(config, "reward", PAIRS)
    assert (trained.policy, trained.gradients, trained.moments) == (real, real, 2 * real)
    assert trained.logits == 0
    assert costs.memory(config, "grpo", BATCH, judge=True).reward_model == real
    assert costs.memory(config, "grpo", BATCH).reward_model == 0


def test_the_cache_is_that_of_a_rollout(monkeypatch):
    """Oracle: bytes of the stores that a rollout fills."""
    model, config = small()
    made = []
    room = rollout._RoomyLayer.batch_repeat_interleave

    def seen(layer, repeats):
        room(layer, repeats)
        made.extend(layer.stores)

    monkeypatch.setattr(rollout._RoomyLayer, "batch_repeat_interleave", seen)
    prompts = tokens_of(BATCH, 1)[:, : BATCH.prompt_tokens]
    options = {"eos_token_id": None, "pad_token_id": 0, "samples_per_prompt": BATCH.group}
    rollout.sample(model, prompts, torch.ones_like(prompts), BATCH.new_tokens, **options)
    assert costs.rollout_memory(config, BATCH) == sum(store.nbytes for store in made)


def saved_bytes(compute, model, width=None):
    """Bytes of the tensors that autograd keeps, weights apart; with `width`, of those so wide."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        where = tensor.untyped_storage().data_ptr()
        if where not in weights and (width is None or tensor.shape[-1] == width):
            kept[where] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("method", "group"), [("sft", 4), ("grpo", 4), ("grpo", 1)])
def test_activations_are_what_autograd_keeps(method, group, rank, activation):
    """Oracle: the storages that the forward pass saves. 0.5 %: indices and masks are not
    counted."""
    model, config = small(rank, n_embd=128, n_head=16, activation_function=activation)
    batch = BATCH._replace(group=group, new_tokens=16)
    tokens = tokens_of(batch)
    where = (model, tokens, torch.ones_like(tokens), batch.new_tokens)
    shared = group if method == "grpo" else 1
    completion_log_probs(*where, samples_per_prompt=shared)
    found = costs.memory(config, method, batch, rank)
    measured = saved_bytes(lambda: completion_log_probs(*where, samples_per_prompt=shared), model)
    assert found.activations + found.logits / 2 == pytest.approx(measured, rel=0.005)
    logits = saved_bytes(lambda: completion_log_probs(*where), model, config.vocab_size)
    assert found.logits == 2 * logits


def test_activations_of_a_reward_model_and_of_ppo():
    """Oracle: as above, of the score of whole texts, and of policy and value model together."""
    model, config = small(n_embd=128)
    config.num_labels = 1
    scorer, tokens = GPT2ForSequenceClassification(config).eval(), tokens_of(PAIRS)
    mask = torch.ones_like(tokens)
    measured = saved_bytes(lambda: reward_model.last_scores(scorer, tokens, mask), scorer)
    counted = costs.memory(config, "reward", PAIRS).activations
    assert counted == pytest.approx(measured, rel=0.03)  # the last norm's rows are few here
    value_model, tokens = models.ValueModel(model), tokens_of(BATCH)
    where = (tokens, torch.ones_like(tokens), BATCH.new_tokens)

    def both():
        completion_log_probs(model, *where, samples_per_prompt=4)
        value_model(*where, 4)

    both()
    found = costs.memory(config, "ppo", BATCH)
    weights = torch.nn.ModuleList([model, value_model])
    measured = saved_bytes(both, weights)
    assert found.activations + found.logits / 2 == pytest.approx(measured, rel=0.01)


def allocated(compute):
    """The most bytes that were allocated at once in a function, above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("at_once", [1024, 500])
def test_the_peak_of_the_logits_is_counted_with_their_gradient(at_once):
    """Oracle: the allocator. 15 %: pieces of 4 MiB come and go, and the model's few activations."""
    model, config = small(n_layer=1, n_embd=8, n_head=2, vocab_size=50_257)
    batch = Batch(8, 8, 4, 16, at_once=at_once)
    tokens = tokens_of(batch)
    where = (model, tokens, torch.ones_like(tokens), batch.new_tokens)

    def both_ways():
        model.zero_grad()
        completion_log_probs(*where, chunk_size=at_once, samples_per_prompt=8).sum().backward()

    both_ways()
    model.zero_grad()
    found = costs.memory(config, "grpo", batch)
    counted = found.logits + found.activations + found.gradients
    assert allocated(both_ways) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_peak_of_an_update_is_what_is_counted(method):
    """Oracle: the allocator, above the models and moments. It needs less, since the last gradients
    come when most activations are gone, and up to two pieces of 4 MiB more, in which
    log-probabilities are computed."""
    batch = Batch(prompts=8, group=4, prompt_tokens=16, new_tokens=16)
    changes = {"n_embd": 128, "n_layer": 6, "vocab_size": 2000}
    module, run, config, options = started(method, batch, **changes)
    collected = module.collect(run, texts(batch), judge, options)
    collected = collected if method == "ppo" else collected[0]
    rows = torch.arange(batch.prompts)

    def update():
        return (
            module.step(run, collected, rows, options)
            if method == "ppo"
            else module.step(run, collected, options)
        )

    update()
    run.optimizer.zero_grad()
    found = costs.memory(config, method, batch)
    counted = found.gradients + found.activations + found.logits
    share = allocated(update) / counted
    assert 0.8 < share < 1 + 2 * 2**22 / counted


# --- operations ----------------------------------------------------------------------------------


def operations(compute):
    with FlopCounterMode(display=False) as counter:
        found = compute()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("new", [6, 1])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("at_once", [1024, 7, 6])
def test_operations_of_a_pass(group, new, at_once, rank):
    """Oracle: torch's counter, to the last operation; attention that is not fused, since that is
    counted."""
    model, config = small(rank, "eager")
    batch = Batch(3, 4, 10, new, at_once=at_once)
    tokens = tokens_of(batch)
    where = (model, tokens, torch.ones_like(tokens), new)
    options = {"chunk_size": at_once, "samples_per_prompt": group}
    completion_log_probs(*where)
    found = costs.flops(config, "sft" if group == 1 else "grpo", batch, rank)
    forward, log_probs = operations(lambda: completion_log_probs(*where, **options))
    assert found.forward == forward
    assert found.backward == operations(lambda: log_probs.sum().backward())[0]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("method", "kl"), [("ppo", True), ("grpo", True), ("grpo", False)])
def test_operations_of_an_iteration(method, kl, rank):
    """Oracle: torch's counter on what the loop does: sampling, reference and values, two passes of
    updates."""
    batch = BATCH._replace(epochs=2)
    module, run, config, options = started(method, batch, rank, kl, attention="eager")
    before, collected = operations(lambda: module.collect(run, texts(batch), judge, options))
    collected = collected if method == "ppo" else collected[0]
    assert not collected.ended.any()
    assert collected.mask.all()
    found = costs.flops(config, method, batch, rank, kl)
    assert before == found.rollout + found.reference + found.values
    after, _ = operations(lambda: module.update(run, collected, options))
    assert after == found.forward + found.backward


def test_operations_of_pairs_and_of_a_judge():
    """Oracle: torch's counter on DPO's pass with and without gradient, and on a reward model's."""
    model, config = small(attention="eager")
    tokens = tokens_of(PAIRS)
    ones = torch.ones_like(tokens)
    pairs = dpo.Batch(tokens, ones, ones[:, -6:], None, None)
    found = costs.flops(config, "dpo", PAIRS)
    dpo.response_log_probs(model, pairs)
    with torch.no_grad():
        assert operations(lambda: dpo.response_log_probs(model, pairs))[0] == found.reference
    both = operations(lambda: dpo.response_log_probs(model, pairs).sum().backward())[0]
    assert both == found.forward + found.backward
    config.num_labels = 1
    scorer = GPT2ForSequenceClassification(config).eval()
    forward, scores = operations(lambda: reward_model.last_scores(scorer, tokens, ones))
    found = costs.flops(config, "reward", PAIRS)
    assert found.forward == forward
    assert found.backward == operations(lambda: scores.sum().backward())[0]
    assert costs.flops(config, "grpo", PAIRS, judge=True).scoring == forward


def test_operations_of_fine_tuning():
    """Oracle: torch's counter on the loop's own step."""
    model, config = small(attention="eager")
    tokens = tokens_of(BATCH)
    ones = torch.ones_like(tokens)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = sft.Batch(tokens, ones, ones[:, -6:])
    sft.update(model, optimizer, batch)
    assert operations(lambda: sft.update(model, optimizer, batch))[0] == sum(
        costs.flops(config, "sft", BATCH)
    )


def test_gpt2_costs_what_is_known_of_it():
    """Oracle: by hand, 2 · (85.0 M + 768 · 50,257) = 247 M operations a token without attention; 72
    KiB of keys and values a token; 196 KiB of logits a token; 16 bytes a trained number."""
    config = GPT2Config()
    alone = Batch(1, 1, 1, 1)
    attention = 4 * 768 * 12
    assert costs.flops(config, "sft", alone).forward - attention == pytest.approx(247e6, rel=0.001)
    assert costs.rollout_memory(config, Batch(1, 1, 1, 1)) == 72 * 1024
    assert costs.memory(config, "sft", alone).logits / 2 == pytest.approx(196 * 1024, rel=0.002)
    found = costs.memory(config, "sft", alone)
    assert found.policy + found.gradients + found.moments == 16 * 124_439_808


# --- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_counted_is_refused():
    config = GPT2Config()
    for count in (costs.memory, costs.flops):
        with pytest.raises(ValueError, match="method='rloo'"):
            count(config, "rloo", BATCH)
        with pytest.raises(ValueError, match="new_tokens=0"):
            count(config, "grpo", BATCH._replace(new_tokens=0))
        with pytest.raises(ValueError, match="group=4 must be 2 for dpo"):
            count(config, "dpo", BATCH)
        with pytest.raises(ValueError, match="rank must be 0"):
            count(config, "reward", PAIRS, rank=4)
        with pytest.raises(ValueError, match="rank=-1"):
            count(config, "grpo", BATCH, rank=-1)
        with pytest.raises(ValueError, match="GPT-2 with tied"):
            count(OPTConfig(), "grpo", BATCH)
        with pytest.raises(ValueError, match="GPT-2 with tied"):
            count(GPT2Config(tie_word_embeddings=False), "grpo", BATCH)
