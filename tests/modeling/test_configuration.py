"""Configurations: impossible values are refused in a sentence, possible ones survive a round trip."""

import json

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_moe.modeling import CONFIGS
from tests.conftest import FAMILIES, moe_classes
from tests.families import TESTED


def twelve_layers(family, **values):
    return CONFIGS[family](num_hidden_layers=12, **TESTED[family].with_12_layers, **values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_experts": 1}, "a mixture needs at least 2 experts"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "must lie between 1 and num_experts (4)"),
        ({"num_experts_per_tok": 0}, "must lie between 1 and num_experts"),
        ({"moe_layers": []}, "name at least one layer"),
        ({"moe_layers": [0, 0]}, "names a layer twice"),
        ({"moe_layers": [12]}, "the model's layers are 0 to 11"),
        ({"moe_layers": [-1]}, "the model's layers are 0 to 11"),
        ({"moe_intermediate_size": 0}, "must be at least 1"),
        ({"router_jitter_noise": 1.0}, "must lie in [0, 1)"),
        ({"router_aux_loss_coef": -1}, "can't be negative"),
        ({"router_z_loss_coef": -0.1}, "can't be negative"),
        ({"num_experts": "eight"}, "num_experts"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(family, values, sentence):
    with pytest.raises(StrictDataclassError) as caught:
        twelve_layers(family, **values)
    assert sentence in str(caught.value)


def test_layers_that_are_skipped_are_refused():
    with pytest.raises(StrictDataclassError, match="layers can't be skipped"):
        CONFIGS["opt"](layerdrop=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_impossible_change_is_refused_when_saved(family, tmp_path):
    config = CONFIGS[family]()
    config.num_experts_per_tok = 9
    with pytest.raises(StrictDataclassError, match="between 1 and"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    config = twelve_layers(family, num_experts=6, moe_layers=[3, 1], upcycled_from={"source": "x", "revision": None})
    config.save_pretrained(tmp_path)
    again = CONFIGS[family].from_pretrained(tmp_path)
    assert again.to_dict() == {**config.to_dict(), "_name_or_path": again._name_or_path}
    assert again.moe_layer_indices == [1, 3]
    assert twelve_layers(family).moe_layer_indices == list(range(12))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_ecosystem(family):
    config = CONFIGS[family]()
    assert config.num_local_experts == config.num_experts == 8
    assert config.moe_intermediate_size == config.dense_intermediate_size > 0
    assert {"aux_loss", "z_loss", "router_logits", "past_key_values"} <= set(config.keys_to_ignore_at_inference)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_is_one_of_transformers_own(family):
    """Registered under the name of a native mixture, ours would be loaded in its place; and the other way round,
    wherever else `architectures` is read."""
    assert CONFIGS[family].model_type not in CONFIG_MAPPING_NAMES
    assert not {name for name in moe_classes(family) if hasattr(transformers, name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_names_every_auto_class_and_carries_the_code(family, tmp_path):
    config = CONFIGS[family]()
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *config.auto_classes}
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert name in (tmp_path / f"{module}.py").read_text()
    assert {"moe_layers.py", "modeling_moe.py", "configuration_moe.py"} <= {file.name for file in tmp_path.iterdir()}
