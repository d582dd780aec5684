"""A PyTorch process to compare with: torch and JAX share neither an address space nor a thread pool."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from sunfish_jax.errors import UserError

WORKER = Path(__file__).with_name("torch_worker.py")


class TorchProcess:
    """A running torch_worker.py, which waits while it has no request; leaving the `with` block ends it."""

    def __init__(self, python: str, worker: Path = WORKER):
        """Starts the process.

        Args:
          python: an interpreter that has PyTorch and NumPy.
          worker: the script it runs.
        """
        self._python = python
        self._folder = tempfile.TemporaryDirectory()
        self._errors = open(Path(self._folder.name) / "errors.txt", "w+")
        # -E: PYTHONPATH and its like are meant for this interpreter, not for that one.
        command = [python, "-E", str(worker)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        except OSError as error:
            self._errors.close()
            self._folder.cleanup()
            raise UserError(f"{python} cannot be run: {error.strerror}; name a Python that has PyTorch") from None

    def call(self, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **arguments) -> dict:
        """Calls a method of `Worker`.

        Args:
          name: the method.
          arrays: what it takes by name.
          **arguments: its other arguments; anything that JSON can say.

        Returns:
          Its result; arrays that it answers with are among it by their names.

        Raises:
          UserError: the process cannot do it, or has ended.
        """
        folder = Path(self._folder.name)
        request = {"call": name, "arguments": arguments, "arrays": None, "answer": str(folder / "answer.npz")}
        if arrays is not None:
            request["arrays"] = str(folder / "request.npz")
            np.savez(request["arrays"], **arrays)
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._python} ended while it was asked to {name}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"PyTorch cannot {name}: {answer['error']}")
        result = answer["result"]
        if answer["arrays"]:
            with np.load(answer["arrays"]) as file:
                result |= file
        return result

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"code {self._process.returncode}")

    def __enter__(self) -> "TorchProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


@contextlib.contextmanager
def torch_to_compare_with(wanted: bool, python: str | None) -> Iterator[TorchProcess | None]:
    """A PyTorch process on as many threads as JAX has cores, or None if it is not wanted.

    Args:
      wanted: whether there is to be one.
      python: the interpreter; None for this one.

    Raises:
      UserError: it has no PyTorch.
    """
    if not wanted:
        yield None
        return
    with TorchProcess(python or sys.executable) as process:
        version = process.call("start", threads=len(os.sched_getaffinity(0)))
        print(f"PyTorch {version['torch']} on {version['threads']} thread(s) of a process of its own", flush=True)
        yield process
