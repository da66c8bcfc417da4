"""What to do next follows from the figures: each rule speaks where it should, and only there."""

import pytest

from hf_moe.routing.advice import advise

LAYER = {
    "layer": 3,
    "tokens": 10_000,
    "similarity": 0.3,
    "normalised_entropy": 0.9,
    "max_violation": 0.4,
    "dead_experts": [],
    "together": [],
}
DOMAINS = {"layers": [3], "information": [0.1], "p_value": 0.01, "note": ""}


def summary(specialisation=DOMAINS, tokens=10_000, **layer):
    return {
        "num_experts": 8,
        "tokens": tokens,
        "layers": [{**LAYER, "layer": 1}, {**LAYER, **layer}],
        "specialisation": specialisation,
    }


PAIR = {"experts": [2, 5], "share": 0.2, "times_chance": 4.0}
SAID = {
    "few tokens": ({"tokens": 500}, "These are 500 tokens, few for 8 experts"),
    "copies": ({"similarity": 1.0}, "Layer 3: the experts are copies still"),
    "collapse": ({"normalised_entropy": 0.1, "max_violation": 3.0}, "Layer 3: routing has collapsed"),
    "one dead": ({"dead_experts": [4]}, "Layer 3: 1 expert is dead"),
    "two dead": ({"dead_experts": [4, 5]}, "Layer 3: 2 experts are dead"),
    "uneven": ({"max_violation": 1.2}, "Layer 3: some expert has more than twice its share"),
    "together": ({"together": [PAIR]}, "Experts 2 and 5 in layer 3 are chosen together"),
    "no domains": ({"specialisation": None}, "--domains"),
    "no significance": (
        {"specialisation": {**DOMAINS, "p_value": None, "note": "law has one passage"}},
        "Of the domains, law has one passage",
    ),
    "no sign": ({"specialisation": {**DOMAINS, "p_value": 0.4}}, "No sign that experts are chosen by domain"),
}
FOUND = "Experts are chosen by domain (p = 0.010), most in layer 3"


@pytest.mark.parametrize("what", SAID)
def test_each_rule_speaks_where_it_applies(what):
    figures, sentence = SAID[what]
    said = advise(summary(**figures))
    others = [one for one in said if not one.startswith(FOUND)]
    assert len(others) == 1
    assert sentence in others[0]


def test_it_says_so_where_nothing_stands_out():
    assert [one.startswith(FOUND) for one in advise(summary())] == [True]


def test_copies_are_not_told_to_merge():
    assert len(advise(summary(similarity=1.0, together=[PAIR]))) == 2


def test_all_layers_are_called_every_layer():
    figures = summary()
    for layer in figures["layers"]:
        layer["similarity"] = 1.0
    assert advise(figures)[0].startswith("Every layer: the experts are copies")
