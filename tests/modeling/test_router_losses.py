"""The routers' losses: of the router's own kind, over processes, and never silent about NaN."""

import math

import pytest
import torch
from torch import distributed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.modeling.moe_losses import load_balancing_loss, router_entropy
from hf_moe.modeling.moe_router_kinds import ROUTERS
from hf_moe.modeling.moe_routers import TopKRouter
from tests.conftest import FAMILIES, batch, real_tokens, tiny_moe
from tests.modeling.distributed import in_processes
from tests.modeling.test_features import gradients, lm_inputs, without_dropout


def test_pooled_over_layers_a_collapsed_model_looks_perfect():
    """Eight layers, each of which sends every token to an expert of its own."""
    layers = tuple(torch.full((32, 8), -50.0).index_fill_(1, torch.tensor([layer]), 50.0) for layer in range(8))
    balanced = tuple(torch.eye(8).repeat(4, 1) * 50.0 for _ in range(8))
    assert float(load_balancing_loss_func(layers, 8, 1)) == pytest.approx(1.0)
    assert float(load_balancing_loss_func(balanced, 8, 1)) == pytest.approx(1.0)
    assert float(load_balancing_loss(layers, 1)) == pytest.approx(8.0)
    assert float(load_balancing_loss(balanced, 1)) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_the_balance_is_of_the_routers_own_choice_and_probabilities(kind):
    model = tiny_moe("bert", router_type=kind)
    indices = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            if module.e_score_correction_bias is not None:
                module.e_score_correction_bias += torch.tensor([5.0, 0, 0, 0])
            module.register_forward_hook(lambda _, args, out: indices.append(out[2]))
    inputs = batch("bert")
    outputs = model(**inputs, output_router_logits=True)
    real = real_tokens("bert", inputs).flatten()
    balance, entropies = [], []
    for logits, index in zip(outputs.router_logits, indices, strict=True):
        scores = logits.double().sigmoid() if kind == "sigmoid" else logits.double().softmax(-1)
        probs = (scores / scores.sum(-1, keepdim=True))[real]
        load = [sum(e in row for row in index[real].tolist()) / int(real.sum()) for e in range(4)]
        balance.append(4 * sum(share * float(probs[:, e].mean()) for e, share in enumerate(load)))
        entropies.append(float(-(probs * probs.log()).sum(-1).mean()))
    assert float(outputs.aux_loss) == pytest.approx(sum(balance) / 2, rel=1e-5)
    assert float(outputs.router_entropy) == pytest.approx(sum(entropies) / 2, rel=1e-5)


def test_entropy_is_0_where_a_token_is_sure_and_log_e_where_it_is_not():
    sure, even = torch.eye(4) * 100, torch.zeros(4, 4)
    assert float(router_entropy((sure,))) == pytest.approx(0, abs=1e-6)
    assert float(router_entropy((even,))) == pytest.approx(math.log(4))
    mask = torch.tensor([True, True, False, False])
    assert float(router_entropy((torch.cat([sure[:2], even[2:]]),), mask)) == pytest.approx(0, abs=1e-6)


def test_its_weight_is_added_in_training_and_may_be_negative():
    losses = {}
    for weight in (0.0, 0.5, -0.5):
        model = without_dropout(tiny_moe("bert", router_entropy_coef=weight)).train()
        outputs = model(**lm_inputs("bert"))
        losses[weight] = float(outputs.loss)
        assert losses[weight] == pytest.approx(losses[0.0] + weight * float(outputs.router_entropy), rel=1e-5)


def global_batches():
    """Of different numbers of real tokens."""
    inputs = batch("bert", rows=4, seed=5)
    inputs["attention_mask"][0, 3:] = 0
    return inputs


def joined_loss(inputs, scope):
    """The balance alone, whose gradient is what balances."""
    model = without_dropout(tiny_moe("bert", router_aux_loss_scope=scope)).train()
    loss = model(**inputs, output_router_logits=True).aux_loss
    loss.backward()
    return loss.detach(), [m.weight.grad for m in model.modules() if isinstance(m, TopKRouter)]


def in_a_process(rank, scope):
    loss, grads = joined_loss({key: value[2 * rank : 2 * rank + 2] for key, value in global_batches().items()}, scope)
    for value in (loss, *grads):  # as DistributedDataParallel averages them
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return loss, grads


@pytest.mark.multiprocess
def test_balance_over_processes_is_that_of_the_joined_batch():
    expected, gradients_of_one = joined_loss(global_batches(), "global_batch")
    for loss, grads in in_processes(2, in_a_process, "global_batch"):
        torch.testing.assert_close(loss, expected)
        for grad, of_one in zip(grads, gradients_of_one, strict=True):
            torch.testing.assert_close(grad, of_one, rtol=1e-4, atol=1e-6)
    for loss, _ in in_processes(2, in_a_process, "micro_batch"):
        assert abs(loss - expected) > 1e-3


def test_layers_skipped_at_random_have_no_balance_over_processes():
    with pytest.raises(Exception, match="layers that are skipped at random"):
        tiny_moe("wav2vec2", layerdrop=0.1, router_aux_loss_scope="global_batch")


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_a_router_names_the_layer(family):
    model = tiny_moe(family).train()
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    with torch.no_grad():
        routers[1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the router of layer 2 has logits of NaN or Inf for"):
        model(**lm_inputs(family))
    with pytest.raises(FloatingPointError, match="layer 2"):
        model.eval()(**batch(family), output_router_logits=True)


def test_nan_in_padding_is_no_error():
    model = without_dropout(tiny_moe("bert")).train()
    inputs = lm_inputs("bert")
    real = inputs["attention_mask"].flatten().bool()
    first = next(module for module in model.modules() if isinstance(module, TopKRouter))

    def spoil(module, args, output):
        return output[0].masked_fill(~real[:, None], float("nan")), *output[1:]

    expected = model(**inputs).loss
    first.register_forward_hook(spoil, prepend=True)
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert gradients(model, inputs)[0].isfinite()
