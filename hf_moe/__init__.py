"""Dense Transformers checkpoints become Mixture-of-Experts models; importing this tells the Auto classes of them."""

from hf_moe.auto import register_all
from hf_moe.convert import from_dense, upcycle
from hf_moe.modeling.modeling_bert_moe import *
from hf_moe.modeling.modeling_bert_moe import __all__ as _bert
from hf_moe.modeling.modeling_gpt2_moe import *
from hf_moe.modeling.modeling_gpt2_moe import __all__ as _gpt2
from hf_moe.modeling.modeling_llama_moe import *
from hf_moe.modeling.modeling_llama_moe import __all__ as _llama
from hf_moe.modeling.modeling_moe import MoePreTrainedModelMixin
from hf_moe.version import __version__

__all__ = ["__version__", "upcycle", *_bert, *_gpt2, *_llama]

register_all()
MoePreTrainedModelMixin.from_dense = classmethod(from_dense)
