"""What the tests must know of a family beside its code: one row each, and the whole suite runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
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
    XLMRobertaConfig,
)


@dataclass(frozen=True, kw_only=True)
class TestedFamily:
    """Args:
    tiny: keyword arguments -> a dense configuration with 3 layers, and widths that are multiples of 8.
    lm: the Auto class of its language model, which most tests use.
    attention: modules that LoRA is put on.
    attention_weight: a weight of the attention, relative to a layer.
    tokenizer: "wordpiece", "unigram" or "bpe".
    attention_implementations: those that the dense family has, and that run everywhere.
    no_static_cache: why the dense model itself does not work with one.
    with_12_layers: what a configuration needs besides their number.
    variants: other configurations of the architecture, which must be converted as exactly.
    old_buffers: constants, by their names in the body, that checkpoints of older Transformers hold.
    not_heads: Auto classes that Transformers lists for the family, but whose class is another family's -> why.
    refused: what the dense classes can't do either -> the words in which they say so.
    """

    __test__ = False  # for pytest, which collects classes named Test…

    tiny: Callable[..., PretrainedConfig]
    lm: str
    attention: tuple[str, ...]
    attention_weight: str
    tokenizer: str
    attention_implementations: tuple[str, ...] = ("sdpa", "eager")
    no_static_cache: str = ""
    with_12_layers: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    old_buffers: tuple[str, ...] = ()
    not_heads: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

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
        not_heads={"AutoModelForDecision": "JevForDecision has a JevConfig; Qwen2 may be the body inside it"},
    ),
    "qwen3": TestedFamily(
        tiny=decoder(Qwen3Config, num_key_value_heads=2, head_dim=8),
        lm="AutoModelForCausalLM",
        attention=("q_proj", "v_proj"),
        attention_weight="self_attn.o_proj.weight",
        tokenizer="bpe",
    ),
}
DECODERS = [name for name, family in TESTED.items() if family.is_decoder]
