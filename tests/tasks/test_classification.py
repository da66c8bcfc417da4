"""Text classification: labels of every kind, in an order that is always the same."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_moe.errors import UsageError


def rows(labels, **more):
    return [{"text": "the cat sat", "label": label, **more} for label in labels]


# Labels as they stand -> (names, problem type, what the model takes).
KINDS = {
    "words": (["b", "a", "b"], ["a", "b"], "single_label_classification", [1, 0, 1]),
    "numbers": ([10, 2, 10], ["2", "10"], "single_label_classification", [1, 0, 1]),
    "whole numbers with a point": ([1.0, 0.0], ["0", "1"], "single_label_classification", [1, 0]),
    "true and false": ([True, False], ["False", "True"], "single_label_classification", [1, 0]),
    "several": ([["x", "y"], [], ["y"]], ["x", "y"], "multi_label_classification", [[1, 1], [0, 0], [0, 1]]),
    "amounts": ([0.5, 2.0, -1.25], None, "regression", [0.5, 2.0, -1.25]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind(kind, files, prepare):
    cells, names, problem_type, numbers = KINDS[kind]
    files(train_jsonl=rows(cells))
    made, _ = prepare("text-classification", train_file="train.jsonl")
    assert (made.labels, made.problem_type) == (names, problem_type)
    assert made.train["labels"][:] == numbers
    batch = made.collator([made.train[row] for row in range(len(cells))])
    wanted = torch.long if problem_type.startswith("single") else torch.float32
    assert batch["labels"].dtype == wanted


def test_a_csv_says_as_much(files, prepare):
    files(train_csv='text,label\na,"x, y"\nb,\nc,y\n', amounts_csv="text,label\na,1.5\nb,2\n")
    made, _ = prepare("text-classification", train_file="amounts.csv")
    assert made.problem_type == "regression"
    with pytest.raises(UsageError, match="row 2 has no label"):
        prepare("text-classification", train_file="train.csv", problem_type="multi_label_classification")
    files(train_csv='text,label\na,"x, y"\nc,y\n')
    made, _ = prepare("text-classification", train_file="train.csv", problem_type="multi_label_classification")
    assert made.train["labels"][:] == [[1, 1], [0, 1]]


def test_whole_numbers_are_amounts_if_one_says_so(files, prepare):
    files(train_jsonl=rows([1, 2, 5]))
    made, _ = prepare("text-classification", train_file="train.jsonl", problem_type="regression")
    assert made.train["labels"][:] == [1.0, 2.0, 5.0]


def test_pairs_of_texts(files, prepare):
    files(train_jsonl=[{"premise": "the cat", "hypothesis": "a cat", "label": label} for label in "ab"])
    made, tokenizer = prepare("text-classification", train_file="train.jsonl")
    assert made.train[0]["input_ids"] == tokenizer("the cat", "a cat")["input_ids"]


def test_a_dataset_s_own_names_keep_their_order(tmp_path, prepare):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})
    split = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    for name, part in DatasetDict({"train": split}).items():
        (tmp_path / "set").mkdir()
        part.to_parquet(tmp_path / "set" / f"{name}.parquet")
    made, _ = prepare("text-classification", dataset_name=str(tmp_path / "set"))
    assert made.labels == ["no", "maybe", "yes"]
    assert made.train["labels"][:] == [2, 0]


def test_a_trained_model_s_labels_are_taken(files, prepare):
    files(test_jsonl=rows(["b", "b"]))
    made, _ = prepare("text-classification", test_file="test.jsonl", labels=["z", "b", "a"])
    assert made.labels == ["z", "b", "a"]
    assert made.test["labels"][:] == [1, 1]
    files(test_jsonl=rows([1, 0]))
    made, _ = prepare("text-classification", test_file="test.jsonl", labels=["LABEL_0", "LABEL_1"])
    assert made.test["labels"][:] == [1, 0]


@pytest.mark.parametrize("cells", [["a", "b"], [["a"], []], [0.5, 1.5]])
def test_rows_of_one_class_are_measured(cells, files, prepare):
    files(train_jsonl=rows(cells), test_jsonl=rows(cells[:1] * 2))
    made, _ = prepare("text-classification", train_file="train.jsonl", test_file="test.jsonl")
    assert len(made.test) == 2
    settings = {"test_file": "test.jsonl", "problem_type": made.problem_type}
    for labels in (made.labels, None):
        assert len(prepare("text-classification", labels=labels, **settings)[0].test) == 2


REFUSED = {
    "no label": (rows(["a", None]), {}, "row 2 has no label"),
    "one class": (rows(["a", "a"]), {}, "every row has the label 'a'; two are needed to learn"),
    "one class of a model's": (rows(["a", "a"]), {"labels": ["a", "b"]}, "every row has the label 'a'; two are"),
    "one class by two names": (rows(["LABEL_0", "0"]), {"labels": ["LABEL_0", "LABEL_1"]}, "every row has the label"),
    "several, the same in each": (rows([["a"], ["a"]]), {}, r"every row has the labels \['a'\]; two are needed"),
    "several, none in any": (rows([[], []]), {}, r"train\.jsonl: no row has a label"),
    "several, none of a model's": (
        rows([[], []]),
        {"labels": ["a", "b"], "problem_type": "multi_label_classification"},
        r"every row has the labels \[\]",
    ),
    "one amount": (rows([0.5, 0.5]), {}, "every row has the label 0.5; two are needed"),
    "a word for an amount": (
        rows(["a", "b"]), {"problem_type": "regression"}, "row 1: a regression's label is a number, not 'a'",
    ),
    "an amount for a label": (
        rows([0.5, 1.0]), {"problem_type": "single_label_classification"}, "row 1: 0.5 is no label",
    ),
    "several for one": (
        rows([["a"], ["b"]]), {"problem_type": "single_label_classification"}, r"row 1: should have one label",
    ),
    "one for several": (rows([1, 2]), {"problem_type": "multi_label_classification"}, "should have a list of labels"),
    "a label that the model lacks": (rows(["a", "q"]), {"labels": ["a", "b"]}, "row 2 has the label 'q', which the m"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, files, prepare):
    held, settings, words = REFUSED[name]
    files(train_jsonl=held)
    with pytest.raises(UsageError, match=words) as error:
        prepare("text-classification", train_file="train.jsonl", **settings)
    assert "\n" not in str(error.value)


def test_a_label_that_training_lacks(files, prepare):
    files(train_jsonl=rows(["a", "b"]), dev_jsonl=rows(["a", "c"]))
    with pytest.raises(UsageError, match=r"dev\.jsonl: row 2 has the label 'c', which training lacks; it has a, b"):
        prepare("text-classification", train_file="train.jsonl", validation_file="dev.jsonl")
