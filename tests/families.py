"""What the tests must know of a family beside its code: one row each, and the whole suite runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
    Dinov2Config,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
    XLMRobertaConfig,
)


@dataclass(frozen=True, kw_only=True)
class TestedFamily:
    """Args:
    tiny: keyword arguments -> a dense configuration with 3 layers, and widths that are multiples of 8.
    lm: the Auto class of its language model, or of another head with logits; most tests use it.
    attention: modules that LoRA is put on.
    attention_weight: a weight of the attention, relative to a layer.
    tokenizer: "wordpiece", "unigram", "bpe" or "ctc"; None where it reads no text.
    preprocessor: its preprocessor_config.json.
    variants: other configurations of the architecture, which must be converted as exactly.
    left_out: classes of Transformers that have no mixture -> why.
    cannot: what can't hold for the family -> why: "one graph" (compiled), or a head without dropout that trains the
        same twice.
    """

    __test__ = False  # for pytest, which collects classes named Test…

    tiny: Callable[..., PretrainedConfig]
    lm: str
    attention: tuple[str, ...]
    attention_weight: str
    tokenizer: str | None = None
    preprocessor: dict[str, Any] | None = None
    variants: tuple[dict[str, Any], ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)

    @property
    def is_decoder(self) -> bool:
        return self.lm == "AutoModelForCausalLM"


def encoder(config_class: type[PretrainedConfig], **fixed) -> Callable[..., PretrainedConfig]:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64, **fixed}
    return lambda **kwargs: config_class(**{**sizes, **kwargs})


def decoder(config_class: type[PretrainedConfig], **fixed) -> Callable[..., PretrainedConfig]:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return encoder(config_class, vocab_size=300, **special, **fixed)


def vision(config_class: type[PretrainedConfig], **fixed) -> Callable[..., PretrainedConfig]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    return lambda **kwargs: config_class(**{**sizes, **fixed, **kwargs})


def sound(config_class: type[PretrainedConfig], **fixed) -> Callable[..., PretrainedConfig]:
    """Of the form whose padding changes nothing: norms over channels, not over time. Nothing random but dropout."""
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
    codes = {"num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16, "num_negatives": 3}
    windows = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 2), "tdnn_dilation": (2, 1), "xvector_output_dim": 16}
    still = {"apply_spec_augment": False, "layerdrop": 0.0, "attention_dropout": 0.0, "classifier_proj_size": 16}
    return encoder(config_class, **convolutions, **positions, **codes, **windows, **still, **fixed)


def spectrum(config_class: type[PretrainedConfig], **fixed) -> Callable[..., PretrainedConfig]:
    sizes = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    sizes |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_target_positions": 16}
    sizes |= {"num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 64, "classifier_proj_size": 16}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return lambda **kwargs: config_class(**{**sizes, "begin_suppress_tokens": None, **fixed, **kwargs})


IMAGES = {
    "crop_size": {"height": 16, "width": 16},
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

TESTED: dict[str, TestedFamily] = {
    "bert": TestedFamily(
        tiny=encoder(BertConfig),
        lm="AutoModelForMaskedLM",
        attention=("query", "value"),
        attention_weight="attention.self.value.weight",
        tokenizer="wordpiece",
    ),
    "gpt2": TestedFamily(
        tiny=decoder(GPT2Config, n_inner=64),
        lm="AutoModelForCausalLM",
        attention=("c_attn",),
        attention_weight="attn.c_proj.weight",
        tokenizer="bpe",
    ),
    "llama": TestedFamily(
        tiny=decoder(LlamaConfig, num_key_value_heads=2),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
    ),
    "electra": TestedFamily(
        tiny=encoder(ElectraConfig, embedding_size=16),
        lm="AutoModelForMaskedLM",
        attention=("query", "value"),
        attention_weight="attention.self.value.weight",
        tokenizer="wordpiece",
    ),
    "roberta": TestedFamily(
        tiny=encoder(RobertaConfig),
        lm="AutoModelForMaskedLM",
        attention=("query", "value"),
        attention_weight="attention.self.value.weight",
        tokenizer="wordpiece",
    ),
    "xlm-roberta": TestedFamily(
        tiny=encoder(XLMRobertaConfig),
        lm="AutoModelForMaskedLM",
        attention=("query", "value"),
        attention_weight="attention.self.value.weight",
        tokenizer="unigram",
    ),
    "mistral": TestedFamily(
        tiny=decoder(MistralConfig, num_key_value_heads=2),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
    ),
    "qwen3": TestedFamily(
        tiny=decoder(Qwen3Config, num_key_value_heads=2, head_dim=8),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
    ),
    "dinov2": TestedFamily(
        tiny=vision(Dinov2Config, mlp_ratio=2),
        lm="AutoModelForImageClassification",
        attention=("q_proj", "v_proj"),
        attention_weight="attention.o_proj.weight",
        preprocessor={"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}, **IMAGES},
    ),
    "wav2vec2": TestedFamily(
        tiny=sound(Wav2Vec2Config),
        lm="AutoModelForCTC",
        attention=("q_proj", "v_proj"),
        attention_weight="attention.out_proj.weight",
        tokenizer="ctc",
        preprocessor={"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True},
        variants=(
            {"do_stable_layer_norm": False, "feat_extract_norm": "group"},
            {"add_adapter": True, "num_adapter_layers": 2},
            {"adapter_attn_dim": 8},
        ),
        cannot={
            "one graph": "its dense CTC head branches on the labels' values",
            "Wav2Vec2MoeForPreTraining": "draws its codes with Gumbel noise",
        },
    ),
    "whisper": TestedFamily(
        tiny=spectrum(WhisperConfig),
        lm="AutoModelForAudioClassification",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.out_proj.weight",
        preprocessor={"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1},
        variants=({"use_weighted_layer_sum": True},),
        left_out={
            "WhisperForConditionalGeneration": "it is the encoder with a decoder",
            "WhisperForCausalLM": "it is the decoder",
        },
    ),
    "vit": TestedFamily(
        tiny=vision(ViTConfig, intermediate_size=64, encoder_stride=8),
        lm="AutoModelForImageClassification",
        attention=("q_proj", "v_proj"),
        attention_weight="attention.o_proj.weight",
        preprocessor={"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, **IMAGES},
    ),
}
DECODERS = [name for name, family in TESTED.items() if family.is_decoder]
