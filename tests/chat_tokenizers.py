"""Small tokenizers of chat models, one token a letter, with chat templates after those of known
families."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]  # printable ASCII, space and line end

# as SmolLM2's, which has a system message of its own
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# a space on both sides of the answer; no system message; the user begins, and the two take turns
LLAMA_2 = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# words alone mark the turns, and nothing ends them
WORDS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def made(special, template, first=None, words=(), **roles):
    """A tokenizer; `first` is a token that it puts in front of every text by itself, `words` are
    added to the vocabulary without being special."""
    vocabulary = {letter: i for i, letter in enumerate([*special, *LETTERS])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special))
    if words:
        raw.add_tokens(list(words))
    if first is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **roles)
    tokenizer.chat_template = template
    return tokenizer


END = "<|endoftext|>"
HEADS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATS = {
    "chatml": lambda: made(
        [END, "<|im_start|>", "<|im_end|>"],
        CHATML,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token=END,
        pad_token=END,
    ),
    "chatml, another end": lambda: made(
        [END, "<|im_start|>", "<|im_end|>"], CHATML, eos_token=END, pad_token=END
    ),
    "chatml, added words": lambda: made(
        [END], CHATML, words=["<|im_start|>", "<|im_end|>"], eos_token=END, pad_token=END
    ),
    "llama 3": lambda: made(
        ["<|begin_of_text|>", "<|end_of_text|>", *HEADS],
        LLAMA_3,
        first="<|begin_of_text|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    ),
    "llama 2": lambda: made(
        ["<unk>", "<s>", "</s>"],
        LLAMA_2,
        first="<s>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    ),
    "words": lambda: made([END], WORDS, eos_token=END, pad_token=END),
}
ENDS = {
    "chatml": "<|im_end|>",
    "chatml, another end": "<|im_end|>",
    "chatml, added words": "<|im_end|>",
    "llama 3": "<|eot_id|>",
    "llama 2": "</s>",
    "words": None,
}
