"""What the ranks of a run know of each other: whether one has died."""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import DistError, TCPStore

from effbackbones.train.callbacks.signals import EXIT_CODES, StoppedError, StopSignals, own_code

BEAT = 2.0  # seconds from one sign of life to the next
PATIENCE = 40.0  # without a sign of life, a rank is taken for dead
GRACE = 5.0  # for a rank that ends by itself, with an error of its own to tell
STOPPED = "was stopped"  # by a signal, says the verdict
LOST_STORE = "rank 0, which keeps what the ranks tell each other, was killed or is out of reach"


class RankWatch(Callback):
    """Ends this rank, with a message, where another one has died or failed: no collective waits for it in vain.

    A thread of each rank counts up a number in the store of the process group, whatever the rank is waiting for, and
    watches the number of the next rank. Who finds one dead, or ends by an error, writes that into the store for all.
    Another thread ends the rank: where that is written, or the store no longer answers.

    Args:
        signals: What may stop the run.
    """

    def __init__(self, signals: StopSignals | None = None):
        self._signals = signals or StopSignals()
        self._ended, self._told = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._verdict = ""
        self._heard = 0.0  # when the store last answered

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        rank = trainer.global_rank
        self._stopped_code = own_code(trainer, EXIT_CODES[signal.SIGTERM])
        self._me = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._run = trainer.strategy.broadcast(os.urandom(8).hex())  # under torchrun, the store outlives a run
        # A connection of its own: another one is blocked while its rank waits for a key.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        self._store.set(self._key("name", rank), self._me)
        self._heard = time.monotonic()
        pair = rank, (rank + 1) % trainer.world_size
        threading.Thread(target=self._exchange, args=pair, name="rank-exchange", daemon=True).start()
        self._thread = threading.Thread(target=self._judge, name="rank-judge", daemon=True)
        self._thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._end(self._key("left", trainer.global_rank), "yes")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others, or, where the exception is that another rank is gone, say which and raise StoppedError."""
        if self._thread is None:
            return
        if isinstance(exception, DistError) or "gloo" in str(exception):  # gloo's errors are no DistErrors
            deadline = time.monotonic() + PATIENCE + 3 * BEAT
            while not self._told.wait(0.1) and time.monotonic() < deadline and not self._signals.received:
                pass
            if self._verdict:
                self._ended.set()
                print(self._message(), file=sys.stderr, flush=True)
                raise StoppedError(self._verdict, self._code()) from exception
        manner = STOPPED if isinstance(exception, StoppedError) else "failed"
        reason = str(exception).partition("\n")[0] or type(exception).__name__
        self._end(self._key("verdict"), f"{self._me} {manner}: {reason}")

    def _key(self, *parts: Any) -> str:
        return "/".join(map(str, ("effbackbones", self._run, *parts)))

    def _end(self, key: str, value: str) -> None:
        self._ended.set()
        self._thread = None
        with suppress(DistError):  # the rank with the store has ended: nobody is left to be told
            self._store.compare_set(key, "", value)

    def _exchange(self, rank: int, other: int) -> None:
        """Give signs of life, look for those of the other rank, and read the verdict."""
        beats, since, verdict = 0, time.monotonic(), ""
        while not verdict and not self._ended.wait(BEAT):
            try:
                self._store.add(self._key("beat", rank), 1)
                heard, self._heard = self._store.add(self._key("beat", other), 0), time.monotonic()
                if heard != beats:
                    beats, since = heard, self._heard
                elif self._heard - since > PATIENCE and not self._store.check([self._key("left", other)]):
                    name = self._store.get(self._key("name", other)).decode()
                    text = f"{name} gives no sign of life: it was killed, or is out of reach"
                    self._store.compare_set(self._key("verdict"), "", text)
                if self._store.check([self._key("verdict")]):
                    verdict = self._store.get(self._key("verdict")).decode()
            except DistError:
                verdict = LOST_STORE
        self._verdict = verdict or self._verdict

    def _judge(self) -> None:
        """End this rank by a verdict, unless it ends by itself."""
        while not self._told.is_set() and not self._ended.wait(BEAT / 4):
            if time.monotonic() - self._heard > PATIENCE + BEAT:
                self._verdict = self._verdict or LOST_STORE
            if self._verdict:
                self._told.set()
                if not self._ended.wait(GRACE):
                    os.write(2, f"{self._message()}\n".encode())
                    os._exit(self._code())

    def _code(self) -> int:
        return self._stopped_code if f") {STOPPED}: " in self._verdict else 1

    def _message(self) -> str:
        return f"{self._verdict}. {self._me} ends too; the same command goes on from the last checkpoint."
