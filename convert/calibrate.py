"""What the dense network's neurons do on text, by which they can be dealt to experts."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_moe.errors import SourceError, UsageError

from .checkpoint import Checkpoint
from .compare import load_model, make_batches, run_model, watch_networks
from .plan import Plan
from .texts import read_texts

DEALS_NAME = "neurons.safetensors"
MAX_TOKENS = 512


def coactivation(plan: Plan) -> dict[int, torch.Tensor]:
    """Layer -> (F, N) how strongly each neuron fires on N tokens of the recipe's calibration text.

    The dense model is loaded for this, in float32.

    Raises:
        UsageError, SourceError: where there is no text, or nothing that reads it.
    """
    if plan.family.inputs != "input_ids":
        raise UsageError(
            f"partition 'coactivation' measures on text, but a {plan.family.model_type} reads {plan.family.inputs}: "
            "choose another partition."
        )
    if plan.recipe.calibration is None:
        raise UsageError("partition 'coactivation' wants text to measure on: name a file as calibration.")
    texts = read_texts(Path(plan.recipe.calibration))
    checkpoint = plan.source.checkpoint
    model = load_model(plan.dense_class, checkpoint, "float32")
    batches, note = make_batches(checkpoint, model.config, plan.family.inputs, texts, plan.recipe.seed)
    batch, mask = batches[0], batches[0].mask
    if batch.name != "text" or mask is None:
        raise UsageError(f"{plan.recipe.calibration}: can't be read with the source's tokenizer ({note}).")
    with watch_networks(model, plan.family, plan.networks, "hidden") as seen:
        run_model(model, batch)
    real = mask.bool().flatten()
    return {
        layer: values[0].flatten(0, -2)[real][:MAX_TOKENS].abs().T.contiguous()
        for layer, values in seen["hidden"].items()
    }


def write_deals(plan: Plan, folder: Path) -> None:
    """Keeps beside the weights who got which neurons, where that can't be computed again without the text."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, (parts_PF, shared_F) in plan.deals.items():
        if parts_PF is not None:
            tensors |= {f"{layer}.parts": parts_PF, f"{layer}.shared": shared_F}
    save_file(tensors, folder / DEALS_NAME)


def read_deals(plan: Plan, moe: Checkpoint) -> None:
    """Fills `plan.deals` with what `write_deals` kept beside `moe`, if it did."""
    if plan.recipe.partition == "coactivation" and (moe.path / DEALS_NAME).is_file():
        tensors = load_file(moe.path / DEALS_NAME)
        for layer, scheme in plan.schemes.items():
            parts_PF, shared_F = (tensors.get(f"{layer}.{name}", torch.empty(0)) for name in ("parts", "shared"))
            everyone = torch.cat([parts_PF.flatten(), shared_F.flatten()]).sort().values
            wanted = scheme.parts * scheme.expert_width + (0 if scheme.shared_is_copy else scheme.shared_width)
            if parts_PF.shape != (scheme.parts, scheme.expert_width) or not torch.equal(
                everyone, torch.arange(wanted)
            ):
                raise SourceError(f"{moe.path / DEALS_NAME}: does not deal out the neurons of layer {layer}.")
            plan.deals[layer] = (parts_PF, shared_F)
