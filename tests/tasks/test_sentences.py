"""Sentence embeddings: pairs, triplets, scores; and the mean over real tokens."""

import pytest
import torch
from transformers import AutoModel

from hf_moe.errors import UsageError
from hf_moe.tasks import embed
from tests.conftest import TEXT_FAMILIES, tiny_moe

PAIRS = [{"anchor": "the cat sat", "positive": "a cat"}, {"anchor": "war", "positive": "peace and war on earth"}]


def test_pairs_triplets_and_scores(files, prepare):
    files(
        pairs_jsonl=PAIRS,
        triplets_jsonl=[pair | {"negative": "the law"} for pair in PAIRS],
        scores_csv="sentence1,sentence2,score\na cat,the cat,0.9\nwar,the dog,0.1\n",
    )
    made, _ = prepare("sentence-embedding", train_file="pairs.jsonl")
    assert (made.report["scored"], made.report["triplets"]) == (False, False)
    assert made.collator([made.train[0], made.train[1]])["labels"].tolist() == [1.0, 1.0]
    made, _ = prepare("sentence-embedding", train_file="triplets.jsonl")
    batch = made.collator([made.train[0], made.train[1]])
    assert {"anchor_input_ids", "positive_input_ids", "negative_input_ids"} <= set(batch)
    made, _ = prepare("sentence-embedding", test_file="scores.csv")
    assert made.test["labels"][:] == [0.9, 0.1]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_an_embedding_is_the_mean_over_the_text_s_own_tokens(family, files, prepare):
    """However it is padded."""
    files(train_jsonl=PAIRS)
    made, tokenizer = prepare("sentence-embedding", family=family, train_file="train.jsonl")
    name = AutoModel._model_mapping[type(tiny_moe(family).config)].__name__
    model = tiny_moe(family, name)
    with torch.no_grad():
        sides, _ = embed(model, made.collator([made.train[0], made.train[1]]))
        for side, vectors in sides.items():
            for vector, pair in zip(vectors, PAIRS, strict=True):
                states = model(**tokenizer(pair[side], return_tensors="pt")).last_hidden_state[0]
                mean = torch.nn.functional.normalize(states.mean(0), dim=0)
                torch.testing.assert_close(vector, mean, atol=1e-5, rtol=1e-4)
        _, outputs = embed(model, made.collator([made.train[0], made.train[1]]), output_router_logits=True)
    assert [len(logits) for logits in outputs.router_logits] == [outputs.last_hidden_state[..., 0].numel()] * 2


def test_what_is_wrong_is_said_in_one_line(files, prepare):
    files(one_jsonl=[{"anchor": "a"}], two_csv="anchor,positive,score\na,b,high\n")
    with pytest.raises(UsageError, match="has no text_pair column; name it by text_pair_column"):
        prepare("sentence-embedding", train_file="one.jsonl")
    files(empty_jsonl=[*PAIRS, {"anchor": "", "positive": "a"}])
    with pytest.raises(UsageError, match=r"empty\.jsonl: row 3 has no tokens; leave it out"):
        prepare("sentence-embedding", family="gpt2", train_file="empty.jsonl")
    with pytest.raises(UsageError, match="row 1: a score is a number, not 'high'"):
        prepare("sentence-embedding", train_file="two.csv")
