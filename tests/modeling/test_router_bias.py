"""Loss-free balancing: the same bias however a step is split, padding never counts, and copies stay exact."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from hf_moe.modeling.moe_routers import TopKRouter, chosen
from hf_moe.routing.callbacks import RouterBiasCallback
from tests.conftest import batch, real_tokens, tiny_moe
from tests.modeling.distributed import in_processes
from tests.modeling.test_features import lm_inputs, without_dropout

RATE = 0.01


def model_of(family="bert", **config):
    return without_dropout(tiny_moe(family, router_type="sigmoid", router_bias_update_rate=RATE, **config)).train()


def routers_of(model):
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def biases(model):
    return torch.stack([router.e_score_correction_bias for router in routers_of(model)])


def micro_batches():
    return [{**batch("bert", seed=seed), "labels": batch("bert", seed=seed)["input_ids"]} for seed in range(4)]


def naive_bias(batches):
    """Counted by hand from what the routers say in evaluation mode, which is what they say in training."""
    model = model_of().eval()
    loads = [[0] * 4 for _ in routers_of(model)]
    for inputs in batches:
        seen = []
        handles = [
            r.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out[2])) for r in routers_of(model)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        real = real_tokens("bert", inputs).flatten()
        for load, index in zip(loads, seen, strict=True):
            for token in range(len(index)):
                for expert in index[token].tolist() if real[token] else ():
                    load[expert] += 1
    signs = [[(sum(load) / 4 > one) - (sum(load) / 4 < one) for one in load] for load in loads]
    return RATE * torch.tensor(signs, dtype=torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_moves_by_what_was_counted_over_micro_batches(checkpointing):
    model = model_of()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for inputs in micro_batches():
        model(**inputs).loss.backward()
    model.eval()(**micro_batches()[0])  # counts nothing
    expected = naive_bias(micro_batches())
    model.update_router_bias()
    assert expected.abs().max() > 0
    torch.testing.assert_close(biases(model), expected)
    model.update_router_bias()  # the counts are gone
    torch.testing.assert_close(biases(model), expected)


def in_a_process(rank, checkpointing):
    model = model_of()
    if checkpointing:
        model.gradient_checkpointing_enable()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for inputs in micro_batches()[2 * rank : 2 * rank + 2]:
        parallel(**inputs).loss.backward()
    model.update_router_bias()
    return biases(model)


@pytest.mark.multiprocess
def test_two_processes_move_it_as_one_does():
    one, other = in_processes(2, in_a_process, True)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, naive_bias(micro_batches()))


def test_trainer_moves_it_once_an_optimizer_step(tmp_path):
    rows = [{name: value[row] for name, value in inputs.items()} for inputs in micro_batches() for row in range(2)]
    model = model_of()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[RouterBiasCallback()]).train()
    torch.testing.assert_close(biases(model), naive_bias(micro_batches()))


def test_a_model_without_a_selection_bias_says_so():
    with pytest.raises(ValueError, match="'softmax' has no selection bias; 'sigmoid' has"):
        tiny_moe("bert").update_router_bias()


def test_it_balances_a_router_that_prefers_few():
    torch.manual_seed(0)
    model = model_of(num_experts=8)
    shares = []
    for step in range(80):
        inputs = batch("bert", rows=8, length=16, seed=step)
        model(**inputs)
        loads = torch.stack([router.load_E for router in routers_of(model)]).float()
        shares.append((loads / loads.sum(1, keepdim=True)).max().item())
        model.update_router_bias()
    assert min(shares[:5]) > 0.2
    assert sum(shares[-10:]) / 10 < 0.7 * sum(shares[:10]) / 10


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.double()])
def test_it_is_float32_whatever_the_model_is(cast, tmp_path):
    model = model_of()
    for router in routers_of(model):
        router.e_score_correction_bias += 1 + 0.001 * torch.arange(4)
    before = biases(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(biases(cast(model)), before)
    assert biases(model).dtype == torch.float32
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(biases(half), before)
    half.save_pretrained(tmp_path / "again")
    assert torch.equal(biases(type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)), before)


def test_layers_that_are_skipped_count_nothing():
    model = model_of("wav2vec2", layerdrop=1.0)
    model(**lm_inputs("wav2vec2")).loss.backward()
    model.update_router_bias()
    assert not biases(model).any()


def test_what_was_chosen_is_counted_once_a_slot():
    assert chosen(torch.tensor([[0, 3], [2, 3]]), 3).tolist() == [[1, 0, 0], [0, 0, 1]]
