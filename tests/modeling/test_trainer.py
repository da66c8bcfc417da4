"""Under Trainer: one optimizer step is the same step however it is split, auxiliary losses included."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.conftest import TEXT_FAMILIES, batch, tiny_moe

ROWS, LENGTH = 4, 12


def rows_for(name, *, equal, family="bert"):
    """Four examples; `equal` ones balance alike in every split, others have labels of very different number."""
    if family not in TEXT_FAMILIES:
        inputs = batch(family, rows=ROWS, padding=False)
        labels = torch.full((ROWS, 4), -100).where(torch.arange(4) > torch.arange(ROWS)[:, None], 7)
        labels = labels if name.endswith("ForCTC") else torch.tensor([1, 0, 0, 1])
        chosen = [0] * ROWS if equal else range(ROWS)
        return [{**{key: value[row] for key, value in inputs.items()}, "labels": labels[row]} for row in chosen]
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(ROWS):
        if row == 0 or not equal:
            ids = torch.randint(5, 60, (LENGTH,), generator=generator)
        labels = ids.clone()
        if not equal:
            labels[: row * 3] = -100
        if name.endswith("ForSequenceClassification"):
            labels = torch.tensor(row % 2 if not equal else 1)
        if name.endswith("ForTokenClassification"):
            labels = torch.where(labels == -100, -100, labels % 2)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(LENGTH, dtype=torch.long), "labels": labels})
    return rows


def step(family, name, rows, accumulation, tmp_path, **config):
    model = tiny_moe(family, name, **config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    return moved, trainer.state.log_history[0]["loss"]


HEADS = [
    ("bert", "BertMoeForMaskedLM"),
    ("bert", "BertMoeForSequenceClassification"),
    ("bert", "BertMoeForTokenClassification"),
    ("gpt2", "GPT2MoeLMHeadModel"),
    ("gpt2", "GPT2MoeForSequenceClassification"),
    ("gpt_neo", "GPTNeoMoeForTokenClassification"),
    ("llama", "LlamaMoeForCausalLM"),
    ("llama", "LlamaMoeForSequenceClassification"),
    ("llama", "LlamaMoeForTokenClassification"),
    ("modernbert", "ModernBertMoeForMaskedLM"),
    ("mpnet", "MPNetMoeForMaskedLM"),
    ("vit", "ViTMoeForImageClassification"),
    ("dinov2", "Dinov2MoeForImageClassification"),
    ("wav2vec2", "Wav2Vec2MoeForCTC"),
    ("wav2vec2", "Wav2Vec2MoeForSequenceClassification"),
    ("whisper", "WhisperMoeForAudioClassification"),
]
BALANCED = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
TASK_ONLY = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


@pytest.mark.parametrize(("family", "name"), HEADS)
@pytest.mark.parametrize(("equal", "losses"), [(True, BALANCED), (False, TASK_ONLY)], ids=["auxiliary", "task"])
def test_gradients_do_not_depend_on_accumulation(family, name, equal, losses, tmp_path):
    rows = rows_for(name, equal=equal, family=family)
    whole, whole_loss = step(family, name, rows, 1, tmp_path, **losses)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3
    for accumulation in (2, 4):
        split, split_loss = step(family, name, rows, accumulation, tmp_path, **losses)
        assert split_loss == pytest.approx(whole_loss, rel=1e-4)
        for parameter, value in whole.items():
            torch.testing.assert_close(split[parameter], value, rtol=1e-3, atol=2e-5, msg=parameter)


def test_a_batch_without_labels_counts_nothing(tmp_path):
    rows = rows_for("BertMoeForMaskedLM", equal=True)
    rows[0] = {**rows[0], "labels": torch.full((LENGTH,), -100)}
    for name, family in (("BertMoeForMaskedLM", "bert"), ("GPT2MoeLMHeadModel", "gpt2")):
        split, _ = step(family, name, rows, 4, tmp_path, **TASK_ONLY)
        assert all(value.isfinite().all() for value in split.values())
        whole, _ = step(family, name, rows, 1, tmp_path, **TASK_ONLY)
        for parameter, value in whole.items():
            torch.testing.assert_close(split[parameter], value, rtol=1e-3, atol=2e-5, msg=parameter)


def test_predictions_hold_no_router_state(tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification", output_router_logits=True)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments)
    predicted = trainer.predict(rows_for("BertMoeForSequenceClassification", equal=True))
    assert predicted.predictions.shape == (ROWS, 2)
    assert "test_loss" in predicted.metrics


def test_label_smoothing_shifts_as_for_a_causal_model(tmp_path):
    """Trainer looks our class up by name to know that labels shift; without it the loss would be another one."""
    model = tiny_moe("gpt2").eval()
    rows = rows_for("GPT2MoeLMHeadModel", equal=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, label_smoothing_factor=0.1
    )
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    loss = Trainer(model=model, args=arguments).compute_loss(model, dict(inputs))
    logits = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, inputs["labels"][:, 1:, None]).mean()
    torch.testing.assert_close(loss, 0.9 * nll + 0.1 * -logits.mean(), rtol=1e-4, atol=1e-5)
