"""Dense Transformers checkpoints become Mixture-of-Experts models; importing this tells the Auto classes of them."""

from hf_moe.auto import register_all
from hf_moe.convert import downcycle, expand_experts, from_dense, fuse, merge_experts, prune, upcycle
from hf_moe.modeling.modeling_bert_moe import *
from hf_moe.modeling.modeling_bert_moe import __all__ as _bert
from hf_moe.modeling.modeling_dinov2_moe import *
from hf_moe.modeling.modeling_dinov2_moe import __all__ as _dinov2
from hf_moe.modeling.modeling_distilbert_moe import *
from hf_moe.modeling.modeling_distilbert_moe import __all__ as _distilbert
from hf_moe.modeling.modeling_electra_moe import *
from hf_moe.modeling.modeling_electra_moe import __all__ as _electra
from hf_moe.modeling.modeling_gemma2_moe import *
from hf_moe.modeling.modeling_gemma2_moe import __all__ as _gemma2
from hf_moe.modeling.modeling_gemma3_text_moe import *
from hf_moe.modeling.modeling_gemma3_text_moe import __all__ as _gemma3_text
from hf_moe.modeling.modeling_gpt2_moe import *
from hf_moe.modeling.modeling_gpt2_moe import __all__ as _gpt2
from hf_moe.modeling.modeling_gpt_neo_moe import *
from hf_moe.modeling.modeling_gpt_neo_moe import __all__ as _gpt_neo
from hf_moe.modeling.modeling_gpt_neox_moe import *
from hf_moe.modeling.modeling_gpt_neox_moe import __all__ as _gpt_neox
from hf_moe.modeling.modeling_gptj_moe import *
from hf_moe.modeling.modeling_gptj_moe import __all__ as _gptj
from hf_moe.modeling.modeling_llama_moe import *
from hf_moe.modeling.modeling_llama_moe import __all__ as _llama
from hf_moe.modeling.modeling_mistral_moe import *
from hf_moe.modeling.modeling_mistral_moe import __all__ as _mistral
from hf_moe.modeling.modeling_modernbert_moe import *
from hf_moe.modeling.modeling_modernbert_moe import __all__ as _modernbert
from hf_moe.modeling.modeling_moe import MoePreTrainedModelMixin
from hf_moe.modeling.modeling_mpnet_moe import *
from hf_moe.modeling.modeling_mpnet_moe import __all__ as _mpnet
from hf_moe.modeling.modeling_opt_moe import *
from hf_moe.modeling.modeling_opt_moe import __all__ as _opt
from hf_moe.modeling.modeling_phi_moe import *
from hf_moe.modeling.modeling_phi_moe import __all__ as _phi
from hf_moe.modeling.modeling_qwen2_moe import *
from hf_moe.modeling.modeling_qwen2_moe import __all__ as _qwen2
from hf_moe.modeling.modeling_qwen3_moe import *
from hf_moe.modeling.modeling_qwen3_moe import __all__ as _qwen3
from hf_moe.modeling.modeling_roberta_moe import *
from hf_moe.modeling.modeling_roberta_moe import __all__ as _roberta
from hf_moe.modeling.modeling_vit_moe import *
from hf_moe.modeling.modeling_vit_moe import __all__ as _vit
from hf_moe.modeling.modeling_wav2vec2_moe import *
from hf_moe.modeling.modeling_wav2vec2_moe import __all__ as _wav2vec2
from hf_moe.modeling.modeling_whisper_moe import *
from hf_moe.modeling.modeling_whisper_moe import __all__ as _whisper
from hf_moe.modeling.modeling_xlm_roberta_moe import *
from hf_moe.modeling.modeling_xlm_roberta_moe import __all__ as _xlm_roberta
from hf_moe.version import __version__

__all__ = ["__version__", "downcycle", "expand_experts", "fuse", "merge_experts", "prune", "upcycle"]
__all__ += [
    *_bert,
    *_dinov2,
    *_distilbert,
    *_electra,
    *_gemma2,
    *_gemma3_text,
    *_gpt2,
    *_gpt_neo,
    *_gpt_neox,
    *_gptj,
    *_llama,
    *_mistral,
    *_modernbert,
    *_mpnet,
    *_opt,
    *_phi,
    *_qwen2,
    *_qwen3,
    *_roberta,
    *_vit,
    *_wav2vec2,
    *_whisper,
    *_xlm_roberta,
]

register_all()
MoePreTrainedModelMixin.from_dense = classmethod(from_dense)
