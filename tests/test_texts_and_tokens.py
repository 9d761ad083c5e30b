"""From text to tokens and back: what was sampled comes back as the same tokens, with one end where
a text ended and none where it was cut; special tokens stay out of texts, and texts out of them."""

import pytest
import torch
from architectures import build
from numbers_and_words import letters
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from rlhf_helpers import models, preferences, settings
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sampling, sft
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.book.labelling import Session
from rlhf_helpers.models import Cut, decode
from rlhf_helpers.rollout import sample, write
from rlhf_helpers.worlds import arithmetic

SAMPLED = {"max_new_tokens": 3, "samples_per_prompt": 4}


@pytest.fixture(scope="module")
def adder():
    return models.load(settings.TINY_ARITHMETIC)


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def in_all_encoders(tokenizer, prompt, response, other):
    """The response's tokens by each encoder."""
    before = len(models.encode_prompts(tokenizer, [prompt])[0][0])
    rows = preferences.from_rows([{"prompt": prompt, "chosen": response, "rejected": other}])
    (row,) = reward_model.comparisons(rows)
    pair = Comparison(prompt, (response, other))
    return {
        "sft": sft.encode(tokenizer, [(prompt, response)])[0].response,
        "dpo": dpo.encode(tokenizer, [pair])[0].chosen,
        "rows": dpo.encode(tokenizer, [row])[0].chosen,
        "reward model": reward_model.encode(tokenizer, [prompt], [response])[0][before:],
        "reward model, trained": reward_model.token_lists(tokenizer, [pair])[0][0][before:],
    }


# --- one end where the text ended, none where it was cut -----------------------------------------


def test_what_was_sampled_is_what_is_encoded_whether_it_ended_or_was_cut(adder):
    """Oracle: the tokens of the same sampling, before they were text."""
    policy, tokenizer = adder
    prompts = [f"{a}+58=" for a in range(10, 22)]
    rollout = sample(
        policy,
        *models.encode_prompts(tokenizer, prompts),
        SAMPLED["max_new_tokens"],
        eos_token_id=0,
        pad_token_id=1,
        samples_per_prompt=4,
        generator=luck(),
    )
    texts = write(policy, tokenizer, prompts, **SAMPLED, generator=luck())
    completions, seen = rollout.tokens[:, rollout.prompt_length :], set()
    for row, (text, ids) in enumerate(zip(texts, completions, strict=True)):
        wanted = ids[rollout.completion_mask[row]].tolist()
        seen.add(wanted[-1] == 0)
        assert isinstance(text, Cut) == (wanted[-1] != 0)
        if text:
            found = in_all_encoders(tokenizer, prompts[row // 4], text, "+++")
            assert found == dict.fromkeys(found, wanted)
    assert seen == {True, False}


def test_a_text_that_spells_its_end_gets_one(adder):
    _, tokenizer = adder
    for text in ("2", "2<|endoftext|>", "2<|endoftext|>\n", "2<|endoftext|><|endoftext|>"):
        assert set(map(tuple, in_all_encoders(tokenizer, "1+1=", text, "7").values())) == {(5, 0)}


def test_files_and_the_panel_keep_that_a_text_was_cut(adder, tmp_path):
    _, tokenizer = adder
    pairs = [("97+58=", Cut("14"), "7"), ("1+1=", "2", Cut("3"))]
    session = Session(pairs, tmp_path / "answers.jsonl")
    while (item := session.next()) is not None:
        session.record(item, "a" if item.a in ("14", "2") else "b")
    path = tmp_path / "pairs.jsonl"
    preferences.write_jsonl(session.results(), path)
    back = preferences.read_jsonl(path)
    said = preferences.annotate(
        *map(list, zip(*pairs, strict=True)),
        lambda prompts, completions: [float(text in ("14", "2")) for text in completions],
        [preferences.Annotator("sure", temperature=1e-6)],
    )
    for rows in (back, said.pairs):
        one, two = dpo.encode(tokenizer, reward_model.comparisons(rows))
        assert (one.chosen, one.rejected) == ([4, 7], [10, 0])
        assert (two.chosen, two.rejected) == ([5, 0], [6])


def test_judges_are_told_which_texts_were_cut(adder):
    """Oracle: the reward model's tokens; the judge sees one token less of a cut text."""
    policy, tokenizer = adder
    cut = []

    def judge(prompts, completions, **_):
        cut.append([isinstance(text, Cut) for text in completions])
        return [0.0] * len(prompts)

    prompts = [f"{a}+58=" for a in range(10, 22)]
    found = sampling.respond(policy, tokenizer, prompts, judge, luck(), 4, 3)
    config = ppo.Config(samples_per_prompt=4, max_new_tokens=3)
    sampling.evaluate(policy, policy, tokenizer, prompts, {"judge": judge}, config)
    assert cut[0] == (~found.ended).tolist()
    assert cut == [cut[0], cut[0]]
    assert len(set(cut[0])) == 2


# --- special tokens ------------------------------------------------------------------------------


def test_a_text_ends_at_the_first_token_that_spells_none(adder):
    """Oracle: by hand; each special token and an id beyond the tokenizer, in front, inside and
    behind."""
    _, tokenizer = adder
    nine, five = tokenizer.convert_tokens_to_ids(["9", "5"])
    for odd in (*tokenizer.all_special_ids, len(tokenizer), len(tokenizer) + 60):
        rows = torch.tensor([[odd, nine, five], [nine, odd, five], [nine, five, odd]])
        texts = decode(tokenizer, rows, torch.ones_like(rows))
        assert texts == ["", "9", "95"]
        assert arithmetic.exact([""] * 3, texts, ["95"] * 3) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("source", [settings.TINY, settings.TINY_ARITHMETIC])
def test_a_spelled_special_token_stays_letters_in_every_encoder(source):
    _, tokenizer = models.load(source)
    # of the letters that spell it, the adder knows few
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token in tokenizer.all_special_tokens:
        for text in (f"{token}8", f"7{token}8"):
            for ids in in_all_encoders(tokenizer, text, text, "8").values():
                assert [one for one in ids if one in special] == [tokenizer.eos_token_id]
                assert ids[-1] == tokenizer.eos_token_id
            assert special.isdisjoint(models.encode_prompts(tokenizer, [text])[0][0].tolist())
            assert special.isdisjoint(sft.encode(tokenizer, [(text, "8")])[0].prompt)


def test_a_vocabulary_that_reads_a_special_token_from_letters_is_refused():
    """Here the end is a word like any other, and every unknown word is read as it."""
    tokenizer = letters()
    calls = {
        r"prompts\[1\]": lambda text: models.encode_prompts(tokenizer, ["a", text]),
        r"pairs\[1\]": lambda text: sft.encode(tokenizer, [("a", "b"), ("a", text)]),
        r"data\[1\]": lambda text: dpo.encode(
            tokenizer, [Comparison("a", ("b", "c")), Comparison("a", ("b", text))]
        ),
        r"responses\[1\]": lambda text: reward_model.encode(tokenizer, ["a"] * 2, ["b", text]),
    }
    for where, call in calls.items():
        for text in ("a <end> b", "unknown"):
            with pytest.raises(ValueError, match=rf"{where} .*special token '<end>'"):
                call(text)


# --- spaces at the border ------------------------------------------------------------------------


def trained(model, before, decoder, after_training=None, **options):
    raw = Tokenizer(model)
    raw.pre_tokenizer = before
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False, **options
    )
    raw.train_from_iterator(["the film was good", "nobody expected goodness"] * 20, trainer)
    if after_training is not None:
        after_training(raw)
    raw.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def without_first_space():
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def as_in_llama_2(raw):
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")


def sentences(scheme, decoder=None, **options):
    return lambda: trained(
        kinds.BPE(unk_token="<unk>"),
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder or without_first_space(),
        **options,
    )


def of_bytes(space):
    return lambda: trained(
        kinds.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=space),
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


TOKENIZERS = {
    "metaspace, first": sentences("first"),
    "metaspace, always": sentences("always", decoders.Metaspace()),
    "metaspace, never": sentences("never", decoders.Metaspace(prepend_scheme="never")),
    "llama 2": sentences("never", after_training=as_in_llama_2),
    "bytes": of_bytes(False),
    "bytes, with a space in front": of_bytes(True),
}
RESPONSES = [" good", "good", "ness", "  good", " goodness was", " ", "expected ", " a film"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spaces_at_the_border_are_those_of_the_tokens(name):
    """Oracle: the tokenizer's own decoding of prompt and response together."""
    tokenizer = TOKENIZERS[name]()
    for response in RESPONSES:
        ((prompt, ids),) = sft.encode(tokenizer, [("the film was", response)])
        together = tokenizer.decode(prompt + ids, skip_special_tokens=True)
        assert together.lstrip() == "the film was" + response
        row = torch.tensor([ids])
        assert decode(tokenizer, row, torch.ones_like(row)) == [response]
        if response.strip():
            found = in_all_encoders(tokenizer, "the film was", response, "nobody")
            assert found == dict.fromkeys(found, ids)


def test_words_that_mark_their_end_keep_the_space_in_front():
    """Oracle: by hand, for a vocabulary as that of openai-gpt."""
    tokenizer = trained(
        kinds.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        pre_tokenizers.WhitespaceSplit(),
        decoders.BPEDecoder(suffix="</w>"),
        end_of_word_suffix="</w>",
    )
    ids = sft.encode(tokenizer, [("the film", " was good")])[0].response
    row = torch.tensor([ids])
    assert decode(tokenizer, row, torch.ones_like(row)) == [" was good"]


# --- several end tokens --------------------------------------------------------------------------


def test_any_end_token_of_the_model_ends_a_completion():
    """Oracle: `sample`, which is given both; the texts by hand."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("=")]
    prompts = [f"{a}+58=" for a in range(10, 30)]
    where = models.encode_prompts(tokenizer, prompts)
    wanted = sample(policy, *where, 16, eos_token_id=ends, pad_token_id=1, generator=luck())
    lengths = wanted.completion_mask.sum(1)
    one_end = sample(policy, *where, 16, eos_token_id=0, pad_token_id=1, generator=luck())
    assert (one_end.completion_mask.sum(1) > lengths).any()
    policy.generation_config.eos_token_id = ends
    texts = write(policy, tokenizer, prompts, 16, generator=luck())
    assert not any("=" in text[:-1] for text in texts)
    assert any(text.endswith("=") and not isinstance(text, Cut) for text in texts)
    judge = lambda prompts, completions, **_: [float(len(x)) for x in completions]  # noqa: E731
    found = sampling.respond(policy, tokenizer, prompts, judge, luck(), 1, 16)
    assert torch.equal(found.rollout.tokens, wanted.tokens)
    assert found.ended.all()
    config = ppo.Config(samples_per_prompt=1, max_new_tokens=16)
    assert sampling.evaluate(policy, policy, tokenizer, prompts, {}, config).texts == texts
    config = ppo.Config(
        iterations=1, prompts=4, samples_per_prompt=4, max_new_tokens=16, mini_batches=1
    )
    for train, settings_of in ((ppo.train, config), (grpo.train, None)):
        settings_of = settings_of or grpo.Config(iterations=1, prompts=4, samples_per_prompt=4)
        assert next(train(policy, tokenizer, prompts, judge, settings_of)).unended == 0.0


def test_the_kl_of_dpo_ends_where_the_model_does(monkeypatch):
    policy, tokenizer = build("gpt2"), letters()
    policy.generation_config.eos_token_id = [0, 7, 10_000]  # the last has no row
    asked = []
    monkeypatch.setattr(dpo, "sample", lambda *a, **k: asked.append(k) or sample(*a, **k))
    config = dpo.Config(max_new_tokens=2)
    dpo.sampled_kl(policy, models.reference(policy), tokenizer, [[1, 2]], config)
    assert asked[0]["eos_token_id"] == [0, 7]


# --- empty prompts, and one text where several belong --------------------------------------------


def test_an_empty_prompt_is_one_token_everywhere(adder):
    """Oracle: what the policy is sampled from."""
    _, tokenizer = adder
    start = models.encode_prompts(tokenizer, [""])[0][0].tolist()
    assert start == [tokenizer.bos_token_id]
    assert sft.encode(tokenizer, [("", "2")])[0] == (start, [5, 0])
    assert dpo.encode(tokenizer, [Comparison("", ("2", "3"))])[0][:2] == (start, [5, 0])
    assert reward_model.encode(tokenizer, [""], ["2"]) == [[*start, 5, 0]]
    preferences.from_rows([{"prompt": "", "chosen": "2", "rejected": "3"}])


def ones(prompts, completions, **_):
    return [1.0] * len(prompts)


SURE = [preferences.Annotator("a")]
ONE_TEXT = {
    r"pairs\[0\] is '12'": lambda p, t: next(sft.train(p, t, ["12", "34"], sft.Config())),
    "pairs is one text": lambda p, t: sft.encode(t, "12"),
    r"held_out\[0\]": lambda p, t: next(sft.train(p, t, [("1", "2")], sft.Config(), ["12"])),
    r"ptx pairs\[0\] is '12'": lambda p, t: next(
        ppo.train(p, t, ["1"], ones, ppo.Config(ptx_coefficient=1.0), ptx=["12"])
    ),
    r"columns\['answers'\]": lambda p, t: next(
        ppo.train(p, t, ["1", "2"], ones, ppo.Config(), columns={"answers": "12"})
    ),
    r"columns\['answer'\]": lambda p, t: next(
        grpo.train(p, t, ["1", "2"], ones, grpo.Config(), columns={"answer": "12"})
    ),
    "kinds is one text": lambda p, t: next(
        grpo.train(p, t, ["1", "2"], ones, grpo.Config(), kinds="12")
    ),
    r"data\[0\] has a str": lambda p, t: dpo.encode(t, [Comparison("1", "23")]),
    r"data\[1\] has a str": lambda p, t: next(
        reward_model.train(
            *reward_model.load(p, t),
            [Comparison("1", ("2", "3")), Comparison("1", "23")],
            reward_model.Config(),
        )
    ),
    "first is one text": lambda p, t: preferences.annotate(["1"], "2", ["3"], ones, SURE),
    "second is one text": lambda p, t: preferences.choice_probabilities(
        ["1"], ["2"], "3", ones, SURE
    ),
    "prompts is one text": lambda p, t: reward_model.labelled("1", ["2"], ["3"], torch.ones(1)),
    "responses is one text": lambda p, t: reward_model.encode(t, ["1"], "2"),
    "utility gave texts": lambda p, t: preferences.annotate(
        ["1"], ["2"], ["3"], lambda prompts, completions: "7", SURE
    ),
    r"prompts\[0\] is a tuple": lambda p, t: models.encode_prompts(t, [("1", "2")]),
}


@pytest.mark.parametrize("message", ONE_TEXT)
def test_one_text_where_several_belong_is_refused(message, adder):
    with pytest.raises(ValueError, match=message):
        ONE_TEXT[message](*adder)
