"""Conversion of dense checkpoints into mixtures. Imported as `hf_moe.convert`."""

from .certificate import certify, read_certificate, write_certificate
from .checkpoint import Checkpoint, open_checkpoint
from .conversion import Progress, Upcycled, from_dense, upcycle
from .disable import disable
from .downcycle import downcycle
from .families import FAMILIES, Family
from .fusion import Fused, fuse
from .low_rank import expand_experts
from .mixture import Mixture, open_mixture
from .plan import Plan, TensorPlan, plan_upcycle
from .prune import merge_experts, prune
from .reduce import Reduced

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "Fused",
    "Mixture",
    "Plan",
    "Progress",
    "Reduced",
    "TensorPlan",
    "Upcycled",
    "certify",
    "disable",
    "downcycle",
    "expand_experts",
    "from_dense",
    "fuse",
    "merge_experts",
    "open_checkpoint",
    "open_mixture",
    "plan_upcycle",
    "prune",
    "read_certificate",
    "upcycle",
    "write_certificate",
]
