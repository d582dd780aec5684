"""41.3 M parameters: the recommended model on a 16-core CPU.

uv run main.py --config=configs/micro.py --workdir=workdir
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By path, so that it is this file's neighbour from any working directory.
get_default_config = runpy.run_path(str(Path(__file__).with_name("default.py")))["get_config"]


def get_config() -> ConfigDict:
    # The defaults are this model's: see default.py.
    config = get_default_config()
    config.logging.name = "micro"
    return config
