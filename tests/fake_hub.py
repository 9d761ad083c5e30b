"""Lay out a hub cache with small random stand-ins under the real names.  usage: fake_hub.py DIR

HF_HOME=DIR HF_HUB_OFFLINE=1 RLHF_SCALE=gpt2 then runs the code of scale gpt2, from_pretrained and
load_dataset included, without a network. What it computes means nothing.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

import torch
from datasets import ClassLabel, DatasetInfo, Features, Value
from datasets.arrow_writer import ArrowWriter
from datasets.splits import SplitDict, SplitInfo
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf_helpers.worlds.imdb import TOPICS

IMDB = "stanfordnlp/imdb"
SENTIMENT = "lvwerra/distilbert-imdb"
END = "<|endoftext|>"
# word: label 0 is a negative review, 1 a positive one
TASTE = {
    0: ["dull", "awful", "weak", "boring", "terrible", "thin"],
    1: ["great", "lovely", "strong", "moving", "wonderful", "sharp"],
}
THINGS = [*(topic.replace("humour", "humor") for topic in TOPICS), "camera", "effects"]
PLACES = ["on a train", "with my sister", "last night", "at a festival", "twice", "by accident"]


def reviews(n, seed):
    """n made-up reviews as (text, label), with the line breaks that the real ones have."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        label = i % 2
        words = [rng.choice(TASTE[label]) for _ in range(3)]
        things = rng.sample(THINGS, 3)
        found.append(
            (
                f"I saw film number {rng.randrange(10_000)} {rng.choice(PLACES)}. "
                f"The {things[0]} was {words[0]} and so was the {things[1]}.<br /><br />"
                f"All in all the {things[2]} seemed {words[1]}  to me, even {words[2]}.",
                label,
            )
        )
    return found


def byte_level_bpe(texts, size, special_tokens):
    """A byte-level BPE tokenizer like GPT-2's, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def snapshot(cache, name):
    """An empty snapshot folder of a model repository, as the hub client lays it out."""
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def write_gpt2(folder, texts):
    """A random GPT-2 with the real context length and the files of the real repository."""
    tokenizer = byte_level_bpe(texts, 400, [END])
    # the real repository names no special tokens and no pad token: they are the class's defaults
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    end = tokenizer.token_to_id(END)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=1024,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_sentiment(folder, texts):
    """A random DistilBERT classifier with the labels of the real one and a WordPiece tokenizer."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = DistilBertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=512)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder)


def write_imdb(cache, splits):
    """The prepared files of the data set: what load_dataset reads when it cannot reach the hub."""
    name = IMDB.rpartition("/")[2]
    commit = hashlib.sha1(IMDB.encode()).hexdigest()
    folder = cache / "datasets" / IMDB.replace("/", "___") / "plain_text" / "0.0.0" / commit
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    infos = SplitDict(dataset_name=name)
    for split, rows in splits.items():
        with ArrowWriter(features=features, path=str(folder / f"{name}-{split}.arrow")) as writer:
            for text, label in rows:
                writer.write({"text": text, "label": label})
            count, size = writer.finalize()
        infos.add(SplitInfo(split, num_bytes=size, num_examples=count, dataset_name=name))
    DatasetInfo(
        features=features,
        splits=infos,
        dataset_name=name,
        config_name="plain_text",
        builder_name="parquet",
        version="0.0.0",
    ).write_to_directory(str(folder))


def make(cache):
    cache = Path(cache)
    # an unlabelled review has label -1, as in the real data set
    splits = {
        "train": reviews(2400, seed=1),
        "test": reviews(1200, seed=2),
        "unsupervised": [(text, -1) for text, _ in reviews(50, seed=3)],
    }
    texts = [text for text, _ in splits["train"]]
    # one repository, and the short name that it is usually called by
    for name in ("openai-community/gpt2", "gpt2"):
        write_gpt2(snapshot(cache, name), texts)
    write_sentiment(snapshot(cache, SENTIMENT), texts)
    write_imdb(cache, splits)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    make(sys.argv[1])
