"""Commands in processes of their own, forked from one that has imported everything: a start takes no time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMAND = """
import sys
from effbackbones.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Forked:
    """A process, and the file with all that it prints."""

    def __init__(self, server: "ForkServer", pid: int, out: Path):
        self._server, self.pid, self._out = server, pid, out
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code as subprocess has it: negative after a signal, None while the process runs."""
        if self.code is None:
            self.code = self._server.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 300) -> int:
        """Return the exit code; a process that runs for longer is killed, and an error."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end after {seconds} s; so far:\n{self.said}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait_to_say(self, text: str, seconds: float = 60) -> None:
        """Return when the process has printed `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.002)

    @property
    def said(self) -> str:
        return self._out.read_text()


class ForkServer:
    """The process that has imported everything.

    Args:
        folder: A new folder, for what the processes print.
    """

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *argv: str, code: str = COMMAND, env: Mapping[str, str] | None = None) -> Forked:
        """Run `code` with the arguments `argv`, by default the command `effb`, and more environment variables."""
        self._count += 1
        out = self._folder / f"{self._count}.txt"
        out.touch()
        return Forked(self, self.ask(argv=argv, code=code, env=dict(env or {}), out=str(out)), out)

    def start_ranks(
        self, *argv: str, code: str = COMMAND, env: Mapping[str, str] | None = None, strategy: str = "ddp"
    ) -> list[Forked]:
        """Run two ranks of a distributed run, which take each other for started by a launcher."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        group = {
            **(env or {}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "NODE_RANK": "0",
        }
        devices = ("trainer.devices=2", f"trainer.strategy={strategy}")
        return [self.start(*argv, *devices, code=code, env={**group, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> str | None:
    """Answer requests; return the code to run in a process that was asked for, None at the end."""
    import torch

    import effbackbones.cli
    import effbackbones.train.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                out = os.open(request["out"], os.O_WRONLY)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
                os.environ.update(request["env"])
                sys.argv[1:] = request["argv"]
                return request["code"]
        print(json.dumps(answer), flush=True)
    return None


if __name__ == "__main__":
    if source := _serve():
        exec(compile(source, "<forked>", "exec"), {"__name__": "__main__"})
