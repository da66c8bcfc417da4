"""DeepSpeed's ZeRO-3 on two processes of a CPU against one process: loss, gradients, and what is gathered together.

    pip install deepspeed
    ACCELERATE_USE_DEEPSPEED=true torchrun --nproc-per-node 2 -m benchmarks.zero3

Writes benchmarks/zero3.json. DeepSpeed is no dependency of the tests: Accelerate imports it wherever it is installed.
"""

import json
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import distributed

from hf_moe.modeling.moe_routers import TopKRouter
from hf_moe.training.distributed import set_leaf_modules
from tests.conftest import tiny_moe
from tests.training.test_parallel import LOSSES, half, inputs, step, total_of

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
}


def tiny(starved: bool) -> torch.nn.Module:
    model = tiny_moe("llama", **LOSSES)
    if starved:  # every token to the same experts
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, TopKRouter):
                    module.weight.zero_()
    return model


def compare(starved: bool, leaves: bool) -> dict:
    """One step; differences are the largest of any value."""
    from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad

    batch = inputs("starved" if starved else "")
    total = total_of("llama", batch)
    expected, grads = step(tiny(starved), batch, total, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json.loads(json.dumps(ZERO3))))
    model = tiny(starved)
    if leaves:
        set_leaf_modules(model, accelerator)
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    # (Accelerate counts one process here, since it looks for a GPU; DeepSpeed counts two.)
    batch = half(distributed.get_rank(), batch)
    engine.train()
    loss = engine(**batch, num_items_in_batch=total).loss
    accelerator.backward(loss * distributed.get_world_size())
    worst = 0.0
    for name, parameter in engine.module.named_parameters():
        grad = safe_get_full_grad(parameter)
        worst = max(worst, float((grad - grads[name]).abs().max()))
    summed = loss.detach().clone()
    distributed.all_reduce(summed)
    return {
        "starved": starved,
        "distributed_type": accelerator.distributed_type.value,
        "processes": distributed.get_world_size(),
        "leaves": sorted({type(module).__name__ for module in get_z3_leaf_modules(engine.module)}),
        "sharded": all(parameter.numel() == 0 for parameter in engine.module.parameters()),
        "loss_difference": float((summed - expected).abs()),
        "gradient_difference": worst,
    }


def main() -> None:
    torch.set_num_threads(1)
    found = [compare(starved, leaves) for starved in (False, True) for leaves in (True, False)]
    if distributed.get_rank() == 0:
        versions = {name: metadata.version(name) for name in ("deepspeed", "accelerate", "torch", "transformers")}
        text = json.dumps({"versions": versions, "runs": found}, indent=2)
        Path(__file__).with_suffix(".json").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
