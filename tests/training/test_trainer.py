"""MoeTrainer: the loss is what it says, however a step is split; what stops it names the place."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from transformers import TrainingArguments as Arguments

from hf_moe.errors import TrainingError
from hf_moe.modeling.moe_losses import load_balancing_loss
from hf_moe.training import MoeTrainer, freeze
from hf_moe.training.checkpoints import is_whole, last_checkpoint
from hf_moe.training.collate import SeededCollator
from hf_moe.training.compute import count_active, count_tokens
from hf_moe.training.losses import contrastive_loss
from tests.conftest import TEXT_FAMILIES, batch, tiny_moe
from tests.modeling.test_features import without_dropout
from tests.modeling.test_trainer import BALANCED, LENGTH, rows_for


def arguments(folder, **values):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
    }
    return Arguments(**defaults | values)


def trained(model, rows, folder, *, collator=None, callbacks=None, router_rate=None, scale=None, **values):
    """The trainer after its run, and how far each parameter moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = MoeTrainer(
        model=model,
        args=arguments(folder, **values),
        train_dataset=rows,
        data_collator=collator,
        callbacks=callbacks,
        router_learning_rate=router_rate,
        contrastive_scale=scale,
    )
    trainer.train()
    return trainer, {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=1.0,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


def dense_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return without_dropout(BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)))


MODELS = {
    "masked": ("BertMoeForMaskedLM", lambda: without_dropout(tiny_moe("bert", "BertMoeForMaskedLM", **BALANCED))),
    "classes": (
        "BertMoeForSequenceClassification",
        lambda: without_dropout(tiny_moe("bert", "BertMoeForSequenceClassification", **BALANCED)),
    ),
    "causal": ("GPT2MoeLMHeadModel", lambda: without_dropout(tiny_moe("gpt2", **BALANCED))),
    "dense": ("BertForMaskedLM", dense_bert),
    "native": ("MixtralForCausalLM", mixtral),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", MODELS)
def test_four_micro_batches_are_one_batch(kind, smoothing, tmp_path):
    """Labels of every micro-batch are as many, and its tokens balance as the whole's: the stated condition."""
    name, make = MODELS[kind]
    rows = rows_for(name, equal=True)
    whole, moved = trained(make(), rows, tmp_path, label_smoothing_factor=smoothing)
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-3
    split, moved_by_parts = trained(
        make(),
        rows,
        tmp_path,
        label_smoothing_factor=smoothing,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    log, log_by_parts = whole.state.log_history[0], split.state.log_history[0]
    for figure in ("loss", "task_loss", "aux_loss", "z_loss", "router_entropy"):
        if figure in log:
            assert log_by_parts[figure] == pytest.approx(log[figure], rel=1e-4), figure
    assert log_by_parts["tokens_seen"] == log["tokens_seen"] == 4 * LENGTH
    for parameter, value in moved.items():
        torch.testing.assert_close(moved_by_parts[parameter], value, rtol=1e-3, atol=2e-5, msg=parameter)


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_labels_weigh_alike_wherever_they_are(kind, tmp_path):
    """Also the dense control's, whose head leaves Trainer's number of labels unread."""
    _, make = MODELS[kind]
    rows = rows_for("BertMoeForMaskedLM", equal=False)
    still = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}

    def model():
        made = make()
        for field, value in still.items():
            setattr(made.config, field, value)
        return made

    _, moved = trained(model(), rows, tmp_path)
    _, by_parts = trained(model(), rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for parameter, value in moved.items():
        torch.testing.assert_close(by_parts[parameter], value, rtol=1e-3, atol=2e-5, msg=parameter)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_logged_losses_are_those_of_a_naive_step(smoothing, tmp_path):
    make = MODELS["masked"][1]
    rows = rows_for("BertMoeForMaskedLM", equal=False)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model = make().eval()  # without dropout this is the training's function
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    logits, labels = outputs.logits.flatten(0, 1), inputs["labels"].flatten()
    nll = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    aux = load_balancing_loss(outputs.router_logits, 2, torch.ones(4 * LENGTH, dtype=torch.bool))
    trainer, moved = trained(make(), rows, tmp_path, label_smoothing_factor=smoothing)
    log = trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(float(aux), rel=1e-4)
    assert log["task_loss"] == pytest.approx(float(nll), rel=1e-4)
    assert log["loss"] == pytest.approx(float(nll + aux + outputs.z_loss), rel=1e-4)
    assert any(value.abs().max() > 1e-6 for name, value in moved.items() if ".gate." in name)
    evaluated = trainer.evaluate(rows)["eval_loss"]  # the task's alone, unsmoothed
    with torch.no_grad():
        outputs = trainer.model.eval()(**inputs)
    assert evaluated == pytest.approx(float(outputs.loss), rel=1e-4)


def test_a_log_adds_up_over_steps(tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification", router_aux_loss_coef=0.5, router_entropy_coef=0.25)
    rows = [row for _ in range(4) for row in rows_for("BertMoeForSequenceClassification", equal=False)]
    trainer, _ = trained(
        model,
        rows,
        tmp_path,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    for log in logs:
        weighted = 0.5 * log["aux_loss"] + 0.25 * log["router_entropy"]
        assert log["loss"] == pytest.approx(log["task_loss"] + weighted, rel=1e-5)
        assert 1 < log["aux_loss"] < 4
        assert 0 < log["router_entropy"] <= torch.log(torch.tensor(4.0)) + 1e-6
        assert log["tokens_per_second"] > 0
        assert {"routing/max_violation", "routing/entropy", "routing/dead_experts"} <= set(log)
    assert [log["tokens_seen"] for log in logs] == [8 * LENGTH, 16 * LENGTH]
    assert [log["active_flops"] for log in logs] == [count_active(model).flops(log["tokens_seen"]) for log in logs]


def test_reporters_see_every_figure(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    trained(model, rows_for("BertMoeForSequenceClassification", equal=True), tmp_path, callbacks=[Reporter()])
    assert {"aux_loss", "task_loss", "tokens_per_second", "active_flops", "routing/entropy"} <= set(seen[0])


def test_active_parameters_are_counted_as_by_hand():
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    shapes = {name: p.numel() for name, p in model.named_parameters()}
    looked_up = sum(size for name, size in shapes.items() if "_embeddings.weight" in name)
    experts = sum(size for name, size in shapes.items() if ".experts." in name)
    assert count_active(model).all == sum(shapes.values()) - looked_up - experts / 2  # 2 of 4
    freeze(model, "experts_only")
    assert count_active(model).trained == experts / 2
    tied = tiny_moe("gpt2")  # its head multiplies with the embeddings
    shapes = {name: p.numel() for name, p in tied.named_parameters()}
    experts = sum(size for name, size in shapes.items() if ".experts." in name)
    assert count_active(tied).all == sum(shapes.values()) - shapes["transformer.wpe.weight"] - experts / 2


def test_experts_of_low_rank_cost_one_network_and_all_factors():
    model = tiny_moe("llama", expert_rank=2)
    D, F, R, E, K, layers = 32, 64, 2, 4, 2, 2
    shared = 3 * D * F
    once, often = E * R * D + E * D * R, E * 2 * F * R + E * R * F  # before and after, and beside the activations
    others = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name and "embed" not in name)
    assert count_active(model).all == others + layers * (shared + once + K * often)


def test_padding_is_no_token():
    assert count_tokens(batch("bert", rows=2, length=10)) == 15
    assert count_tokens({"input_ids": torch.zeros(2, 5)}) == 10
    pairs = {
        f"{side}_{name}": torch.ones(2, 3)
        for side in ("anchor", "positive")
        for name in ("input_ids", "attention_mask")
    }
    assert count_tokens(pairs) == 12


def test_routers_have_a_rate_of_their_own(tmp_path):
    rows = rows_for("BertMoeForMaskedLM", equal=False)
    make = MODELS["masked"][1]
    _, plain = trained(make(), rows, tmp_path)
    trainer, moved = trained(make(), rows, tmp_path, router_rate=0.25)
    for name, value in moved.items():
        factor = 0.25 if ".gate." in name else 1.0
        torch.testing.assert_close(value, factor * plain[name], rtol=1e-3, atol=1e-6, msg=name)
    assert trainer.state.log_history[0]["learning_rate"] == 1.0
    assert trainer.state.log_history[0]["router_learning_rate"] == 0.25


def test_what_waits_does_not_move_until_it_trains(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callbacks = [*freeze(model, "gradual:1"), Look()]
    rows = rows_for("BertMoeForSequenceClassification", equal=False)
    values = {"max_steps": 5, "learning_rate": 0.01, "optim": "adamw_torch", "weight_decay": 0.1}
    trained(model, rows, tmp_path, callbacks=callbacks, **values)
    states = [start, *seen]
    for name, first in [
        ("classifier.weight", 0),
        ("bert.pooler.dense.weight", 0),
        ("bert.encoder.layer.2.mlp.experts.up_proj", 0),
        ("bert.encoder.layer.1.output.dense.weight", 1),
        ("bert.encoder.layer.0.attention.self.value.weight", 2),
        ("bert.embeddings.word_embeddings.weight", 3),
    ]:
        moved = [not torch.equal(before[name], after[name]) for before, after in pairwise(states)]
        assert moved == [step >= first for step in range(5)], name


def test_the_schedule_scales_both_rates(tmp_path):
    rows = rows_for("BertMoeForMaskedLM", equal=True)
    schedule = {"max_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 0.1, "optim": "adamw_torch"}
    trainer, _ = trained(MODELS["masked"][1](), rows, tmp_path, router_rate=0.01, **schedule)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["learning_rate"] for log in logs] == pytest.approx([0.1, 0.05])
    assert [log["router_learning_rate"] for log in logs] == pytest.approx([0.01, 0.005])


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_biases_and_norms_do_not_decay(family, tmp_path):
    model = tiny_moe(family, router_type="sigmoid")
    names = MoeTrainer(model=model, args=arguments(tmp_path)).get_decay_parameter_names(model)
    shapes = dict(model.named_parameters())
    for name, parameter in shapes.items():
        spared = parameter.ndim == 1 or "bias" in name
        assert (name in names) == (not spared), name
    assert not any("e_score_correction_bias" in name for name in [*names, *shapes])
    assert any(".experts." in name for name in names)


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sentence_embeddings_are_told_apart(family, negatives, tmp_path):
    """The loss of a step against one made by hand, the routers' losses in it."""
    sides = ("anchor", "positive", "negative")[: 3 if negatives else 2]
    rows = {side: batch(family, rows=3, length=8, seed=place) for place, side in enumerate(sides)}
    inputs = {f"{side}_{name}": value for side, held in rows.items() for name, value in held.items()}
    inputs["labels"] = torch.ones(3)
    name = {"bert": "BertMoeModel", "llama": "LlamaMoeModel"}[family]
    make = lambda: without_dropout(tiny_moe(family, name, router_aux_loss_coef=0.5))  # noqa: E731

    model, embedded = make().eval(), {}
    for side, held in rows.items():
        hidden, mask = model(**held).last_hidden_state, held["attention_mask"]
        means = [hidden[row][mask[row].bool()].mean(0) for row in range(3)]
        embedded[side] = torch.stack([mean / mean.norm() for mean in means])
    others = torch.cat([embedded[side] for side in sides[1:]])
    scores = [[20 * float(anchor @ other) for other in others] for anchor in embedded["anchor"]]
    naive = torch.stack([functional.cross_entropy(torch.tensor(row), torch.tensor(i)) for i, row in enumerate(scores)])

    dataset = [{key: value[row] for key, value in inputs.items()} for row in range(3)]
    collator = lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}  # noqa: E731
    trainer, moved = trained(
        make(), dataset, tmp_path, collator=collator, scale=20.0, learning_rate=0.1, label_names=["labels"]
    )
    log = trainer.state.log_history[0]
    assert log["task_loss"] == pytest.approx(float(naive.mean()), rel=1e-4)
    assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["aux_loss"], rel=1e-5)
    assert all(value.abs().max() > 0 for key, value in moved.items() if ".gate." in key)
    predicted = trainer.predict(dataset)
    assert predicted.predictions.shape == (3, len(sides), 32)
    assert predicted.metrics["test_loss"] > 0


def test_a_batch_of_one_pair_has_nothing_to_tell_apart():
    one = functional.normalize(torch.randn(1, 8), dim=-1)
    assert contrastive_loss(one, one, None, 20.0) == 0


class Poison(TrainerCallback):
    """Puts NaN into a weight before a step."""

    def __init__(self, name, step, value=float("nan")):
        self.name, self.step, self.value = name, step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].flatten()[0] = self.value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "bert.encoder.layer.1.intermediate.dense.weight",
            "is that of bert.encoder.layer.1.intermediate.dense (layer 1)",
        ),
        ("bert.encoder.layer.0.mlp.gate.weight", "the router of layer 0 has logits of NaN or Inf"),
        ("bert.encoder.layer.0.mlp.experts.up_proj", "is that of bert.encoder.layer.0.mlp.experts (layer 0)"),
        ("classifier.weight", "is that of classifier"),
    ],
)
def test_a_loss_that_is_no_number_stops_and_names_step_and_layer(name, words, tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    rows = rows_for("BertMoeForSequenceClassification", equal=False)
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    with pytest.raises(TrainingError) as raised:
        trained(model, rows, tmp_path, callbacks=[Poison(name, 4)], **saving)
    message = str(raised.value)
    assert message.startswith("step 5: ")
    assert words in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-4'}" in message
    assert "\n" not in message
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_gradient_that_is_no_number_stops_before_the_weights_move(tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    layer = model.bert.encoder.layer[1]
    layer.output.dense.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        TrainingError, match=r"step 1: a gradient is not finite, first that of .*layer\.1\.output\.dense"
    ):
        trained(model, rows_for("BertMoeForSequenceClassification", equal=False), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    class Late(Poison):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            Poison.on_step_begin(self, args, state, control, model)

        def on_step_begin(self, *args, **kwargs):
            pass

    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    rows = rows_for("BertMoeForSequenceClassification", equal=False)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    with pytest.raises(TrainingError, match=r"the weights of classifier\.weight are not finite"):
        trained(model, rows, tmp_path, callbacks=[Late("classifier.weight", 2, float("inf"))], **saving)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert is_whole(tmp_path / "checkpoint-1")


def test_a_collator_draws_by_rows_and_epoch_alone():
    def draw(rows):
        return {"drawn": torch.rand(3)}

    collator, rows = SeededCollator(draw, seed=1), [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    first = collator(rows)["drawn"]
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(collator(rows)["drawn"], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(collator(rows[::-1])["drawn"], first)
    assert not torch.equal(SeededCollator(draw, seed=2)(rows)["drawn"], first)
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["drawn"], first)


def scrambled(rows):
    """A collator that draws."""
    held = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    held["input_ids"] = torch.where(torch.rand(held["input_ids"].shape) < 0.5, 6, held["input_ids"])
    return held


def test_workers_and_evaluations_change_nothing(tmp_path):
    rows = rows_for("BertMoeForSequenceClassification", equal=False) * 2

    def losses(**values):
        model = tiny_moe("bert", "BertMoeForSequenceClassification", hidden_dropout_prob=0.3)
        trainer = MoeTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=6, learning_rate=0.01, **values),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=scrambled,
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    alone = losses()
    assert losses(eval_strategy="steps", eval_steps=1) == alone
    assert losses(dataloader_num_workers=2) == alone


@pytest.mark.parametrize(("how", "moves"), [("none", True), ("all_but_router", False)])
def test_a_selection_bias_moves_with_its_router(how, moves, tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification", router_type="sigmoid", router_bias_update_rate=0.01)
    freeze(model, how)
    trained(model, rows_for("BertMoeForSequenceClassification", equal=False), tmp_path)
    biases = [value for name, value in model.named_buffers() if "e_score" in name]
    assert any(bias.any() for bias in biases) == moves


def test_gradient_checkpointing_and_bf16_train(tmp_path):
    rows = rows_for("BertMoeForMaskedLM", equal=False)
    make = MODELS["masked"][1]
    _, plain = trained(make(), rows, tmp_path)
    _, again = trained(make(), rows, tmp_path, gradient_checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=name)
    trainer, half = trained(make(), rows, tmp_path, bf16=True)
    assert trainer.state.log_history[0]["loss"] > 0
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert any(value.abs().max() > 1e-3 for value in half.values())
