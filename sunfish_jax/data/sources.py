"""Where text comes from. `open_source` tells the kind by the name and returns something with examples in it.

Nothing here holds a whole corpus in memory.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from sunfish_jax.data.corpus import VitalArticles, corpus_file
from sunfish_jax.data.examples import Example, file_digest
from sunfish_jax.data.prompts import article_prompts
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
        return TfdsDataset(name.removeprefix("tfds:"), config.text_key, config.prompt_key, data_dir)
    path = Path(name).expanduser()
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
    raise UserError(
        f"data.source={name} has an unknown ending: give a .txt, .jsonl or .csv file, or a folder"
    )


class DefaultCorpus:
    """The `vital_articles` corpus, prepared once under `data_dir` as ArrayRecord."""

    continuous = False

    def __init__(self, data_dir: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS reports every file it looks at.
        self._builder = VitalArticles(data_dir=str(data_dir), file_format="array_record")
        self._builder.download_and_prepare()  # Shows a progress bar; returns at once where it is prepared.
        self.identity = f"{self._builder.info.full_name}:{file_digest([corpus_file()])}"

    def examples(self, split: str) -> Iterator[Example]:
        for row in self._builder.as_data_source(split):
            title, description, topic, text = (
                row[key].decode() for key in ("title", "description", "topic", "text")
            )
            yield Example(text, article_prompts(title, description, topic))


class TfdsDataset:
    """A prepared TFDS dataset in ArrayRecord with a text feature and perhaps a prompt feature."""

    continuous = False

    def __init__(self, name: str, text_key: str, prompt_key: str, data_dir: Path):
        raise NotImplementedError
