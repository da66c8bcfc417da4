"""Rows from files of every kind, and what is said of those that can't be read."""

import json
import os
import shutil
from pathlib import Path

import pandas
import pytest
from datasets import load_dataset_builder

from hf_moe.errors import SourceError, UsageError
from tests.tasks.conftest import TEXTS

ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, ["b", "a", "b", "a", "c", "a"], strict=True)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


@pytest.fixture
def kinds(files):
    """The same rows in every kind of file."""
    folder = files(
        rows_jsonl=ROWS,
        rows_json=ROWS,
        wrapped_json={"data": ROWS},
        lines_json="".join(json.dumps(row) + "\n" for row in ROWS),
        rows_csv=CSV,
        quoted_csv="text,label\r\n" + "".join(f'"{row["text"]}","{row["label"]}"\r\n' for row in ROWS),
        bom_csv=b"\xef\xbb\xbf" + CSV.encode(),
        rows_tsv=CSV.replace(",", "\t"),
    )
    pandas.DataFrame(ROWS).to_parquet(folder / "rows.parquet")
    return folder


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.json", "wrapped.json", "lines.json", "rows.csv", "quoted.csv", "bom.csv", "rows.tsv",
     "rows.parquet"],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(name, kinds, prepare):
    made, tokenizer = prepare("text-classification", train_file=name)
    assert made.labels == ["a", "b", "c"]
    assert made.train["labels"][:] == [1, 0, 1, 0, 2, 0]
    assert made.train["input_ids"][:] == [tokenizer(text)["input_ids"] for text in TEXTS]
    report = made.report["splits"]["train"]
    assert report["labels"] == {"a": 3, "b": 2, "c": 1}
    assert len(made.report["files"][name]["sha256"]) == 64
    json.dumps(made.report)


def test_what_csv_files_hold_is_text(files, prepare):
    files(train_csv="text,label\nNA,01\nnull,1\n,01\n")
    made, _ = prepare("text-classification", train_file="train.csv")
    assert made.labels == ["01", "1"]
    assert list(made.raw["train"]["text"]) == ["NA", "null", ""]


def test_a_quotation_mark_between_tabs_is_one(files, prepare):
    """As in GLUE's files: quoting would join rows."""
    files(train_tsv='text\tlabel\n"Yes he said\t1\nno\t0\nok"\t1\n')
    made, _ = prepare("text-classification", train_file="train.tsv")
    assert list(made.raw["train"]["text"]) == ['"Yes he said', "no", 'ok"']


def test_a_cell_may_be_long(files, prepare):
    files(train_csv=f"text,label\n{'the dog ' * 20_000},a\nthe cat,b\n")
    made, _ = prepare("text-classification", train_file="train.csv", max_length=16)
    assert made.report["splits"]["train"]["rows"] == 2


def test_columns_of_json_are_those_of_all_rows(files, prepare):
    """The first row need not have them."""
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y", "more": "c"}]
    files(train_json=rows)
    made, _ = prepare("text-classification", train_file="train.json")
    assert list(made.raw["train"]["more"]) == [None, "c"]


def test_a_mark_of_encoding_is_no_text(files, prepare):
    files(train_txt=b"\xef\xbb\xbfthe dog\nthe cat\n")
    made, _ = prepare("causal-lm", family="gpt2", train_file="train.txt")
    assert list(made.raw["train"]["text"]) == ["the dog", "the cat"]


def test_several_files_make_one_split(kinds, prepare):
    made, _ = prepare("text-classification", train_file=["rows.jsonl", "rows.jsonl"], validation_file="rows.csv")
    assert len(made.train) == 12
    assert len(made.validation) == 6
    assert made.test is None


def test_a_folder_that_datasets_reads(kinds, prepare):
    (kinds / "set").mkdir()
    for split in ("train", "test"):
        (kinds / "set" / f"{split}.jsonl").write_text((kinds / "rows.jsonl").read_text())
    made, _ = prepare("text-classification", dataset_name="./set", test_split="test", max_eval_samples=2)
    assert (len(made.train), made.validation, len(made.test)) == (6, None, 2)
    with pytest.raises(UsageError, match=r"has no split 'dev'; it has train, test"):
        prepare("text-classification", dataset_name="./set", validation_split="dev")


def identity(made):
    names = ("files", "dataset_name", "dataset_revision", "fingerprints")
    return {name: made.report[name] for name in names if name in made.report}


def test_a_folder_is_known_by_what_its_files_hold(kinds, prepare):
    """A copy of it, or a file whose time alone is another, are the same data."""
    for place in ("one", "other"):
        (kinds / place / "set").mkdir(parents=True)
        for split in ("train", "test"):
            (kinds / place / "set" / f"{split}.jsonl").write_text((kinds / "rows.jsonl").read_text())
    os.utime(kinds / "other" / "set" / "train.jsonl", (0, 0))

    def read(place, **settings):
        return identity(prepare("causal-lm", family="gpt2", dataset_name=str(kinds / place / "set"), **settings)[0])

    one, other = read("one"), read("other")
    assert set(one["files"]) == {"train.jsonl", "test.jsonl"}
    assert one["files"] == other["files"]
    assert "fingerprints" not in one
    assert read("one", streaming=True)["files"]["train.jsonl"]["bytes"] == one["files"]["train.jsonl"]["bytes"]
    (kinds / "other" / "set" / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert read("other")["files"]["train.jsonl"] != one["files"]["train.jsonl"]


def test_a_dataset_of_the_hub_is_known_by_its_commit(kinds, prepare):
    """Out of reach of the Hub, by that of the copy in the library's cache."""
    (kinds / "set").mkdir()
    (kinds / "set" / "train.jsonl").write_text((kinds / "rows.jsonl").read_text())
    builder = load_dataset_builder(str(kinds / "set"))
    builder.download_and_prepare()
    cached = Path(os.environ["HF_DATASETS_CACHE"]) / "somebody___set" / "default" / "0.0.0" / ("a1" * 20)
    shutil.copytree(builder.cache_dir, cached)
    for streaming in (False, True):
        made, _ = prepare("causal-lm", family="gpt2", dataset_name="somebody/set", streaming=streaming)
        assert identity(made) == {"dataset_name": "somebody/set", "dataset_revision": "a1" * 20}


def test_validation_rows_are_drawn_by_the_seed(kinds, prepare):
    first, again, other = (
        prepare("text-classification", train_file=["rows.csv"] * 4, validation_split_percentage=12.5, seed=seed)[0]
        for seed in (0, 0, 1)
    )
    assert (len(first.train), len(first.validation)) == (21, 3)
    assert first.validation["input_ids"][:] == again.validation["input_ids"][:]
    assert first.validation["input_ids"][:] != other.validation["input_ids"][:]


def test_groups_stay_on_one_side(files, prepare):
    files(train_jsonl=[{"text": "the cat", "label": row % 2, "author": row // 4} for row in range(20)])
    made, _ = prepare(
        "text-classification", train_file="train.jsonl", validation_split_percentage=40, group_column="author"
    )
    sides = [set(made.raw[split]["author"]) for split in ("train", "validation")]
    assert [len(side) for side in sides] == [3, 2]
    assert not set.intersection(*sides)


def test_a_file_that_changed_is_read_again(files, prepare):
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:3]):
        files(rows_txt="\n".join(texts))
        for packing in (False, True):
            made, tokenizer = prepare("causal-lm", family="llama", test_file="rows.txt", packing=packing)
            ids = [token for row in made.test for token in row["input_ids"]]
            end = [tokenizer.eos_token_id] if packing else []
            assert ids == [token for text in texts for token in tokenizer(text)["input_ids"] + end]


SQUAD = {"question": "who sat", "context": "the dog sat", "answers": {"text": ["the dog"], "answer_start": [0]}}

# What is asked -> (files, settings, words of the error).
REFUSED = {
    "no data": ({}, {}, "There is no data"),
    "a file that is not there": ({}, {"train_file": "rows.csv"}, r"rows\.csv: no such file"),
    "an unknown ending": ({"rows_xyz": "a"}, {"train_file": "rows.xyz"}, r"rows\.xyz: .* known are \.txt"),
    "two kinds": (
        {"one_csv": CSV, "two_jsonl": ROWS},
        {"train_file": ["one.csv", "two.jsonl"]},
        r"one\.csv and two\.jsonl: one split is made of files of one kind",
    ),
    "text without labels": ({"rows_txt": "a\n"}, {"train_file": "rows.txt"}, r"rows\.txt: is plain text"),
    "CoNLL for another task": ({"rows_conll": "a O\n"}, {"train_file": "rows.conll"}, r"rows\.conll: CoNLL files are"),
    "a broken line of JSON": (
        {"rows_jsonl": '{"text": "a", "label": "b"}\n{"text": \n'},
        {"train_file": "rows.jsonl"},
        r"rows\.jsonl: line 2 is no JSON",
    ),
    "a line that is a list": ({"rows_jsonl": "[1]\n[2]\n"}, {"train_file": "rows.jsonl"}, r"rows\.jsonl: "),
    "broken JSON": ({"rows_json": '[{"text": 1},\n{"a" 2}]'}, {"train_file": "rows.json"}, "json: line 2 is no JSON"),
    "JSON that is no table": ({"rows_json": "[1, 2]"}, {"train_file": "rows.json"}, "should hold a list of objects"),
    "a short line of CSV": (
        {"rows_csv": "text,label\na,b\nc\n"},
        {"train_file": "rows.csv"},
        r"rows\.csv: line 3 has 1 fields, where the header has 2",
    ),
    "a long line of CSV": (
        {"rows_csv": 'text,label\n"a\nb",c\nd,e,f\n'},
        {"train_file": "rows.csv"},
        r"rows\.csv: line 4 has 3 fields, where the header has 2",
    ),
    "a column twice": ({"rows_csv": "text,text\na,b\n"}, {"train_file": "rows.csv"}, "name the columns, each once"),
    "another encoding, CSV": (
        {"rows_csv": "text,label\nna\xefve,b\n".encode("latin-1")},
        {"train_file": "rows.csv"},
        r"rows\.csv: line 2 is not UTF-8 \(byte 0xef\)",
    ),
    "another encoding, JSON": (
        {"rows_jsonl": '{"text": "a"}\n{"text": "na\xefve"}\n'.encode("latin-1")},
        {"train_file": "rows.jsonl"},
        r"rows\.jsonl: line 2 is not UTF-8 \(byte 0xef\)",
    ),
    "no parquet": ({"rows_parquet": "PAR"}, {"train_file": "rows.parquet"}, "parquet: can't be read as parquet"),
    "an empty file": ({"rows_jsonl": ""}, {"train_file": "rows.jsonl"}, r"rows\.jsonl: holds no rows"),
    "an empty CSV": ({"rows_csv": ""}, {"train_file": "rows.csv"}, r"rows\.csv: holds no rows"),
    "a header alone": ({"rows_csv": "text,label\n"}, {"train_file": "rows.csv"}, r"rows\.csv: holds no rows"),
    "an empty list": ({"rows_json": []}, {"train_file": "rows.json"}, r"rows\.json: holds no rows"),
    "an empty validation file": (
        {"rows_jsonl": ROWS, "more_jsonl": ""},
        {"train_file": "rows.jsonl", "validation_file": "more.jsonl"},
        r"more\.jsonl: holds no rows",
    ),
    "a missing column": (
        {"rows_jsonl": [{"text": "a", "tone": "b"}]},
        {"train_file": "rows.jsonl"},
        r"rows\.jsonl: has no label column; name it by label_column. Its columns are text, tone",
    ),
    "a column of another name": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "label_column": "tone"},
        r"rows\.jsonl: has no column 'tone' \(label_column\); its columns are text, label",
    ),
    "validation without the column": (
        {"rows_jsonl": ROWS, "more_jsonl": [{"text": "a"}]},
        {"train_file": "rows.jsonl", "validation_file": "more.jsonl"},
        r"more\.jsonl: has no column 'label'",
    ),
    "numbers for text": (
        {"rows_jsonl": [{"text": 1, "label": "a"}]},
        {"train_file": "rows.jsonl"},
        r"column 'text' should hold text, but holds int64",
    ),
    "a row without text": (
        {"rows_jsonl": [{"text": "a", "label": "a"}, {"text": None, "label": "b"}]},
        {"train_file": "rows.jsonl"},
        r"rows\.jsonl: row 2 has no 'text'",
    ),
    "files and a dataset": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "dataset_name": "./set"},
        "dataset_name and train_file are both given",
    ),
    "no such dataset": ({}, {"dataset_name": "./set"}, r"\./set: can't be loaded as a dataset"),
    "no such dataset of the Hub": ({}, {"dataset_name": "nobody/nothing"}, "nobody/nothing: can't be loaded"),
    "streaming labels": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "streaming": True},
        "text-classification: can't be streamed",
    ),
    "both validation rows": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "validation_file": "rows.jsonl", "validation_split_percentage": 10},
        "validation rows already",
    ),
    "an impossible share": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "validation_split_percentage": 100},
        "validation_split_percentage is 100; it must be between 0 and 99",
    ),
    "an unknown choice": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "truncation": "cut"},
        "truncation is 'cut'; choose from truncate, refuse",
    ),
    "a row too long": (
        {"rows_jsonl": [*ROWS, {"text": "the cat sat on the mat and the law", "label": "a"}]},
        {"train_file": "rows.jsonl", "max_length": 8, "truncation": "refuse"},
        r"A row of \d+ tokens is longer than max_length \(8\)",
    ),
    "more than there is room for": (
        {"rows_jsonl": ROWS},
        {"train_file": "rows.jsonl", "max_length": 65},
        "max_length is 65, but the model has room for 64 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, files, prepare):
    contents, settings, words = REFUSED[name]
    files(**contents)
    with pytest.raises((UsageError, SourceError), match=words) as error:
        prepare("text-classification", **settings)
    assert "\n" not in str(error.value)


def test_an_unknown_task_gets_a_suggestion(prepare, files):
    files(rows_jsonl=ROWS)
    with pytest.raises(UsageError, match="did you mean 'causal-lm'"):
        prepare("causal_lm", train_file="rows.jsonl")


def test_a_group_is_needed_in_every_row(files, prepare):
    files(rows_jsonl=[{"text": "a", "label": 0, "by": "x"}, {"text": "a", "label": 1, "by": None}])
    settings = {"train_file": "rows.jsonl", "validation_split_percentage": 50}
    with pytest.raises(UsageError, match="row 2 has no 'by'"):
        prepare("text-classification", group_column="by", **settings)
    with pytest.raises(UsageError, match="has no column 'from'"):
        prepare("text-classification", group_column="from", **settings)
