"""A run of finetune_torch.py in a file, from which it goes on after a kill."""

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import torch

SAVE_SECONDS, RELEASE_STEPS = 300, 10
"""From one writing to the next, and from one return of memory to the next, in batches."""


def release_memory() -> None:
    """Gives back what malloc keeps: --keep-memory's heap, taken by batches of ever other shapes, grows to 14 GB."""
    ctypes.CDLL(None).malloc_trim(0)


class Savepoint:
    """Where a run is, in a file: written every few minutes, so that a kill costs no more.

    Attributes:
      path: the file.
      held: model, optimizer and schedule.
      epochs: what is told of the epochs that are complete.
      losses: of the steps of the one that is not.
      draws: state of the generator of orders at its beginning.
      resumed: whether this is not the process that began the run, whose times then mean nothing.
    """

    def __init__(self, path: Path, model: Any, steps: Any, order: torch.Generator) -> None:
        self.path, self.held, self.order, self.written = path, (model, *steps), order, time.perf_counter()
        self.epochs, self.losses, self.draws, self.resumed = [], [], order.get_state(), path.exists()
        if self.resumed:
            saved = torch.load(path, weights_only=True)
            for each, state in zip(self.held, saved["states"], strict=True):
                each.load_state_dict(state)
            self.epochs, self.losses, self.draws = json.loads(saved["epochs"]), saved["losses"], saved["draws"]
            order.set_state(self.draws)
            torch.set_rng_state(saved["random"])

    def end_epoch(self, told: dict[str, Any]) -> None:
        """The epoch is complete."""
        self.epochs, self.losses, self.draws = [*self.epochs, told], [], self.order.get_state()
        self.write()

    def after_step(self, losses: list[torch.Tensor]) -> None:
        """Writes if the file is older than it may be."""
        if len(losses) % RELEASE_STEPS == 0:
            release_memory()
        if time.perf_counter() - self.written > SAVE_SECONDS:
            self.losses = [float(loss) for loss in losses]
            self.write()

    def write(self) -> None:
        """All of it, in one go."""
        states = [each.state_dict() for each in self.held]
        told = {"states": states, "epochs": json.dumps(self.epochs), "losses": self.losses, "draws": self.draws}
        torch.save({**told, "random": torch.get_rng_state()}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)
        self.written = time.perf_counter()
