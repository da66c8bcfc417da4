"""Expert load, against counting by hand, and its picture."""

import pytest
import torch

from hf_moe.routing.load import expert_load
from hf_moe.routing.plots import load_heat_map
from tests.conftest import FAMILIES, batch, real_tokens, tiny_moe


@pytest.mark.parametrize("family", FAMILIES)
def test_load_counts_tokens_not_padding(family):
    model = tiny_moe(family).train()
    batches = [batch(family, seed=seed) for seed in range(3)]
    load = expert_load(model, batches)
    assert model.training
    counts = torch.zeros(2, 4)
    model.eval()
    for inputs in batches:
        for layer, logits in enumerate(model(**inputs, output_router_logits=True).router_logits):
            for token, kept in enumerate(real_tokens(family, inputs).reshape(-1).tolist()):
                for expert in logits[token].argsort(descending=True)[: 2 * kept].tolist():
                    counts[layer, expert] += 1
    torch.testing.assert_close(load, (counts / counts.sum(1, keepdim=True)).double())


def test_a_picture_is_drawn(tmp_path):
    load_heat_map(torch.eye(3).double(), [0, 2, 5], tmp_path / "load.png", "title")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
