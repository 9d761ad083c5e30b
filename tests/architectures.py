"""Small random causal language models of several families, and wrappers of them, for tests."""

import functools
import inspect

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen2Config,
)

VOCABULARY, CONTEXT, EOS = 29, 48, 0
SPECIAL = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
GPT = {"n_positions": CONTEXT, "n_embd": 24, "n_layer": 2, "n_head": 3}
ROPE = {"max_position_embeddings": CONTEXT, "hidden_size": 24, "num_hidden_layers": 2}
GROUPED = {**ROPE, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}

# gemma2 soft-caps its logits, and its first layer sees a window of 5 tokens only
CONFIGS = {
    "gpt2": (GPT2Config, GPT),
    "openai-gpt": (OpenAIGPTConfig, {**GPT, "n_head": 4}),
    "opt": (
        OPTConfig,
        {**ROPE, "word_embed_proj_dim": 12, "ffn_dim": 40, "num_attention_heads": 2},
    ),
    "llama": (LlamaConfig, GROUPED),
    "qwen2": (Qwen2Config, {**GROUPED, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "gemma2": (
        Gemma2Config,
        {**GROUPED, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 2.0},
    ),
}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"intermediate_size": 8, "image_size": 28, "patch_size": 14}


def composite(family):
    """The configuration of a model of text and images, from options for the text."""

    def config(**text):
        extra = {"mm_tokens_per_image": 4} if family == "gemma3" else {}
        if family == "got_ocr2":
            text |= {"model_type": "qwen2"}
            vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            vision |= {"output_channels": 8, "image_size": 28, "patch_size": 14}
        else:
            vision = VISION
        return CONFIG_MAPPING[family](text_config=text, vision_config=vision, **extra)

    return config


HEADS = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
# a context below the configuration of the text; a state in place of keys and values, with padding
# read as text (rwkv) or not (falcon_mamba); a cache of its own (minimax); no position ids (bloom,
# bart)
OTHERS = {
    "gemma3": (composite("gemma3"), {**ROPE, **HEADS, "sliding_window": 5}),
    "got_ocr2": (composite("got_ocr2"), {**ROPE, **HEADS}),
    "rwkv": (
        CONFIG_MAPPING["rwkv"],
        {"hidden_size": 24, "attention_hidden_size": 24, "num_hidden_layers": 2},
    ),
    "falcon_mamba": (
        CONFIG_MAPPING["falcon_mamba"],
        {"hidden_size": 24, "state_size": 4, "num_hidden_layers": 2},
    ),
    "minimax": (
        CONFIG_MAPPING["minimax"],
        {
            **{**ROPE, **HEADS, "num_local_experts": 4, "block_size": 8},
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bloom": (CONFIG_MAPPING["bloom"], {"hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "bart": (
        CONFIG_MAPPING["bart"],
        {
            **{"d_model": 24, "decoder_layers": 2, "decoder_ffn_dim": 40},
            **{"decoder_attention_heads": 3, "max_position_embeddings": CONTEXT},
        },
    ),
    "ctrl": (CONFIG_MAPPING["ctrl"], {**GPT, "dff": 40}),
    "cohere": (CONFIG_MAPPING["cohere"], GROUPED),
    "mpt": (
        CONFIG_MAPPING["mpt"],
        {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": CONTEXT},
    ),
    "gpt_neox": (
        CONFIG_MAPPING["gpt_neox"],
        {**ROPE, "num_attention_heads": 3, "intermediate_size": 40},
    ),
}
FIVE = ["gpt2", "openai-gpt", "opt", "llama", "qwen2"]


def build(name, dtype=torch.float32, seed=0, spread=0.4, **changes):
    """A model in eval mode. Its weights are large, so that its predictions depend on all inputs."""
    config, options = (CONFIGS | OTHERS)[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config(**{"vocab_size": VOCABULARY, **SPECIAL, **options, **changes})
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=spread)
    return model


def left_padded(lengths, width, vocabulary=VOCABULARY, seed=0):
    """Random prompts [B, width] of the given lengths, and their mask; the padding holds EOS."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()
    tokens = torch.randint(1, vocabulary, mask.shape, generator=generator)
    return torch.where(mask == 1, tokens, EOS), mask


def scored_alone(model, tokens, attention_mask, completion_length, temperature=1.0):
    """Completion log-probabilities of one sequence at a time, without padding or a mask."""
    rows = []
    for row, mask in zip(tokens, attention_mask.bool(), strict=True):
        count = int(mask[-completion_length:].sum())
        ids = row[mask].unsqueeze(0)
        log_probs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
        found = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
        found = found[len(found) - count :]
        rows.append(torch.cat([found, found.new_zeros(completion_length - count)]))
    return torch.stack(rows)


class Wrapped(torch.nn.Module):
    """Passes everything on, as wrappers of acceleration libraries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Seen(Wrapped):
    """Shows what it wraps."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class Named(Seen):
    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **kwargs)


def replaced(model):
    old = model.forward
    model.forward = lambda *args, **kwargs: old(*args, **kwargs)
    return model


def replaced_with_its_name(model):
    old = model.forward
    new = functools.partial(lambda model, *args, **kwargs: old(*args, **kwargs), model)
    model.forward = functools.update_wrapper(new, old)
    return model


def inherited(model):
    """The same weights in a class of one's own that hands everything to the one above it."""
    kind = type(model)

    class Own(kind):
        def forward(self, *args, **kwargs):
            return kind.forward(self, *args, **kwargs)

    model.__class__ = Own
    return model


WRAPPERS = {
    "wrapped": Wrapped,
    "seen": Seen,
    "twice": lambda model: Seen(Wrapped(model)),
    "named": Named,
    "replaced": replaced,
    "replaced with its name": replaced_with_its_name,
    "inherited": inherited,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


def with_cache_called(name):
    """A GPT-2 whose forward pass calls its cache so, whatever the installed library does. It shows
    no trunk, so that all goes through that forward pass."""
    arguments = inspect.signature(GPT2LMHeadModel.forward).parameters
    installed = next(each for each in ("cache", "past_key_values") if each in arguments)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        past = kwargs.pop(name, None)
        if kwargs:
            raise TypeError(f"unknown: {list(kwargs)}")
        output = GPT2LMHeadModel.forward(
            self,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{installed: past},
        )
        return type("Output", (), {"logits": output.logits, name: getattr(output, installed)})

    parameters = ["self", "input_ids", "attention_mask", "position_ids", "use_cache", name]
    forward.__signature__ = inspect.Signature(
        [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in parameters]
    )
    model = build("gpt2")
    own = {"forward": forward, "get_decoder": lambda self: self}
    model.__class__ = type("Renamed", (GPT2LMHeadModel,), own)
    return model
