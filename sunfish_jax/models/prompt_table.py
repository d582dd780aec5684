"""The prompts of a corpus, encoded when a batch first asks for them."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from sunfish_jax.models.prompt import Prompt, round_up
from sunfish_jax.models.prompt_encoder import PromptEncoder

# Prompts tokenized together while measuring their lengths.
_CHUNK = 4096
# Share of the prompts that may be too long for the table: without it all of them would be as wide as the longest,
# and each layer attends to the whole width.
_CUT_SHARE = 0.005


class PromptTable:
    """Prompts by their number, all in one width.

    What is computed is kept, up to `cache_bytes`, the least recently used going first. It depends on the prompt
    alone, so that a run which is resumed, and has forgotten it, sees the same bits.

    Attributes:
        width: P, a multiple of 8 tokens that holds all prompts but a few in a thousand. Of those the states (or
            tokens) behind it are left out; states of a frozen encoder are those of the whole prompt.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        num_prompts: int,
        texts: Callable[[np.ndarray], list[str]],
        cache_bytes: int = 2**27,
    ):
        """Measures the prompts.

        Args:
            encoder: What encodes them.
            num_prompts: How many there are.
            texts: From numbers `[n]` int64 in [0, num_prompts) to n texts.
            cache_bytes: How much memory encoded prompts may take.
        """
        self._encoder = encoder
        self._texts = texts
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.width = self._find_width(num_prompts)

    def _find_width(self, num_prompts: int) -> int:
        lengths = [0]
        for start in range(0, num_prompts, _CHUNK):
            _, mask = self._encoder.tokenize(self._texts(np.arange(start, min(start + _CHUNK, num_prompts))))
            lengths += mask.sum(axis=-1).tolist()
        return round_up(np.quantile(lengths, 1.0 - _CUT_SHARE, method="higher"), 8)

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
            rows = {index: self._cache[index] for index in indices if index in self._cache}
            missing = [index for index in indices if index not in rows]
            if missing:
                tokens, mask = self._encoder.tokenize(self._texts(np.array(missing)))
                inputs = self._encoder.encode(tokens, mask) if self._encoder.frozen else tokens
                rows |= {index: inputs[at, mask[at]] for at, index in enumerate(missing)}
            for index in indices:
                self._keep(index, rows[index])
        return rows

    def _keep(self, index: int, row: np.ndarray) -> None:
        if index not in self._cache:
            self._cached_bytes += row.nbytes
        self._cache[index] = row
        self._cache.move_to_end(index)
        while self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
