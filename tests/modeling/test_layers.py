"""The layer against naive twins: one token and one expert at a time, in outputs and gradients."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe import BertMoeConfig
from hf_moe.modeling import moe_sorted_mm
from hf_moe.modeling.moe_experts import MoeExperts
from hf_moe.modeling.moe_layers import MoeBlock
from hf_moe.modeling.moe_losses import load_balancing_loss, router_z_loss
from hf_moe.modeling.moe_routers import TopKRouter

SHAPES = [(False, True), (True, False), (True, True), (False, False)]  # gated, bias


def config(implementation="eager", **values):
    values = {"hidden_size": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_attention_heads": 2, **values}
    made = BertMoeConfig(**values)
    made._experts_implementation = implementation
    return made


def fill(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.to(dtype)


def naive_experts(experts, x, index, weights):
    """For each token, for each chosen expert: its network, times its weight."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[0], dtype=weights.dtype)
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            up = experts.gate_up_proj if experts.has_gate else experts.up_proj
            bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
            h = up[expert] @ x[token]
            h = h + bias[expert] if experts.has_bias else h
            if experts.has_gate:
                width = len(h) // 2
                h = experts.act_fn(h[:width]) * h[width:]
            else:
                h = experts.act_fn(h)
            y = experts.down_proj[expert] @ h
            y = y + experts.down_proj_bias[expert] if experts.has_bias else y
            total = total + weight * y
        rows.append(total.to(x.dtype))
    return torch.stack(rows)


def outputs_and_gradients(function, experts, x, index, weights):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    y = function(x, index, weights)
    (y.double() * torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape).cos()).sum().backward()
    return [y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in experts.parameters())]


@pytest.fixture(params=["few tokens too", "many tokens only"])
def sorting(request, monkeypatch):
    """What `sorted_mm` sorts: few tokens too, which it leaves to `grouped_mm`, or as it does."""
    if request.param == "few tokens too":
        monkeypatch.setattr(moe_sorted_mm, "FEW_TOKENS", {"forward": 0, "training": 0})


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "sorted_mm"])
@pytest.mark.parametrize(("gated", "bias"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 6e-2)]
)
def test_every_implementation_equals_the_naive_loop(sorting, implementation, gated, bias, dtype, tolerance):
    experts = fill(MoeExperts(config(implementation), hidden_act="gelu", gated=gated, bias=bias), dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(13, 16, generator=generator).to(dtype)
    index = torch.rand(13, 3, generator=generator).argsort(1)  # expert 3 stays without tokens
    weights = torch.rand(13, 3, generator=generator, dtype=torch.promote_types(dtype, torch.float32))

    expected = outputs_and_gradients(lambda *a: naive_experts(experts, *a), experts, x, index, weights)
    got = outputs_and_gradients(experts, experts, x, index, weights)
    assert all(e.abs().max() > 0 for e in expected)
    for e, g in zip(expected, got, strict=True):
        assert e.dtype == g.dtype
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from(SHAPES), st.booleans(), st.integers(0, 2**31))
def test_sorted_mm_runs_every_assignment(tokens, top_k, shape, graded, seed):
    """Of any number of tokens, one too, which runs without sorting; a slot of no expert (index E) counts nothing."""
    gated, bias = shape
    experts = fill(MoeExperts(config("sorted_mm"), hidden_act="gelu", gated=gated, bias=bias), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    index = torch.rand(tokens, 5, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(graded):
        torch.testing.assert_close(experts(x, index, weights), experts.loop(x, index, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("graded", [True, False])
def test_sorted_mm_under_autocast_is_the_loop_under_autocast(dtype, tokens, graded):
    experts = fill(MoeExperts(config("sorted_mm"), hidden_act="gelu"))
    x, index, weights = torch.randn(tokens, 16).to(dtype), torch.tensor([[0, 2]] * tokens), torch.rand(tokens, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(graded):
        got, expected = experts(x, index, weights), experts.loop(x, index, weights)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())


def test_sorted_mm_computes_no_gradient_that_nobody_wants(sorting):
    experts = fill(MoeExperts(config("sorted_mm"), hidden_act="gelu")).requires_grad_(False)
    experts.down_proj.requires_grad_(True)
    x = torch.randn(13, 16, requires_grad=True)
    experts(x, torch.tensor([[0, 2]] * 13), torch.rand(13, 2)).sum().backward()
    assert [name for name, p in experts.named_parameters() if p.grad is not None] == ["down_proj"]
    assert x.grad is not None


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_sorted_mm_runs_the_mixtures_of_transformers_too(sorting, name):
    """GPT-OSS has transposed weights, biases, and gates between its columns."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "vocab_size": 50}
    made = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(made).train()
    ids = torch.randint(0, 50, (2, 9))
    found = []
    for implementation in ("eager", "sorted_mm"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [17, 20, 24])
def test_grouped_mm_runs_widths_that_its_kernel_refuses(width):
    made = config("grouped_mm", hidden_size=18, moe_intermediate_size=width)
    experts = fill(MoeExperts(made, hidden_act="gelu"))
    x, index, weights = torch.randn(5, 18), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    torch.testing.assert_close(
        experts(x, index, weights), naive_experts(experts, x, index, weights), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "sorted_mm"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 24])
def test_activations_are_dropped_in_every_expert_and_in_training_only(implementation, gated, shared):
    made = config(implementation, shared_expert_intermediate_size=shared)
    form = {"hidden_act": "gelu", "gated": gated, "bias": False}
    block, plain = fill(MoeBlock(made, **form, activation_dropout=1.0)), fill(MoeBlock(made, **form))
    x = torch.randn(1, 7, 16)
    assert torch.equal(block.train()(x), torch.zeros_like(x))
    assert torch.equal(block.eval()(x), plain.eval()(x))


@torch.no_grad()
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router_is_softmax_then_top_k(norm_topk_prob):
    router = fill(TopKRouter(config(norm_topk_prob=norm_topk_prob)))
    x = torch.randn(7, 16)
    logits, gates, index = router(x)
    for token in range(7):
        scores = [float(sum(a * b for a, b in zip(x[token], row, strict=True))) for row in router.weight]
        exponentials = [torch.tensor(s, dtype=torch.float64).exp() for s in scores]
        probabilities = [float(e / sum(exponentials)) for e in exponentials]
        best = sorted(range(4), key=lambda e: -probabilities[e])[:2]
        scale = sum(probabilities[e] for e in best) if norm_topk_prob else 1.0
        assert index[token].tolist() == best
        assert logits[token].tolist() == pytest.approx(scores, abs=1e-5)
        assert gates[token].tolist() == pytest.approx([probabilities[e] / scale for e in best], abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_router_never_computes_below_float32(dtype, wanted):
    router = fill(TopKRouter(config()), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gates, _ = router(torch.randn(3, 16, dtype=dtype))
    assert logits.dtype == gates.dtype == wanted
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, dtype=wanted))


def test_jitter_disturbs_the_router_in_training_only_and_never_the_experts():
    block = fill(MoeBlock(config(router_jitter_noise=0.5, num_experts_per_tok=4), hidden_act="gelu"))
    x = torch.randn(1, 6, 16)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block.gate(x[0])[0], block.gate(x[0])[0])
    seen = []
    block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(x)
    assert torch.equal(seen[0], x[0])


def naive_balance(layers, top_k, mask):
    values = []
    for logits in layers:
        experts = logits.shape[1]
        tokens = [t for t in range(len(logits)) if mask is None or mask[t]]
        share, probability = [0.0] * experts, [0.0] * experts
        for t in tokens:
            p = logits[t].softmax(-1)
            for e in p.topk(top_k).indices.tolist():
                share[e] += 1 / len(tokens)
            for e in range(experts):
                probability[e] += float(p[e]) / len(tokens)
        values.append(experts * sum(s * p for s, p in zip(share, probability, strict=True)))
    return sum(values) / len(values)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(2, 6),
    layers=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_losses_equal_their_naive_twins(tokens, experts, layers, seed, data):
    top_k = data.draw(st.integers(1, experts))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any)))
    generator = torch.Generator().manual_seed(seed)
    logits = tuple(torch.randn(tokens, experts, generator=generator, dtype=torch.float64) for _ in range(layers))
    assert float(load_balancing_loss(logits, top_k, mask)) == pytest.approx(naive_balance(logits, top_k, mask))
    assert float(load_balancing_loss(logits, top_k)) == pytest.approx(naive_balance(logits, top_k, None))
    z = [float(torch.stack([x.logsumexp(-1) ** 2 for x in layer[mask]]).mean()) for layer in logits]
    assert float(router_z_loss(logits, mask)) == pytest.approx(sum(z) / layers)


def test_padding_never_counts():
    logits = torch.randn(6, 4)
    mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    changed = torch.where(mask[:, None], logits, torch.randn(6, 4) * 100)
    for loss in (lambda x: load_balancing_loss((x,), 2, mask), lambda x: router_z_loss((x,), mask)):
        torch.testing.assert_close(loss(logits), loss(changed))


def test_layers_that_collapsed_onto_different_experts_are_not_called_balanced():
    layers = tuple(torch.full((32, 8), -50.0).index_fill_(1, torch.tensor([layer]), 50.0) for layer in range(4))
    assert float(load_balancing_loss(layers, 1)) == pytest.approx(8.0)
    assert float(load_balancing_loss_func(layers, 8, 1)) == pytest.approx(2.0)  # pooled: a quarter of the truth
    balanced = (torch.eye(8).repeat(4, 1) * 50.0,)
    assert float(load_balancing_loss(balanced, 1)) == pytest.approx(1.0)


def test_gradient_of_the_balance_loss_pushes_towards_the_unused():
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 8, requires_grad=True)
    load_balancing_loss((logits,), 1).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2:] < 0).all()


def test_block_of_copies_is_the_dense_network():
    block = fill(MoeBlock(config("eager"), hidden_act="gelu"), torch.float64)
    for parameter in block.experts.parameters():
        parameter.data[:] = parameter.data[0].clone()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    experts = block.experts
    h = ACT2FN["gelu"](x @ experts.up_proj[0].T + experts.up_proj_bias[0])
    torch.testing.assert_close(
        block(x), h @ experts.down_proj[0].T + experts.down_proj_bias[0], rtol=1e-13, atol=1e-13
    )
