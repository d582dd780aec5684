"""Where text comes from. `open_source` tells the kind by the name and returns something with examples in it.

Nothing here holds a whole corpus in memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from sunfish_jax.data.corpus import DefaultCorpus
from sunfish_jax.data.examples import Example
from sunfish_jax.data.records import CsvRecords, JsonlRecords
from sunfish_jax.data.text_files import TextFiles
from sunfish_jax.errors import UserError

SPLITS = ("train", "validation", "test")


class Source(Protocol):
    """A corpus that can be read any number of times, always in the same order.

    Attributes:
      continuous: whether the text is one stream that fills whole blocks, rather than separate short texts.
      identity: changes when the examples do; a run resumes only on the data it began with.
    """

    continuous: bool
    identity: str

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of `train`, `validation` or `test`."""
        ...


def open_source(config: ConfigDict, data_dir: Path) -> Source:
    """Opens `config.source`.

    Args:
      config: the `data` group: `source`, `text_key`, `prompt_key`.
      data_dir: where the prepared default corpus is kept.

    Raises:
      UserError: the source is missing, empty or broken.
    """
    name = config.source
    if name == "vital_articles":
        return DefaultCorpus(data_dir)
    if name.startswith("tfds:"):
        # Imported for those alone who need it: TFDS takes 0.7 s.
        from sunfish_jax.data.tfds_source import TfdsDataset

        return TfdsDataset(name.removeprefix("tfds:"), config.text_key, config.prompt_key, data_dir)
    path = Path(os.path.expanduser(name))
    if not path.exists():
        raise UserError(
            f"data.source={name} does not exist: give vital_articles, a .txt, .jsonl or .csv file, "
            "a folder of .txt files, or tfds:NAME"
        )
    if path.is_dir() or path.suffix == ".txt":
        return TextFiles(path)
    if path.suffix == ".jsonl":
        return JsonlRecords(path, config.text_key, config.prompt_key)
    if path.suffix == ".csv":
        return CsvRecords(path, config.text_key, config.prompt_key)
    raise UserError(f"data.source={name} has an unknown ending: give a .txt, .jsonl or .csv file, or a folder")
