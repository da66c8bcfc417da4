"""Mixtures on disk, made once a session."""

import pytest

import hf_moe


@pytest.fixture(scope="session")
def mixture(dense_folder, tmp_path_factory):
    """(family, **options of upcycling) -> a folder with a mixture of 4 experts that differ a little."""
    made = {}

    def make(family: str, **options):
        key = (family, repr(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("mixtures") / family
            options = {"num_experts": 4, "noise_std": 0.3, "router_aux_loss_coef": 0.1, **options}
            hf_moe.upcycle(dense_folder(family), folder, verify=False, **options)
            made[key] = folder
        return made[key]

    return make
