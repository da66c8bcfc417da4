"""Language modelling: rows, masks that stay, packed rows, and the words and bytes that tokens end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

from hf_moe.errors import UsageError
from hf_moe.tasks import load_tokenizer
from hf_moe.tasks.language import _ends
from hf_moe.tasks.packing import IGNORED, KEEP_APART, collate_packed, pack
from tests.conftest import TEXT_FAMILIES, tiny_moe
from tests.families import TESTED
from tests.tasks.conftest import TEXTS

DECODERS = [family for family in TEXT_FAMILIES if TESTED[family].is_decoder]


def test_texts_become_rows_and_the_padding_is_not_predicted(files, prepare):
    files(train_txt="\n\n".join(TEXTS))
    made, tokenizer = prepare("causal-lm", family="gpt2", train_file="train.txt")
    report = made.report["splits"]["train"]
    assert (report["rows"], report["empty"], report["examples"]) == (11, 5, 6)
    batch = made.collator([made.train[0], made.train[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(batch["labels"] == IGNORED, batch["attention_mask"] == 0)
    assert report["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


def test_long_texts_are_cut_and_counted(files, prepare):
    files(train_txt="\n".join(TEXTS))
    made, _ = prepare("masked-lm", train_file="train.txt", max_length=8)
    assert max(map(len, made.train["input_ids"])) == 8
    assert made.report["splits"]["train"]["truncated"] == sum(len(text.split()) > 6 for text in TEXTS)


@pytest.mark.parametrize(("sample_by", "count"), [("line", 3), ("paragraph", 2), ("document", 1)])
def test_what_a_text_of_a_file_is(sample_by, count, files, prepare):
    files(train_txt="the cat\nsat\n\na dog sat\n")
    made, _ = prepare("causal-lm", family="llama", train_file="train.txt", sample_by=sample_by)
    assert len(made.train) == count


def test_a_row_of_training_always_hides_a_token(files, prepare):
    """So a batch of short rows has a loss; rows that hide one anyway hide what Transformers hides."""
    files(rows_txt="the cat\na dog\nsat\n" + " ".join(["the dog sat"] * 15))
    made, tokenizer = prepare("masked-lm", train_file="rows.txt")
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    for seed in range(40):
        torch.manual_seed(seed)
        batch = made.collator([made.train[row] for row in range(4)])
        torch.manual_seed(seed)
        plain = theirs([made.train[row] for row in range(4)])
        asked = batch["labels"] != IGNORED
        assert asked.any(1).all()
        assert not (asked & (batch["attention_mask"] == 0)).any()
        for row in range(4):
            if (plain["labels"][row] != IGNORED).any():
                assert torch.equal(batch["labels"][row], plain["labels"][row])
                assert torch.equal(batch["input_ids"][row], plain["input_ids"][row])
            else:
                assert asked[row].sum() == 1
                assert batch["input_ids"][row][asked[row]].item() == tokenizer.mask_token_id


# Task -> (family, a row of which nothing can be predicted).
NOTHING = {"masked-lm": ("bert", "zebra"), "causal-lm": ("gpt2", "a")}


@pytest.mark.parametrize("task", NOTHING)
def test_rows_that_ask_nothing_are_left_out_and_counted(task, files, prepare):
    family, nothing = NOTHING[task]
    files(rows_txt=f"\n{nothing}\nthe cat\n{nothing}\na dog", none_txt=f"{nothing}\n{nothing}")
    made, tokenizer = prepare(task, family=family, train_file="rows.txt", validation_file="rows.txt")
    for split in ("train", "validation"):
        counted = made.report["splits"][split]
        assert [counted[name] for name in ("rows", "empty", "nothing_to_predict", "examples")] == [5, 1, 2, 2]
        assert made.details[split]["example"][:] == [2, 4]
        assert set(made.split(split).column_names) <= {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert made.train["input_ids"][:] == [tokenizer(text)["input_ids"] for text in ("the cat", "a dog")]
    for split in ("train", "validation"):
        with pytest.raises(UsageError, match=r"none\.txt: nothing in its rows can be predicted; give longer ones"):
            prepare(task, family=family, **{"train_file": "rows.txt", f"{split}_file": "none.txt"})


def test_a_last_packed_row_that_asks_nothing_is_left_out(files, prepare):
    files(rows_txt="abcdefgh")
    made, _ = prepare("causal-lm", family="gpt2", test_file="rows.txt", packing=True, max_length=8)
    assert [len(ids) for ids in made.test["input_ids"]] == [8]
    assert made.report["splits"]["test"]["nothing_to_predict"] == 1  # the end of the text, which begins a row


def test_evaluation_masks_the_same_tokens_each_time_and_training_others(files, prepare):
    files(rows_txt="\n".join(TEXTS))
    first, again, other = (
        prepare("masked-lm", train_file="rows.txt", validation_file="rows.txt", seed=seed)[0] for seed in (0, 0, 1)
    )
    assert first.validation[:] == again.validation[:]
    assert first.validation["labels"][:] != other.validation["labels"][:]
    tokenizer = prepare("masked-lm", train_file="rows.txt")[1]
    for row, text in zip(first.validation, TEXTS, strict=True):
        asked = [label for label in row["labels"] if label != IGNORED]
        assert asked
        assert not set(asked) & {tokenizer.cls_token_id, tokenizer.sep_token_id}
        back = [
            label if label != IGNORED else token for label, token in zip(row["labels"], row["input_ids"], strict=True)
        ]
        assert back == tokenizer(text)["input_ids"]
    torch.manual_seed(0)
    rows = [first.train[row] for row in range(6)]
    drawn = {tuple(first.collator(rows)["labels"].flatten().tolist()) for _ in range(3)}
    assert len(drawn) == 3
    held = [first.validation[row] for row in range(6)]
    assert torch.equal(first.collator(held)["labels"], again.collator(held)["labels"])


def test_a_masked_model_needs_a_mask(files, prepare):
    files(rows_txt="\n".join(TEXTS))
    with pytest.raises(UsageError, match="no mask token; try task causal-lm"):
        prepare("masked-lm", family="gpt2", train_file="rows.txt")


def test_an_encoder_packs_only_what_may_see_each_other(files, prepare):
    files(rows_txt="\n".join(TEXTS))
    with pytest.raises(UsageError, match="can't be kept apart in an encoder"):
        prepare("masked-lm", train_file="rows.txt", packing=True)
    made, _ = prepare("masked-lm", train_file="rows.txt", packing=True, document_masking=False, max_length=16)
    assert {len(ids) for ids in made.train["input_ids"]} == {16}
    assert set(made.collator([made.train[0]])) == {"input_ids", "attention_mask", "labels"}


def naive_pack(texts, length, separator):
    """One token at a time."""
    flat = [
        (token, place, place == 0)
        for text in texts
        for place, token in enumerate([*text, separator] if separator is not None else text)
    ]
    rows = []
    for start in range(0, len(flat), length):
        ids, labels, positions = [], [], []
        for token, _, first in flat[start : start + length]:
            fresh = first or not ids
            positions.append(0 if fresh else positions[-1] + 1)
            labels.append(IGNORED if fresh else token)
            ids.append(token)
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows


@given(st.lists(st.lists(st.integers(3, 9), max_size=9), max_size=8), st.integers(1, 7), st.sampled_from([None, 1]))
@settings(deadline=None, max_examples=60)
def test_packing_is_as_one_token_at_a_time(texts, length, separator):
    texts = [text for text in texts if text]
    rows = [{"input_ids": text} for text in texts]
    made = list(pack(rows, length=length, masking=True, drop_last=False, separator=separator))
    assert made == naive_pack(texts, length, separator)
    cut = list(pack(rows, length=length, masking=True, drop_last=True, separator=separator))
    assert cut == [row for row in made if len(row["input_ids"]) == length] or len(made) == 1
    plain = list(pack(rows, length=length, masking=False, drop_last=False, separator=separator))
    assert all(row["labels"] == row["input_ids"] and "position_ids" not in row for row in plain)


def own_losses(model, texts):
    """Of each text alone, token by token."""
    made = []
    for text in texts:
        ids = torch.tensor([text])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        made.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(made)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_texts_are_as_alone(family, kind, dense_folder):
    """Every token's loss, where the family keeps texts apart; and where it does not, it is not in the table."""
    dense = AutoModelForCausalLM.from_pretrained(dense_folder(family)).eval()
    model = (dense if kind == "dense" else tiny_moe(family)).double()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in (7, 5, 9, 4, 6)]
    rows = list(
        pack([{"input_ids": text} for text in texts], length=31, masking=True, drop_last=False, separator=None)
    )
    batch = collate_packed([*rows, rows[0] | {name: values[:12] for name, values in rows[0].items()}], pad_token_id=2)
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits
        expected = own_losses(model, texts)
    got = torch.nn.functional.cross_entropy(
        logits[0, :-1], batch["labels"][0, 1:], ignore_index=IGNORED, reduction="none"
    )
    got = got[batch["labels"][0, 1:] != IGNORED]
    same = got.shape == expected.shape and torch.allclose(got, expected, atol=1e-9)
    assert same == (family in KEEP_APART)


def test_who_can_t_keep_texts_apart_says_so(files, prepare):
    files(rows_txt="\n".join(TEXTS))
    with pytest.raises(UsageError, match="causal-lm: opt can't keep packed texts apart; set document_masking"):
        prepare("causal-lm", family="opt", train_file="rows.txt", packing=True)
    made, _ = prepare("causal-lm", family="opt", train_file="rows.txt", packing=True, document_masking=False)
    assert "position_ids" not in made.train.column_names


def test_packed_rows_lose_no_token_in_evaluation_and_the_rest_in_training(files, prepare):
    files(rows_txt="\n".join(TEXTS))
    made, tokenizer = prepare(
        "causal-lm", family="gpt2", train_file="rows.txt", test_file="rows.txt", packing=True, max_length=16
    )
    whole = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    assert made.report["splits"]["test"]["tokens"] == whole
    assert made.report["splits"]["train"]["tokens"] == whole - whole % 16
    counted = made.report["splits"]["test"]
    cuts = sum(1 for row in made.test for position in row["position_ids"] if position == 0)
    assert counted["scored_tokens"] == whole - cuts


ALPHABET = st.text(st.sampled_from("abc .,é\t字😀"), max_size=24)


@given(ALPHABET)
@settings(deadline=None, max_examples=80)
def test_words_and_bytes_of_tokens_add_up_to_those_of_the_text(text):
    spans = [(place, place + 1) for place in range(len(text))]
    words, size = _ends(text, spans)
    assert sum(words) == len(text.split())
    assert sum(size) == len(text.encode())


def test_words_of_real_tokens(dense_folder, files, prepare):
    files(rows_txt="\n".join(TEXTS))
    for family in ("gpt2", "llama", "qwen2"):
        made, _ = prepare("causal-lm", family=family, test_file="rows.txt")
        tokenizer = load_tokenizer(dense_folder(family))
        first = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0] for text in TEXTS]
        counted = made.report["splits"]["test"]
        rest = [text[end:] for text, (_, end) in zip(TEXTS, first, strict=True)]
        assert counted["bytes"] == sum(len(text.encode()) for text in rest)
        assert counted["words"] == sum(len(text.split()) for text in rest)
