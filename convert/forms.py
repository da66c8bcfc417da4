"""How a mixture layer's tensors are named in a checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """Names relative to a layer; `{block}` is the mixture's name there, and `{expert}`, where it stands, an index:
    then every expert has tensors of its own, else they are stacked in one.

    Args:
        router: of the router's weight.
        experts: tensor -> the roles whose rows it holds, in order.
        shared: role -> tensor of the shared expert.
        endings: what follows a tensor's name, for "weight" and "bias".
    """

    router: str
    experts: dict[str, tuple[str, ...]]
    shared: dict[str, str]
    endings: dict[str, str]

    @property
    def stacked(self) -> bool:
        return not any("{expert}" in name for name in self.experts)


SHARED = {role: f"{{block}}.shared_expert.{role}_proj" for role in ("gate", "up", "down")}


def our_form(gated: bool) -> Form:
    """That of `MoeBlock`."""
    inner: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate", "up")} if gated else {"up_proj": ("up",)}
    return Form(
        router="{block}.gate.weight",
        experts={f"{{block}}.experts.{name}": roles for name, roles in (inner | {"down_proj": ("down",)}).items()},
        shared=SHARED,
        endings={"weight": "", "bias": "_bias"},
    )
