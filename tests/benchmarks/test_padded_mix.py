import types

import numpy as np
import padded_mix
import pytest
from padded_mix import padded_batches

from configs import default
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.models.prompt import Prompt


@pytest.fixture
def mix(monkeypatch):
    """Rows of 1 to 64 tokens, row i of the token i + 1, in batches of two passes of about 4 x 64 positions."""
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    split = TokenizedSplit(
        tokens=np.repeat(np.arange(1, 2001), lengths).astype(np.uint16),
        row_starts=np.concatenate([[0], np.cumsum(lengths)]),
        row_bytes=lengths,
        row_prompts=np.stack([3 * np.arange(2000), np.full(2000, 3)], axis=-1),
        prompt_bounds=np.zeros(6001, np.int64),
        prompt_text=np.zeros(0, np.uint8),
        pad_id=0,
    )

    def prompt_table(*_):
        return lambda numbers: Prompt(numbers[..., None], np.ones((*numbers.shape, 1), bool))

    monkeypatch.setattr(padded_mix, "PromptTable", prompt_table)
    prepared = types.SimpleNamespace(splits={"train": split}, prompt_encoder=None)
    config = default.get_config()
    config.model.block_size = 64
    config.train.accumulate_steps = 2
    return split, padded_batches(config, prepared, 3)


def test_each_batch_holds_whole_rows_and_their_own_prompts(mix):
    split, batches = mix
    assert [typical.length for typical in batches] == sorted({typical.length for typical in batches})
    assert len(batches) == 3
    for typical in batches:
        batch = typical.batch
        passes, rows, length = batch.tokens.shape
        assert passes == 2 and abs(rows * length - 4 * 64) <= length
        seen = batch.tokens[..., 0].ravel() - 1
        assert len(set(seen)) == len(seen)
        for row, tokens, mask in zip(
            seen, batch.tokens.reshape(-1, length), batch.padding_mask.reshape(-1, length), strict=True
        ):
            np.testing.assert_array_equal(tokens[mask], split.row(row))
        np.testing.assert_array_equal(batch.prompt.inputs.ravel() // 3, seen)
        assert not (batch.known_mask & ~batch.padding_mask).any()
        # As full as the rows of that length are on the whole.
        shorter = max((other.length for other in batches if other.length < length), default=0)
        of_length = split.lengths[(split.lengths > shorter) & (split.lengths <= length)]
        assert batch.padding_mask.sum() / batch.tokens.size == pytest.approx(of_length.mean() / length, abs=0.05)


def test_shares_are_those_of_an_epochs_steps(mix):
    split, batches = mix
    shares = [typical.share for typical in batches]
    assert sum(shares) == pytest.approx(1.0)
    rows = np.array(
        [share * typical.batch.tokens[..., 0].size for share, typical in zip(shares, batches, strict=True)]
    )
    ends = [0, *(typical.length for typical in batches)]
    np.testing.assert_allclose(rows / rows.sum(), np.histogram(split.lengths, np.array(ends) + 0.5)[0] / 2000)
