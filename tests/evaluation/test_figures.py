"""The figures, each against a naive twin or a known value."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from hf_moe.evaluation.answers import best_answers, exact_match, normal, word_f1
from hf_moe.evaluation.bootstrap import paired_bootstrap
from hf_moe.evaluation.calibration import calibration, expected_calibration_error, reliability, softmax
from hf_moe.evaluation.classification import f1_by_class, measure_classification, pearson, spearman
from hf_moe.evaluation.entities import _counts, entity_scores, tag_choices
from hf_moe.evaluation.language import perplexity, token_losses
from hf_moe.evaluation.measured import IGNORED, Measured
from hf_moe.evaluation.sentences import own_ranks


def test_losses_are_those_of_the_model_s_own_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[1, 3:] = IGNORED
    for shifted in (True, False):
        own, asked = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
        got = token_losses(logits, labels, shifted=shifted)
        whole = torch.nn.functional.cross_entropy(own.flatten(0, 1), asked.flatten(), ignore_index=IGNORED)
        assert got[:, 0].sum() / got[:, 1].sum() == pytest.approx(whole.item(), rel=1e-5)
        assert got[:, 1].tolist() == (asked != IGNORED).sum(1).tolist()
        assert got[:, 2].sum() == ((own.argmax(-1) == asked) & (asked != IGNORED)).sum()


def test_perplexity_by_token_by_word_and_in_bits():
    found = perplexity(np.array([2.0, 4.0]), np.array([2, 2]), words=3, num_bytes=12)
    assert found["nll"] == 1.5
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["word_perplexity"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert perplexity(np.array([8000.0]), np.array([1]))["perplexity"] == math.inf


LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(LABELS)
@settings(deadline=None, max_examples=80)
def test_f1_is_scikit_learn_s(pairs):
    truth, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    classes = np.unique(truth)
    expected = metrics.f1_score(truth, predicted, labels=classes, average=None, zero_division=0)
    assert f1_by_class(truth, predicted, classes) == pytest.approx(expected)


def test_calibration_of_known_probabilities():
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    found = calibration(probabilities, np.array([0, 1, 1]))
    assert found["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.7]).mean())
    assert found["brier"] == pytest.approx(np.mean([2 * 0.04, 2 * 0.36, 2 * 0.09]))
    assert found["ece"] == pytest.approx((abs(0.8 - 1) + abs(0.6 - 0) + abs(0.7 - 1)) / 3)
    assert np.allclose(softmax(np.array([[1000.0, 1000.0]])), 0.5)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
@settings(deadline=None, max_examples=80)
def test_bins_hold_every_example_once(pairs):
    confidence, correct = (np.array(side) for side in zip(*pairs, strict=True))
    bins = reliability(confidence, correct)
    assert sum(entry["count"] for entry in bins) == len(pairs)
    for entry in bins:
        assert entry["count"] == 0 or entry["from"] - 1e-9 <= entry["confidence"] <= entry["to"] + 1e-9
    assert 0 <= expected_calibration_error(bins) <= 1


def test_tokens_flatter_where_entities_do_not():
    truth = [["O"] * 8 + ["B-PER", "I-PER"], ["B-LOC", "O"]]
    predicted = [["O"] * 8 + ["B-PER", "O"], ["I-LOC", "O"]]
    found = entity_scores(truth, predicted)
    assert found["token_accuracy"] == 10 / 12
    assert found["f1"] == 0.0  # a cut entity is none, and one that begins with I is none either
    assert found["all_o_token_accuracy"] == 9 / 12
    right = entity_scores(truth, truth)
    assert (right["f1"], right["f1_macro"], right["token_accuracy"]) == (1.0, 1.0, 1.0)
    assert right["classification_report"]["PER"]["support"] == 1
    assert entity_scores([["O"]], [["O"]])["f1"] == 0.0


TAGS = st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), min_size=1, max_size=8)


@given(st.lists(TAGS, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_counts_by_sentence_make_seqeval_s_f1(truth, random):
    predicted = [random.choices(["O", "B-A", "I-A", "B-B", "I-B"], k=len(row)) for row in truth]
    hit, there, said = np.sum([_counts(own, guess) for own, guess in zip(truth, predicted, strict=True)], axis=0)
    assert entity_scores(truth, predicted)["f1"] == pytest.approx(2 * hit / max(1, there + said))


def test_tag_choices_hold_what_is_needed_of_the_logits():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, IGNORED], [1, 1, 2]])
    made, probabilities = tag_choices(logits, labels), logits.softmax(-1)
    assert torch.equal(made[..., 0].long(), logits.argmax(-1))
    torch.testing.assert_close(made[..., 1], probabilities.max(-1).values)
    asked = labels != IGNORED
    wanted = calibration(probabilities[asked].double().numpy(), labels[asked].numpy())
    assert made[..., 2][asked].mean().item() == pytest.approx(wanted["nll"], rel=1e-5)
    assert made[..., 3][asked].mean().item() == pytest.approx(wanted["brier"], rel=1e-5)


def test_answers_as_squad_counts_them():
    assert normal("The  Cat, sat!") == "cat sat"
    assert exact_match("the cat", ["A cat.", "dog"]) == 1.0
    assert exact_match("", []) == 1.0
    assert word_f1("black cat", ["the cat", "dog"]) == pytest.approx(2 / 3)
    assert word_f1("", ["cat"]) == 0.0


def naive_best(starts, ends, offsets, context):
    tried = [
        (starts[i] + ends[j], context[offsets[i][0] : offsets[j][1]])
        for i in range(len(offsets))
        for j in range(i, min(len(offsets), i + 30))
        if offsets[i] and offsets[j]
    ]
    return max(tried, key=lambda pair: pair[0])


def test_the_best_answer_is_that_of_all_windows():
    generator, context = np.random.default_rng(0), "abcdefgh"
    offsets = [None, *([place, place + 1] for place in range(8)), None]
    starts, ends = generator.normal(size=(2, 10)), generator.normal(size=(2, 10))
    details = [{"example": 0, "offset_mapping": offsets}, {"example": 0, "offset_mapping": offsets}]
    [(text, score)] = best_answers(starts, ends, details, [context], may_be_none=False)
    expected = max(naive_best(starts[w], ends[w], offsets, context) for w in range(2))
    assert (score, text) == (pytest.approx(expected[0]), expected[1])
    starts[:, 0] = ends[:, 0] = 9.0
    assert best_answers(starts, ends, details, [context], may_be_none=True) == [("", 18.0)]


def test_correlations():
    one, other = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 40])
    assert spearman(one, other) == pytest.approx(1.0)
    assert pearson(one, other) < 0.9
    assert math.isnan(pearson(one, np.ones(4)))


def test_ranks_count_ties_against():
    anchors, positives = np.eye(3), np.array([[1.0, 0, 0], [1.0, 1, 0], [0, 1.0, 0]])
    assert own_ranks(anchors, positives).tolist() == [2, 2, 3]


def measured(scores, examples=None):
    scores = np.asarray(scores, dtype=float)
    return Measured(
        metrics={"f1": float(scores.mean())}, records=[{}] * len(scores), metric="f1", greater_is_better=True,
        statistic=lambda rows: float(scores[rows].mean()), examples=examples or list(range(len(scores))),
    )  # fmt: skip


def test_the_bootstrap_is_paired():
    """A small gain on every example is sure, however different examples are; the same gain by luck is not."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=200)
    sure = paired_bootstrap(measured(base), measured(base + 0.01), resamples=500)
    assert sure["difference"] == pytest.approx(0.01)
    assert sure["interval"] == pytest.approx([0.01, 0.01])
    assert sure["share_better"] == 1.0
    luck = paired_bootstrap(measured(base), measured(generator.permutation(base)), resamples=500)
    assert luck["difference"] == pytest.approx(0.0)
    assert luck["interval"][0] < 0 < luck["interval"][1]
    same = paired_bootstrap(measured(base), measured(base), resamples=500)
    assert same["share_better"] == 0.5
    assert paired_bootstrap(measured(base), measured(base + 0.01), resamples=500) == sure


def test_the_interval_is_that_of_the_mean():
    """Of a mean, theory knows the width."""
    gains = np.random.default_rng(1).normal(size=400)
    found = paired_bootstrap(measured(np.zeros(400)), measured(gains), resamples=2000)
    half = 1.96 * gains.std() / math.sqrt(400)
    assert found["interval"] == pytest.approx([gains.mean() - half, gains.mean() + half], abs=0.02)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_models_with_their_labels_in_another_order_are_compared(problem_type):
    """They were asked the same."""
    truth, logits = np.array([0, 1, 2, 0]), np.random.default_rng(0).normal(size=(4, 3))
    truth = truth if problem_type.startswith("single") else np.eye(3)[truth]
    made, turned = [], [2, 0, 1]
    for order in (list(range(3)), turned):
        prepared = SimpleNamespace(labels=["abc"[place] for place in order], problem_type=problem_type)
        own = np.array([order.index(label) for label in truth]) if truth.ndim == 1 else truth[:, order]
        made.append(measure_classification(logits[:, order], own, prepared, "test"))
    assert paired_bootstrap(*made, resamples=20)["difference"] == pytest.approx(0, abs=1e-9)


def test_models_that_were_asked_otherwise_are_not_compared():
    assert "not compared" in paired_bootstrap(measured([1, 2]), measured([1, 2], ["a", "b"]))["note"]
