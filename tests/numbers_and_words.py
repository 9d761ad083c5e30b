"""What several tests of losses and of training need: random numbers, gradients, and a tokenizer of
letters."""

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WORDS = ["<end>", *"abcdefghijklmnopqrstuvwxyz."]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def value_and_gradient(function, x):
    x = x.detach().clone().requires_grad_()
    result = function(x)
    (gradient,) = torch.autograd.grad(result, x)
    return result.detach(), gradient


def letters():
    """One token a letter, with spaces between; pad and end are one token, which is the hard
    case."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
