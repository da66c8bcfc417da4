"""Streamed texts: read while they are asked for, and in another order each epoch."""

from itertools import islice

import pytest
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks.stream import Stream
from hf_moe.training import TrainRecipe, train
from tests.tasks.conftest import TEXTS
from tests.training.runs import keys_for, without_times, write_rows


@pytest.fixture
def stream(prepare):
    """(files, …) -> the texts' rows, and the tokenizer."""

    def run(files, *, task="causal-lm", family="llama", **settings):
        made, tokenizer = prepare(task, family=family, train_file=files, streaming=True, **settings)
        return made.train, tokenizer

    return run


def test_texts_are_read_while_they_are_asked_for(files, prepare):
    files(train_txt="\n".join(TEXTS * 3), test_txt="\n".join(TEXTS))
    made, tokenizer = prepare(
        "causal-lm", family="llama", train_file="train.txt", test_file="test.txt", streaming=True, max_eval_samples=4,
        shuffle_buffer_size=0,
    )  # fmt: skip
    assert not hasattr(made.train, "__len__")
    assert [row["input_ids"] for row in made.train] == [tokenizer(text)["input_ids"] for text in TEXTS * 3]
    assert len(made.test) == 4


def ids_of(rows, epoch=0):
    rows.set_epoch(epoch)
    return [row["input_ids"] for row in rows]


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 8, "document_masking": False}])
def test_every_epoch_has_all_rows_in_another_order(settings, files, stream):
    files(a_txt="\n".join(TEXTS[:3]), b_txt="\n".join(TEXTS[3:]))
    names = ["a.txt", "b.txt"]
    rows, _ = stream(names, **settings)
    in_order = ids_of(stream(names, shuffle_buffer_size=0, **settings)[0])
    epochs = [ids_of(rows, epoch) for epoch in range(3)]
    assert all(sorted(own) == sorted(in_order) for own in epochs)
    assert len({str(own) for own in [*epochs, in_order]}) == 4
    again, _ = stream(names, **settings)
    assert [ids_of(again, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert ids_of(stream(names, seed=1, **settings)[0]) != epochs[0]
    few = ids_of(stream(names, shuffle_buffer_size=2, **settings)[0])
    assert few.index(in_order[0]) < 2  # of those held, it is among the next


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 8, "document_masking": False}])
def test_rows_do_not_depend_on_workers(settings, files, stream):
    """Packed or not, and however many files there are."""
    files(a_txt="\n".join(TEXTS[:3]), b_txt="\n".join(TEXTS[3:]))
    rows, _ = stream(["a.txt", "b.txt"], **settings)
    assert [row["input_ids"] for row in DataLoader(rows, None, num_workers=2)] == ids_of(rows)


def test_streaming_packs(files, prepare):
    files(train_txt="\n".join(TEXTS))
    streamed, whole = (
        prepare(
            "causal-lm", family="llama", train_file="train.txt", packing=True, max_length=16, streaming=streaming,
            shuffle_buffer_size=0,
        )[0]
        for streaming in (True, False)
    )  # fmt: skip
    assert list(streamed.train) == list(whole.train)


def test_the_first_texts_alone(files, stream):
    files(train_txt="\n".join(TEXTS))
    rows, tokenizer = stream("train.txt", max_train_samples=2)
    assert sorted(ids_of(rows)) == sorted(tokenizer(text)["input_ids"] for text in TEXTS[:2])


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_what_asks_nothing_is_left_out(task, files, stream):
    family = {"masked-lm": "bert", "causal-lm": "gpt2"}[task]
    files(train_jsonl=[{"text": text} for text in ("", "the cat", "a" if task == "causal-lm" else "zebra")])
    rows, tokenizer = stream("train.jsonl", task=task, family=family)
    assert ids_of(rows) == [tokenizer("the cat")["input_ids"]]


@pytest.mark.parametrize(
    ("task", "family", "keys"),
    [("masked-lm", "bert", {}), ("causal-lm", "gpt2", {"packing": True, "max_length": 32})],
)
def test_a_run_goes_on_in_another_epoch(task, family, keys, dense_folder, tmp_path, monkeypatch):
    epochs, set_epoch = [], Stream.set_epoch
    monkeypatch.setattr(Stream, "set_epoch", lambda self, epoch: set_epoch(self, epoch) or epochs.append(epoch))
    made = keys_for(task, dense_folder(family), tmp_path, streaming=True, save_strategy="steps", save_steps=5)
    made |= {"max_steps": 14, "learning_rate": 1e-2, "shuffle_buffer_size": 10, "dropout": 0.1, **keys}
    made["train_file"] = [write_rows(tmp_path / f"{seed}.jsonl", task, 8, seed=seed) for seed in (2, 3)]
    whole = train(TrainRecipe.from_dict(made), quiet=True)
    assert set(epochs) >= {0, 1, 2}
    for step in (5, 10):
        again = {"output_dir": str(tmp_path / f"from-{step}")}
        again["resume_from_checkpoint"] = str(whole.path / f"checkpoint-{step}")
        report = train(TrainRecipe.from_dict(made | again), quiet=True).report
        assert without_times(report["history"]) == without_times(whole.report["history"])


# What is asked -> (files, words of the error, rows that are read before).
REFUSED = {
    "numbers": ({"a_jsonl": [{"text": 1}]}, r"a\.jsonl: row 1: column 'text' should hold text, but holds 1", 0),
    "a row without text": (
        {"a_jsonl": [{"text": "the cat"}, {"text": None}]}, r"a\.jsonl: row 2: column 'text' .* holds None", 0,
    ),
    "one of them without text": (
        {"a_jsonl": [{"text": "the cat"}], "b_jsonl": [{"text": None}]}, "the train split: row 2: column 'text'", 0,
    ),
    "a row without text far on": (
        {"a_jsonl": [*[{"text": "the dog"}] * 2000, {"text": None}]}, r"a\.jsonl: row 2001: column 'text'", 4000,
    ),
    "no text": ({"a_jsonl": [{"text": ""}, {"text": " "}]}, r"a\.jsonl: holds no text of which anything", 0),
    "no rows": ({"a_txt": ""}, r"a\.txt: holds no rows", 0),
    "no JSON": ({"a_jsonl": '{"text": "the cat"}\n{"text": \n'}, r"a\.jsonl: line 2 is no JSON", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, files, stream):
    contents, words, count = REFUSED[name]
    folder = files(**contents)
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".jsonl", ".txt"))
    with pytest.raises((UsageError, SourceError), match=words) as error:
        list(islice(stream(names, shuffle_buffer_size=0)[0], count))
    assert "\n" not in str(error.value)


def test_what_can_t_be_read_further():
    def texts():
        yield {"input_ids": [1]}
        raise OSError("the disk is gone")

    with pytest.raises(SourceError, match=r"a\.jsonl: can't be read to its end \(the disk is gone\)"):
        list(Stream(IterableDataset.from_generator(texts), "a.jsonl"))
