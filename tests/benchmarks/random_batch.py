"""Batches for the steps of two networks that are compared."""

import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.models.prompt import Prompt


def random_batch(config: ConfigDict, prompt_dim: int) -> PaddedBatch:
    """One step's rows of 16 random tokens without padding, a tenth of them given, with prompts of 8 states."""
    rng = np.random.default_rng(0)
    shape = (config.train.accumulate_steps, 16)
    return PaddedBatch(
        tokens=rng.integers(0, config.tokenizer.vocab_size, (*shape, 16), np.int32),
        padding_mask=np.ones((*shape, 16), bool),
        known_mask=rng.random((*shape, 16)) < 0.1,
        prompt=Prompt(
            inputs=rng.standard_normal((*shape, 8, prompt_dim)).astype(np.float16),
            mask=np.ones((*shape, 8), bool),
        ),
    )


def as_packs(batch: PaddedBatch) -> PackedBatch:
    """The same step with each row as a pack of its own."""
    tokens = batch.tokens
    return PackedBatch(
        tokens=tokens,
        padding_mask=batch.padding_mask,
        known_mask=batch.known_mask,
        lengths=np.full((*tokens.shape[:2], 1), tokens.shape[2], np.int32),
        prompt=jax.tree.map(lambda leaf: leaf[:, :, None], batch.prompt),
        longest=tokens.shape[2],
    )
