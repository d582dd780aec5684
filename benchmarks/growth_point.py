"""One measurement of growth.py, in a process of its own: its memory is that of this measurement alone.

Reads what to measure as JSON from the command line, prints what it measured as JSON on the last line.
"""

import dataclasses
import json
import os
import resource
import statistics
import sys
import time

from sunfish_jax.startup import prepare_process


def main(point: dict) -> None:
    """`point`: `task` ("train" or "sample"), `config`, `overrides`, `cores`, `devices`, `rows`, `length`,
    `num_steps` and `repeats`."""
    if "cores" in point:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point["cores"]])
    prepare_process(point["devices"])
    import runpy

    config = runpy.run_path(point["config"])["get_config"]()
    config.update_from_flattened_dict(point["overrides"])
    seconds = statistics.median({"train": train, "sample": sample}[point["task"]](config, point))
    # Linux counts in kilobytes.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "memory": memory}))


def _prompt(config, *shape):
    import numpy as np

    from sunfish_jax.models.prompt import Prompt
    from sunfish_jax.models.prompt_encoder import make_prompt_encoder

    encoder = make_prompt_encoder(config.prompt_encoder)
    shape = (*shape, config.prompt_encoder.max_length)
    states = np.random.default_rng(0).normal(size=(*shape, encoder.output_dim)).astype(np.float16)
    return encoder, Prompt(inputs=states, mask=np.ones(shape, bool))


def train(config, point: dict) -> list[float]:
    """Seconds of each timed optimiser step, on rows of random tokens without padding."""
    import jax
    import numpy as np

    from sunfish_jax.data.batches import PackedBatch
    from sunfish_jax.models.denoiser import make_model
    from sunfish_jax.training.sharding import make_mesh, state_shardings
    from sunfish_jax.training.state import create_state
    from sunfish_jax.training.step import make_train_step

    # Each row is a pack.
    shape = (config.train.accumulate_steps, point["rows"], point["length"])
    encoder, prompt = _prompt(config, *shape[:2], 1)
    model = make_model(config, config.tokenizer.vocab_size, encoder)
    mesh = make_mesh(point["devices"])

    def create():
        return create_state(config, model)

    state = jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))()
    tokens = np.random.default_rng(0).integers(config.tokenizer.vocab_size, size=shape, dtype=np.int32)
    batch = PackedBatch(
        tokens=tokens,
        padding_mask=np.ones(shape, bool),
        known_mask=np.zeros(shape, bool),
        lengths=np.full((*shape[:2], 1), shape[-1], np.int32),
        prompt=prompt,
        longest=shape[-1],
    )
    step = make_train_step(config, model, mesh)
    times = []
    # The first one compiles, and the second still finds its memory.
    for _ in range(2 + point["repeats"]):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    return times[2:]


def sample(config, point: dict) -> list[float]:
    """Seconds of each timed sampling of `rows` texts of `length` tokens, without guidance, compiled before."""
    import jax
    import numpy as np

    from sunfish_jax.diffusion.schedules import make_schedule
    from sunfish_jax.generation.generator import generate, sample_keys
    from sunfish_jax.generation.options import Settings
    from sunfish_jax.models.denoiser import init_params, make_model

    encoder, prompt = _prompt(config, point["rows"])
    vocab_size = config.tokenizer.vocab_size
    model = make_model(config, vocab_size, encoder)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    schedule = make_schedule(config.diffusion.schedule, model.embedding_dim, vocab_size)
    settings = dataclasses.replace(
        Settings.make(config.sampling).with_steps(point["num_steps"]), guidance_scale=1.0
    )
    keys = sample_keys(0, np.arange(point["rows"]))
    times = []
    for _ in range(1 + point["repeats"]):
        start = time.perf_counter()
        generate(model, params, schedule, prompt, keys, point["length"], settings)
        times.append(time.perf_counter() - start)
    return times[1:]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
