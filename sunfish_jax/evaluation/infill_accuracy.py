"""How often a gap in held-out text is filled with what stood there."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.evaluation.ratio import ratio_of_sums
from sunfish_jax.evaluation.text_rows import shuffled_order
from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.models.prompt import Prompt

# Fills what is not given of rows [B, S]: from the given tokens, prompts and random keys [B] to tokens [B, S].
Fill = Callable[[Known, Prompt, jax.Array], np.ndarray]

GAP_SIZES = (1, 2, 4, 8)
# Given tokens between two gaps.
_FEWEST_BETWEEN, _MOST_BETWEEN = 8, 16


@dataclasses.dataclass(frozen=True)
class InfillAccuracy:
    """Share of the tokens in gaps of one size that are filled with the token that stood there.

    Attributes:
        true: With the text around the gaps.
        shuffled: With that text's tokens in random order.
        unigram: Of the best guess that looks at nothing: always the most frequent token.
        standard_error: Of `true`, over the rows.
        margin_error: Of `true - shuffled`.
        num_tokens: Tokens in gaps.
    """

    true: float
    shuffled: float
    unigram: float
    standard_error: float
    margin_error: float
    num_tokens: int


def infill_accuracy(fill: Fill, rows: Sequence[PaddedBatch], most_frequent: int) -> dict[int, InfillAccuracy]:
    """Fills gaps in held-out rows, without a prompt.

    Both times the same gaps are filled with the same keys: any difference comes from what the model reads in
    the order of the words around them.

    Args:
        fill: Fills gaps; padding counts as one, and is not looked at.
        rows: Held-out batches with A = 1.
        most_frequent: The most frequent token of the training text.

    Returns:
        The accuracy in gaps of each of `GAP_SIZES` that occurs.
    """
    counts = []
    for i, batch in enumerate(rows):
        batch = jax.tree.map(lambda leaf: np.asarray(leaf[0]), batch)
        gaps = choose_gaps(batch.padding_mask, np.random.default_rng((0, i)))
        known = batch.padding_mask & (gaps == 0)
        prompt = batch.prompt.replace(mask=np.zeros_like(batch.prompt.mask))
        keys = sample_keys(0, i << 16 | np.arange(len(gaps)))
        shuffled = np.take_along_axis(batch.tokens, shuffled_order(known, seed=i), axis=1)
        right = [fill(Known(given, known), prompt, keys) == batch.tokens for given in (batch.tokens, shuffled)]
        right += [batch.tokens == most_frequent, np.ones_like(known)]
        counts.append(
            np.stack([[(of & (gaps == size)).sum(-1) for of in right] for size in GAP_SIZES]).transpose(2, 0, 1)
        )
    # [rows, sizes, (true, shuffled, unigram, all)]
    counts = np.concatenate(counts).astype(float)
    return {size: _accuracy(counts[:, i]) for i, size in enumerate(GAP_SIZES) if counts[:, i].any()}


def infill_table(accuracies: Mapping[int, InfillAccuracy]) -> str:
    """The accuracies as a table, a line for each size of gap."""
    lines = [
        "gap, tokens    filled right   with shuffled surroundings   most frequent token   (share of the tokens)"
    ]
    for size, of in accuracies.items():
        lines.append(
            f"{size:11d}   {of.true:.3f} ± {of.standard_error:.3f}   {of.shuffled:8.3f} ("
            f"{of.shuffled - of.true:+.3f} ± {of.margin_error:.3f})   {of.unigram:19.3f}   ({of.num_tokens} tokens)"
        )
    return "\n".join(lines)


def _accuracy(counts: np.ndarray) -> InfillAccuracy:
    """counts: [rows, 4], the tokens filled right in the three ways, and all of them."""
    counts = counts[counts[:, 3] > 0]
    true, shuffled, unigram, total = counts.T
    share, error = ratio_of_sums(true, total)
    _, margin_error = ratio_of_sums(true - shuffled, total)
    return InfillAccuracy(
        true=share,
        shuffled=ratio_of_sums(shuffled, total)[0],
        unigram=ratio_of_sums(unigram, total)[0],
        standard_error=error,
        margin_error=margin_error,
        num_tokens=int(total.sum()),
    )


def choose_gaps(padding_mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaps of `GAP_SIZES` tokens with 8 to 16 given tokens between them.

    The last real token, the end of text where the text ends in the row, is never in one.

    Returns:
        [B, S] int, the size of the gap that a position is in; 0 where it is in none.
    """
    gaps = np.zeros(padding_mask.shape, int)
    for row, length in zip(gaps, padding_mask.sum(axis=-1), strict=True):
        start = int(rng.integers(1, _FEWEST_BETWEEN))
        while start + (size := int(rng.choice(GAP_SIZES))) < length:
            row[start : start + size] = size
            start += size + int(rng.integers(_FEWEST_BETWEEN, _MOST_BETWEEN + 1))
    return gaps
