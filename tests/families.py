"""What the tests must know of a family beside its code: one row each, and the whole suite runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
    Dinov2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
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
    attention_implementations: those that the dense family has, and that run everywhere.
    no_static_cache: why the dense model itself does not work with one.
    with_12_layers: what a configuration needs besides their number.
    variants: other configurations of the architecture, which must be converted as exactly.
    old_buffers: constants, by their names in the body, that checkpoints of older Transformers hold.
    left_out: classes that Transformers lists for the family, but that have no mixture -> why.
    refused: what the dense classes can't do either -> the words in which they say so.
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
    attention_implementations: tuple[str, ...] = ("sdpa", "eager")
    no_static_cache: str = ""
    with_12_layers: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    old_buffers: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
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
        old_buffers=("h.0.attn.bias", "h.0.attn.masked_bias"),
    ),
    "gpt_neox": TestedFamily(
        tiny=decoder(GPTNeoXConfig),
        lm="AutoModelForCausalLM",
        attention=("query_key_value",),
        attention_weight="attention.dense.weight",
        tokenizer="bpe",
        variants=({"use_parallel_residual": False},),
        old_buffers=(
            "layers.0.attention.bias",
            "layers.0.attention.masked_bias",
            "layers.0.attention.rotary_emb.inv_freq",
        ),
    ),
    "llama": TestedFamily(
        tiny=decoder(LlamaConfig, num_key_value_heads=2),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
        variants=({"mlp_bias": True, "attention_bias": True},),
        old_buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
    ),
    "gemma2": TestedFamily(
        tiny=decoder(Gemma2Config, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.k_proj.weight",  # a norm follows, so that the scale of o_proj would not matter
        tokenizer="bpe",
        attention_implementations=("eager",),  # no other caps its logits
        variants=({"attn_logit_softcapping": None, "final_logit_softcapping": None},),
    ),
    "gemma3_text": TestedFamily(
        tiny=decoder(
            Gemma3TextConfig,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.q_norm.weight",  # norms follow all projections, so that a scale would not matter
        tokenizer="bpe",
        variants=({"use_bidirectional_attention": True}, {"final_logit_softcapping": 5.0}),
    ),
    "phi": TestedFamily(
        tiny=decoder(PhiConfig, num_key_value_heads=2),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.dense.weight",
        tokenizer="bpe",
        variants=({"qk_layernorm": True},),
        old_buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
    ),
    "opt": TestedFamily(
        tiny=decoder(OPTConfig, ffn_dim=64, dropout=0.0),  # no module that tests could switch off
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.out_proj.weight",
        tokenizer="bpe",
        variants=(
            {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
            {"layer_norm_elementwise_affine": False, "enable_bias": False},
        ),
    ),
    "gpt_neo": TestedFamily(
        tiny=decoder(GPTNeoConfig, attention_types=[[["global", "local", "global"], 1]], window_size=6),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="attn.attention.out_proj.weight",
        tokenizer="bpe",
        attention_implementations=("eager",),
        no_static_cache="its local attention takes the length of the cache for the length of the text",
        with_12_layers={"attention_types": [[["global", "local"], 6]]},
        old_buffers=("h.0.attn.attention.bias", "h.0.attn.attention.masked_bias"),
    ),
    "gptj": TestedFamily(
        tiny=decoder(GPTJConfig, n_inner=64, rotary_dim=4),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="attn.out_proj.weight",
        tokenizer="bpe",
        attention_implementations=("eager",),
        old_buffers=("h.0.attn.bias", "h.0.attn.masked_bias"),
    ),
    "electra": TestedFamily(
        tiny=encoder(ElectraConfig, embedding_size=16),
        lm="AutoModelForMaskedLM",
        attention=("query", "value"),
        attention_weight="attention.self.value.weight",
        tokenizer="wordpiece",
    ),
    "distilbert": TestedFamily(
        tiny=encoder(DistilBertConfig, hidden_dim=64),
        lm="AutoModelForMaskedLM",
        attention=("q_lin", "v_lin"),
        attention_weight="attention.v_lin.weight",
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
    "modernbert": TestedFamily(
        # a window that is smaller than the inputs, and a dropout inside the experts
        tiny=encoder(
            ModernBertConfig,
            local_attention=8,
            mlp_dropout=0.1,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
        ),
        lm="AutoModelForMaskedLM",
        attention=("Wqkv",),
        attention_weight="attn.Wo.weight",
        tokenizer="wordpiece",
        variants=({"mlp_bias": True, "norm_bias": True},),
    ),
    "mpnet": TestedFamily(
        tiny=encoder(MPNetConfig),
        lm="AutoModelForMaskedLM",
        attention=("q", "v"),
        attention_weight="attention.attn.v.weight",
        tokenizer="wordpiece",
        refused={
            "gradient checkpointing": "does not support activation checkpointing",
            "sdpa": "does not support an attention implementation through",
        },
    ),
    "mistral": TestedFamily(
        tiny=decoder(MistralConfig, num_key_value_heads=2),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
    ),
    "qwen2": TestedFamily(
        tiny=decoder(
            Qwen2Config, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
        variants=({"use_sliding_window": False},),
        left_out={"JevForDecision": "it has a JevConfig; Qwen2 may be the body inside it"},
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
