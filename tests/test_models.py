"""Language models: tokenizers of five styles, LoRA by hand, the frozen reference, the value
head."""

import copy
import json
import os
import subprocess
import sys

import fake_hub
import pytest
import torch
from architectures import build
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_helpers import models
from rlhf_helpers.algorithms import reward_model
from rlhf_helpers.models import ValueModel, decode, encode_prompts, lora_policy, reference

WORDS = ["the", "plot", "was", "good", "bad", "and", "slow", ","]
END = "<|endoftext|>"


def word_tokenizer(special, first=None, **roles):
    """One token a word; `first` is a token that the tokenizer itself puts in front of every
    text."""
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=roles.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


# style: the tokenizer, and the pad token that is safe for it
STYLES = {
    "gpt2": lambda: (
        word_tokenizer([END], bos_token=END, eos_token=END, unk_token=END),
        END,
    ),
    "openai-gpt": lambda: (word_tokenizer(["<unk>"], unk_token="<unk>"), "<unk>"),
    "opt": lambda: (
        word_tokenizer(
            ["<s>", "<pad>", "</s>"],
            first="</s>",
            bos_token="</s>",
            eos_token="</s>",
            unk_token="</s>",
            pad_token="<pad>",
        ),
        "<pad>",
    ),
    "llama": lambda: (
        word_tokenizer(
            ["<unk>", "<s>", "</s>"],
            first="<s>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        "<unk>",
    ),
    "llama 3": lambda: (
        word_tokenizer(
            ["<begin>", "<end>"], first="<begin>", bos_token="<begin>", eos_token="<end>"
        ),
        "<begin>",
    ),
    "qwen": lambda: (
        word_tokenizer([END, "<|im_end|>"], eos_token="<|im_end|>", pad_token=END),
        END,
    ),
    "all different": lambda: (
        word_tokenizer(
            ["<unk>", "<s>", "</s>", "<pad>"],
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
        ),
        "<pad>",
    ),
    "pad is eos": lambda: (
        word_tokenizer(["<unk>", "</s>"], eos_token="</s>", pad_token="</s>", unk_token="<unk>"),
        "<unk>",
    ),
}


def tiny(vocabulary=32, seed=0, **changes):
    """A random GPT-2 in eval mode."""
    torch.manual_seed(seed)
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    options |= {"bos_token_id": 0, "eos_token_id": 0} | changes
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **options)).eval()


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "gpt2": tiny,
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=32, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=8, **SIZES
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32, intermediate_size=32, **SIZES)),
    "qwen": lambda: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=32, intermediate_size=32, num_key_value_heads=1, **SIZES)
    ),
}


def family(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


def batch(vocabulary=32, seed=3):
    """Two sequences, prompts of 2 and 4 tokens padded to 4, completions of 3 and 2 padded to 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary, (2, 7), generator=generator)
    return tokens, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(1, 9).view(2, 4)).logits


def train_a_little(policy, steps=3):
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        policy(torch.arange(1, 9).view(2, 4), labels=torch.arange(1, 9).view(2, 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# load


@pytest.mark.parametrize("style", STYLES)
def test_load_makes_every_style_of_tokenizer_safe(style):
    """Oracle: for each style the token that is no end of sequence, or GPT-2's only one; by hand."""
    tokenizer, pad = STYLES[style]()
    model, tokenizer = models.load(tiny().train(), tokenizer)
    assert tokenizer.pad_token == pad
    assert tokenizer.padding_side == "left"
    pads = {model.config.pad_token_id, model.generation_config.pad_token_id}
    assert pads == {tokenizer.pad_token_id} == {tokenizer.convert_tokens_to_ids(pad)}
    assert not model.training


def test_a_pad_token_that_the_model_does_not_know_is_not_used():
    """Oracle: the embedding has rows 0 to 8; the added token would be row 9."""
    tokenizer, _ = STYLES["gpt2"]()
    model = tiny(vocabulary=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(model.transformer.wte.weight) == 9
    model, tokenizer = models.load(model, tokenizer)
    assert tokenizer.pad_token == END
    model(encode_prompts(tokenizer, ["good", "the plot"])[0])


def test_a_tokenizer_without_special_tokens_is_refused():
    """Oracle: the specification."""
    with pytest.raises(ValueError, match="special token"):
        models.load(tiny(), word_tokenizer([]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model in half precision and a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer, _ = STYLES["gpt2"]()
    tiny().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_load_from_a_folder_gives_what_was_saved_in_single_precision(saved):
    """Oracle: the weights in the file."""
    model, tokenizer = models.load(str(saved))
    stored = load_file(saved / "model.safetensors")["transformer.wte.weight"]
    assert model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model.transformer.wte.weight, stored.float())
    assert encode_prompts(tokenizer, ["plot"])[0].item() == 2
    half, _ = models.load(saved, dtype=torch.bfloat16)
    assert half.transformer.wte.weight.dtype == torch.bfloat16


def test_a_loaded_model_finds_its_tokenizer_or_asks_for_it(saved):
    """Oracle: the specification; a model made by hand has no name to look under."""
    model, _ = models.load(saved)
    same, tokenizer = models.load(model)
    assert same is model
    assert tokenizer.get_vocab()["plot"] == 2
    with pytest.raises(ValueError, match="pass tokenizer"):
        models.load(tiny())


def test_a_loaded_model_keeps_its_precision_unless_told(saved):
    """Oracle: the specification."""
    tokenizer, _ = STYLES["gpt2"]()
    assert models.load(tiny().double(), tokenizer)[0].dtype == torch.float64
    assert models.load(tiny().double(), tokenizer, dtype=torch.float32)[0].dtype == torch.float32


def test_pickled_weights_are_refused(tmp_path):
    """Oracle: the same folder is accepted by transformers itself, which unpickles it."""
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no safetensors weights") as caught:
        models.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    """Oracle: the module of the folder would write a file when it is imported."""
    model = tiny()
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, '
    (tmp_path / "config.json").write_text(own + config.lstrip("{").replace('"gpt2"', '"own"'))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        models.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    """Oracle: the specification; transformers gives a tokenizer without words there."""
    tiny().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="No tokenizer"):
        models.load(tmp_path)


def test_a_missing_folder_says_what_to_do(tmp_path):
    """Oracle: the specification: two lines, the first with the name, the second with the
    remedies."""
    with pytest.raises(OSError, match="No model") as caught:
        models.load(tmp_path / "nothing")
    missing, remedy = str(caught.value).splitlines()
    assert str(tmp_path / "nothing") in missing
    assert "RLHF_SCALE=tiny" in remedy


def test_models_and_prompts_go_where_they_are_told():
    """Oracle: torch's meta device, which is nowhere."""
    model, tokenizer = models.load(tiny(), STYLES["gpt2"]()[0], device="meta")
    assert model.device.type == "meta"
    assert {x.device.type for x in encode_prompts(tokenizer, ["good"], "meta")} == {"meta"}


# encode_prompts and decode


@pytest.mark.parametrize("style", STYLES)
def test_prompts_are_padded_on_the_left_and_nothing_is_added(style):
    """Oracle: the vocabulary: a word is its place in the list, whatever the tokenizer adds by
    itself."""
    _, tokenizer = models.load(tiny(), STYLES[style]()[0])
    first = tokenizer.convert_tokens_to_ids("the")
    tokens, mask = encode_prompts(tokenizer, ["the plot was good", "bad", "and slow"])
    pad = tokenizer.pad_token_id
    rows = [[0, 1, 2, 3], [4], [5, 6]]
    expected = [[pad] * (4 - len(row)) + [first + word for word in row] for row in rows]
    assert tokens.tolist() == expected
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert decode(tokenizer, tokens, mask) == ["the plot was good", "bad", "and slow"]


@pytest.mark.parametrize(
    ("style", "start"), [("gpt2", END), ("llama", "<s>"), ("qwen", "<|im_end|>")]
)
def test_an_empty_prompt_becomes_one_token(style, start):
    """Oracle: the specification: bos, or eos where there is no bos; the mask counts it."""
    _, tokenizer = models.load(tiny(), STYLES[style]()[0])
    tokens, mask = encode_prompts(tokenizer, ["", "the plot"])
    assert tokens[0, -1] == tokenizer.convert_tokens_to_ids(start)
    assert mask.tolist() == [[0, 1], [1, 1]]


def test_prompts_that_cannot_be_encoded_are_refused():
    """Oracle: the specification."""
    _, tokenizer = models.load(tiny(), STYLES["openai-gpt"]()[0])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        encode_prompts(tokenizer, ["good", ""])
    for wrong in ([], "good"):
        with pytest.raises(ValueError, match="list of at least one"):
            encode_prompts(tokenizer, wrong)


def test_the_mask_and_not_the_token_decides_what_is_decoded():
    """Oracle: by hand; pad is eos here, and a text ends at a counted eos."""
    _, tokenizer = models.load(tiny(), STYLES["gpt2"]()[0])
    end, good, bad = tokenizer.convert_tokens_to_ids([END, "good", "bad"])
    tokens = torch.tensor([[good, end, bad], [good, bad, end], [end, good, bad]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    assert decode(tokenizer, tokens, mask) == ["good", "good bad", "good bad"]
    assert decode(tokenizer, tokens, torch.ones_like(mask).bool()) == ["good", "good bad", ""]
    with pytest.raises(ValueError, match="shapes differ"):
        decode(tokenizer, tokens, mask[:, 1:])


def test_bytes_come_back_as_they_were():
    """Oracle: the text that went in; spaces before punctuation, line breaks and umlauts stay."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fake_hub.byte_level_bpe(["a film"], 300, [END]), eos_token=END
    )
    _, tokenizer = models.load(tiny(vocabulary=300), tokenizer)
    texts = [" so , what ?\n", "Müller's  film n't \t", "x"]
    assert decode(tokenizer, *encode_prompts(tokenizer, texts)) == texts


def test_spaces_before_punctuation_stay_even_if_the_tokenizer_would_drop_them():
    """Oracle: the words that went in, joined by spaces."""
    tokenizer = word_tokenizer(["<unk>"], unk_token="<unk>", clean_up_tokenization_spaces=True)
    _, tokenizer = models.load(tiny(), tokenizer)
    tokens, mask = encode_prompts(tokenizer, ["slow , good"])
    assert tokenizer.decode(tokens[0]) == "slow, good"
    assert decode(tokenizer, tokens, mask) == ["slow , good"]


# lora_policy


def test_a_lora_layer_of_gpt2_computes_the_formula():
    """Oracle: x W + b + (alpha / r) x Aᵀ Bᵀ, with GPT-2's [in, out] weight, in float64."""
    policy = lora_policy(tiny().double(), rank=3, alpha=5)
    layer = policy.base_model.model.transformer.h[1].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((3, 16), (48, 3))
    torch.nn.init.normal_(b)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = x @ layer.base_layer.weight + layer.base_layer.bias + (5 / 3) * (x @ a.T @ b.T)
    for mode in (True, False):
        policy.train(mode)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merged = policy.merge_and_unload().transformer.h[1].attn.c_attn
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_policy_is_the_model_and_trains_only_its_attention(name):
    """Oracle: the model's own output, bit for bit; the names and the number of trained matrices."""
    model = family(name)
    before = logits_of(model)
    policy = lora_policy(model, rank=2)
    assert torch.equal(logits_of(policy), before)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    layers = 1 if name in ("gpt2", "openai-gpt") else 3
    assert len(trained) == 2 * 2 * layers
    assert all("lora_" in n and "attn" in n for n in trained)
    train_a_little(policy)
    assert not torch.allclose(logits_of(policy), before)
    with policy.disable_adapter():
        assert torch.equal(logits_of(policy), before)


def test_other_layers_can_be_named():
    """Oracle: the names of the trained matrices."""
    policy = lora_policy(tiny(), target_modules=["mlp.c_fc"])
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".mlp.c_fc." in n for n in trained)


def test_a_second_adapter_is_refused(tmp_path):
    """Oracle: the specification; also when the adapter came without PEFT's wrapper around the
    model."""
    policy = lora_policy(tiny())
    for model in (policy, policy.get_base_model()):
        with pytest.raises(ValueError, match="merge_and_unload"):
            lora_policy(model)
    assert isinstance(lora_policy(policy.merge_and_unload()), PeftModel)


def test_a_model_without_known_attention_is_refused():
    """Oracle: the specification."""
    with pytest.raises(ValueError, match="target_modules: Sequential has none of"):
        lora_policy(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_an_adapter_is_saved_alone_and_comes_back(tmp_path):
    """Oracle: the policy's output before; the folder's files; 4 bytes for each number in A and
    B."""
    policy = lora_policy(tiny(), rank=2)
    train_a_little(policy)
    policy.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    numbers = 2 * (2 * 16 + 48 * 2)
    assert 4 * numbers < size < 4 * numbers + 1000
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(policy.eval()))


# reference


def test_the_reference_of_a_fresh_adapter_is_the_same_model_without_it():
    """Oracle: the model's output before any training, bit for bit, and the identity of the
    weights."""
    model = tiny()
    before = logits_of(model)
    policy = lora_policy(model)
    frozen = reference(policy)
    numbers = sum(p.numel() for p in policy.parameters())
    for _ in range(2):
        train_a_little(policy)
        with frozen() as fixed:
            assert fixed is policy
            assert torch.equal(fixed(torch.arange(1, 9).view(2, 4)).logits, before)
    assert sum(p.numel() for p in policy.parameters()) == numbers
    assert policy.get_base_model() is model
    assert not torch.allclose(logits_of(policy), before)


def test_the_reference_of_a_plain_model_is_a_copy_that_stays():
    """Oracle: the model's output before training, and that no storage is shared."""
    policy = tiny(resid_pdrop=0.5).train()
    before = logits_of(copy.deepcopy(policy).eval())
    frozen = reference(policy)
    train_a_little(policy)
    with frozen() as fixed:
        assert torch.equal(fixed(torch.arange(1, 9).view(2, 4)).logits, before)
        assert not any(p.requires_grad for p in fixed.parameters())
        shared = {p.data_ptr() for p in fixed.parameters()}
    assert not shared & {p.data_ptr() for p in policy.parameters()}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_gives_no_gradient_and_leaves_the_policy_as_it_was(adapter):
    """Oracle: grad_fn, and each module's mode and each parameter's requires_grad before."""
    policy = lora_policy(tiny()) if adapter else tiny()
    policy.train()
    policy.get_submodule(
        "base_model.model.transformer.h.0" if adapter else "transformer.h.0"
    ).eval()
    modes = [module.training for module in policy.modules()]
    trained = [p.requires_grad for p in policy.parameters()]
    frozen = reference(policy)
    for failing in (False, True):
        try:
            with frozen() as fixed:
                assert not fixed.training
                assert not torch.is_grad_enabled()
                assert fixed(torch.tensor([[1, 2]])).logits.grad_fn is None
                if failing:
                    raise KeyError
        except KeyError:
            pass
        assert [module.training for module in policy.modules()] == modes
        assert [p.requires_grad for p in policy.parameters()] == trained
    assert policy(torch.tensor([[1, 2]])).logits.grad_fn is not None


def test_an_adapter_of_another_kind_has_a_copy_as_its_reference():
    """Oracle: the output before the first update; IA3 has no matrix that shows whether it was
    trained, so switching it off proves nothing."""
    policy = get_peft_model(
        tiny(), IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[])
    ).eval()
    start, frozen = logits_of(policy), reference(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.equal(logits_of(policy), start)
    with frozen() as model:
        assert torch.equal(logits_of(model), start)


def test_a_trained_adapter_has_no_reference_of_its_own(tmp_path):
    """Oracle: the output of the policy that the run starts from, which both remedies must give."""
    policy = lora_policy(tiny())
    train_a_little(policy)
    policy.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
    start = logits_of(resumed)
    with pytest.raises(ValueError, match="base model") as caught:
        reference(resumed)
    assert "lora_policy(policy.merge_and_unload())" in str(caught.value)
    assert "reference(copy.deepcopy(policy).merge_and_unload())" in str(caught.value)

    copied = reference(copy.deepcopy(resumed).merge_and_unload())
    train_a_little(resumed)
    with copied() as fixed:
        torch.testing.assert_close(logits_of(fixed), start)

    resumed = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    merged = lora_policy(resumed.merge_and_unload())
    again = reference(merged)
    train_a_little(merged)
    with again() as fixed:
        torch.testing.assert_close(logits_of(fixed), start)


# ValueModel


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_those_of_each_sequence_alone(name):
    """Oracle: hidden state times weight plus bias, one sequence at a time without padding, the
    state before each token; openai-gpt and opt included."""
    model = family(name)
    value = ValueModel(model)
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.normal_(value.head.bias)
    tokens, mask = batch()
    expected = torch.zeros(2, 3)
    for i, prompt in enumerate((2, 4)):
        row = tokens[i][mask[i].bool()]
        with torch.no_grad():
            hidden = model.base_model(row[None]).last_hidden_state[0]
        for t in range(len(row) - prompt):
            expected[i, t] = hidden[prompt + t - 1] @ value.head.weight[0] + value.head.bias[0]
    found = value(tokens, mask, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1, 2] == 0


def test_values_have_the_precision_of_the_model():
    """Oracle: the specification."""
    assert ValueModel(tiny().double())(*batch(), 3).dtype == torch.float64


def test_values_start_at_zero_and_the_gradient_reaches_head_and_trunk():
    """Oracle: a zero head; after one step of the head every layer of the trunk has a gradient."""
    value = ValueModel(tiny())
    tokens, mask = batch()
    first = value(tokens, mask, 3)
    assert (first == 0).all()
    (first - 1).square().sum().backward()
    assert value.head.weight.grad.abs().sum() > 0
    torch.optim.SGD(value.parameters(), lr=0.1).step()
    value.zero_grad()
    (value(tokens, mask, 3) - 1).square().sum().backward()
    for name, parameter in value.trunk.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_more_padding_changes_no_value():
    """Oracle: the same call without the extra columns; the pad token is arbitrary."""
    value = ValueModel(tiny())
    torch.nn.init.normal_(value.head.weight)
    tokens, mask = batch()
    wide = torch.cat([torch.full((2, 3), 9), tokens], 1)
    wide_mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    for dtype in (torch.long, torch.bool, torch.float32):
        torch.testing.assert_close(
            value(wide, wide_mask.to(dtype), 3), value(tokens, mask, 3), rtol=1e-5, atol=1e-6
        )


def test_the_trunk_is_a_copy_or_the_models_own():
    """Oracle: the identity of the weights."""
    model = tiny()
    own, shared = ValueModel(model), ValueModel(model, share_trunk=True)
    assert shared.trunk is model.transformer
    weights = {p.data_ptr() for p in model.parameters()}
    assert not weights & {p.data_ptr() for p in own.parameters()}
    assert not any(module.training for module in [*own.modules(), *shared.modules()])
    assert all(module.training for module in ValueModel(tiny().train()).modules())


def test_the_trunk_of_a_lora_policy_comes_with_its_adapter():
    """Oracle: the policy's own hidden states, and that only the adapter and the head are
    trained."""
    policy = lora_policy(tiny())
    train_a_little(policy)
    value = ValueModel(policy.eval())
    torch.nn.init.ones_(value.head.weight)
    tokens, mask = batch()
    with torch.no_grad():
        hidden = policy(tokens[1:, :6], output_hidden_states=True).hidden_states[-1]
        found = value(tokens[1:, :6], mask[1:, :6], 2)
    torch.testing.assert_close(found, hidden[:, 3:5].sum(-1), rtol=1e-4, atol=1e-5)
    trained = {n for n, p in value.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("head.") for n in trained)
    assert len(trained) == 6


def grouped(lengths, group, width=4, seed=3):
    """Prompts of these lengths, padded to 4, with `group` completions of 1 to 3 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 32, (len(lengths), width), generator=generator)
    rows = len(lengths) * group
    completions = torch.randint(1, 32, (rows, 3), generator=generator)
    tokens = torch.cat([prompts.repeat_interleave(group, 0), completions], 1)
    left = torch.arange(width) >= width - torch.tensor(lengths).repeat_interleave(group).unsqueeze(
        1
    )
    right = torch.arange(3) <= torch.arange(rows).unsqueeze(1) % 3
    return tokens, torch.cat([left, right], 1).long()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("group", "lengths"), [(3, (2, 4)), (2, (4, 4)), (4, (1,))])
def test_values_that_share_a_prompt_are_those_of_each_sequence_alone(name, group, lengths):
    """Oracle: hidden state times weight plus bias and its gradient, one sequence at a time without
    padding, in float64; openai-gpt, which has no cache, included."""
    value = ValueModel(family(name).double())
    torch.manual_seed(1)
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.normal_(value.head.bias)
    tokens, mask = grouped(lengths, group)
    weights = torch.randn(len(tokens), 3, dtype=torch.float64)
    expected = []
    for i, row in enumerate(tokens):
        count = int(mask[i, -3:].sum())
        hidden = value.trunk(row[mask[i].bool()][None]).last_hidden_state[0]
        found = hidden[-count - 1 : -1] @ value.head.weight[0] + value.head.bias[0]
        expected.append(torch.cat([found, found.new_zeros(3 - count)]))
    expected = torch.stack(expected)
    (expected * weights).sum().backward()
    wanted = {n: p.grad.clone() for n, p in value.named_parameters() if p.grad is not None}
    value.zero_grad()
    found = value(tokens, mask, 3, samples_per_prompt=group)
    (found * weights).sum().backward()
    # the norm of these two is computed in float32 whatever the model's precision
    tolerance = 1e-5 if name in ("llama", "qwen") else 1e-10
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not found[mask[:, -3:] == 0].any()
    assert wanted
    for parameter, grad in wanted.items():
        found = value.get_parameter(parameter).grad
        atol = tolerance * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found, grad, rtol=0, atol=atol, msg=parameter)


def test_a_shared_prompt_goes_through_the_trunk_once():
    """Oracle: the number of tokens that the trunk is given."""
    value, seen = ValueModel(tiny()), []
    value.trunk.wte.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    value(*grouped((2, 4), 3), 3, samples_per_prompt=3)
    assert sum(ids.numel() for ids in seen) == 2 * 4 + 6 * 2
    seen.clear()
    value(*grouped((2, 4), 3), 3)
    assert sum(ids.numel() for ids in seen) == 6 * (4 + 2)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (4, "samples_per_prompt=4 must be positive and divide the 6 rows"),
        (0, "samples_per_prompt=0 must be positive"),
        (2, r"group 1 \(rows 2 to 3\) holds different prompts"),
    ],
)
def test_rows_that_are_no_groups_are_refused(group, message):
    """Oracle: the specification."""
    with pytest.raises(ValueError, match=message):
        ValueModel(tiny())(*grouped((2, 4), 3), 3, samples_per_prompt=group)


@pytest.mark.parametrize("length", [0, 7, 8])
def test_a_completion_length_outside_the_sequence_is_refused(length):
    """Oracle: the specification; a value needs one token before it."""
    with pytest.raises(ValueError, match="completion_length"):
        ValueModel(tiny())(*batch(), length)


def test_tokens_and_mask_of_different_shapes_are_refused():
    """Oracle: the specification."""
    tokens, mask = batch()
    with pytest.raises(ValueError, match="shapes differ"):
        ValueModel(tiny())(tokens, mask[:, 1:], 2)


# The hub's cache


def offline(code, home):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "RLHF_SCALE": "gpt2"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


CODE = """
from rlhf_helpers import models, settings
chosen = settings.load()
try:
    model, tokenizer = models.load(chosen.model)
except OSError as error:
    print(error)
    raise SystemExit
tokens, mask = models.encode_prompts(tokenizer, ["I saw", "The plot was"])
print(models.decode(tokenizer, tokens, mask), model.config.n_positions, tokenizer.pad_token)
from transformers import pipeline
score = pipeline("text-classification", model="lvwerra/distilbert-imdb", top_k=None)
print(sorted(row["label"] for row in score(["a great film"])[0]))
from rlhf_helpers.worlds import imdb
print(len(imdb.texts("held_out", 200)))
"""


@pytest.mark.slow
def test_scale_gpt2_loads_from_the_cache_without_a_network(tmp_path):
    """Oracle: by hand; the real names, the real context length, GPT-2's one special token."""
    fake_hub.make(tmp_path)
    run = offline(CODE, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"['I saw', 'The plot was'] 1024 {END}",
        "['NEGATIVE', 'POSITIVE']",
        "200",
    ]


@pytest.mark.slow
def test_without_network_and_cache_two_lines_say_what_to_do(tmp_path):
    """Oracle: the specification."""
    run = offline(CODE, tmp_path)
    missing, remedy = run.stdout.splitlines()
    assert "No model 'gpt2'" in missing
    assert all(words in remedy for words in ("Connect", "RLHF_SCALE=tiny", "path"))


def test_values_ask_of_their_input_what_scoring_asks():
    """Oracle: the specification; the prompt of one row is padded on the right."""
    value, (tokens, mask) = ValueModel(tiny()), batch()
    right = mask.clone()
    right[1, 3] = 0
    wrong = tokens.clone()
    wrong[0, 3] = 32
    long = torch.ones(1, 33, dtype=torch.long)
    for given, message in (
        ((tokens, 2 * mask, 3), "attention_mask"),
        ((tokens, mask * 0.5, 3), "attention_mask"),
        ((tokens, torch.where(mask == 1, 0.0, -torch.inf), 3), "attention_mask"),
        ((tokens, right, 3), "attention_mask.*row 1.*left"),
        ((wrong, mask, 3), r"tokens.*\[0, 32\)"),
        ((long, long, 3), r"tokens: 33 .*context of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            value(*given)


# What a folder holds


def folder_of(model, path, **options):
    """The model and a tokenizer, saved; the path of the folder."""
    tokenizer, _ = STYLES["gpt2"]()
    model.save_pretrained(path, **options)
    tokenizer.save_pretrained(path)
    return path


def rewrite(path, change):
    """The weights of a folder, changed: by name and tensor to names and tensors."""
    weights = load_file(path / "model.safetensors")
    weights = dict(pair for name, each in weights.items() for pair in change(name, each))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "missing": (lambda name, each: [(name, each)] * (".h.1." not in name), r"h\.1\."),
    "renamed": (lambda name, each: [(f"module.{name}", each)], "transformer|score"),
    "extra": (lambda name, each: [(name, each), ("more.weight", torch.ones(2))], r"more\.weight"),
    "of another shape": (
        lambda name, each: [(name, each[:3] if name.endswith("wpe.weight") else each)],
        r"wpe\.weight",
    ),
    "not finite": (
        lambda name, each: [(name, each * float("nan") if "ln_f.bias" in name else each)],
        r"ln_f\.bias",
    ),
}


@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_all_weights_or_with_others_is_refused_by_name(tmp_path, kind, damage):
    """Oracle: the same folder before it was changed is read, and gives the same numbers."""
    tokenizer, _ = STYLES["gpt2"]()
    model, read = tiny(), models.load
    if kind == "reward model":
        model, read = reward_model.load(model, tokenizer)[0], reward_model.load
        torch.nn.init.normal_(model.score.weight)
    folder_of(model, tmp_path)
    again, _ = read(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    change, named = DAMAGES[damage]
    rewrite(tmp_path, change)
    with pytest.raises((ValueError, OSError), match=named) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_reward_model_keeps_its_head_and_is_no_language_model(tmp_path):
    """Oracle: the scores before it was saved; a head that the file lacks or holds in vain."""
    judge, tokenizer = reward_model.load(tiny(), STYLES["gpt2"]()[0])
    torch.nn.init.normal_(judge.score.weight)
    folder_of(judge, tmp_path)
    expected = reward_model.scores(judge, tokenizer, ["the"], ["plot was good"])
    assert expected.abs() > 0.01
    for source in (tmp_path, str(tmp_path), judge):
        again, _ = reward_model.load(source, tokenizer)
        assert torch.equal(
            reward_model.scores(again, tokenizer, ["the"], ["plot was good"]), expected
        )
        assert again is not judge
    with pytest.raises(ValueError, match=r"no place for: score\.weight"):
        models.load(tmp_path)
    rewrite(tmp_path, lambda name, each: [(name, each)] * (name != "score.weight"))
    with pytest.raises(ValueError, match=r"no trained weights for score\.weight"):
        reward_model.load(tmp_path)


def test_a_classifier_of_many_labels_is_no_reward_model(tmp_path):
    """Oracle: the specification."""
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    folder_of(GPT2ForSequenceClassification(config), tmp_path)
    with pytest.raises(ValueError, match="3 scores"):
        reward_model.load(tmp_path)


@pytest.mark.parametrize("name", ["ctrl", "bloom"])
def test_a_family_without_a_score_has_no_reward_model(name):
    """Oracle: the library: CTRL has a classifier with a head of another name, BLOOM has a score."""
    model, tokenizer = build(name, vocab_size=32), STYLES["gpt2"]()[0]
    if name == "bloom":
        assert not reward_model.load(model, tokenizer)[0].score.weight.any()
        return
    with pytest.raises(ValueError, match=r"no classifier with one score.*CTRL"):
        reward_model.load(model, tokenizer)


def test_a_tokenizer_with_more_words_than_the_model_is_refused():
    """Oracle: the model's rows; the word that has none."""
    tokenizer, _ = STYLES["gpt2"]()
    with pytest.raises(ValueError, match=r"tokenizer: 3 of its words, from 'and' = 6 on.*of 6"):
        models.load(tiny(vocabulary=6), tokenizer)


def test_the_tokenizer_of_a_model_with_an_adapter_on_its_embedding_is_made_safe():
    """Oracle: the pad token of the plain model."""
    tokenizer, pad = STYLES["llama"]()
    policy = lora_policy(tiny(), target_modules=["c_attn", "wte"])
    assert models.load(policy, tokenizer)[1].pad_token == pad


@pytest.mark.parametrize("read", [models.load, reward_model.load])
@pytest.mark.parametrize(
    ("named", "read_it"),
    [
        ("inside.bin", False),
        ("../outside.bin", False),
        ("{folder}/outside.bin", False),
        ("../outside.safetensors", False),
        ("link.safetensors", False),
        ("model-1.safetensors", True),
    ],
)
def test_an_index_names_only_safetensors_of_its_own_folder(tmp_path, read, named, read_it):
    """Oracle: the specification; all those files hold the right weights."""
    model = tiny()
    folder = folder_of(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for path in (folder / "inside.bin", tmp_path / "outside.bin"):
        torch.save(weights, path)
    for path in (folder / "model-1.safetensors", tmp_path / "outside.safetensors"):
        save_file(weights, path, metadata={"format": "pt"})
    if "link" in named:
        if os.name == "nt":
            pytest.skip("links need rights there that few have")
        (folder / named).symlink_to(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, named.format(folder=tmp_path))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if read_it:
        read(folder)
        return
    with pytest.raises(OSError, match=r"names .* only safetensors files") as caught:
        read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("named", ["adapter_model.bin", "../outside.safetensors", "x.index.json"])
def test_a_configuration_names_no_other_file_either(tmp_path, named):
    """Oracle: the specification; the library would unpickle the first."""
    folder = folder_of(tiny(), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": named}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"names|safetensors"):
        models.load(folder)


def test_the_folder_of_an_adapter_says_how_to_read_it(tmp_path):
    """Oracle: the specification; its settings name a model that would be read without a check."""
    lora_policy(tiny()).save_pretrained(tmp_path)
    tiny().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds an adapter.*PeftModel\.from_pretrained"):
        models.load(tmp_path)


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES += ["model.safetensors.index.json"]


@pytest.mark.parametrize("how", ["empty", "cut", "a list", "bytes"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_that_names_the_folder_and_not_the_hub(tmp_path, name, how):
    """Oracle: the specification; the folder is there, so that no one need connect."""
    shards = {"max_shard_size": "4KB"} if "index" in name else {}
    path = folder_of(tiny(), tmp_path, **shards) / name
    whole = path.read_bytes()
    damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "a list": b"[1, 2]"}
    path.write_bytes(damaged.get(how, bytes(range(256)) * 4))
    with pytest.raises(OSError, match=r"cannot be read: .") as caught:
        models.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "hub" not in str(caught.value)


def test_folders_and_files_of_another_kind_are_not_called_absent(tmp_path):
    """Oracle: the specification."""
    (tmp_path / "model.txt").write_bytes(b"weights")
    for source, message in (
        (tmp_path, "cannot be read"),
        (tmp_path / "model.txt", "is a file; pass the folder"),
    ):
        with pytest.raises(OSError, match=message) as caught:
            models.load(source)
        assert str(source) in str(caught.value)


@pytest.mark.parametrize("beside", ["nothing", "a configuration", "safetensors"])
def test_a_gguf_file_is_named_with_what_to_do(tmp_path, beside):
    """Oracle: the specification, and that the lines which it prints are Python; safetensors beside
    it are read."""
    path = tmp_path / "model.Q4_1.gguf"
    if beside != "nothing":
        folder_of(tiny(), tmp_path)
    path.write_bytes(b"GGUF")
    if beside == "safetensors":
        models.load(tmp_path)
    elif beside == "a configuration":
        (tmp_path / "model.safetensors").unlink()
    for source in (tmp_path, path)[beside == "safetensors" :]:
        for read in (models.load, models.load_tokenizer)[: 1 + (source == path)]:
            with pytest.raises(OSError, match="is a GGUF file") as caught:
                read(source)
            assert str(path) in str(caught.value)
            lines = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
            compile("\n".join(line.strip() for line in lines), "message", "exec")
            assert "gguf_file='model.Q4_1.gguf'" in lines[0]


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    """Oracle: the specification."""
    with pytest.raises(ValueError, match=f"device='{device}' is not here"):
        models.load(tiny(), STYLES["gpt2"]()[0], device=device)
