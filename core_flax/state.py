"""What an optimizer step changes, and all that has to be saved to go on."""

from typing import Any

import flax.struct

from core_flax.types import Array, Params


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step; a pytree.

    There is no random key and no position in the data: both are functions of the step.
    """

    step: Array
    """Optimizer steps taken: an int32 scalar."""
    params: Params
    """Nested dict of parameters, float32."""
    opt_state: Any
    """State of the optimizer: a dict by name of the stage (optax.named_chain)."""
    carry: Any = None
    """What a batch hands to the next besides (task.Task.carry); None, of which nothing is saved, for most tasks."""
    ema: Params | None = None
    """Moving average of the parameters (train.ema_decay); None, of which nothing is saved, without one."""

    @property
    def measured(self) -> Params:
        """The parameters that are evaluated and handed on: the moving average where there is one."""
        return self.params if self.ema is None else self.ema
