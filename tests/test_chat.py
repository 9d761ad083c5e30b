"""Conversations: what the chat template writes becomes tokens, what ends a turn ends a response,
and rewards read plain texts."""

import warnings

import pytest
import torch
from architectures import build
from chat_tokenizers import CHATML, CHATS, END, ENDS, made
from numbers_and_words import letters
from trl import GRPOTrainer, apply_chat_template

from rlhf_helpers import conversations, models, preferences, rewards, scale_out
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sampling, sft
from rlhf_helpers.algorithms._resume import digest
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.book import labelling
from rlhf_helpers.conversations import chat, plain_text
from rlhf_helpers.models import Cut, encode_prompts
from rlhf_helpers.rollout import end_tokens, ended, sample, write


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


SHORT = [user("Hi")]
LONG = [user("What is red?"), assistant("A rose."), user("And  blue?\n\n- one")]
TOLD = [system("Be brief."), user("Say <b>hi</b> ")]
WITHOUT_SYSTEM = ["llama 2"]  # templates that know no system message


def talks_for(name):
    return [SHORT, LONG] if name in WITHOUT_SYSTEM else [SHORT, LONG, TOLD]


def model_for(tokenizer):
    """A random model that knows the tokenizer's words. It often ends its turn, and of special
    tokens it writes no others."""
    policy = build("llama", vocab_size=len(tokenizer), max_position_embeddings=400)
    head = torch.nn.Linear(24, len(tokenizer))
    end = models.turn_end(tokenizer)
    with torch.no_grad():
        head.weight.copy_(policy.lm_head.weight)
        head.bias.zero_()
        head.bias[list(tokenizer.added_tokens_decoder)] = -1e4
        head.bias[tokenizer.eos_token_id if end is None else end] = 3.0
    policy.lm_head = head
    policy.generation_config.eos_token_id = None
    return models.load(policy, tokenizer)


def judge_for(tokenizer):
    trunk = build("llama", vocab_size=len(tokenizer), max_position_embeddings=400)
    return reward_model.load(trunk, tokenizer)


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_what_the_library_makes_of_it(name):
    """Oracle: transformers' own tokens of each conversation alone; texts beside them are those of
    the tokenizer, without any special token."""
    tokenizer = CHATS[name]()
    talks = talks_for(name)
    wanted = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
        for one in talks
    ]
    texts = ["Hi", "user: a longer text"]
    wanted[1:1] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens, mask = encode_prompts(tokenizer, [talks[0], *texts, *talks[1:]])
    assert len(set(map(len, wanted))) == len(wanted)
    for row, counts, ids in zip(tokens, mask, wanted, strict=True):
        assert row[counts.bool()].tolist() == ids
        assert counts[-len(ids) :].all()
        assert counts.sum() == len(ids)
    if name == "llama 3":
        # TRL's and this tokenizer's habit is to put one in front, too
        assert [ids.count(tokenizer.bos_token_id) for ids in wanted] == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("name", CHATS)
def test_prompts_and_responses_are_those_of_trl(name):
    """Oracle: TRL's rendering of prompt and responses. What it has behind the end of the turn (a
    line end) is not trained here."""
    tokenizer = CHATS[name]()
    for prompt in talks_for(name):
        gap = " " if name == "llama 2" else ""
        row = {"prompt": prompt, "chosen": [assistant("Blue.")], "rejected": [assistant("No")]}
        text = apply_chat_template(row, tokenizer)
        pair = Comparison(prompt, (f"{gap}Blue.", f"{gap}No"))
        (found,) = dpo.encode(tokenizer, [pair])
        theirs = {
            key: tokenizer(value, add_special_tokens=False)["input_ids"]
            for key, value in text.items()
        }
        assert found.prompt == theirs["prompt"]
        for mine, side in ((found.chosen, "chosen"), (found.rejected, "rejected")):
            if name == "llama 2":  # and a space before the end, which no model is asked to write
                del theirs[side][-2]
            end = [] if ENDS[name] else mine[-1:]
            if not ENDS[name]:
                theirs[side] = theirs[side][:-1] + end  # a line end in its place
            assert theirs[side][: len(mine)] == mine
            assert set(theirs[side][len(mine) :]) <= {tokenizer.convert_tokens_to_ids("Ċ")}


def test_texts_become_conversations():
    assert chat(["Hi", ""]) == [[user("Hi")], [user("")]]
    assert chat(["Hi"], system="Be brief.") == [[system("Be brief."), user("Hi")]]
    with pytest.raises(ValueError, match="texts is one text"):
        chat("Hi")
    with pytest.raises(ValueError, match=r"texts\[1\] is a int"):
        chat(["Hi", 5])


BAD = {
    "is a conversation without a message": [],
    "has as message 0 a str": ["Hi"],
    "has in message 0 a NoneType as content": [{"role": "user"}],
    "has in message 0 a list as content": [{"role": "user", "content": [{"type": "text"}]}],
    "has in message 1 the role 'bot'": [user("Hi"), {"role": "bot", "content": "Ho"}],
    "has in message 0 the field 'tool_calls'": [{**user("Hi"), "tool_calls": [1]}],
    "ends with a message of the assistant": [user("Hi"), assistant("Ho")],
    "ends with a message of the system": [user("Hi"), system("Ho")],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_conversation_is_refused_by_its_index(message):
    """Oracle: the specification; by every function that takes prompts."""
    tokenizer, talk = CHATS["chatml"](), BAD[message]
    calls = {
        r"prompts\[1\]": lambda: encode_prompts(tokenizer, [SHORT, talk]),
        r"pairs\[1\]": lambda: sft.encode(tokenizer, [(SHORT, "a"), (talk, "a")]),
        r"data\[1\].prompt": lambda: dpo.encode(
            tokenizer, [Comparison(SHORT, ("a", "b")), Comparison(talk, ("a", "b"))]
        ),
        r"rows\[1\]: prompt": lambda: preferences.from_rows(
            [{"prompt": one, "chosen": "a", "rejected": "b"} for one in (SHORT, talk)]
        ),
        r"prompts\[1\] ": lambda: rewards.score(rewards.word_count, [SHORT, talk], ["a", "b"]),
        r"pairs\[1\] cannot be shown: prompt": lambda: labelling.Session(
            [(SHORT, "a", "b"), (talk, "a", "b")], "nowhere/answers.jsonl"
        ),
    }
    for where, call in calls.items():
        with pytest.raises(ValueError, match=f"{where}.*{message}"):
            call()


def test_one_conversation_is_not_a_list_of_prompts():
    with pytest.raises(ValueError, match="prompts is one conversation; put it into a list"):
        encode_prompts(CHATS["chatml"](), SHORT)
    # a field that a table gives to every message
    talk = [{**user("Hi"), "name": None}]
    assert models.prompt_ids(CHATS["chatml"](), [talk]) == models.prompt_ids(
        CHATS["chatml"](), [SHORT]
    )


def test_without_a_template_a_conversation_is_refused():
    tokenizer = made([END], None, eos_token=END, pad_token=END)
    with pytest.raises(ValueError, match=r"prompts\[1\] is a conversation .* no chat template"):
        encode_prompts(tokenizer, ["Hi", SHORT])
    assert models.turn_end(tokenizer) is None


def test_what_a_template_does_not_take_is_told_with_the_index():
    with pytest.raises(ValueError, match=r"prompts\[1\].*template does not take.*alternate"):
        encode_prompts(CHATS["llama 2"](), [SHORT, TOLD])


def test_a_template_that_does_not_begin_the_answer_is_refused():
    """Sampled from such prompts, a model would speak as anybody."""
    template = CHATML[: CHATML.index("{% if add_generation_prompt")]
    tokenizer = made(
        [END, "<|im_start|>", "<|im_end|>"], template, eos_token="<|im_end|>", pad_token=END
    )
    with pytest.raises(ValueError, match=r"<\|im_start\|>assistant.*add_generation_prompt"):
        encode_prompts(tokenizer, [SHORT])
    encode_prompts(tokenizer, ["Hi"])


def test_a_template_that_does_not_write_texts_is_refused():
    """As those of models that see, which take a content in parts."""
    template = CHATML.replace(
        "message['content']", "(message['content'] | selectattr('type') | join)"
    )
    special = [END, "<|im_start|>", "<|im_end|>"]
    tokenizer = made(special, template, eos_token="<|im_end|>", pad_token=END)
    with pytest.raises(
        ValueError, match=r"prompts\[1\].*leaves the content of the last message out"
    ):
        encode_prompts(tokenizer, ["Hi", SHORT])


@pytest.mark.parametrize("name", CHATS)
def test_a_content_that_spells_a_special_token_is_refused_and_a_response_stays_letters(name):
    """Oracle: the ids of special tokens; those of the template are there, and no others."""
    tokenizer = CHATS[name]()
    special = set(tokenizer.all_special_tokens) | ({ENDS[name]} - {None})
    for token in special:
        talk = [*LONG[:2], user(f"a {token} b")]
        with pytest.raises(ValueError, match=r"prompts\[1\]\[2\] ") as caught:
            encode_prompts(tokenizer, [SHORT, talk])
        assert repr(token) in str(caught.value)
    gap = " " if name == "llama 2" else ""
    for token in tokenizer.all_special_tokens:
        (ids,) = models.response_ids(tokenizer, [f"{gap}a {token} b"], prompts=[SHORT])
        assert [i for i in ids if i in tokenizer.all_special_ids] in ([ids[-1]], [])
    if name == "chatml, added words":
        # a word of its own even in a text: letters it cannot be
        with pytest.raises(ValueError, match=r"responses\[0\] holds .*im_end"):
            models.response_ids(tokenizer, ["a <|im_end|> b"], prompts=[SHORT])


def test_a_content_that_is_read_as_a_special_token_is_refused():
    """Here every unknown word is read as the end."""
    tokenizer = letters()
    tokenizer.chat_template = "{{ messages[-1]['content'] + ' .' }}"
    assert models.prompt_ids(tokenizer, [[user("a b")]]) == [[1, 2, 27]]
    with pytest.raises(ValueError, match=r"prompts\[1\]\[0\] holds .*special token '<end>'"):
        encode_prompts(tokenizer, ["a", [user("a unknown")]])


# --- the end of a turn ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_what_ends_a_turn_ends_a_completion(name):
    """Oracle: the template, read by hand."""
    tokenizer = CHATS[name]()
    end = tokenizer.convert_tokens_to_ids(ENDS[name]) if ENDS[name] else None
    assert models.turn_end(tokenizer) == end
    policy = build("llama", vocab_size=len(tokenizer))
    policy.generation_config.eos_token_id = None
    wanted = {tokenizer.eos_token_id, end} - {None}
    assert set(end_tokens(policy, tokenizer)) == wanted
    assert end_tokens(build("llama", vocab_size=1), tokenizer) in ([], [0])


def in_all_encoders(tokenizer, prompt, response, other):
    """The response's tokens by each encoder."""
    before = len(encode_prompts(tokenizer, [prompt])[0][0])
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


@pytest.mark.filterwarnings("ignore:the tokenizer's chat template writes ' '")
@pytest.mark.parametrize("name", CHATS)
def test_what_was_sampled_is_what_is_encoded(name):
    """Oracle: the tokens of the same sampling, before they were text; ended and cut."""
    policy, tokenizer = model_for(CHATS[name]())
    talks = talks_for(name)
    ends = end_tokens(policy, tokenizer)
    rollout = sample(
        policy,
        *encode_prompts(tokenizer, talks),
        6,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        samples_per_prompt=8,
        generator=luck(),
    )
    texts = write(policy, tokenizer, talks, 6, samples_per_prompt=8, generator=luck())
    whole, seen = ended(rollout, ends).tolist(), set()
    for row, (text, done) in enumerate(zip(texts, whole, strict=True)):
        ids = rollout.tokens[row, rollout.prompt_length :]
        wanted = ids[rollout.completion_mask[row]].tolist()
        assert isinstance(text, Cut) != done
        if text.strip():
            seen.add(done)
            found = in_all_encoders(tokenizer, talks[row // 8], text, " other")
            assert found == dict.fromkeys(found, wanted)
    assert seen == {True, False}


def test_a_response_that_spells_the_end_of_its_turn_gets_one():
    tokenizer = CHATS["llama 3"]()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    letters = tokenizer("Ho", add_special_tokens=False)["input_ids"]
    for text in ("Ho", "Ho<|eot_id|>", "Ho<|eot_id|>\n", "Ho<|end_of_text|>"):
        found = in_all_encoders(tokenizer, SHORT, text, "other")
        assert found == {key: [*letters, end] for key in found}
        assert models.response_ids(tokenizer, [Cut("Ho")], prompts=[SHORT]) == [letters]
    # behind a text nothing has changed
    found = in_all_encoders(tokenizer, "Hi", "Ho", "other")
    assert found == {key: [*letters, tokenizer.eos_token_id] for key in found}


def test_what_a_template_puts_in_front_of_a_response_is_asked_for():
    """Oracle: the template; a response has it or not, and its tokens are its own letters."""
    tokenizer = CHATS["llama 2"]()
    with pytest.warns(UserWarning, match="writes ' ' between a prompt and its response"):
        (found,) = sft.encode(tokenizer, [(SHORT, "Ho")])
    assert tokenizer.decode(found.response) == "Ho</s>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = sft.encode(tokenizer, [(SHORT, " Ho")])
    assert tokenizer.decode(found.prompt + found.response) == "<s>[INST] Hi [/INST] Ho</s>"


def test_thoughts_that_a_template_puts_in_front_are_asked_for():
    """Oracle: the template; an answer behind thoughts of the model's own has what it needs."""
    thoughts = "('<think>\n</think>' if message['role'] == 'assistant' else '')"
    template = CHATML.replace("message['content']", f"{thoughts} + message['content']")
    special = [END, "<|im_start|>", "<|im_end|>"]
    tokenizer = made(special, template, eos_token="<|im_end|>", pad_token=END)
    with pytest.warns(UserWarning, match="writes '<think>.*</think>' between"):
        models.response_ids(tokenizer, ["Ho"], prompts=[SHORT])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.response_ids(tokenizer, ["Ho"], prompts=["Hi"])
        for text in ("<think>\n</think>Ho", "<think>\nSo\n</think>Ho"):
            models.response_ids(tokenizer, [text], prompts=[SHORT])


# --- rewards -------------------------------------------------------------------------------------


def test_plain_texts_of_prompts():
    """Oracle: by hand."""
    assert plain_text("Hi") == "Hi"
    assert plain_text(TOLD) == "Say <b>hi</b> "
    assert plain_text(LONG) == "What is red?\n\nA rose.\n\nAnd  blue?\n\n- one"
    assert [plain_text(one) for one in chat(["a", "b"], system="c")] == ["a", "b"]
    assert plain_text(plain_text(LONG)).messages == LONG
    assert conversations.messages_of(plain_text("Hi")) is None


class Seen:
    """A reward that keeps what it was given."""

    def __init__(self):
        self.prompts, self.completions = [], []

    def __call__(self, prompts, completions, **_):
        self.prompts += prompts
        self.completions += completions
        return [float(len(text)) + 0.1 * (i % 3) for i, text in enumerate(completions)]


def loops(policy, tokenizer, prompts, reward):
    """One iteration of each loop that samples."""
    how = {"iterations": 1, "prompts": len(prompts), "samples_per_prompt": 2, "max_new_tokens": 3}
    next(ppo.train(policy, tokenizer, prompts, reward, ppo.Config(mini_batches=1, **how)))
    next(grpo.train(policy, tokenizer, prompts, reward, grpo.Config(**how)))
    next(dpo.online(policy, tokenizer, prompts, reward, dpo.Config(**how)))
    config = ppo.Config(mini_batches=1, **how)
    sampling.evaluate(policy, policy, tokenizer, prompts, {"reward": reward}, config)


def test_rewards_get_plain_texts_in_every_loop():
    """Oracle: the contents by hand, and no markup in either."""
    policy, tokenizer = model_for(CHATS["chatml, another end"]())
    reward = Seen()
    loops(policy, tokenizer, [LONG, SHORT], reward)
    wanted = {"Hi", plain_text(LONG)}
    assert set(reward.prompts) == wanted
    assert len(reward.prompts) == 16
    assert all(isinstance(text, str) for text in reward.prompts + reward.completions)
    assert not any("<|" in text for text in reward.completions)
    said = preferences.annotate(
        [LONG], ["a"], ["b"], reward, [preferences.Annotator("one")], seed=1
    )
    assert reward.prompts[-1] == plain_text(LONG)
    assert said.pairs[0]["prompt"] == LONG


def test_a_reward_model_reads_conversations_as_it_was_trained_to():
    """Oracle: the score of the tokens that its own training makes of the comparison, also through a
    function of the reader's around it."""
    judge, tokenizer = judge_for(CHATS["llama 3"]())
    torch.nn.init.normal_(judge.score.weight, generator=luck())
    prompts, responses = [LONG, SHORT, "Hi"], ["Blue.", Cut("Ho"), "Ho"]
    data = [Comparison(p, (r, "other")) for p, r in zip(prompts, responses, strict=True)]
    rows = [row[0] for row in reward_model.token_lists(tokenizer, data)]
    wanted = [reward_model.last_scores(judge, *reward_model.collate([ids], 0)) for ids in rows]
    wanted = torch.cat(wanted).detach()
    plain = reward_model.as_reward(judge, tokenizer)

    def around(completions, prompts, **columns):
        return [1.0 + score for score in plain(prompts, completions)]

    found = rewards.score(plain, prompts, responses).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found = rewards.score(around, prompts, responses).float()
    torch.testing.assert_close(found, wanted + 1, rtol=1e-4, atol=1e-5)
    assert len(set(wanted.tolist())) == 3


# --- pairs, training, identity -------------------------------------------------------------------


def test_pairs_of_conversations_go_through_everything(tmp_path):
    """Oracle: the tokens of the prompts, at the end of the way."""
    policy, tokenizer = model_for(CHATS["llama 3"]())
    talks = [LONG, SHORT, TOLD, chat(["Why?"])[0]]
    pairs = preferences.sample_pairs(policy, tokenizer, talks, 5, luck())
    said = preferences.annotate(*pairs, rewards.word_count, preferences.crowd(1.0, 3))
    path = tmp_path / "pairs.jsonl"
    preferences.write_jsonl(said.pairs, path)
    back = preferences.read_jsonl(path)
    assert back.features == said.pairs.features
    assert back[:] == said.pairs[:]
    data = reward_model.comparisons(back)
    soft = reward_model.labelled(*pairs, said.preferences.mean(1))
    wanted = models.prompt_ids(tokenizer, pairs[0])
    assert [one.prompt for one in dpo.encode(tokenizer, soft)] == wanted
    examples = dpo.encode(tokenizer, data)
    assert [one.prompt for one in examples] == [ids for ids in wanted for _ in range(3)]
    assert next(dpo.train(policy, tokenizer, examples, dpo.Config(batch_size=4))).step == 1
    judge = judge_for(tokenizer)
    assert next(reward_model.train(*judge, data, reward_model.Config(batch_size=4))).step == 1
    taught = [(prompt, "Ho") for prompt in talks]
    assert next(sft.train(policy, tokenizer, taught, sft.Config())).step == 1


def test_a_run_knows_its_conversations():
    names = {digest([one]) for one in (LONG, SHORT, TOLD, [system("x"), *SHORT], "Hi")}
    assert len(names) == 5


def test_the_panel_shows_who_said_what(tmp_path):
    session = labelling.Session([(TOLD, "a", "b"), (SHORT, "c", "d")], tmp_path / "answers.jsonl")
    page = labelling._page(session.next(), 0, 2, "", 0)
    assert "system: Be brief.\n\nuser: Say &lt;b&gt;hi&lt;/b&gt;" in page
    while (item := session.next()) is not None:
        session.record(item, "a")
    assert ">Hi<" in labelling._page(session.items[item_of(session, SHORT)], 0, 2, "", 0)
    assert [row["prompt"] for row in session.results()] == [TOLD, SHORT]
    again = labelling.Session([(TOLD, "a", "b"), (SHORT, "c", "d")], session.path)
    assert again.next() is None
    preferences.from_rows(again.results())


def item_of(session, prompt):
    return next(name for name, item in session.items.items() if item.prompt == prompt)


# --- with TRL ------------------------------------------------------------------------------------


def test_trl_samples_conversations_as_this_book_does(tmp_path):
    """Oracle: TRL's own tokens of its conversational prompts; the end tokens and texts of the
    book's own loop."""
    policy, tokenizer = model_for(CHATS["llama 3"]())
    reward, talks = Seen(), [LONG, SHORT, TOLD, chat(["Why?"])[0]]
    config = grpo.Config(iterations=1, prompts=4, samples_per_prompt=4, max_new_tokens=6)
    ends = set(end_tokens(policy, tokenizer))
    trainer = scale_out.grpo_trainer(
        policy, tokenizer, talks, reward, config, {"number": [1, 2, 3, 4]}, folder=tmp_path
    )
    assert trainer.train_dataset["prompt"][:] == talks
    assert set(trainer.eos_token_ids) == ends == set(trainer.generation_config.eos_token_id)
    theirs = GRPOTrainer._tokenize_prompts(trainer, talks)[0]
    assert trainer._tokenize_prompts(talks)[0] == theirs == models.prompt_ids(tokenizer, talks)
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    found = trainer._generate_and_score_completions(rows)
    assert reward.prompts == [plain_text(talk) for talk in talks for _ in range(4)]
    assert [one.messages for one in reward.prompts[::4]] == talks
    done = torch.isin(found["completion_ids"], torch.tensor(list(ends))).any(1)
    assert [not isinstance(text, Cut) for text in reward.completions] == done.tolist()
    texts = models.decode(tokenizer, found["completion_ids"], found["completion_mask"])
    assert texts == reward.completions
    assert len(set(done.tolist())) == 2


def test_trl_trains_on_the_tokens_of_this_book(tmp_path):
    """Oracle: this book's encoders, which are held against TRL's rendering above."""
    policy, tokenizer = model_for(CHATS["chatml, another end"]())
    data = [Comparison(LONG, ("Blue.", "No")), Comparison(SHORT, ("Ho", "Hu"))]
    examples = dpo.encode(tokenizer, data)
    trainer = scale_out.dpo_trainer(policy, tokenizer, data, dpo.Config(), folder=tmp_path)
    assert trainer.train_dataset.to_list() == [
        {"prompt_ids": one.prompt, "chosen_ids": one.chosen, "rejected_ids": one.rejected}
        for one in examples
    ]
    judge, _ = judge_for(tokenizer)
    trainer = scale_out.reward_trainer(
        judge, tokenizer, data, reward_model.Config(), folder=tmp_path
    )
    assert trainer.train_dataset["chosen_ids"][:] == [one.prompt + one.chosen for one in examples]
    pairs = [(one.prompt, one.responses[0]) for one in data]
    trainer = scale_out.sft_trainer(policy, tokenizer, pairs, sft.Config(), folder=tmp_path)
    assert trainer.train_dataset["input_ids"][:] == [one.prompt + one.chosen for one in examples]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_column_of_texts_and_conversations_is_refused(held_out, tmp_path):
    policy, tokenizer = model_for(CHATS["chatml"]())
    mixed, name = [SHORT, LONG, "Hi"], "prompts"
    given = [mixed, None]
    if held_out:
        given, name = [[SHORT] * 3, {"prompt": mixed}], r"held_out\['prompt'\]"
    config = grpo.Config(prompts=3)
    with pytest.raises(ValueError, match=rf"{name} holds conversations and texts, {name}\[2\]"):
        scale_out.grpo_trainer(
            policy, tokenizer, given[0], Seen(), config, None, given[1], folder=tmp_path
        )
