"""What a run shows of itself besides its loss: held-out figures and samples."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.evaluation.held_out import held_out_cross_entropy, nearest_neighbour_distance
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.training.interrupt import StopRequest
from sunfish_jax.training.preparation import Prepared
from sunfish_jax.training.state import TrainState

# Held-out figures by name, or samples by name.
Evaluate = Callable[[TrainState], dict[str, float]]
Sample = Callable[[TrainState], dict[str, str]]

HELD_OUT_MEAN = "held_out/mean"


class Stopped(Exception):
    """An evaluation was given up because the run is to stop."""


def make_evaluate(config: ConfigDict, prepared: Prepared, stop: StopRequest) -> Evaluate:
    """Makes the evaluation of a state on always the same held-out rows.

    Args:
        config: the whole configuration; `eval.num_rows` is read.
        prepared: the model and the validation text.
        stop: when it is asked for, the evaluation raises `Stopped` before its next batch.

    Returns:
        A function to scalars by name, of the averaged parameters.
    """
    # Encoding their prompts takes seconds, which the first step need not wait for.
    validation = prepared.splits["validation"]
    text = functools.cache(lambda: TextRows.of(validation, config.eval.num_rows, config, prepared.prompt_encoder))

    def until_stopped() -> Iterator[PaddedBatch]:
        for batch in text().rows:
            if stop:
                raise Stopped
            yield batch

    def evaluate(state: TrainState) -> dict[str, float]:
        params = on_one_device(state.ema_params)
        figures = held_out_cross_entropy(prepared.model, params, until_stopped())
        distance = nearest_neighbour_distance(prepared.model, params)
        return figures | {"embeddings/nearest_neighbour_distance": float(distance)}

    return evaluate


def make_sample(config: ConfigDict, prepared: Prepared) -> Sample:
    """Makes the sampling of a state: one text for each of `logging.sample_prompts`, and one without a prompt.

    The noise they start from is always the same, so that they can be compared from step to step.
    """
    names = [*config.logging.sample_prompts, "no prompt"]
    prompts = functools.cache(
        lambda: encode_prompts(prepared.prompt_encoder, [*config.logging.sample_prompts, None])
    )
    settings = Settings.make(config.sampling)

    def sample(state: TrainState) -> dict[str, str]:
        params, schedule = on_one_device((state.ema_params, state.schedule))
        texts = sample_texts(
            prepared.model,
            params,
            schedule,
            prepared.tokenizer,
            prompts(),
            sample_keys(config.train.seed, np.arange(len(names))),
            seq_len=config.model.block_size,
            settings=settings,
            row_lengths=np.bincount(prepared.splits["train"].lengths),
        )
        return dict(zip(names, texts, strict=True))

    return sample


def on_one_device(tree):
    """Arrays that lie on every device of a mesh, on the first alone: what uses them is then computed once."""
    return jax.device_put(tree, jax.local_devices()[0])
