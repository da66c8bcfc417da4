"""Token classification: CoNLL files, schemes of tags, and which token has a word's tag."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.scheme import BILOU, IOB2, IOBES, Tokens

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks.conll import read_conll, to_iob2
from hf_moe.tasks.packing import IGNORED
from tests.conftest import TEXT_FAMILIES
from tests.families import TESTED

CONLL = "the O\ndogs B-PET\nsat O\n\na O\ncat B-PET\n"
ROWS = [
    {"tokens": ["the", "dogs", "sat"], "ner_tags": ["O", "B-PET", "O"]},
    {"tokens": ["a", "cat"], "ner_tags": ["O", "B-PET"]},
]


def test_the_first_token_of_a_word_has_its_tag(files, prepare):
    files(train_conll=CONLL)
    made, tokenizer = prepare("token-classification", train_file="train.conll")
    assert made.labels == ["B-PET", "I-PET", "O"]
    row = made.train[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "the", "dog", "##s", "sat", "[SEP]"]
    assert row["labels"] == [IGNORED, 2, 0, IGNORED, 2, IGNORED]
    batch = made.collator([made.train[0], made.train[1]])
    assert batch["labels"][1].tolist() == [IGNORED, 2, 0, IGNORED, IGNORED, IGNORED]
    report = made.report["splits"]["train"]
    assert (report["words"], report["words_lost"], report["tags_changed"]) == (5, 0, 0)
    assert report["labels"] == {"B-PET": 2, "I-PET": 0, "O": 3}
    assert made.report["scheme"] == "IOB2"


def test_rows_of_json_are_as_those_of_conll(files, prepare):
    files(one_conll=CONLL, two_jsonl=ROWS)
    one, two = (prepare("token-classification", train_file=name)[0] for name in ("one.conll", "two.jsonl"))
    assert one.train[:] == two.train[:]


FAMILIES = [family for family in TEXT_FAMILIES if TESTED[family].tokenizer in ("wordpiece", "unigram", "bpe")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_has_one_tag_in_every_family(family, files, prepare):
    files(train_jsonl=ROWS)
    made, _ = prepare("token-classification", family=family, train_file="train.jsonl")
    for row, raw in zip(made.train, ROWS, strict=True):
        tags = [made.labels[label] for label in row["labels"] if label != IGNORED]
        assert tags == raw["ner_tags"]
        assert set(row) <= {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_what_is_cut_off_is_counted(files, prepare):
    files(train_jsonl=[{"tokens": ["cat"] * 20, "tags": ["O", "B-PET"] * 10}])
    made, _ = prepare("token-classification", train_file="train.jsonl", max_length=12)
    report = made.report["splits"]["train"]
    assert (report["truncated"], report["words"], report["words_lost"]) == (1, 20, 10)


def test_rows_without_words_are_left_out_and_counted(files, prepare):
    empty = {"tokens": [], "ner_tags": []}
    none, odd = [empty, ROWS[0]], [{"tokens": ["\u0000"], "ner_tags": ["O"]}]
    files(train_jsonl=[ROWS[0], empty, ROWS[1]], none_jsonl=none, odd_jsonl=odd)
    made, _ = prepare("token-classification", train_file="train.jsonl", validation_file="train.jsonl")
    for split in ("train", "validation"):
        counted = made.report["splits"][split]
        assert [counted[name] for name in ("rows", "nothing_to_predict", "examples")] == [3, 1, 2]
        assert made.details[split]["example"][:] == [0, 2]
        assert "example" not in made.split(split).column_names
    for name, words in (("none.jsonl", "holds no words"), ("odd.jsonl", "nothing in its rows can be predicted")):
        with pytest.raises(UsageError, match=f"{name}: {words}"):
            prepare("token-classification", train_file="train.jsonl", validation_file=name, max_eval_samples=1)


def test_words_of_one_tag_are_measured(files, prepare):
    files(test_conll="the O\ncat O\n")
    for labels in (None, ["B-PET", "I-PET", "O"]):
        made, _ = prepare("token-classification", test_file="test.conll", labels=labels)
        assert "O" in made.labels


def test_a_dataset_s_own_names_of_tags(tmp_path, prepare):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PET", "I-PET"]))})
    (tmp_path / "set").mkdir()
    rows = Dataset.from_dict({"tokens": [["the", "cat"]], "ner_tags": [[0, 1]]}, features=features)
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    made, _ = prepare("token-classification", dataset_name=str(tmp_path / "set"))
    assert made.labels == ["B-PET", "I-PET", "O"]
    assert made.train[0]["labels"] == [IGNORED, 2, 0, IGNORED]


def test_tags_that_mark_no_entities_are_left(files, prepare):
    files(train_jsonl=[{"tokens": ["the", "cat"], "tags": ["DET", "NOUN"]}])
    made, _ = prepare("token-classification", train_file="train.jsonl")
    assert made.labels == ["DET", "NOUN"]
    assert made.report["scheme"] is None


# A scheme's way to write the same, and what it becomes.
SCHEMES = {
    "IOB1": ["I-A", "I-A", "O", "I-B", "B-B", "O"],
    "IOBES": ["B-A", "E-A", "O", "S-B", "S-B", "O"],
    "BILOU": ["B-A", "L-A", "O", "U-B", "U-B", "O"],
    "IOB2": ["B-A", "I-A", "O", "B-B", "B-B", "O"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_becomes_iob2(scheme, files, prepare):
    files(train_jsonl=[{"tokens": ["a"] * 6, "tags": SCHEMES[scheme]}])
    made, _ = prepare("token-classification", train_file="train.jsonl")
    tags = [made.labels[label] for label in made.train[0]["labels"] if label != IGNORED]
    assert tags == SCHEMES["IOB2"]
    changed = sum(a != b for a, b in zip(SCHEMES[scheme], SCHEMES["IOB2"], strict=True))
    assert made.report["splits"]["train"]["tags_changed"] == changed


SPANS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["A", "B", None])), max_size=8)


def written(spans, scheme):
    tags = []
    for length, kind in spans:
        if kind is None:
            tags += ["O"] * length
        elif scheme is IOB2:
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
        else:
            one, last = ("S", "E") if scheme is IOBES else ("U", "L")
            tags += [f"{one}-{kind}"] if length == 1 else [f"B-{kind}"] + [f"I-{kind}"] * (length - 2)
            tags += [f"{last}-{kind}"] if length > 1 else []
    return tags


@given(SPANS, st.sampled_from([IOB2, IOBES, BILOU]))
@settings(deadline=None, max_examples=100)
def test_entities_stay_what_they_are(spans, scheme):
    tags = written(spans, scheme)
    made = to_iob2(tags)
    assert made == written(spans, IOB2)
    assert to_iob2(made) == made
    own, new = (
        {(e.start, e.end, e.tag) for e in Tokens(row, s).entities} for row, s in ((tags, scheme), (made, IOB2))
    )
    assert own == new


def test_conll_as_it_is_found(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text("-DOCSTART- -X- -X- O\r\n\r\nthe DT B-NP O\r\ncat NN I-NP B-PET\r\n\r\n\r\n# DT O O\r\n")
    assert read_conll(file) == [[("the", "O"), ("cat", "B-PET")], [("#", "O")]]
    file.write_text("the O\n-DOCSTART- -X-\ncat O\n")
    assert read_conll(file) == [[("the", "O")], [("cat", "O")]]
    file.write_text("# sent_id = 1\nNew York\tB-LOC\n#\tO\n")
    assert read_conll(file) == [[("New York", "B-LOC"), ("#", "O")]]


WORD = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=5)


@given(
    st.lists(st.lists(st.tuples(WORD, st.sampled_from(["O", "B-A", "I-A"])), min_size=1, max_size=4), max_size=4),
    st.sampled_from([" ", "\t", "  ", " NN "]),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None, max_examples=60)
def test_conll_is_read_as_it_was_written(tmp_path_factory, sentences, between, end):
    file = tmp_path_factory.mktemp("conll") / "a.conll"
    text = (end * 2).join(end.join(f"{word}{between}{tag}" for word, tag in row) for row in sentences)
    file.write_bytes((text + end).encode())
    assert read_conll(file) == [row for row in sentences if row]


REFUSED = {
    "a line without a tag": ({"a_conll": "the O\ncat\n"}, {}, r"a\.conll: line 2 should hold 2 columns as before"),
    "one column": ({"a_conll": "the\n"}, {}, r"a\.conll: line 1 should hold a word and its tag"),
    "a line too long": ({"a_conll": "the O\ncat NN B-PET\n"}, {}, r"a\.conll: line 2 should hold 2 columns"),
    "another encoding": ({"a_conll": "the O\nna\xefve O\n".encode("latin-1")}, {}, r"a\.conll: line 2 is not UTF-8"),
    "an empty file": ({"a_conll": "\n"}, {}, r"a\.conll: holds no rows"),
    "no scheme": ({"a_conll": "the O\ncat X-PET\nsat B-PET\n"}, {}, "tag 'X-PET' is neither O nor of the form"),
    "one tag": ({"a_conll": "the O\ncat O\n"}, {}, "every word has the tag 'O'"),
    "one tag of a model's": (
        {"a_conll": "the O\ncat O\n"}, {"labels": ["B-PET", "I-PET", "O"]}, "every word has the tag 'O'; two are need",
    ),
    "a word that is none": (
        {"a_jsonl": [ROWS[0], {"tokens": ["a", None], "ner_tags": ["O", "O"]}]},
        {},
        "row 2: column 'tokens' lacks word 2",
    ),
    "more words than tags": (
        {"a_jsonl": [{"tokens": ["a", "b"], "tags": ["O"]}]}, {}, "row 1 has 2 words, but 1 tags",
    ),
    "numbers without names": (
        {"a_jsonl": [{"tokens": ["a"], "tags": [0]}]}, {}, "row 1: tags are numbers without names",
    ),
    "a single tag": ({"a_jsonl": [{"tokens": ["a"], "tags": "O"}]}, {}, "should hold a list of tags, but holds 'O'"),
    "text for words": (
        {"a_jsonl": [{"tokens": "a b", "tags": ["O", "O"]}]}, {}, "should hold a list of words, but holds string",
    ),
    "a tag that training lacks": (
        {"a_conll": CONLL, "b_conll": "a O\ndog B-BEAST\n"},
        {"validation_file": "b.conll"},
        r"b\.conll: row 1 has the tag 'B-BEAST', which training lacks; it has B-PET, I-PET, O",
    ),
    "a model's tags of no scheme": (
        {"a_conll": CONLL}, {"labels": ["B-PET", "I-PET", "O", "PET"]}, "The model's labels: tag 'PET' is neither O",
    ),
    "a tag that the model lacks": (
        {"a_conll": CONLL}, {"labels": ["B-BEAST", "O"]}, "row 1 has the tag 'B-PET', which the model lacks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, files, prepare):
    contents, settings, words = REFUSED[name]
    folder = files(**contents)
    first = next(file.name for file in sorted(folder.iterdir()) if file.name.startswith("a."))
    with pytest.raises((UsageError, SourceError), match=words) as error:
        prepare("token-classification", train_file=first, **settings)
    assert "\n" not in str(error.value)
