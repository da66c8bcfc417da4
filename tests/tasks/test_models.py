"""A task's model: the right head, its labels, and which weights are new."""

import pytest
from transformers import AutoConfig

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks import TASKS, load_model, load_tokenizer
from tests.conftest import tiny_moe

HEADS = {
    "masked-lm": "bert",
    "causal-lm": "gpt2",
    "text-classification": "gpt2",
    "token-classification": "bert",
    "question-answering": "roberta",
    "sentence-embedding": "llama",
}


@pytest.mark.parametrize("task", TASKS)
def test_dense_models_and_mixtures_get_the_task_s_head(task, dense_folder, tmp_path):
    family = HEADS[task]
    labels = ["a", "b", "c"] if task.endswith("classification") else None
    tiny_moe(family).save_pretrained(tmp_path)
    for folder in (dense_folder(family), tmp_path):
        model = load_model(task, folder, labels=labels)
        if labels:
            assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
            assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
            assert model.new_weights
        if task in ("masked-lm", "causal-lm"):
            assert model.new_weights == []
        if family == "gpt2":
            assert model.config.pad_token_id is not None
    assert "Moe" in type(model).__name__


def test_what_an_architecture_can_t_do_is_said(dense_folder, tmp_path):
    with pytest.raises(
        UsageError, match=r"of type 'gpt2', which has no head for masked-lm; it has causal-lm, text-cl"
    ):
        load_model("masked-lm", dense_folder("gpt2"))
    with pytest.raises(UsageError, match="of type 'vit', which has no head for causal-lm; it has sentence-embedding"):
        load_model("causal-lm", dense_folder("vit"))
    with pytest.raises(SourceError, match="its configuration does not load"):
        load_model("causal-lm", tmp_path / "nothing")
    AutoConfig.from_pretrained(dense_folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="its model does not load"):
        load_model("masked-lm", tmp_path)
    with pytest.raises(SourceError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="holds a PEFT adapter; merge it"):
        load_model("masked-lm", tmp_path)


def test_a_trained_head_has_the_labels_it_was_trained_with(dense_folder, tmp_path):
    load_model("text-classification", dense_folder("bert"), labels=["a", "b", "c"]).save_pretrained(tmp_path)
    assert load_model("text-classification", tmp_path).config.num_labels == 3
    with pytest.raises(SourceError, match="its model does not load"):
        load_model("text-classification", tmp_path, labels=["a", "b"])
