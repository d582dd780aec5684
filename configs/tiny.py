"""1 M parameters: a first result in minutes.

    uv run main.py --config=configs/tiny.py --workdir=workdir_tiny

Expect words that belong to the prompt's topic, in little order.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By path, so that it is this file's neighbour from any working directory.
get_default_config = runpy.run_path(str(Path(__file__).with_name("default.py")))["get_config"]


def get_config() -> ConfigDict:
    config = get_default_config()
    config.data.num_buckets = 2
    config.tokenizer.vocab_size = 2048

    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.width = 128
    config.model.block_size = 128
    config.model.embedding_dim = 32
    config.model.mlp_ratio = 2
    config.model.conditioning_dim = 32
    config.model.dropout = 0.0

    config.prompt_encoder.max_length = 32
    config.prompt_encoder.num_layers = 1
    config.prompt_encoder.width = 128

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995

    config.train.num_steps = 3000
    config.train.batch_size = 16
    config.train.accumulate_steps = 1

    config.eval.every_steps = 500
    config.eval.num_rows = 128
    config.eval.bound_rows = 32
    config.logging.name = "tiny"
    config.logging.sample_every_steps = 500
    config.checkpoint.every_steps = 500
    return config
