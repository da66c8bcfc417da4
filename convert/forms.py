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
        shared_gate: of the weight by whose sigmoid the shared expert's output is multiplied; "": it has none.
    """

    router: str
    experts: dict[str, tuple[str, ...]]
    shared: dict[str, str]
    endings: dict[str, str]
    shared_gate: str = ""

    @property
    def stacked(self) -> bool:
        return not any("{expert}" in name for name in self.experts)

    def holding(self, role: str) -> tuple[str, tuple[str, ...]]:
        """The experts' tensor that holds the rows of `role`, and whose rows it holds."""
        return next((name, roles) for name, roles in self.experts.items() if role in roles)


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


def separate_form(shared_gate: str = "", **projections: str) -> Form:
    """That of Transformers' own mixtures, which write each expert by itself: role -> its projection's name."""
    return Form(
        router="{block}.gate.weight",
        experts={f"{{block}}.experts.{{expert}}.{name}": (role,) for role, name in projections.items()},
        shared=SHARED,
        endings={"weight": ".weight", "bias": ".bias"},
        shared_gate=shared_gate,
    )
