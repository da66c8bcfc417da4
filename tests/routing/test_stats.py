"""Routing statistics, each against counting by hand, for our mixtures and Transformers' own."""

import json
import math

import pytest
import torch
import transformers

from hf_moe.errors import SourceError, UsageError
from hf_moe.routing import RoutingStats, gather
from hf_moe.routing import tokens as tokens_module
from tests.conftest import FAMILIES, batch, dense_classes, lm_class, real_tokens, scatter, tiny_moe
from tests.families import TESTED

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
NATIVE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "mlp_only_layers": [1]},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4},
}


def native(model_type):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**SIZES, **NATIVE[model_type], pad_token_id=0)
    return scatter(transformers.AutoModelForCausalLM.from_config(config))


def some_model(name):
    return (native(name), "bert") if name in NATIVE else (tiny_moe(name), name)


def choices_by_hand(model, inputs, real):
    """Layer -> [the two experts of each real token], from the router's logits."""
    with torch.no_grad():
        logits = model.eval()(**inputs, output_router_logits=True).router_logits
    kept = real.reshape(-1).tolist()
    return [
        [row.argsort(descending=True)[:2].tolist() for row, real in zip(rows, kept, strict=True) if real]
        for rows in logits
    ]


@pytest.mark.parametrize("name", [*FAMILIES, *NATIVE])
def test_every_figure_is_that_of_counting_by_hand(name):
    model, family = some_model(name)
    batches = [batch(family, seed=seed) for seed in range(3)]
    stats = gather(model.train(), batches, domain="all")
    assert model.training
    by_hand = [choices_by_hand(model, inputs, real_tokens(family, inputs)) for inputs in batches]
    assert len(stats.layers) == len(by_hand[0])
    for place in range(len(stats.layers)):
        tokens = [pair for one in by_hand for pair in one[place]]
        counts = [sum(expert in pair for pair in tokens) for expert in range(4)]
        load = [count / sum(counts) for count in counts]
        mean = sum(load) / 4
        entropy = -sum(share * math.log(share) for share in load if share)
        assert stats.tokens[place] == len(tokens)
        assert stats.counts[place].tolist() == counts
        assert stats.load[place].tolist() == pytest.approx(load)
        assert stats.max_violation[place].item() == pytest.approx(max(load) / mean - 1)
        assert stats.cv[place].item() == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in load) / 4) / mean)
        assert stats.entropy[place].item() == pytest.approx(entropy)
        even = (entropy - math.log(2)) / (math.log(4) - math.log(2))
        assert stats.normalised_entropy[place].item() == pytest.approx(even, abs=1e-9)
        assert stats.dead[place].tolist() == [share < 0.1 / 4 for share in load]
        for one in range(4):
            for other in range(4):
                both = sum(one in pair and other in pair for pair in tokens) / len(tokens)
                assert stats.coactivation[place, one, other].item() == pytest.approx(both)
        assert stats.domains["all"][place].tolist() == counts
        passages = torch.stack(stats.passages["all"])[:, place]
        assert passages.sum(0).tolist() == counts
        assert passages.sum(1).tolist() == [2 * n for x in batches for n in real_tokens(family, x).sum(1).tolist()]


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_tokens_and_gates_are_counted_by_hand(name):
    model, family = some_model(name)
    inputs = batch(family)
    stats = gather(model, [inputs])
    real = real_tokens(family, inputs).reshape(-1)
    ids = inputs["input_ids"].reshape(-1)[real].tolist()
    expected = {token: torch.zeros(len(stats.layers), 4, dtype=torch.long) for token in ids}
    for place, pairs in enumerate(choices_by_hand(model, inputs, real)):
        for token, pair in zip(ids, pairs, strict=True):
            expected[token][place, pair] += 1
    assert set(stats.table.counts) == set(expected)
    assert all(torch.equal(stats.table.counts[token], expected[token]) for token in expected)
    torch.testing.assert_close(stats.gates.sum(1), stats.tokens.double())  # gates of a token sum to 1
    torch.testing.assert_close(stats.gate_mass.sum(1), torch.ones(len(stats.layers), dtype=torch.float64))


def test_batches_processes_and_files_add_up():
    model = tiny_moe("llama")
    batches = [batch("llama", seed=seed) for seed in range(4)]
    whole = gather(model, batches, domain="a")
    joined = {key: torch.cat([inputs[key] for inputs in batches]) for key in batches[0]}
    halves = gather(model, batches[:2], domain="a") + gather(model, batches[2:], domain="a")
    read = RoutingStats.from_json(json.loads(json.dumps(whole.to_json())))
    for other in (gather(model, [joined], domain="a"), halves, read):
        assert_same(other, whole)


def assert_same(one, other):
    for name in ("tokens", "together"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.gates, other.gates)
    assert torch.equal(one.domains["a"], other.domains["a"])
    assert torch.equal(torch.stack(one.passages["a"]), torch.stack(other.passages["a"]))
    assert one.table.counts.keys() == other.table.counts.keys()
    assert all(torch.equal(one.table.counts[token], other.table.counts[token]) for token in one.table.counts)


def test_statistics_of_other_models_do_not_add_up():
    with pytest.raises(ValueError, match="other layers"):
        RoutingStats((0, 1), 4) + RoutingStats((0,), 4)


def test_empty_slots_do_not_count():
    """A router may leave slots empty: index E, gate 0."""
    stats = RoutingStats((5,), 3)
    index = torch.tensor([[0, 1], [0, 3], [3, 3]])
    gates = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 0.0]])
    stats.update({5: (index, gates)}, ids=torch.tensor([7, 7, 9]), rows=torch.tensor([0, 0, 1]), domain="a")
    assert stats.tokens.tolist() == [3]
    assert stats.counts.tolist() == [[2, 1, 0]]
    assert stats.gates.tolist() == [pytest.approx([1.7, 0.3, 0.0])]
    assert stats.coactivation[0, 0, 1].item() == pytest.approx(1 / 3)
    assert stats.dead.tolist() == [[False, False, True]]
    assert stats.table.counts[7].tolist() == [[2, 1, 0]]


def test_collapse_and_balance_are_the_ends_of_the_scale():
    stats = RoutingStats((0, 1, 2), 4)
    balanced = torch.tensor([[0, 1], [2, 3]])
    pairs = {0: balanced, 1: torch.tensor([[1, 2], [1, 2]]), 2: torch.tensor([[0, 1], [0, 1]])}
    stats.update({layer: (index, torch.full((2, 2), 0.5)) for layer, index in pairs.items()})
    assert stats.normalised_entropy.tolist() == pytest.approx([1, 0, 0])
    assert stats.max_violation.tolist() == pytest.approx([0, 1, 1])
    assert stats.dead.sum(1).tolist() == [0, 2, 2]
    assert stats.coactivation_lift[0, 0, 1] == pytest.approx(3)  # always together; a third of the time by chance


def test_layers_that_were_skipped_have_no_measure():
    stats = RoutingStats((0, 1), 2)
    stats.update({1: (torch.tensor([[0], [1]]), torch.ones(2, 1))}, domain="a")
    assert stats.load[0].isnan().all()
    assert stats.load[1].tolist() == [0.5, 0.5]


def test_the_token_table_keeps_the_commonest(monkeypatch):
    monkeypatch.setattr(tokens_module, "CAPACITY", 4)
    table = tokens_module.TokenTable()
    for token in (1, 1, 1, 2, 2, 3, 4, 5, 1):
        table.add(torch.tensor([token]), torch.ones(1, 1, 2))
    assert len(table.counts) <= 4
    assert table.commonest(2)[1].tolist() == [[4, 4]]
    assert table.counts[2].tolist() == [[2, 2]]


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_nan_logits_name_the_layer(name):
    model, family = some_model(name)
    broken = [module for module_name, module in model.named_modules() if module_name.endswith(".gate")][1]
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(SourceError, match=f"layer {1 if name == 'mixtral' else 2}: the router's logits are NaN"):
        gather(model, [batch(family)])


def test_a_dense_model_is_refused():
    dense = dense_classes("bert")[lm_class("bert").replace("Moe", "")](TESTED["bert"].tiny())
    with pytest.raises(UsageError, match="dense"):
        gather(dense, [batch("bert")])
