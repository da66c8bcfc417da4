"""Routing as Trainer logs it: the figures of the tokens trained on, however the step is split; and the alarm."""

import json
import logging

import pytest
import torch
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe.routing import RoutingMonitor, gather, measures
from tests.conftest import batch, tiny_moe

NAMES = ("max_violation", "cv", "entropy", "dead_experts")


def still(model):
    """Without dropout, training routes as evaluation does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def rows(count=4, length=12):
    inputs = batch("llama", rows=count, length=length)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return [{key: value[row] for key, value in inputs.items()} for row in range(count)]


def train(tmp_path, model, monitor, data=None, *, join=False, callbacks=(), **arguments):
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0, **arguments}
    settings = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        **settings,
    )  # fmt: skip
    data = data or rows()
    given = [*callbacks, *([] if join else [monitor])]
    trainer = Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data, callbacks=given)
    if join:
        RoutingMonitor.join(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def expected(model, data):
    """By one pass of the statistics."""
    stacked = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    stats = gather(model, [stacked])
    return {
        "routing/max_violation": stats.max_violation.max().item(),
        "routing/cv": stats.cv.max().item(),
        "routing/entropy": stats.normalised_entropy.min().item(),
        "routing/dead_experts": float(stats.dead.sum()),
    }


SPLITS = {
    "whole": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluated between": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_logged_is_the_routing_of_the_tokens_trained_on(split, tmp_path):
    model, monitor = still(tiny_moe("llama")), RoutingMonitor()
    wanted = expected(model, rows())
    logged = train(tmp_path, model, monitor, max_steps=2, **SPLITS[split])
    assert len(logged) == 2
    for entry in logged:
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted)
    assert not monitor.handles  # taken off at the end


def test_an_adapted_model_is_watched(tmp_path):
    model = still(tiny_moe("llama"))
    wanted = expected(model, rows())
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    )
    [entry] = train(tmp_path, adapted, RoutingMonitor())
    assert {name: entry[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.slow
def test_a_compiled_model_is_watched(tmp_path):
    model = still(tiny_moe("llama"))
    wanted = expected(model, rows())
    [entry] = train(tmp_path, model, RoutingMonitor(), torch_compile=True, torch_compile_backend="eager")
    assert {name: entry[name] for name in wanted} == pytest.approx(wanted)


class Reporter(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_reporters_see_the_figures_of_a_monitor_that_joined(tmp_path):
    reporter = Reporter()
    train(tmp_path, tiny_moe("llama"), None, join=True, callbacks=[reporter])
    assert {f"routing/{name}" for name in NAMES} <= set(reporter.seen[0])


def collapsed(model):
    """Every token to the same experts: a router whose rows do not depend on the token, by a constant input."""
    for module in model.modules():
        if type(module).__name__ == "TopKRouter":
            module.forward = lambda x_TD, E=module.num_experts: (
                torch.zeros(len(x_TD), E),
                torch.full((len(x_TD), 2), 0.5),
                torch.tensor([[1, 3]]).repeat(len(x_TD), 1),
            )
    return model


@pytest.fixture
def warnings(monkeypatch):
    """What the monitor's logger warns of."""
    said = []
    monkeypatch.setattr(logging.getLogger("hf_moe.routing.monitor"), "warning", said.append)
    return said


def test_collapse_is_told_once_with_the_layer_and_what_to_try(tmp_path, warnings):
    logged = train(tmp_path, collapsed(tiny_moe("llama")), RoutingMonitor(), max_steps=6)
    assert logged[0]["routing/entropy"] == 0
    assert logged[0]["routing/dead_experts"] == 4
    [said] = [line for line in warnings if "collapsed" in line]
    assert "collapsed in layer 0: 2 of 4 experts are dead" in said
    assert "router_aux_loss_coef" in said


@pytest.mark.parametrize(("steps", "window"), [(2, 3), (3, 4)])
def test_a_short_collapse_is_no_alarm(steps, window, tmp_path, warnings):
    train(tmp_path, collapsed(tiny_moe("llama")), RoutingMonitor(window=window), max_steps=steps)
    assert warnings == []


def test_balanced_routing_is_no_alarm(tmp_path, warnings):
    train(tmp_path, tiny_moe("llama"), RoutingMonitor(collapsed_entropy=0.3), max_steps=5)
    assert warnings == []


class Planted(TrainerCallback):
    """Makes the routers of `layers` send each token to two of the experts that live, in turn; expert 2 does so in the
    steps of `alive` alone."""

    def __init__(self, model, layers=(0,), alive=()):
        self.alive = alive
        self.on_step_end(None, type("State", (), {"global_step": 0}), None)
        for layer in layers:
            model.model.layers[layer].mlp.gate.forward = self.route

    def on_step_end(self, args, state, control, **kwargs):
        self.living = [0, 1, 3, *([2] if state.global_step + 1 in self.alive else [])]

    def route(self, x_TD):
        turn_T, living = torch.arange(len(x_TD)), torch.tensor(self.living)
        index_TK = living[torch.stack([turn_T, turn_T + 1], dim=1) % len(living)]
        return torch.zeros(len(x_TD), 4), torch.full((len(x_TD), 2), 0.5), index_TK


def plant(tmp_path, *, steps, data=None, **planted):
    model = tiny_moe("llama")
    monitor = RoutingMonitor()
    train(tmp_path, model, monitor, data, callbacks=[Planted(model, **planted)], max_steps=steps)
    return monitor


def test_a_dead_expert_is_named_once(tmp_path, warnings):
    plant(tmp_path, steps=8)
    [said] = warnings
    assert "For 3 logs or more no token has gone to expert 2 in layer 0." in said
    assert "router_aux_loss_coef" in said
    assert "\n" not in said


def test_dead_experts_of_several_layers_are_one_warning(tmp_path, warnings):
    plant(tmp_path, steps=4, layers=(0, 2))
    [said] = warnings
    assert "to expert 2 in layer 0, expert 2 in layer 2." in said


def test_an_expert_that_revives_is_named_when_it_dies_again(tmp_path, warnings):
    plant(tmp_path, steps=9, alive=(4, 5))
    assert len(warnings) == 2
    warnings.clear()
    plant(tmp_path, steps=9, alive=(3, 6, 9))
    assert warnings == []


def test_few_tokens_leave_an_expert_empty_by_chance(tmp_path, warnings):
    monitor = plant(tmp_path, steps=9, data=rows(1, 8), layers=(0, 2))
    assert monitor.loads[0][2] == 0
    assert warnings == []


def test_a_resumed_run_goes_on_counting_the_logs_of_an_empty_expert(tmp_path, warnings):
    state = plant(tmp_path, steps=2).state_dict()

    class Resumed(TrainerCallback):
        def on_step_begin(self, args, state_, control, **kwargs):
            monitor.load_state_dict(json.loads(json.dumps(state)), torch.device("cpu"))

    model, monitor = tiny_moe("llama"), RoutingMonitor()
    train(tmp_path, model, monitor, callbacks=[Planted(model), Resumed()])
    assert len(warnings) == 1


def _one_of_two(rank, folder, port):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    [entry] = train(folder, still(tiny_moe("llama")), RoutingMonitor(), per_device_train_batch_size=2)
    torch.save(entry, folder / f"{rank}.pt")


@pytest.mark.multiprocess
def test_processes_are_added_up(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, (tmp_path, port), nprocs=2)
    wanted = expected(still(tiny_moe("llama")), rows())
    for rank in (0, 1):
        entry = torch.load(tmp_path / f"{rank}.pt")
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted)


def test_measures_know_the_ends_of_their_scale():
    even, one = torch.tensor([[5, 5, 5, 5]]), torch.tensor([[20, 0, 0, 0]])
    assert measures.normalised_entropy(even, torch.tensor([20])).item() == pytest.approx(1)
    assert measures.normalised_entropy(one, torch.tensor([20])).item() == 0
    assert measures.normalised_entropy(even, torch.tensor([5])).item() == 1  # all visit all
    assert measures.max_violation(one).item() == 3
