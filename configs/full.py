"""1.4 B parameters, for eight accelerators. The default corpus is far too small for it: bring text.

uv run main.py --config=configs/full.py --config.data.source=FOLDER --workdir=workdir_full
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By path, so that it is this file's neighbour from any working directory.
get_default_config = runpy.run_path(str(Path(__file__).with_name("default.py")))["get_config"]


def get_config() -> ConfigDict:
    config = get_default_config()
    config.tokenizer.vocab_size = 32_768

    config.model.num_layers = 18
    config.model.num_heads = 16
    config.model.width = 2048
    config.model.block_size = 1024
    config.model.conditioning_dim = 1024
    config.model.dropout = 0.0
    config.model.remat = True

    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.weight_decay = 0.1

    config.train.num_steps = 500_000
    config.train.batch_size = 64
    config.train.num_devices = 8

    config.logging.name = "full"
    return config
