"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193): ViT's layer with scaled branches."""

from hf_moe.modeling.configuration_dinov2_moe import Dinov2MoeConfig

from .family import Family
from .vit import OLD_ATTENTION

DINOV2 = Family(
    config_class=Dinov2MoeConfig,
    layer="encoder.layer.{layer}",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="norm2",
    inputs="pixel_values",
    renamed=OLD_ATTENTION,
    refused={"use_swiglu_ffn": "one tensor holds gate and up, two in the model; small, base and large do without"},
)
