"""Small random causal language models of several families, for tests."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
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
FIVE = ["gpt2", "openai-gpt", "opt", "llama", "qwen2"]


def build(name, dtype=torch.float32, seed=0, spread=0.4, **changes):
    """A model in eval mode. Its weights are large, so that its predictions depend on all inputs."""
    config, options = CONFIGS[name]
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
