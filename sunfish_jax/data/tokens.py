"""A corpus as tokens on disk: written once, one text at a time, and then memory-mapped."""

import array
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sunfish_jax.data.examples import Example
from sunfish_jax.data.kept import made_once
from sunfish_jax.data.sources import SPLITS, Source
from sunfish_jax.data.tokenizer import tokenizer_identity
from sunfish_jax.errors import UserError

# To be changed with what is made of the same text and tokenizer: what was made before would be found.
_FORMAT = "2"
# Texts tokenized together: no more than this, and no more once they have this many characters, each of which takes
# about 30 bytes until its tokens are written.
_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 256, 2**21


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """The rows of one split. R rows, T tokens in all, M prompts in all, all texts one after another.

    Attributes:
      tokens: `[T]`, the rows' tokens; end-of-text is part of the last row of each text.
      row_starts: `[R + 1]`, row i is `tokens[row_starts[i] : row_starts[i + 1]]`.
      row_bytes: `[R]`, UTF-8 bytes of text that each row stands for (end-of-text stands for none).
      row_prompts: `[R, 2]`, the first prompt and the number of prompts of the row's text.
      prompt_bounds: `[M + 1]`, prompt j is `prompt_text[prompt_bounds[j] : prompt_bounds[j + 1]]`.
      prompt_text: bytes, UTF-8.
      pad_id: the token at padding and at positions of no row.
    """

    tokens: np.ndarray
    row_starts: np.ndarray
    row_bytes: np.ndarray
    row_prompts: np.ndarray
    prompt_bounds: np.ndarray
    prompt_text: np.ndarray
    pad_id: int

    @property
    def num_rows(self) -> int:
        return len(self.row_bytes)

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_bounds) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """`[R]` int64, tokens in each row."""
        return np.diff(self.row_starts)

    def row(self, index: int) -> np.ndarray:
        """The tokens of one row, int32."""
        return np.asarray(self.tokens[self.row_starts[index] : self.row_starts[index + 1]], np.int32)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs, [V] int64."""
        counts = np.zeros(vocab_size, np.int64)
        # In parts: counting makes a wider copy of what it counts.
        for start in range(0, len(self.tokens), 2**20):
            counts += np.bincount(self.tokens[start : start + 2**20], minlength=vocab_size)
        return counts

    def prompt_texts(self, indices: np.ndarray) -> list[str]:
        """The prompts of the given numbers (any shape, flattened)."""
        return [
            bytes(self.prompt_text[self.prompt_bounds[i] : self.prompt_bounds[i + 1]]).decode()
            for i in np.ravel(indices)
        ]


def log_frequencies(counts: np.ndarray) -> np.ndarray:
    """How frequent each token is, in nats [V] float32. One is added to each count: an unseen token stays possible.

    Args:
      counts: [V], from `TokenizedSplit.token_counts`.
    """
    counts = counts + 1.0
    return np.log(counts / counts.sum()).astype(np.float32)


def prepare(
    source: Source, tokenizer: PreTrainedTokenizerFast, directory: Path, *, block_size: int
) -> dict[str, TokenizedSplit]:
    """Tokenizes all splits of `source` into `directory`, or opens what an earlier run left there.

    A text longer than `block_size` tokens becomes several rows of nearly equal length. In a continuous source
    every row but the last is whole, and a row may begin in the middle of a text.

    Args:
      source: where the text comes from.
      tokenizer: decides the tokens.
      directory: is created; each (source, tokenizer, block size) has a folder of its own in it.
      block_size: the longest row, in tokens.

    Returns:
      `train`, `validation` and `test`.

    Raises:
      UserError: no text for training, or none held out.
    """
    key = f"{_FORMAT}|{source.identity}|{tokenizer_identity(tokenizer)}|{block_size}"

    def write(folder):
        for split in SPLITS:
            _write_split(source, split, tokenizer, folder / split, block_size)

    folder = made_once(directory, key, write)
    splits = {split: _open_split(folder / split, tokenizer) for split in SPLITS}
    for split in ("train", "validation"):
        if not splits[split].num_rows:
            raise UserError(
                f"the corpus is too small: it has no {split} text "
                f"({splits['train'].num_rows} rows of training text); give more text in data.source"
            )
    return splits


# Tokens on their way to disk, [n], and the UTF-8 bytes that each of them stands for, [n].
_Tokens = tuple[np.ndarray, np.ndarray]


def _write_split(
    source: Source, split: str, tokenizer: PreTrainedTokenizerFast, folder: Path, block_size: int
) -> None:
    folder.mkdir(parents=True)
    row_starts, prompt_bounds = array.array("q", [0]), array.array("q", [0])
    row_bytes, row_prompts = array.array("q"), array.array("q")
    cut = _cut_stream if source.continuous else _cut_texts
    dtype = _token_dtype(tokenizer)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "prompt_text.bin").open("wb") as prompt_text:
        for rows, prompts in cut(_encoded(source, split, tokenizer), block_size):
            first_prompt = len(prompt_bounds) - 1
            for prompt in prompts:
                prompt_bounds.append(prompt_bounds[-1] + prompt_text.write(prompt.encode()))
            for ids, num_bytes in rows:
                tokens.write(ids.astype(dtype).tobytes())
                row_starts.append(row_starts[-1] + len(ids))
                row_bytes.append(int(num_bytes.sum()))
                row_prompts.extend((first_prompt, len(prompts)))
    for name, values in (
        ("row_starts", row_starts),
        ("row_bytes", row_bytes),
        ("row_prompts", row_prompts),
        ("prompt_bounds", prompt_bounds),
    ):
        (folder / f"{name}.bin").write_bytes(values.tobytes())


def _open_split(folder: Path, tokenizer: PreTrainedTokenizerFast) -> TokenizedSplit:
    def read(name: str, dtype: np.dtype | type) -> np.ndarray:
        path = folder / f"{name}.bin"
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    return TokenizedSplit(
        tokens=read("tokens", _token_dtype(tokenizer)),
        row_starts=read("row_starts", np.int64),
        row_bytes=read("row_bytes", np.int64),
        row_prompts=read("row_prompts", np.int64).reshape(-1, 2),
        prompt_bounds=read("prompt_bounds", np.int64),
        prompt_text=read("prompt_text", np.uint8),
        pad_id=tokenizer.pad_token_id,
    )


def _token_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)


def _encoded(
    source: Source, split: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[_Tokens, tuple[str, ...]]]:
    """The tokens of each text that is not blank, end-of-text included, and its prompts."""
    # A text that happens to contain `<eos>` must not end there. A copy: the caller's tokenizer stays as it is.
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    examples = (example for example in source.examples(split) if example.text.strip())
    with tqdm(desc=f"Tokenizing {split}", unit=" texts", disable=None) as progress:
        for batch in _batched(examples):
            encodings = encoder.encode_batch([example.text for example in batch], add_special_tokens=False)
            for example, encoding in zip(batch, encodings, strict=True):
                ids = np.array([*encoding.ids, tokenizer.eos_token_id], np.int64)
                yield (ids, _bytes_per_token(example.text, encoding.offsets)), example.prompts
            progress.update(len(batch))


def _batched(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Texts to be tokenized together: all cores have work, and what they make of long texts fits into memory."""
    batch, characters = [], 0
    for example in examples:
        batch.append(example)
        characters += len(example.text)
        if len(batch) == _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _bytes_per_token(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes from the start of each token to the start of the next; 0 for the end-of-text token.

    They add up to the bytes of the text, also where a tokenizer leaves characters out.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    position = np.concatenate([[0], np.cumsum(sizes)])  # [characters + 1]
    starts = np.array([start for start, _ in offsets[1:]], np.int64)
    bounds = np.concatenate([[0], position[starts], position[-1:], position[-1:]])
    return np.diff(bounds)[-len(offsets) - 1 :]


def _cut_texts(
    texts: Iterator[tuple[_Tokens, tuple[str, ...]]], block_size: int
) -> Iterator[tuple[list[_Tokens], tuple[str, ...]]]:
    """Rows of single texts. A long one is cut evenly: 257 tokens as 129 and 128, not as 256 and 1."""
    for (ids, num_bytes), prompts in texts:
        parts = -(-len(ids) // block_size)
        rows = zip(np.array_split(ids, parts), np.array_split(num_bytes, parts), strict=True)
        yield list(rows), prompts


def _cut_stream(
    texts: Iterator[tuple[_Tokens, tuple[str, ...]]], block_size: int
) -> Iterator[tuple[list[_Tokens], tuple[str, ...]]]:
    """Whole blocks of the texts laid end to end; what is left at the very end is a shorter row."""
    rest = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for tokens, _ in texts:
        ids, num_bytes = (np.concatenate(pair) for pair in zip(rest, tokens, strict=True))
        whole = len(ids) // block_size * block_size
        yield (
            [
                (ids[start : start + block_size], num_bytes[start : start + block_size])
                for start in range(0, whole, block_size)
            ],
            (),
        )
        rest = ids[whole:], num_bytes[whole:]
    if len(rest[0]):
        yield [rest], ()
