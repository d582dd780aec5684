"""Where generated text goes: the terminal, and a JSONL file with what is needed to make each sample again."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from sunfish_jax.errors import UserError


def decode(tokens: np.ndarray, tokenizer) -> str:
    """The text of a row of tokens [S], cut at its first end of text."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    ids = tokens[: ends[0]] if len(ends) else tokens
    # The table of embeddings may be longer than the tokenizer's own vocabulary.
    ids = [int(i) for i in ids if i < len(tokenizer)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def config_hash(config) -> str:
    """A short fingerprint of a run's configuration."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "permission denied")
        # Beside the file, so that the rename does not cross file systems.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)
        # mkstemp makes files that only their owner may read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def step_counter(label: str, num_steps: int, stream: TextIO | None = None) -> Callable[[int], None] | None:
    """A line on the terminal that counts steps in place; None where nobody would see it."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return None

    def show(step: int) -> None:
        done = int(step) + 1
        stream.write(f"\r{label}: step {done}/{num_steps}" + ("\n" if done == num_steps else ""))
        stream.flush()

    return show
