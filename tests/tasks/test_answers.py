"""Question answering: windows on a context, and the tokens of an answer in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks.answers import _span

CONTEXT = "the dog sat on a mat and the cat sat on the law of the free people of the earth"


def row(answer="cat", start=None, context=CONTEXT, **more):
    start = context.find(answer) if start is None else start
    return {"question": "what sat", "context": context, "answers": {"text": [answer], "answer_start": [start]}, **more}


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "qwen2"])
def test_the_tokens_of_the_answer_spell_it(family, files, prepare):
    files(train_jsonl=[row("cat"), row("dog"), row("the free people")])
    made, _ = prepare("question-answering", family=family, train_file="train.jsonl", max_length=62, doc_stride=8)
    seen = set()
    for window, detail in zip(made.train, made.details["train"], strict=True):
        first, last = window["start_positions"], window["end_positions"]
        if last:
            start, end = detail["offset_mapping"][first][0], detail["offset_mapping"][last][1]
            seen.add((detail["example"], CONTEXT[start:end].strip()))
    assert seen == {(0, "cat"), (1, "dog"), (2, "the free people")}
    batch = made.collator([made.train[0], made.train[1]])
    assert {"input_ids", "attention_mask", "start_positions", "end_positions"} <= set(batch)


def test_a_long_context_is_read_through_windows(files, prepare):
    files(train_jsonl=[row("cat")])
    made, _ = prepare("question-answering", train_file="train.jsonl", max_length=14, doc_stride=4)
    assert len(made.train) > 2
    assert max(map(len, made.train["input_ids"])) <= 14
    starts = made.train["start_positions"][:]
    assert 0 in starts  # a window without the answer
    assert max(starts) > 0
    covered = {
        place for detail in made.details["train"] for span in detail["offset_mapping"] if span for place in span
    }
    assert covered >= {0, len(CONTEXT)}


def test_squad_s_own_form_and_questions_without_an_answer(files, prepare):
    paragraph = {
        "context": CONTEXT,
        "qas": [
            {"id": "a", "question": "what sat", "answers": [{"text": "dog", "answer_start": 4}]},
            {"id": "b", "question": "who", "is_impossible": True, "answers": []},
        ],
    }
    files(train_json={"version": "2", "data": [{"title": "t", "paragraphs": [paragraph]}]})
    made, _ = prepare("question-answering", train_file="train.json", max_length=62, doc_stride=8)
    assert list(made.raw["train"]["id"]) == ["a", "b"]
    assert [end > 0 for end in made.train["end_positions"]] == [True, False]


def naive_span(offsets, begin, end):
    """Every token that holds a letter of the answer."""
    inside = [place for place, span in enumerate(offsets) if span and span[0] < end and span[1] > begin]
    spans = [span for span in offsets if span]
    if not spans or spans[0][0] > begin or spans[-1][1] < end:
        return 0, 0
    return (inside[0], inside[-1]) if inside else (0, 0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 20), st.integers(1, 6), st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_the_span_is_every_token_with_a_letter_of_the_answer(lengths, begin, size, shift):
    offsets, at = [None, None], shift
    for length in lengths:
        offsets.append([at, at + length])
        at += length
    offsets.append(None)
    assert _span(offsets, ["x" * size], [begin]) == naive_span(offsets, begin, begin + size)


REFUSED = {
    "an answer elsewhere": ([row("cat", start=0)], {}, r"row 1: the answer 'cat' is not at 0, where the context has"),
    "answers of another form": ([row() | {"answers": "cat"}], {}, "row 1: answers should be an object"),
    "a place that is a word": ([row(start="4")], {}, "row 1: an answer_start is a whole number from 0 on, not '4'"),
    "a place that is an amount": ([row(), row(start=4.5)], {}, r"row 1: an answer_start is a whole .*, not \d+\.0"),
    "a place before the text": ([row("of", start=-8)], {}, "row 1: an answer_start is a whole .*, not -8"),
    "no place": ([row(), row() | {"answers": {"text": ["cat"], "answer_start": [None]}}], {}, "row 2: .*, not None"),
    "no context": ([{"question": "a", "answers": {"text": [], "answer_start": []}}], {}, "has no context column"),
    "no room": ([row()], {"max_length": 12, "doc_stride": 10}, "row 1: a question of 2 tokens leaves 7 of max_length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, files, prepare):
    held, settings, words = REFUSED[name]
    files(train_jsonl=held)
    with pytest.raises(UsageError, match=words) as error:
        prepare("question-answering", train_file="train.jsonl", **{"doc_stride": 8, **settings})
    assert "\n" not in str(error.value)


def test_articles_of_another_form(files, prepare):
    files(train_json={"data": [{"paragraphs": [{"context": "a"}]}]})
    with pytest.raises(SourceError, match=r"train\.json: is not of SQuAD's form"):
        prepare("question-answering", train_file="train.json")
