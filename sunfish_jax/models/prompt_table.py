"""The prompts of a corpus, encoded when a batch first asks for them."""

import contextlib
import math
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sunfish_jax.models.prompt import Prompt, round_up
from sunfish_jax.models.prompt_encoder import PromptEncoder

# Prompts whose lengths are measured: that many, spread over the corpus, find the width.
_MEASURED = 4096
# Share of the prompts that may be too long for the table: without it all of them would be as wide as the longest,
# and each layer attends to the whole width.
_CUT_SHARE = 0.005
# What the file of encoded prompts may grow to, and what it leaves free on the disk.
_MOST_FILE_BYTES, _BYTES_LEFT_FREE = 2**30, 2**31


class PromptTable:
    """Prompts by their number, all in one width.

    What is encoded is kept in a file, where it takes no memory, so that each prompt is encoded once while there
    is room. It depends on the prompt alone: a run which is resumed, and has forgotten it, sees the same bits.

    Attributes:
        width: P, a multiple of 8 tokens that holds all prompts but a few in a thousand. Of those the states (or
            tokens) behind it are left out; states of a frozen encoder are those of the whole prompt.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        num_prompts: int,
        texts: Callable[[np.ndarray], list[str]],
        folder: Path | None = None,
    ):
        """Measures the prompts.

        Args:
            encoder: What encodes them.
            num_prompts: How many there are.
            texts: From numbers `[n]` int64 in [0, num_prompts) to n texts.
            folder: Where encoded prompts are kept, in a file without a name that ends with the process; None if
                each is asked for but once.
        """
        self._encoder = encoder
        self._texts = texts
        row_shape, dtype = ((encoder.output_dim,), np.float16) if encoder.frozen else ((), np.int32)
        self._kept = None
        if folder is not None:
            with contextlib.suppress(OSError):  # Where nothing can be written, nothing is kept.
                self._kept = _RowFile(folder, num_prompts, row_shape, np.dtype(dtype))
        self._lock = threading.Lock()
        self.width = self._find_width(num_prompts)

    def _find_width(self, num_prompts: int) -> int:
        if not num_prompts:
            return 8
        measured = np.unique(np.linspace(0, num_prompts - 1, _MEASURED).astype(np.int64))
        _, mask = self._encoder.tokenize(self._texts(measured))
        return round_up(np.quantile(mask.sum(axis=-1), 1.0 - _CUT_SHARE, method="higher"), 8)

    def __call__(self, indices: np.ndarray) -> Prompt:
        """The prompts of a batch.

        Args:
            indices: `[...]` int; -1 for no prompt.

        Returns:
            Prompt with the axes of `indices` leading, P = `width`; inputs are zero at padding.
        """
        wanted, inverse = np.unique(indices, return_inverse=True)
        rows = self._rows(wanted[wanted >= 0].tolist())
        shape = (len(wanted), self.width)
        if self._encoder.frozen:
            inputs = np.zeros((*shape, self._encoder.output_dim), np.float16)
        else:
            inputs = np.zeros(shape, np.int32)
        mask = np.zeros(shape, bool)
        for at, index in enumerate(wanted.tolist()):
            if index >= 0:
                row = rows[index][: self.width]
                inputs[at, : len(row)] = row
                mask[at, : len(row)] = True
        inverse = inverse.reshape(np.shape(indices))
        return Prompt(inputs=inputs[inverse], mask=mask[inverse])

    def _rows(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Each prompt's states `[length, d]`, or its tokens `[length]`, without padding."""
        with self._lock:
            rows = {} if self._kept is None else self._kept.read(indices)
            missing = [index for index in indices if index not in rows]
            if missing:
                tokens, mask = self._encoder.tokenize(self._texts(np.array(missing)))
                inputs = self._encoder.encode(tokens, mask) if self._encoder.frozen else tokens
                encoded = {index: inputs[at, mask[at]] for at, index in enumerate(missing)}
                if self._kept is not None:
                    self._kept.write(encoded)
                rows |= encoded
        return rows


class _RowFile:
    """Rows of varying length by number, in a file without a name. What there is no room for is not kept."""

    def __init__(self, folder: Path, num_rows: int, shape: tuple[int, ...], dtype: np.dtype):
        """Rows are `[length, *shape]`. Raises an OSError if the folder takes no file."""
        self._folder, self._shape, self._dtype = folder, shape, dtype
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self._end = 0
        # Where each row begins, -1 if it is not kept, and how long it is.
        self._starts = np.full(num_rows, -1, np.int64)
        self._lengths = np.zeros(num_rows, np.int32)

    def read(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Those of the rows that are kept."""
        rows = {}
        for index in indices:
            if self._starts[index] >= 0:
                shape = (self._lengths[index], *self._shape)
                self._file.seek(self._starts[index])
                rows[index] = np.ndarray(
                    shape, self._dtype, self._file.read(math.prod(shape) * self._dtype.itemsize)
                )
        return rows

    def write(self, rows: dict[int, np.ndarray]) -> None:
        """Keeps them all, or none."""
        data = b"".join(row.tobytes() for row in rows.values())
        try:
            free = shutil.disk_usage(self._folder).free
            if self._end + len(data) > _MOST_FILE_BYTES or free - len(data) < _BYTES_LEFT_FREE:
                return
            self._file.seek(self._end)
            if self._file.write(data) < len(data):
                return
        except OSError:  # Such as a quota, which the free space does not show: training goes on without.
            return
        for index, row in rows.items():
            self._starts[index], self._lengths[index] = self._end, len(row)
            self._end += row.nbytes
