"""How an expert's tensor is written down: whole, or as what it has changed of the base's."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_moe.convert.headers import SAFETENSORS_NAMES
from hf_moe.convert.network import is_finite
from hf_moe.errors import UsageError
from hf_moe.modeling.moe_artefact import decode

from .difference import same_bytes

LEVEL = 6  # of deflate
EXACT = ("full", "xor")


@dataclass(frozen=True, kw_only=True)
class How:
    """Args:
    kind: a key of `ENCODERS`.
    rank, max_error: of "low-rank": how many singular values are kept; or as many as leave at most this error.
    density: of "sparse": share of the values that are kept.
    """

    kind: str = "full"
    rank: int | None = None
    max_error: float | None = None
    density: float = 0.1

    def check(self) -> None:
        """Raises UsageError where it is no way to write anything."""
        if self.kind not in ENCODERS:
            raise UsageError(f"--as is {self.kind!r}; choose from {', '.join(ENCODERS)}.")
        if self.kind == "low-rank" and (self.rank is None) == (self.max_error is None):
            raise UsageError("low-rank: give a rank or a largest error, one of them.")
        if self.rank is not None and (self.kind != "low-rank" or self.rank < 1):
            raise UsageError(f"rank is {self.rank}: it is of low-rank, and at least 1.")
        if self.max_error is not None and (self.kind != "low-rank" or not 0 < self.max_error < 1):
            raise UsageError(f"max_error is {self.max_error}: it is of low-rank, and lies between 0 and 1.")
        if not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density}, but it is a share, above 0 and at most 1.")

    def itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of a value as it will be stored: files hold wide ones first."""
        return {"xor": 1, "sparse": 1, "delta": 2}.get(self.kind, dtype.itemsize)


Encoded = tuple[str, torch.Tensor, dict[str, Any]]


def encode(name: str, old: torch.Tensor, new: torch.Tensor, how: How) -> tuple[torch.Tensor, dict[str, Any]]:
    """What is stored for `new` over `old`, the base's, and its entry but for where it goes.

    The entry's `error` is measured on what comes out again: norm of what it is off, over that of the change.

    Raises:
        UsageError: where NaN or Inf would be lost.
    """
    exact = how.kind in EXACT or old.dtype not in _FLOAT_DTYPES
    if not exact and not (is_finite(new) and is_finite(old)):
        raise UsageError(f"{name}: holds NaN or Inf, which only full and xor keep.")
    kind, stored, extra = _full(old, new, how) if exact and how.kind != "xor" else ENCODERS[how.kind](old, new, how)
    entry = {
        "shape": list(new.shape),
        "dtype": SAFETENSORS_NAMES[new.dtype],
        "sha256": sha256_of_values(stored),
        "how": kind,
        **extra,
    }
    made = decode(name, entry, stored, old)
    if exact and not same_bytes(made, new):
        raise AssertionError(f"{name}: {kind} is not exact")
    return stored, {**entry, "error": 0.0 if same_bytes(made, new) else _error(old, new, made)}


def sha256_of_values(values: torch.Tensor) -> str:
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _error(old: torch.Tensor, new: torch.Tensor, made: torch.Tensor) -> float:
    change = (new.double() - old.double()).norm().clamp(min=1e-300)
    return ((made.double() - new.double()).norm() / change).item()


def _full(old: torch.Tensor, new: torch.Tensor, how: How) -> Encoded:
    return "full", new.contiguous(), {}


def _xor(old: torch.Tensor, new: torch.Tensor, how: How) -> Encoded:
    """Bytes of one place stand together: the upper ones are mostly 0, and deflate to nothing."""
    differ = new.reshape(-1).view(torch.uint8) ^ old.reshape(-1).view(torch.uint8)
    planes = differ.view(-1, old.element_size()).T.contiguous()
    packed = zlib.compress(planes.numpy().tobytes(), LEVEL)
    return "xor", torch.frombuffer(bytearray(packed), dtype=torch.uint8), {}


def _delta(old: torch.Tensor, new: torch.Tensor, how: How) -> Encoded:
    wide = torch.promote_types(old.dtype, torch.float32)
    return "delta", (new.to(wide) - old.to(wide)).to(torch.bfloat16), {}


def _low_rank(old: torch.Tensor, new: torch.Tensor, how: How) -> Encoded:
    """Whole where it has no two sides, or would be no smaller (then exact)."""
    if new.ndim != 2:
        return _full(old, new, how)
    change = new.to(torch.float64 if new.dtype == torch.float64 else torch.float32) - old
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    if how.rank is not None:
        rank = min(how.rank, len(s))
    else:
        assert how.max_error is not None
        left = (s.double().square().flip(0).cumsum(0).flip(0) / s.double().square().sum().clamp(min=1e-300)).sqrt()
        rank = max(1, int((left > how.max_error).sum()))
    if rank * sum(new.shape) >= new.numel():
        return _full(old, new, how)
    root = s[:rank].sqrt()
    stored = torch.cat([u[:, :rank] * root, vh[:rank].T * root])
    return "low_rank", stored.to(new.dtype).contiguous(), {}


def _sparse(old: torch.Tensor, new: torch.Tensor, how: How) -> Encoded:
    """The new values where they changed most."""
    change = (new.double() - old.double()).abs().reshape(-1)
    count = min(max(1, round(how.density * change.numel())), int((change > 0).sum()))
    index = change.topk(count).indices.sort().values
    values = new.reshape(-1)[index]
    stored = torch.cat([index.to(torch.int32).view(torch.uint8), values.view(torch.uint8)])
    return "sparse", stored, {"count": count}


_FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# `--as` -> the base's values, the new ones, options -> its name in the file, what is stored, further entries.
ENCODERS: dict[str, Callable[[torch.Tensor, torch.Tensor, How], Encoded]] = {
    "full": _full,
    "xor": _xor,
    "delta": _delta,
    "low-rank": _low_rank,
    "sparse": _sparse,
}
