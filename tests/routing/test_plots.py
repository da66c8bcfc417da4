"""Pictures are drawn whatever the numbers."""

import pytest
import torch

from hf_moe.routing.plots import coactivation_map, load_heat_map, specialisation_bars

DRAWN = b"\x89PNG"


@pytest.mark.parametrize("experts", [3, 200])
def test_the_load_is_drawn(experts, tmp_path):
    load = torch.rand(3, experts).softmax(1).double()
    load[1] = float("nan")  # a layer that was skipped
    load_heat_map(load, [0, 2, 5], tmp_path / "load.png", "$title_")
    assert (tmp_path / "load.png").read_bytes().startswith(DRAWN)
    width = int.from_bytes((tmp_path / "load.png").read_bytes()[16:20], "big")
    assert width < 8_000


@pytest.mark.parametrize("layers", [1, 5])
def test_pairs_are_drawn(layers, tmp_path):
    coactivation_map(torch.rand(layers, 4, 4), list(range(layers)), tmp_path / "pairs.png", "$title_")
    assert (tmp_path / "pairs.png").read_bytes().startswith(DRAWN)


@pytest.mark.parametrize("tested", [True, False])
def test_specialisation_is_drawn(tested, tmp_path):
    found = {"layers": [0, 3], "information": [0.2, 0.1], "by_chance": [0.1, 0.1] if tested else None}
    found["p_values"] = [0.01, 0.5] if tested else None
    specialisation_bars(found, tmp_path / "domains.png", "$title_")
    assert (tmp_path / "domains.png").read_bytes().startswith(DRAWN)
