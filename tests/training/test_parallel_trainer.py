"""Trainer on two processes: what Accelerate and Transformers make of a mixture, and going on with another number."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import hf_moe
from hf_moe.errors import TrainingError
from hf_moe.training import MoeTrainer
from tests.conftest import lm_class, tiny_moe
from tests.modeling.distributed import in_processes
from tests.training.test_parallel import LOSSES, STILL

pytestmark = pytest.mark.multiprocess

STEPS, ROWS, LENGTH = 4, 4, 10
EACH = [("bert", {}), ("gpt2", {}), ("llama", {"experts_implementation": "eager"})]


def rows(family):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (STEPS * ROWS, LENGTH), generator=generator)
    ids[::ROWS] = 9  # rows of one token, which leave experts without any
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def train(family, folder, output, world, resume=None, steps=STEPS, loading=None, **arguments):
    """Trains on `world` processes with the same batches; what was logged, and what the model was wrapped in."""
    model = getattr(hf_moe, lm_class(family)).from_pretrained(folder, **(loading or {}))
    values = {
        "max_steps": steps,
        "per_device_train_batch_size": ROWS // world,
        "optim": "sgd",  # with a state; Adam makes something of the rounding of gradients that are 0
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        **arguments,
    }
    trainer = Trainer(
        model=model, args=TrainingArguments(output_dir=str(output), **values), train_dataset=rows(family)
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output / "last"))
    return {
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "distributed": str(trainer.accelerator.distributed_type),
        "ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "fsdp": isinstance(trainer.model_wrapped, FSDPModule),
        "processes": trainer.accelerator.num_processes,
    }


class Poisoned(MoeTrainer):
    """Its loss, or the gradients of it, are NaN in one of two processes."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.accelerator.process_index == 1:
            if self.poisoned == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss


def stopped(root, rank, poisoned):
    """What each of two processes that share a model says of a NaN that one of them met."""
    sharded = DistributedConfig(fsdp_size=2, ep_size=2)
    model = hf_moe.LlamaMoeForCausalLM.from_pretrained(root / "llama", distributed_config=sharded)
    values = {"max_steps": 2, "use_cpu": True, "save_only_model": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(root / "stopped"), **values)
    trainer = Poisoned(model=model, args=args, train_dataset=rows("llama"))
    trainer.poisoned = poisoned
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)


def seen(root):
    """The rows that a process meets in each of two epochs, grouped by length."""
    met = []

    def collate(batch):
        met.extend(int(row["input_ids"][0]) for row in batch)
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}

    ids = torch.arange(5, 29)[:, None].repeat(1, LENGTH)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]
    model = tiny_moe("bert", hidden_dropout_prob=0.1)  # each process draws its own
    values = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
    values |= {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(root / "seen"), **values)
    MoeTrainer(model=model, args=args, train_dataset=data, data_collator=collate).train()
    return met


def two(rank, root):
    """All that two processes do, in one start of them."""
    found = {}
    for family, loading in EACH:
        found[family] = train(family, root / family, root / f"{family}-two", 2, loading=loading)
    found["resumed"] = train(
        "bert", root / "bert", root / "resumed-by-two", 2, resume=str(root / "bert-one" / "checkpoint-2")
    )
    sharded = {"distributed_config": DistributedConfig(fsdp_size=2, ep_size=2)}
    found["sharded"] = train("llama", root / "llama", root / "sharded", 2, loading=sharded, save_only_model=True)
    found["loss"], found["gradient"] = stopped(root, rank, "loss"), stopped(root, rank, "gradient")
    found["seen"] = seen(root)
    found["fsdp on a CPU"] = train(
        "bert", root / "bert", root / "fsdp", 2, steps=1, fsdp=True, fsdp_config={"version": 2}, save_strategy="no"
    )
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    for family, _ in EACH:
        tiny_moe(family, **STILL[family], **LOSSES).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def one(root):
    """Of each family what one process finds."""
    return {family: train(family, root / family, root / f"{family}-one", 1) for family, _ in EACH}


@pytest.fixture(scope="module")
def found(root, one):
    return in_processes(2, two, root)


def assert_same_weights(one, other):
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", [family for family, _ in EACH])
def test_data_parallel_training_is_that_of_one_process(family, root, one, found):
    for process in found:
        assert process[family]["ddp"]
        assert process[family]["distributed"].endswith("MULTI_CPU")
        assert process[family]["processes"] == 2
        assert process[family]["losses"] == pytest.approx(one[family]["losses"], rel=1e-4)
        assert process[family]["norms"] == pytest.approx(one[family]["norms"], rel=1e-3)
    assert_same_weights(root / f"{family}-one" / "last", root / f"{family}-two" / "last")


def test_training_goes_on_with_more_processes(root, one, found):
    for process in found:
        assert process["resumed"]["losses"] == pytest.approx(one["bert"]["losses"], rel=1e-4)
    assert_same_weights(root / "bert-one" / "last", root / "resumed-by-two" / "last")


def test_training_goes_on_with_fewer_processes(root, one, found):
    gone_on = train("bert", root / "bert", root / "resumed-by-one", 1, resume=str(root / "bert-two" / "checkpoint-2"))
    assert gone_on["losses"] == pytest.approx(one["bert"]["losses"], rel=1e-4)
    assert_same_weights(root / "bert-one" / "last", root / "resumed-by-one" / "last")


def test_experts_on_different_processes_train_as_on_one(root, one, found):
    for process in found:
        assert process["sharded"]["fsdp"]
        assert not process["sharded"]["ddp"]
        assert process["sharded"]["losses"] == pytest.approx(one["llama"]["losses"], rel=1e-4)
    assert_same_weights(root / "llama-one" / "last", root / "sharded" / "last")
    configs = [json.loads((root / name / "last" / "config.json").read_text()) for name in ("llama-one", "sharded")]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]


def test_a_nan_in_one_process_stops_all_that_share_the_model(found):
    told = [process["loss"] for process in found]
    assert told[0].startswith("step 1: another process's loss is not finite; all outputs are finite")
    assert told[1].startswith("step 1: the loss is nan; ")
    for process in found:
        assert process["gradient"].startswith("step 1: a gradient is not finite, by their norm")


def test_processes_that_group_by_length_share_out_all_rows(found):
    one, other = (process["seen"] for process in found)
    for epoch in (0, 1):
        met = [row for rows in (one, other) for row in rows[12 * epoch : 12 * (epoch + 1)]]
        assert sorted(met) == list(range(5, 29))


def test_accelerate_has_no_fsdp_on_a_cpu(found):
    """It takes data parallelism without a word; when this fails, the other tests can ask for the real thing."""
    for process in found:
        assert process["fsdp on a CPU"]["ddp"]
        assert not process["fsdp on a CPU"]["fsdp"]
