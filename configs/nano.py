"""0.3 M parameters: a first look in about a minute, and what the tests train.

    uv run main.py --config=configs/nano.py --workdir=workdir_nano

Expect loose words in the shape of an article, no sentences.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By path, so that it is this file's neighbour from any working directory.
get_default_config = runpy.run_path(str(Path(__file__).with_name("default.py")))["get_config"]


def get_config() -> ConfigDict:
    config = get_default_config()
    config.data.num_buckets = 1
    config.tokenizer.vocab_size = 512

    config.model.num_layers = 3
    config.model.num_heads = 2
    config.model.width = 64
    config.model.block_size = 64
    config.model.embedding_dim = 32
    config.model.conditioning_dim = 64
    config.model.dropout = 0.0

    config.prompt_encoder.max_length = 16
    config.prompt_encoder.num_layers = 1
    config.prompt_encoder.num_heads = 2
    config.prompt_encoder.width = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 15
    config.optimizer.ema_decay = 0.98

    config.train.num_steps = 300
    config.train.batch_size = 16
    config.train.accumulate_steps = 1

    config.sampling.num_steps = 32
    config.eval.every_steps = 100
    config.eval.num_rows = 32
    config.eval.bound_rows = 8
    config.logging.name = "nano"
    config.logging.every_steps = 10
    config.logging.sample_every_steps = 100
    config.checkpoint.every_steps = 100
    return config
