"""Where generated text goes: the terminal, and a JSONL file with what is needed to make each sample again."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import GenerationOptions, Settings
from sunfish_jax.unfinished import unfinished

if TYPE_CHECKING:
    from sunfish_jax.workdir.run import Run


def decode(tokens: np.ndarray, tokenizer) -> str:
    """The text of a row of tokens [S], cut at its first end of text."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    ids = tokens[: ends[0]] if len(ends) else tokens
    # The table of embeddings may be longer than the tokenizer's own vocabulary.
    ids = [int(i) for i in ids if i < len(tokenizer)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def provenance(run: "Run", options: GenerationOptions, settings: Settings) -> dict:
    """What all samples of one call have in common and each record keeps, to be made again."""
    config = json.dumps(run.config.to_dict(), sort_keys=True, default=str)
    return {
        "seed": options.seed,
        **dataclasses.asdict(settings),
        "workdir": str(run.workdir),
        "checkpoint_step": run.step,
        "config_hash": hashlib.sha256(config.encode()).hexdigest()[:16],
        "prompt_encoder": run.prompt_encoder.identity,
    }


@contextlib.contextmanager
def jsonl_writer(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """Opens a JSONL file that appears, or replaces the old one, only when everything has been written.

    Args:
        path: The file; None for none, and the function yielded does nothing.

    Yields:
        A function that writes one record.

    Raises:
        UserError: At once, if a file cannot be written there.
    """
    if path is None:
        yield lambda record: None
        return
    # What a link leads to is written, and the link stays.
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "permission denied")
        # Beside the file, so that the rename does not cross file systems.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file or folder") from None
    with unfinished(Path(name)):
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)
        # mkstemp makes files that only their owner may read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)


class StepCounter:
    """A line that counts steps in place."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._label, self._num_steps = "", 0

    @classmethod
    def on_terminal(cls) -> "StepCounter | None":
        """A counter on stderr; None where nobody would see it."""
        return cls(sys.stderr) if sys.stderr.isatty() else None

    def start(self, first: int, stop: int, total: int, num_steps: int) -> None:
        """Begins with samples `first` to `stop` (excluded) of `total`."""
        which = f"sample {first + 1}" if stop == first + 1 else f"samples {first + 1}-{stop}"
        self._label = which if total == 1 else f"{which} of {total}"
        self._num_steps = num_steps

    def __call__(self, step: int) -> None:
        """Shows that `step` passes are made."""
        end = "\n" if step == self._num_steps else ""
        self._stream.write(f"\r{self._label}: step {step}/{self._num_steps}{end}")
        self._stream.flush()
