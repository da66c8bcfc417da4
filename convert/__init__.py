"""Conversion of dense checkpoints into mixtures. Imported as `hf_moe.convert`."""

from .certificate import certify, read_certificate, write_certificate
from .checkpoint import Checkpoint, open_checkpoint
from .conversion import Progress, Upcycled, from_dense, upcycle
from .families import FAMILIES, Family
from .fusion import Fused, fuse
from .plan import Plan, TensorPlan, plan_upcycle

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "Fused",
    "Plan",
    "Progress",
    "TensorPlan",
    "Upcycled",
    "certify",
    "from_dense",
    "fuse",
    "open_checkpoint",
    "plan_upcycle",
    "read_certificate",
    "upcycle",
    "write_certificate",
]
