"""What to do next: sentences that follow from the figures, by a table of rules."""

from collections.abc import Callable
from typing import Any

COLLAPSED = 0.5  # normalised entropy
UNEVEN = 1.0  # max-violation: some expert has twice its share
COPIES = 0.9999  # cosine
SIGNIFICANT = 0.05
TOKENS_PER_EXPERT = 100  # below it a share is a guess

Summary = dict[str, Any]


def advise(summary: Summary) -> list[str]:
    """The sentences of all rules that apply to what `summarise` gives; never none."""
    said = [sentence for rule in RULES if (sentence := rule(summary))]
    return said or [
        "Nothing stands out: the load is even, no expert is dead and none is a copy. Look at the tokens and the "
        "text below to see what each expert has taken up."
    ]


def _layers(summary: Summary, holds: Callable[[dict[str, Any]], bool]) -> str:
    """The layers that something holds for, in words; "" for none."""
    found = [layer["layer"] for layer in summary["layers"] if layer["tokens"] and holds(layer)]
    if len(found) == len(summary["layers"]) and found[1:]:
        return "Every layer"
    return f"{'Layers' if found[1:] else 'Layer'} {', '.join(map(str, found))}" if found else ""


def _few_tokens(summary: Summary) -> str:
    wanted = TOKENS_PER_EXPERT * summary["num_experts"]
    if summary["tokens"] >= wanted:
        return ""
    return (
        f"These are {summary['tokens']:,} tokens, few for {summary['num_experts']} experts: give a longer text (some "
        f"{wanted:,} tokens) before you act on any figure here."
    )


def _copies(summary: Summary) -> str:
    where = _layers(summary, lambda layer: (layer["similarity"] or 0) > COPIES)
    return where and (
        f"{where}: the experts are copies still, so it makes no difference yet who reads what. Train the mixture, or "
        "make it with --noise-std or --drop-ratio, so that they begin to differ."
    )


def _collapsed(summary: Summary) -> str:
    where = _layers(summary, lambda layer: layer["normalised_entropy"] < COLLAPSED)
    return where and (
        f"{where}: routing has collapsed, nearly all tokens go to the same experts. Train with a larger "
        "router_aux_loss_coef (tenfold is a fair step), from a checkpoint before the collapse if there is one."
    )


def _dead(summary: Summary) -> str:
    count = sum(len(layer["dead_experts"]) for layer in summary["layers"])
    where = _layers(summary, lambda layer: bool(layer["dead_experts"]))
    return where and (
        f"{where}: {count} {'expert is' if count == 1 else 'experts are'} dead on this text. If they are on every "
        "text that matters, hf-moe prune leaves them out; if the mixture is to be trained on, a larger "
        "router_aux_loss_coef brings them back."
    )


def _uneven(summary: Summary) -> str:
    where = _layers(
        summary, lambda layer: layer["max_violation"] > UNEVEN and layer["normalised_entropy"] >= COLLAPSED
    )
    return where and (
        f"{where}: some expert has more than twice its share of the tokens, which slows down inference over several "
        "devices. A larger router_aux_loss_coef evens it out."
    )


def _together(summary: Summary) -> str:
    found = [
        f"{pair['experts'][0]} and {pair['experts'][1]} in layer {layer['layer']}"
        for layer in summary["layers"]
        for pair in layer["together"]
        if pair["times_chance"] > 3 and (layer["similarity"] or 0) <= COPIES
    ]
    return ", ".join(found[:3]) and (
        f"Experts {', '.join(found[:3])} are chosen together over three times as often as chance would: they may do "
        "one job. hf-moe merge-experts joins experts that are alike."
    )


def _domains(summary: Summary) -> str:
    found = summary["specialisation"]
    if found is None:
        return (
            "To see whether experts specialise, give texts of two or more subjects: "
            "--domains law=law.txt pets=pets.txt."
        )
    if found["p_value"] is None:
        return f"Of the domains, {found['note']}"
    if found["p_value"] > SIGNIFICANT:
        return (
            f"No sign that experts are chosen by domain (p = {found['p_value']:.3f}): more passages would show "
            "smaller differences, and longer training makes larger ones."
        )
    strongest = max(zip(found["information"], found["layers"], strict=True))[1]
    return (
        f"Experts are chosen by domain (p = {found['p_value']:.3f}), most in layer {strongest}: the tables below say "
        "which expert reads what."
    )


RULES: tuple[Callable[[Summary], str], ...] = (_few_tokens, _copies, _collapsed, _dead, _uneven, _together, _domains)
