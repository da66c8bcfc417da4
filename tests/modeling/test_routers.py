"""Every kind of router against a naive twin, one token and one expert at a time, and what a user would notice."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import hf_moe
from hf_moe.modeling import CONFIGS
from hf_moe.modeling.moe_checks import ROUTER_TYPES
from hf_moe.modeling.moe_experts import MoeExperts
from hf_moe.modeling.moe_layers import MoeBlock
from hf_moe.modeling.moe_router_kinds import ROUTERS
from hf_moe.modeling.moe_routers import ForwardPass, TopKRouter
from tests.conftest import FAMILIES, batch, lm_class, real_tokens, tiny_moe
from tests.families import DECODERS, TESTED
from tests.modeling.test_features import assert_same, gradients, in_dtype, lm_inputs, without_dropout
from tests.modeling.test_layers import config, fill, naive_experts, outputs_and_gradients

KINDS = list(ROUTERS)
ENCODERS = [family for family in FAMILIES if family not in DECODERS]
LEAVE_SLOTS_EMPTY = [kind for kind in KINDS if ROUTERS[kind].leaves_slots_empty]


def router_of(kind, dtype=torch.float64, **values):
    values = {"router_type": kind, "num_experts": 6, "num_experts_per_tok": 2, "router_top_p": 0.5, **values}
    router = fill(TopKRouter(config(**values)), dtype)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias += torch.tensor([0.0, 0.4, 0.0, 0.0, -0.2, 0.0])[: router.num_experts]
    return router.eval()


def naive_logits(router, x):
    if router.kind is ROUTERS["laplace"]:
        return [
            -math.sqrt(sum(float((a - b) ** 2) for a, b in zip(x, row, strict=True))) for row in router.weight.detach()
        ]
    return [float(sum(a * b for a, b in zip(x, row, strict=True))) for row in router.weight.detach()]


def naive_scores(router, logits):
    if router.kind is ROUTERS["sigmoid"]:
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def naive_choice(router, scores, others, real):
    """Experts of one token, given the scores of all."""
    experts = range(len(scores))
    if router.kind is ROUTERS["expert_choice"]:
        places = math.ceil(sum(real) * router.capacity_factor / len(scores))
        column = [[others[t][e] for t in range(len(others)) if real[t]] for e in experts]
        return [e for e in experts if scores[e] >= sorted(column[e], reverse=True)[places - 1]]
    if router.kind is ROUTERS["top_p"]:
        best, total = [], 0.0
        for e in sorted(experts, key=lambda e: -scores[e]):
            if total < router.top_p:
                best.append(e)
            total += scores[e]
        return best
    bias = router.e_score_correction_bias
    return sorted(experts, key=lambda e: -(scores[e] + (0.0 if bias is None else float(bias[e]))))[: router.top_k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_every_kind_equals_its_naive_twin(kind, norm_topk_prob):
    router = router_of(kind, norm_topk_prob=norm_topk_prob)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = [token != 4 for token in range(9)]
    router.forward_pass = ForwardPass(lambda num_tokens: torch.tensor(real), False)
    logits, gates, index = router(x)
    scores = [naive_scores(router, naive_logits(router, token)) for token in x]
    sizes = set()
    for token in range(9):
        chosen = naive_choice(router, scores[token], scores, real)
        if kind == "expert_choice" and not real[token]:
            chosen = []
        sizes.add(len(chosen))
        scale = sum(scores[token][e] for e in chosen) if norm_topk_prob else 1.0
        expected = {e: scores[token][e] / scale for e in chosen}
        slots = list(zip(index[token].tolist(), gates[token].tolist(), strict=True))
        assert {e: gate for e, gate in slots if e < 6} == pytest.approx(expected, abs=1e-12)
        assert [gate for e, gate in slots if e >= 6] == [0.0] * (len(slots) - len(chosen))
        assert max(index[token]) <= 6
        assert logits[token].tolist() == pytest.approx(naive_logits(router, x[token]), abs=1e-12)
    assert (len(sizes) > 1) == (kind in LEAVE_SLOTS_EMPTY)


def test_the_table_and_the_configuration_name_the_same_kinds():
    assert tuple(ROUTERS) == ROUTER_TYPES


def test_noise_is_for_training_and_as_large_as_its_weights_say():
    router = router_of("noisy")
    x = torch.randn(1, 16, dtype=torch.float64).expand(20_000, 16)
    plain = router(x)[0]
    assert torch.equal(plain[0], plain[1])
    noise = router.train()(x)[0] - plain
    expected = torch.nn.functional.softplus(router.noise_weight @ x[0])
    torch.testing.assert_close(noise.std(0), expected, rtol=0.05, atol=0)
    assert noise.mean(0).abs().max() < 0.05
    noise.square().sum().backward()
    assert router.noise_weight.grad.abs().max() > 0


def test_the_selection_bias_chooses_but_never_weighs():
    router = router_of("sigmoid")
    x = torch.randn(50, 16, dtype=torch.float64)
    router.e_score_correction_bias += torch.tensor([9.0, 9.0, 0, 0, 0, 0])
    logits, gates, index = router(x)
    assert set(index.flatten().tolist()) == {0, 1}
    scores = logits.sigmoid().gather(1, index)
    torch.testing.assert_close(gates, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_a_group_are_taken_together_and_share_their_gate(kind):
    """As a router of half as many experts, each of which is two."""
    values = {"num_experts": 6, "num_experts_per_tok": 4, "router_group_size": 2}
    grouped, plain = router_of(kind, **values), router_of(kind, num_experts=3, num_experts_per_tok=2)
    with torch.no_grad():
        grouped.weight.copy_(plain.weight.repeat_interleave(2, 0))
        plain.capacity_factor = grouped.capacity_factor / 2  # groups that a token visits
        if grouped.e_score_correction_bias is not None:
            plain.e_score_correction_bias = torch.tensor([0.0, 0.3, 0.0])
            grouped.e_score_correction_bias = plain.e_score_correction_bias.repeat_interleave(2)
    x = torch.randn(11, 16, dtype=torch.float64)
    logits, gates, index = grouped(x)
    plain_logits, plain_gates, plain_index = plain(x)
    torch.testing.assert_close(logits, plain_logits.repeat_interleave(2, 1))
    torch.testing.assert_close(gates, plain_gates.repeat_interleave(2, 1) / 2)
    filled = plain_index < 3
    assert torch.equal(
        index.unflatten(1, (-1, 2))[filled], torch.stack([plain_index * 2, plain_index * 2 + 1], -1)[filled]
    )
    assert (index.unflatten(1, (-1, 2))[~filled] == 6).all()


def test_groups_stay_together_in_training():
    model = without_dropout(tiny_moe("bert", router_group_size=2, router_aux_loss_coef=1.0)).train()
    rows = [module.weight for module in model.modules() if isinstance(module, TopKRouter)]
    with torch.no_grad():
        for row in rows:
            row.copy_(row[::2].repeat_interleave(2, 0))
    before = [row.detach().clone() for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        model(**lm_inputs("bert")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for row, start in zip(rows, before, strict=True):
        assert not torch.equal(row, start)
        assert torch.equal(row[::2], row[1::2])


def test_copies_give_the_router_a_gradient_only_where_the_normaliser_is_detached():
    """All experts equal: what a token gets is the sum of its gates times one network."""
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    for detached in (False, True):
        made = config("eager", router_detach_normalizer=detached)
        block = fill(MoeBlock(made, hidden_act="gelu"), torch.float64)
        for parameter in block.experts.parameters():
            parameter.data[:] = parameter.data[0].clone()
        y = block(x)
        y.square().sum().backward()
        assert (block.gate.weight.grad.abs().max() > 1e-6) == detached
        torch.testing.assert_close(block.gate(x[0])[1].sum(1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("gated", [True, False])
def test_empty_slots_reach_no_expert_in_outputs_and_gradients(implementation, gated):
    made = config(implementation, router_type="top_p")
    block = fill(MoeBlock(made, hidden_act="gelu", gated=gated))
    experts: MoeExperts = block.experts
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(13, 16, generator=generator)
    index = torch.rand(13, 4, generator=generator).argsort(1)
    empty = torch.rand(13, 4, generator=generator) < 0.5
    empty[0] = True  # a token that is sent nowhere
    weights = torch.rand(13, 4, generator=generator).masked_fill(empty, 0.0)
    expected = outputs_and_gradients(lambda *a: naive_experts(experts, *a), experts, x, index, weights)
    expected[2] = expected[2].masked_fill(empty, 0.0)  # where no expert is, no gate has a gradient
    got = outputs_and_gradients(experts, experts, x, index.masked_fill(empty, 4), weights)
    got[2] = got[2].masked_fill(empty, 0.0)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-5, atol=2e-5 * float(e.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_trains_and_generates_alike_in_every_implementation(kind):
    family = "bert" if kind == "expert_choice" else "llama"
    model = without_dropout(tiny_moe(family, router_type=kind)).train()
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.manual_seed(0)
        results.append(gradients(model, lm_inputs(family)))
    for result in results[1:]:
        assert_same(result, results[0], tolerance=1e-4)
    assert any(grad.abs().max() > 0 for name, grad in results[0][1].items() if name.endswith("gate.weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_compiles_in_one_graph_and_checkpoints(kind):
    model = without_dropout(tiny_moe("bert", router_type=kind, router_aux_loss_coef=0.5)).train()
    torch.manual_seed(0)
    expected = gradients(model, lm_inputs("bert"))
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_same(gradients(twin, lm_inputs("bert")), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.zero_grad()
    torch.manual_seed(0)
    loss = compiled(**lm_inputs("bert")).loss
    loss.backward()
    got = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(got, expected, tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_router(kind, tmp_path):
    model = tiny_moe("bert", router_type=kind)
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias += torch.randn(4)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(again(**batch("bert")).logits, model(**batch("bert")).logits)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        (family, checkpointing)
        for family in ENCODERS
        for checkpointing in (False, True)
        if "attention_mask" in batch(family)
        and not (checkpointing and TESTED[family].refused.get("gradient checkpointing"))
    ],
)
def test_padding_never_takes_a_place_where_experts_choose(family, checkpointing):
    """The same gradient whatever stands in the padding's place; an expert takes its share of the real tokens."""
    model = without_dropout(tiny_moe(family, router_type="expert_choice", router_capacity_factor=1.0)).train()
    seen = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _, args, out: seen.append(out[2]))
    inputs = lm_inputs(family)
    real = real_tokens(family, inputs).flatten()
    assert not real.all()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, grads = gradients(model, inputs)
    assert len(seen) == (4 if checkpointing else 2)
    for index in seen:
        filled = index < 4
        assert not filled[~real].any()
        assert filled.sum(0).tolist() == [math.ceil(int(real.sum()) / 4)] * 4
    if family in ("wav2vec2",):
        return  # its convolutions read over the edge
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, 9)
    other_loss, other = gradients(model, changed)
    torch.testing.assert_close(other_loss, loss)
    name = next(name for name in grads if name.endswith("gate.weight"))
    torch.testing.assert_close(other[name], grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_choose_in_encoders_only(family):
    if family in ENCODERS:
        outputs = tiny_moe(family, router_type="expert_choice")(**batch(family))
        assert outputs.logits.isfinite().all()
    else:
        with pytest.raises(StrictDataclassError, match="leak the future"):
            tiny_moe(family, router_type="expert_choice")


def test_experts_do_not_choose_in_an_encoder_that_became_a_decoder():
    with pytest.raises(StrictDataclassError, match="leak the future"):
        CONFIGS["bert"](router_type="expert_choice", is_decoder=True)
    with pytest.raises(ValueError, match="BertMoeLMHeadModel, which generates"):
        hf_moe.BertMoeLMHeadModel(CONFIGS["bert"](router_type="expert_choice", num_hidden_layers=1))


REFUSED = {
    "did you mean 'top_p'": {"router_type": "topp"},
    "known are softmax": {"router_type": "???"},
    "did you mean 'global_batch'": {"router_aux_loss_scope": "globalbatch"},
    "above 0 and at most 1": {"router_top_p": 0.0},
    "at most all 8 experts": {"router_capacity_factor": 9.0},
    "gates have no normaliser": {"router_detach_normalizer": True, "norm_topk_prob": False},
    "must be at least 1": {"router_group_size": 0},
    "does not divide num_experts": {"router_group_size": 3},
    "must be a multiple": {"router_group_size": 4},
    "router_bias_update_rate is -1; it must be finite and can't be negative": {"router_bias_update_rate": -1},
    "a loss weight is finite": {"router_entropy_coef": math.inf},
}


@pytest.mark.parametrize("words", REFUSED)
def test_impossible_routers_are_refused_in_a_sentence(words):
    with pytest.raises(StrictDataclassError) as caught:
        CONFIGS["bert"](**REFUSED[words])
    assert words in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sigmoid", "top_p"])
def test_every_family_takes_other_kinds(family, kind):
    model = without_dropout(tiny_moe(family, router_type=kind)).train()
    outputs = model(**in_dtype(lm_inputs(family), torch.float32), output_router_logits=True)
    assert outputs.router_logits[0].shape[1] == 4
    outputs.loss.backward()
    assert lm_class(family) == type(model).__name__
