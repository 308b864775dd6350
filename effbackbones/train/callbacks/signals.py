"""Signals that ask a run to stop: it finishes its step, saves, and ends on all ranks together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""What the command ends with, by signal."""
if hasattr(signal, "SIGUSR1"):  # not on Windows; SLURM sends it before a job's time is up
    EXIT_CODES[signal.SIGUSR1] = 143

ABORT_HINT = b"\nFinishing the step and saving. Ctrl-C again ends the run at once, without.\n"


class StoppedError(Exception):
    """The run was stopped from outside, which has been said. `code` is what the process is to end with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StopSignals:
    """SIGTERM, SIGUSR1 and SIGINT, noted while a trainer runs. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        """The signal that this rank has got; 0 for none. Of several, the largest number."""

    @contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """Note signals instead of ending from them, in the main thread."""
        # Lightning's handlers call collectives wherever a signal arrives, and end the run without a checkpoint.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        before = {number: signal.signal(number, partial(self._note, trainer)) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, trainer: Trainer, number: int, frame: Any) -> None:
        self.received = max(self.received, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if trainer.is_global_zero:
                os.write(2, ABORT_HINT)  # print could have been interrupted in the middle of a line

    def agree(self, trainer: Trainer) -> int:
        """Return the signal that any rank has got, 0 for none: the same on all ranks, which all have to ask."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))


def stop(trainer: Trainer, number: int, saved: int) -> None:
    """Say that the signal `number` stops the run, which goes on from step `saved`, and raise StoppedError."""
    name = signal.Signals(number).name
    message = f"{name}: stopped at step {trainer.global_step}; the same command goes on from step {saved}."
    trainer.print(message)
    raise StoppedError(message, own_code(trainer, EXIT_CODES[signal.Signals(number)]))


def own_code(trainer: Trainer, code: int) -> int:
    """Return what this rank ends with where the run is to end with `code`, as it was stopped on purpose."""
    # Lightning's launcher kills the rank that started the others as soon as one of them ends with anything but 0.
    launched = trainer.local_rank > 0 and isinstance(trainer.strategy.cluster_environment, LightningEnvironment)  # type: ignore[attr-defined]
    return 0 if launched else code
