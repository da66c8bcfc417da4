"""Specialisation by domain: the measure by hand, and a test that is neither blind nor credulous."""

import math

import pytest
import torch

from hf_moe.routing import RoutingStats, specialise
from hf_moe.routing.domains import information


def stats_of(passages):
    """Domain -> [(layers, experts) counts of a passage]."""
    [first, *_] = next(iter(passages.values()))
    stats = RoutingStats(tuple(range(len(first))), first.shape[1])
    stats.passages = passages
    return stats


def drawn(generator, number, shares, own=0.0):
    """Passages of 30 tokens in one layer; `own`: how strong each passage's own taste is, which its tokens share."""
    made = []
    for _ in range(number):
        taste = (torch.tensor(shares).log() + own * torch.randn(len(shares), generator=generator)).softmax(0)
        tokens = torch.multinomial(taste, 30, replacement=True, generator=generator)
        made.append(torch.bincount(tokens, minlength=len(shares))[None])
    return made


def information_by_hand(rows):
    total = sum(map(sum, rows))
    value = 0.0
    for row in rows:
        for column, count in enumerate(row):
            if count:
                expected = sum(row) * sum(other[column] for other in rows) / total**2
                value += count / total * math.log(count / total / expected)
    return value


@pytest.mark.parametrize("rows", [[[3, 4], [5, 1]], [[9, 0, 0], [0, 9, 0], [0, 0, 9]], [[2, 4], [1, 2]]])
def test_information_is_that_of_the_formula(rows):
    assert information(torch.tensor(rows)).item() == pytest.approx(information_by_hand(rows), abs=1e-12)


def test_the_p_value_is_that_of_naive_shuffles():
    generator = torch.Generator().manual_seed(0)
    passages = {"a": drawn(generator, 5, [0.3, 0.3, 0.4], 0.5), "b": drawn(generator, 7, [0.5, 0.2, 0.3], 0.5)}
    found = specialise(stats_of(passages), permutations=200, seed=3)
    held, labels = [x for some in passages.values() for x in some], [0] * 5 + [1] * 7

    def measured(labels):
        rows = [
            sum(x for x, label in zip(held, labels, strict=True) if label == place)[0].tolist() for place in (0, 1)
        ]
        return information_by_hand(rows)

    observed = measured(labels)
    assert found.information[0] == pytest.approx(observed)
    generator, shuffled = torch.Generator().manual_seed(3), []
    for count in (64, 64, 64, 8):
        for order in torch.rand(count, 12, generator=generator, dtype=torch.float64).argsort(1).tolist():
            shuffled.append(measured([labels[place] for place in order]))
    expected = (1 + sum(value >= observed - 1e-12 for value in shuffled)) / 201
    assert found.p_values == (pytest.approx(expected),)
    assert found.p_value == pytest.approx(expected)
    assert found.by_chance == (pytest.approx(sum(shuffled) / 200),)


def test_without_specialisation_every_p_value_is_as_likely():
    """Passages have tastes of their own, which a test that shuffles tokens would take for their domain's."""
    generator = torch.Generator().manual_seed(1)
    p_values = []
    for _ in range(200):
        passages = {name: drawn(generator, 8, [0.25] * 4, own=1.0) for name in ("a", "b")}
        p_values.append(specialise(stats_of(passages), permutations=99).p_value)
    below = [sum(p <= level for p in p_values) / 200 for level in (0.05, 0.25, 0.5, 0.75)]
    # three standard deviations of a share of 200
    for share, level in zip(below, (0.05, 0.25, 0.5, 0.75), strict=True):
        assert abs(share - level) < 3 * math.sqrt(level * (1 - level) / 200), below


def test_planted_domains_are_found():
    generator = torch.Generator().manual_seed(2)
    passages = {
        "a": drawn(generator, 20, [0.4, 0.2, 0.2, 0.2], own=0.3),
        "b": drawn(generator, 20, [0.2, 0.4, 0.2, 0.2], own=0.3),
    }
    found = specialise(stats_of(passages))
    assert found.p_value == found.p_values[0] == 1 / 1000
    assert found.information[0] > 5 * found.by_chance[0]
    assert found.passages == {"a": 20, "b": 20}


def test_one_passage_gives_no_significance():
    generator = torch.Generator().manual_seed(0)
    passages = {"a": drawn(generator, 1, [0.5, 0.5]), "b": drawn(generator, 9, [0.5, 0.5])}
    found = specialise(stats_of(passages))
    assert found.p_value is None
    assert found.p_values is None
    assert found.note.startswith("a has one passage")
    assert len(found.information) == 1


def test_one_domain_is_nothing_to_compare():
    with pytest.raises(ValueError, match="at least two"):
        specialise(stats_of({"a": [torch.ones(1, 2)]}))
