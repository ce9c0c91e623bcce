"""What the processes of a run settle among themselves: whether one was told to stop, whether it is time to save."""

import signal

import jax
import numpy as np
from jax.sharding import Mesh

from core_flax import sharding
from core_flax.signals import StopFlag


class Agreement:
    """A signal that came to any process, and the first one's clock, as all of them know it.

    A process alone knows at once. Among several, each says after every step what it knows, and the largest figures are
    found by an all-reduce that follows the step on the devices. It is read after the step that comes next, by when it
    is long done: nobody waits, and all act after the same step. Every process must make the same calls in the same
    order.

    Attributes:
      signal: what all are agreed to stop for; None: go on.
    """

    def __init__(self, mesh: Mesh, stop: StopFlag) -> None:
        """``mesh`` has the devices of the run, ``stop`` what this process was told."""
        self.signal: signal.Signals | None = None
        self._stop = stop
        self._pending: jax.Array | None = None
        self._alone = jax.process_count() == 1
        if not self._alone:
            everyone = sharding.flat_mesh(list(mesh.devices.flat))
            self._rows = sharding.batch_sharding(everyone)
            self._largest = jax.jit(lambda x: x.max(axis=0), out_shardings=sharding.replicated(everyone))

    def settle(self, is_time: bool) -> bool:
        """After a step: sets ``signal`` if a process was told to stop, and returns whether it is time to save.

        Args:
          is_time: whether the first process's clock says so; the others' do not count.
        """
        if self._alone:
            self.signal = self._stop.signal
            return is_time
        if self.signal:  # all know it: nothing is left to settle
            return False
        before, self._pending = self._pending, self._ask(is_time)
        return before is not None and self._read(before)

    def stop_now(self) -> bool:
        """Whether a process was told to stop, as of this moment; waits for the others, so not for use after steps."""
        if self._alone:
            self.signal = self._stop.signal
        elif not self.signal:
            self._read(self._ask(False))
        return self.signal is not None

    def _ask(self, is_time: bool) -> jax.Array:
        told = [self._stop.signal or 0, int(is_time and jax.process_index() == 0)]
        local = np.tile(np.array(told, np.int32), (len(self._rows.addressable_devices), 1))
        return self._largest(
            jax.make_array_from_process_local_data(self._rows, local, (len(self._rows.device_set), len(told)))
        )

    def _read(self, largest: jax.Array) -> bool:
        number, is_time = np.asarray(largest)
        self.signal = signal.Signals(number) if number else None
        return bool(is_time)
