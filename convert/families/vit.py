"""ViT (Dosovitskiy et al. 2020, arXiv 2010.11929): pre-norm encoder of image patches, plain feed-forward network."""

from hf_moe.modeling.configuration_vit_moe import ViTMoeConfig

from .family import Family

OLD_ATTENTION = {
    r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.": r".attention.\1_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
}

VIT = Family(
    config_class=ViTMoeConfig,
    layer="layers.{layer}",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="layernorm_after",
    inputs="pixel_values",
    renamed={
        r"\bencoder\.layer\.": "layers.",
        **OLD_ATTENTION,
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"(\d)\.output\.dense\.": r"\1.mlp.fc2.",
    },
)
