"""What one process does for all of them."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_moe.errors import HfMoeError


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns in the main process, in every process; or what it raises there of `HfMoeError`."""
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except HfMoeError as error:
            if state.num_processes == 1:
                raise
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
