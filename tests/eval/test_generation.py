"""Generated answers: what counts as the result, and batches that change nothing."""

import pytest
import torch
from support.fabricate import make_tokenizer
from transformers import GenerationConfig

from qalora_plugin import load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.examples import as_row
from qalora_plugin.eval.generation import Judge, exact_match, generate

GSM8K = [
    as_row({"question": "q", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4"}),
    as_row({"question": "q", "answer": "Much.\n#### 1,200"}),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PLAIN = [as_row({"question": "q", "answer": "yes"})]
WRITTEN = {  # by the model, for the first row → right with reasoning, right without
    "It is 4.\n#### 4": (True, False),
    " 4\n\nUser: more": (False, True),
    "#### 4.": (True, False),
    "#### $4\n#### 5": (True, False),  # the first counts: some models go on with another question
    "####\n4": (False, False),
    "4 apples": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_gsm8k(text):
    judge = Judge(GSM8K)
    assert (judge.marked, judge.reasons, judge.wanted) == (True, True, ["4", "1200"])
    reasoned, direct = judge.answers([text, "#### $1200."], 0, True), judge.answers([text, "1,200"], 0, False)
    assert (reasoned.right == 2, direct.right == 2) == WRITTEN[text]  # the second row's are right


@pytest.mark.parametrize("odd", ["4", "#### Step 1\n2 + 2\n#### 4", "Much. ####"])
def test_marks_that_are_not_everywhere_once(odd):
    """Taken as it comes, one such row would change what all are compared by."""
    rows = [*GSM8K, as_row({"question": "q", "answer": odd})]
    with pytest.raises(QALoraError, match=r"(?i)pass an --answer-pattern"):
        Judge(rows)
    assert Judge(rows[:2]).marked


def test_commas_of_lists_count():
    assert Judge([as_row({"question": "q", "answer": "3,4"})]).answers(["34"], 0, True).right == 0
    assert Judge([as_row({"question": "q", "answer": "1,234,567"})]).answers(["1234567."], 0, True).right == 1


def test_whole_answers():
    judge = Judge(PLAIN)
    assert (judge.marked, judge.reasons) == (False, False)
    assert judge.answers([" yes.\n"], 0, True).right == 1
    assert judge.answers(["yes and no"], 0, True).share == 0


def test_patterns():
    judge = Judge(GSM8K, r"(-?[\d.,]*\d)\D*$")
    assert judge.wanted == ["4", "1200"]
    assert judge.reasons
    assert judge.answers(["so 3 and 4 it is", "about 1200 dollars."], 0, True).right == 2
    whole = Judge(GSM8K, r"#### (-?[\d.,]+)")  # lm_eval's of gsm8k
    assert whole.answers(["4", "#### 1200"], 0, False).right == 2  # asked for alone, it has no mark
    assert whole.answers(["4", "#### 1200"], 0, True).right == 1
    assert Judge(PLAIN, "y.s").wanted == ["yes"]
    with pytest.raises(QALoraError, match="has nothing that"):
        Judge(PLAIN, r"\d+")
    with pytest.raises(QALoraError, match="has nothing that"):
        Judge(PLAIN, r"\d*")  # every answer would be right
    with pytest.raises(QALoraError, match="has nothing that"):
        Judge(GSM8K, "")  # no default
    with pytest.raises(QALoraError, match="there is no row to answer"):
        Judge([])
    with pytest.raises(QALoraError, match="is no regular expression"):
        Judge(PLAIN, "(")


@pytest.fixture(scope="module")
def model(merged):
    return load_base(merged, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


PROMPTS = ["what is it", "a", "how many are there of them, and why?"]


def test_batches_change_nothing(model, tokenizer):
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    texts, unfinished = generate(model, tokenizer, ids, 6)
    for row, text in zip(ids, texts, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[0, len(row) :]
        assert text == tokenizer.decode(alone, skip_special_tokens=True)
    assert 0 <= unfinished <= 3


def test_a_long_row_takes_nothing_from_others(model, tokenizer, monkeypatch):
    ids = [tokenizer(prompt).input_ids for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0])]
    long, longer = ids[0] * 3, ids[0] * 4
    expected, _ = generate(model, tokenizer, ids, 6)
    monkeypatch.setattr(model.config, "max_position_embeddings", len(long) + 2)
    texts, _ = generate(model, tokenizer, [*ids, long, longer], 6)
    assert texts[:3] == expected
    assert texts[4] == ""  # there is no room for it
    assert len(tokenizer(texts[3]).input_ids) <= 2
    assert generate(model, tokenizer, [longer], 6) == ([""], 1)


def test_what_ends_an_answer(model, tokenizer):
    row = tokenizer(PROMPTS[0]).input_ids
    first = model.generate(torch.tensor([row]), max_new_tokens=2, do_sample=False)[0, len(row)].item()
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first]
    try:
        assert generate(model, tokenizer, [row], 4) == ([""], 0)
    finally:
        model.generation_config.eos_token_id = before


def test_an_answer_ends_as_the_chat_template_ends_it(model):
    """Many base models have ChatML in their tokenizer, and another end of text."""
    chat = make_tokenizer()
    chat.chat_template = TEMPLATE
    chat.add_tokens(["<|done|>"], special_tokens=True)
    done = chat.convert_tokens_to_ids("<|done|>")
    row = as_row({"question": "two?", "answer": "2"})
    assert row.ends(chat) == [done]
    assert as_row({"text": "two"}).ends(chat) == []
    assert as_row({"question": "two?", "answer": "2"}).ends(make_tokenizer()) == []
    written = chat("2<|done|>user: three?", add_special_tokens=False).input_ids

    class Writes:
        config, generation_config, device, training = model.config, GenerationConfig(), "cpu", False

        def eval(self): ...

        def train(self, mode): ...

        def generate(self, input_ids, **options):
            assert done in options["eos_token_id"]
            return torch.cat([input_ids, torch.tensor([written])], 1)

    found = exact_match(Writes(), chat, [row], Judge([row]))
    assert (found.right, found.unfinished) == (1, 0), found


def test_a_pad_without_an_embedding(model):
    """``[PAD]`` that was added to a tokenizer, the model left as it was."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    tokenizer.add_tokens([f"[{i}]" for i in range(model.config.vocab_size)])
    expected = generate(model, tokenizer, ids, 4)
    tokenizer.add_special_tokens({"pad_token": "[A NEW PAD]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    assert generate(model, tokenizer, ids, 4) == expected


OWN = {
    "num_return_sequences": 2, "num_beams": 2, "stop_strings": ["a"], "return_dict_in_generate": True,
    "min_new_tokens": 6, "repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "max_length": 3,
    "begin_suppress_tokens": list(range(0, 100, 2)), "forced_eos_token_id": 5, "use_cache": False, "top_k": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", OWN)
def test_nothing_of_the_models_own_way_to_write(model, tokenizer, monkeypatch, key):
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = generate(model, tokenizer, ids, 6)
    own = GenerationConfig()
    setattr(own, key, OWN[key])
    monkeypatch.setattr(model, "generation_config", own)
    assert generate(model, tokenizer, ids, 6) == expected
    assert model.generation_config is own


def test_a_model_is_right_about_its_own_answers(model, tokenizer):
    asked = [as_row({"prompt": prompt, "completion": "?"}) for prompt in PROMPTS]
    ids = [tokenizer(row.plain).input_ids for row in asked]
    texts, _ = generate(model, tokenizer, ids, 8)
    rows = [as_row({"prompt": p, "completion": f"{t}!"}) for p, t in zip(PROMPTS, texts, strict=True)]
    judge = Judge(rows, r"(?s)^(.{4})")
    assert judge.reasons
    found = exact_match(model, tokenizer, rows, judge, max_new_tokens=8)
    assert found.right == 3
    assert found.texts == texts
    direct = exact_match(model, tokenizer, rows, judge, with_reasoning=False, max_new_tokens=8)
    assert len(direct.texts) == 3
    assert direct.texts != texts  # it was asked for the result alone


def test_the_mark_is_put_in_its_mouth(model, tokenizer):
    rows = [as_row({"prompt": "what is 2+2?", "completion": "Easy.\n#### 4"})]
    found = exact_match(model, tokenizer, rows, Judge(rows), with_reasoning=False, max_new_tokens=5)
    forced, _ = generate(model, tokenizer, [tokenizer("what is 2+2?####").input_ids], 5)
    assert found.texts == forced
