"""Completion log-probabilities against scoring one sequence at a time, plain autograd, and TRL."""

import copy
import warnings

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
    Seen,
    Wrapped,
    build,
    left_padded,
    scored_alone,
    with_cache_called,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.models import ValueModel

P, C, GROUP = 6, 5, 2
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def batch(padded=True, vocabulary=VOCABULARY):
    """Three prompts with two completions each, of mixed lengths; EOS ends them and pads them."""
    prompts, prompt_mask = left_padded([6, 2, 4] if padded else [6, 6, 6], P, vocabulary)
    lengths = torch.tensor([5, 1, 3, 5, 2, 0] if padded else [C] * 6).unsqueeze(1)
    generator = torch.Generator().manual_seed(1)
    completions = torch.randint(1, vocabulary, (6, C), generator=generator)
    columns = torch.arange(C)
    completions[columns >= lengths - 1] = EOS
    mask = (columns < lengths).long()
    tokens = torch.cat([prompts.repeat_interleave(GROUP, 0), completions], 1)
    return tokens, torch.cat([prompt_mask.repeat_interleave(GROUP, 0), mask], 1)


def gradients(model, values):
    """Gradients of a weighted sum of values, by parameter; the weights keep any two apart."""
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    found = torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_same_gradients(model, found, expected, tolerance=1e-12):
    found, expected = gradients(model, found), gradients(model, expected)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # a key's bias shifts all scores of a query alike: its gradient is 0 up to rounding
        assert (found[name] - grad).norm() <= tolerance * (1 + grad.norm()), name


def precision(name, group):
    """These families normalise in float32 even in a float64 model, so that a sum over a group
    rounds elsewhere."""
    return 1e-6 if name in ("llama", "qwen2") and group > 1 else 1e-12


@pytest.mark.equation("eq:completion-log-probs")
@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", FIVE)
def test_a_batch_gives_the_values_and_gradients_of_each_sequence_alone(name, padded, group):
    """Oracle: one sequence at a time, unpadded, through the whole model and log_softmax; its plain
    autograd."""
    model = build(name, torch.float64)
    tokens, mask = batch(padded)
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=group)
    expected = scored_alone(model, tokens, mask, C)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(model, found, expected, precision(name, group))


@pytest.mark.equation("eq:completion-log-probs")
@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_divides_the_logits(temperature, group):
    """Oracle: log_softmax of the divided logits of one sequence at a time."""
    model = build("gpt2", torch.float64)
    tokens, mask = batch()
    found = completion_log_probs(model, tokens, mask, C, temperature, samples_per_prompt=group)
    torch.testing.assert_close(found, scored_alone(model, tokens, mask, C, temperature), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_the_order_of_the_batch_and_the_type_of_the_mask_change_nothing(dtype):
    """Oracle: the same rows in another order, with an integer mask."""
    model = build("gpt2", torch.float64)
    tokens, mask = batch()
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    found = completion_log_probs(model, tokens[order], mask[order].to(dtype), C)
    torch.testing.assert_close(found, completion_log_probs(model, tokens, mask, C)[order], **EXACT)


def test_what_stands_under_the_mask_reaches_neither_values_nor_gradients():
    """Oracle: the same call with other tokens under the mask; exact zeros there."""
    model = build("gpt2", torch.float64)
    tokens, mask = batch()
    other = torch.where(mask == 1, tokens, 7)
    found, expected = (completion_log_probs(model, each, mask, C) for each in (other, tokens))
    assert torch.equal(found[mask[:, P:] == 0], torch.zeros(14, dtype=torch.float64))
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(model, found, expected)


def test_a_token_left_out_in_the_middle_is_as_if_it_were_not_there():
    """Oracle: the sequences without that token, each alone."""
    model = build("gpt2", torch.float64)
    tokens, mask = batch(padded=False)
    mask[:, P + 1] = 0
    found = completion_log_probs(model, tokens, mask, C)
    expected = scored_alone(model, tokens, mask, C)
    torch.testing.assert_close(found[:, 0], expected[:, 0], **EXACT)
    # the token after the gap is predicted from the column before it, which is masked
    torch.testing.assert_close(found[:, 3:], expected[:, 2:4], **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_chunk_size_changes_neither_values_nor_gradients(name, group, chunk_size):
    """Oracle: the call without a chunk size."""
    model = build(name, torch.float64)
    tokens, mask = batch()
    found, expected = (
        completion_log_probs(model, tokens, mask, C, 0.7, chunk, group)
        for chunk in (chunk_size, None)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert_same_gradients(model, found, expected)


class Largest(TorchDispatchMode):
    """Records the shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.made.append((each.numel(), tuple(each.shape)))
        return out


@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_tensor_holds_all_logits_forward_or_backward(temperature, group):
    """Oracle: every tensor made by any operation: none has more than chunk · V entries."""
    vocabulary, chunk = 2011, 4
    model = build("gpt2", vocab_size=vocabulary, n_embd=3 * chunk, n_head=1)
    # the weight of the output embedding is V · H: keep its gradient out of what is looked at
    model.requires_grad_(False)
    model.transformer.h.requires_grad_(True)
    tokens, mask = batch(padded=False, vocabulary=vocabulary)
    completion_log_probs(model, tokens, mask, C)
    with Largest() as largest:
        values = completion_log_probs(model, tokens, mask, C, temperature, chunk, group)
        values.sum().backward()
    sizes = {shape: size for size, shape in largest.made if shape not in model_shapes(model)}
    assert max(sizes.values()) == chunk * vocabulary < tokens.shape[0] * C * vocabulary / 7
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def test_the_logits_of_one_chunk_are_kept_for_the_backward_pass():
    """Oracle: the sizes of all logits that autograd saves; the output embedding's weight is longer
    than a chunk."""
    vocabulary, chunk, saved = 211, 4, {}
    model = build("gpt2", vocab_size=vocabulary)
    tokens, mask = batch(padded=False, vocabulary=vocabulary)

    def pack(tensor):
        if tensor.shape[-1] == vocabulary and len(tensor) <= chunk:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_log_probs(model, tokens, mask, C, chunk_size=chunk)
    kept = sum(saved.values())
    assert kept <= chunk * vocabulary < mask[:, P:].sum() * vocabulary / 7


def model_shapes(model):
    shapes = {tuple(p.shape) for p in model.parameters()}
    return shapes | {shape[::-1] for shape in shapes}


def count_positions(module, counts):
    def hook(_module, args, kwargs, _output):
        first = args[0] if args else kwargs["input_ids"]
        counts.append(tuple(first.shape))

    return module.register_forward_hook(hook, with_kwargs=True)


def test_a_prompt_is_run_once_for_its_group_and_the_last_token_never():
    """Oracle: the shapes of the tokens that reach the trunk, and the rows that reach the head."""
    model = build("gpt2")
    tokens, mask = batch()
    completion_log_probs(model, tokens, mask, C)
    trunk, head = [], []
    count_positions(model.transformer, trunk)
    count_positions(model.lm_head, head)
    completion_log_probs(model, tokens, mask, C, chunk_size=10, samples_per_prompt=GROUP)
    assert trunk == [(3, P), (6, C - 1)]
    assert [rows for rows, _ in head] == [10, 6], "5 + 1 + 3 + 5 + 2 + 0 tokens count"
    completion_log_probs(model, tokens[:, : P + 1], mask[:, : P + 1], 1, samples_per_prompt=GROUP)
    assert trunk[2:] == [(3, P)]


@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("extra", [{}, {"head": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_counts_and_can_be_switched_off(name, group, extra):
    """Oracle: one sequence at a time through the wrapped model; the base model from before."""
    base = build(name, torch.float64, tie_word_embeddings=False)
    before = copy.deepcopy(base)
    options = dict(extra)
    layers = ["q_proj", "v_proj"] if name == "llama" else ["c_attn"]
    layers += ["lm_head"] if options.pop("head", False) else []
    config = peft.LoraConfig(
        r=3,
        target_modules=layers,
        fan_in_fan_out=name == "gpt2",
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(base, config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    tokens, mask = batch()
    found = completion_log_probs(model, tokens, mask, C, chunk_size=4, samples_per_prompt=group)
    expected = scored_alone(model, tokens, mask, C)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(model, found, expected, precision(name, group))
    original = scored_alone(before, tokens, mask, C)
    assert (found - original).abs().max() > 0.01
    with torch.no_grad(), model.disable_adapter():
        found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=group)
    torch.testing.assert_close(found, original, **EXACT)


@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("spread", [0.4, 0.02])
def test_a_model_that_caps_its_logits_is_scored_with_the_cap(spread, group):
    """Oracle: one sequence at a time through the whole model; after training, too, where the logits
    are large."""
    model = build("gemma2", spread=spread)
    tokens, mask = batch()
    completion_log_probs(model, tokens, mask, C)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=group)
    expected = scored_alone(model, tokens, mask, C)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, found, expected, 1e-4)


def test_a_model_with_prompt_tuning_is_scored_with_its_virtual_tokens():
    """Oracle: the wrapped model's own logits on a batch without padding."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config).eval()
    tokens, mask = batch(padded=False)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, -C - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, tokens[:, P:, None]).squeeze(-1)
    found = completion_log_probs(model, tokens, mask, C)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_are_checkpointed_in_training_lose_no_prompt():
    """Oracle: the same model without gradient checkpointing."""
    model = build("gpt2", torch.float64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    tokens, mask = batch()
    expected = completion_log_probs(model, tokens, mask, C, samples_per_prompt=GROUP)
    model.gradient_checkpointing_enable()
    shapes = []
    count_positions(model.transformer, shapes)
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=GROUP)
    assert shapes == [(6, P + C - 1)], "its cache is not even tried"
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(model, found, expected)


def test_half_precision_is_scored_in_float32():
    """Oracle: log_softmax in float64 of the model's own bfloat16 logits."""
    model = build("gpt2", torch.bfloat16)
    tokens, mask = batch(padded=False)
    found = completion_log_probs(model, tokens, mask, C)
    logits = model(tokens, attention_mask=mask).logits[:, P - 1 : -1].double()
    expected = logits.log_softmax(-1).gather(-1, tokens[:, P:, None]).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_mode_random_state_and_inputs_are_left_as_they_were():
    """Oracle: copies from before; dropout is on, and some submodules are in another mode than the
    model."""
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    tokens, mask = batch()
    copies, state = (tokens.clone(), mask.clone()), torch.get_rng_state()
    found = completion_log_probs(model, tokens, mask, C)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(tokens, copies[0])
    assert torch.equal(mask, copies[1])
    # the first call looks at the model: it must draw no more random numbers than the second
    torch.set_rng_state(state)
    assert torch.equal(found, completion_log_probs(model, tokens, mask, C))


def test_equal_to_trl_without_padding():
    """Oracle: trl.trainer.utils.selective_log_softmax on the model's logits, and
    add_fused_lm_head's log-probs."""
    utils = pytest.importorskip("trl.trainer.utils")
    model = build("gpt2")
    tokens, mask = batch(padded=False)
    found = completion_log_probs(model, tokens, mask, C, 0.8)
    logits = model(tokens, attention_mask=mask).logits[:, P - 1 : -1]
    expected = utils.selective_log_softmax(logits, tokens[:, P:], temperature=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs",))
    fused = model(tokens, attention_mask=mask, labels=tokens, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, fused[:, P - 1 :], rtol=1e-5, atol=1e-5)


def change(array, index, value):
    array = array.clone()
    array[index] = value
    return array


TOKENS, MASK = batch()
LONG = torch.ones(2, CONTEXT + 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_length": 0}, r"completion_length=0 must lie in \[1, 10\]"),
        ({"completion_length": P + C}, r"completion_length=11 must lie in \[1, 10\]"),
        ({"tokens": TOKENS[0]}, r"tokens has shape \(11,\)"),
        ({"attention_mask": MASK[:, 1:]}, "attention_mask"),
        ({"attention_mask": change(MASK, (3, P - 1), 0)}, "attention_mask.*row 3.*left"),
        ({"attention_mask": change(MASK, (0, 2), 0)}, "attention_mask.*row 0.*left"),
        ({"attention_mask": change(MASK, (slice(None), slice(P, None)), 0)}, "attention_mask"),
        ({"tokens": change(TOKENS, (0, 0), VOCABULARY)}, r"tokens.*\[0, 29\)"),
        ({"tokens": change(TOKENS, (0, 0), -100)}, r"tokens.*\[0, 29\)"),
        ({"tokens": LONG, "attention_mask": LONG}, "49 tokens.*context of 48.*shorten"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"samples_per_prompt": 4}, "samples_per_prompt=4 .*divide the 6 rows"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"samples_per_prompt": 3}, r"samples_per_prompt=3, but group 0 \(rows 0 to 2\)"),
        (
            {"tokens": change(TOKENS, (4, P - 1), 3), "samples_per_prompt": 2},
            r"group 2 \(rows 4 to 5\)",
        ),
        (
            {"attention_mask": change(MASK, (3, P - 2), 0), "samples_per_prompt": 2},
            r"group 1 \(rows 2 to 3\)",
        ),
    ],
)
def test_bad_input_is_refused(changes, message):
    """Oracle: the specification: ValueError that names the argument and what to do."""
    arguments = {"tokens": TOKENS, "attention_mask": MASK, "completion_length": C, **changes}
    with pytest.raises(ValueError, match=message):
        completion_log_probs(build("gpt2"), **arguments)


def test_padding_does_not_count_towards_the_context():
    """Oracle: the same rows without the padding."""
    model = build("gpt2")
    tokens, mask = left_padded([20, 30], CONTEXT + 12)
    found = completion_log_probs(model, tokens, mask, 4)
    expected = completion_log_probs(model, tokens[:, 30:], mask[:, 30:], 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Wrappers, and models of other kinds


@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_scored_as_the_plain_one(wrapper, group):
    """Oracle: one sequence at a time through the plain model, and its gradients."""
    plain, model = build("gpt2", torch.float64), build("gpt2", torch.float64)
    tokens, mask = batch()
    expected = scored_alone(plain, tokens, mask, C)
    with torch.compiler.set_stance("force_eager"):
        found = completion_log_probs(
            WRAPPERS[wrapper](model), tokens, mask, C, samples_per_prompt=group
        )
    torch.testing.assert_close(found, expected, **EXACT)
    wanted = gradients(plain, expected)
    assert wanted.keys() == gradients(model, found).keys()


@pytest.mark.parametrize("shown", [True, False])
def test_a_wrapper_that_changes_the_logits_is_heard(shown):
    """Oracle: the plain model at another temperature, which divides the logits as the wrapper
    does."""

    class Halved(Seen if shown else Wrapped):
        def forward(self, *args, **kwargs):
            output = self.inner(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    model = build("gpt2", torch.float64)
    tokens, mask = batch()
    expected = completion_log_probs(model, tokens, mask, C, 2.0)
    torch.testing.assert_close(
        completion_log_probs(Halved(model), tokens, mask, C), expected, **EXACT
    )


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_prompt_is_shared_whatever_the_cache_is_called(name):
    """Oracle: the plain model, and the shapes of the tokens that reach the trunk."""
    model, shapes = with_cache_called(name), []
    tokens, mask = batch(padded=False)
    completion_log_probs(model, tokens, mask, C)
    count_positions(model.transformer, shapes)
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=GROUP)
    assert shapes == [(3, P), (6, C - 1)]
    torch.testing.assert_close(
        found, completion_log_probs(build("gpt2"), tokens, mask, C), rtol=1e-5, atol=1e-5
    )


def families():
    """All small models, each with a batch without padding where it reads padding."""
    for name in CONFIGS | OTHERS:
        yield name, name not in ("rwkv", "bart")


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("name", "padded"), families())
def test_every_family_is_scored_and_valued_as_each_sequence_alone(name, padded, group):
    """Oracle: one sequence at a time, without padding, cache or sharing."""
    model = build(name)
    tokens, mask = batch(padded)
    rows = torch.arange(3).repeat_interleave(group)
    tokens = torch.cat([tokens[rows * 2, :P], tokens[torch.arange(len(rows)) % 6, P:]], 1)
    mask = torch.cat([mask[rows * 2, :P], mask[torch.arange(len(rows)) % 6, P:]], 1)
    with torch.no_grad():
        expected = scored_alone(model, tokens, mask, C)
        found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=group)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        value = ValueModel(model)
        torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
        found = value(tokens, mask, C, samples_per_prompt=group)
        alone = torch.zeros_like(found)
        for i, counted in enumerate(mask.bool()):
            ids, count = tokens[i][counted][None], int(mask[i, P:].sum())
            if count:
                alone[i, :count] = value(ids, torch.ones_like(ids), count)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0.4, 0.02])
@pytest.mark.parametrize("size", [31, 8192])
@pytest.mark.parametrize("what", ["recurrent", "positions of its own"])
def test_a_model_that_reads_padding_is_refused_if_there_is_any(what, size, spread):
    """Oracle: the same rows alone, which differ in the plain forward pass; fresh and peaked, small
    and large vocabularies."""
    if what == "recurrent":
        model = build("rwkv", vocab_size=size, spread=spread)
    else:
        # told the mask but not the positions: GPT-2 counts padding as places
        class Closed(Wrapped):
            def forward(self, input_ids, attention_mask=None):
                return self.inner(input_ids, attention_mask=attention_mask)

        model = Closed(build("gpt2", vocab_size=size, spread=spread))
    tokens, mask = batch()
    for call in (completion_log_probs, lambda model, *args: ValueModel(model)(*args)):
        if call is not completion_log_probs and what != "recurrent":
            continue
        with pytest.raises(ValueError, match="attention_mask holds padding"):
            call(model, tokens, mask, C)
    tokens, mask = batch(padded=False)
    with torch.no_grad():
        found = completion_log_probs(model, tokens, mask, C)
        torch.testing.assert_close(
            found, scored_alone(model, tokens, mask, C), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["bert", "gpt_neox"])
def test_a_model_of_both_directions_is_refused_and_one_of_one_is_not(name):
    """Oracle: the configuration: BERT reads in one direction if told so; GPT-NeoX has the same
    setting and always does."""
    tokens, mask = batch(padded=False)
    if name == "gpt_neox":
        completion_log_probs(build(name), tokens, mask, C)
        return
    shape = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 3, "intermediate_size": 40}
    for told in (False, True):
        torch.manual_seed(0)
        config = CONFIG_MAPPING["bert"](**shape, is_decoder=told)
        model = AutoModelForCausalLM.from_config(config).eval()
        if told:
            found = completion_log_probs(model, tokens, mask, C)
            expected = scored_alone(model, tokens, mask, C)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(ValueError, match=r"both directions.*is_decoder=True"):
                completion_log_probs(model, tokens, mask, C)


@pytest.mark.parametrize("group", [1, GROUP])
def test_a_model_that_answers_with_tuples_is_scored(group):
    """Oracle: the same model with named answers; its configuration is as before."""
    model = build("gpt2", return_dict=False)
    tokens, mask = batch()
    expected = completion_log_probs(build("gpt2"), tokens, mask, C)
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=group)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.return_dict is False


def adapters(name):
    layers = ["q_proj", "v_proj"] if name == "llama" else ["c_attn"]
    words = "embed_tokens" if name == "llama" else "wte"
    options = {"fan_in_fan_out": name == "gpt2", "task_type": "CAUSAL_LM"}
    return {
        "an adapter": peft.LoraConfig(target_modules=[*layers, words], **options),
        "some tokens": peft.LoraConfig(
            target_modules=layers, trainable_token_indices=[1, 2], **options
        ),
        "saved whole": peft.LoraConfig(target_modules=layers, modules_to_save=[words], **options),
        "head and words": peft.LoraConfig(
            target_modules=layers, modules_to_save=[words, "lm_head"], **options
        ),
        "ada": peft.AdaLoraConfig(target_modules=layers, total_step=10, **options),
    }


@pytest.mark.parametrize("how", adapters("gpt2"))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_adapter_on_the_embedding_leaves_the_numbers_of_a_fresh_one(name, how):
    """Oracle: the plain model."""
    tokens, mask = batch()
    expected = completion_log_probs(build(name), tokens, mask, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(name), adapters(name)[how]).eval()
    found = completion_log_probs(model, tokens, mask, C, samples_per_prompt=GROUP)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not ValueModel(model)(tokens, mask, C).any()
    wrong = change(tokens, (0, 0), VOCABULARY)
    with pytest.raises(ValueError, match=r"tokens.*\[0, 29\)"):
        completion_log_probs(model, wrong, mask, C)
