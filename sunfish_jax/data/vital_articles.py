"""The default corpus as a TFDS builder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from sunfish_jax.data.corpus import NAME, VERSION, corpus_file
from sunfish_jax.data.examples import split_of, uniform_hash
from sunfish_jax.data.tfds_source import quiet


def prepare_articles(folder: Path) -> None:
    """Prepares the dataset in a folder, with a progress bar."""
    with quiet():
        _builder(folder).download_and_prepare()


def article_rows(folder: Path, split: str) -> Sequence[dict[str, bytes]]:
    """The articles of a split, from a folder in which they are prepared."""
    with quiet():
        return _builder(folder).as_data_source(split)


def _builder(folder: Path) -> tfds.core.DatasetBuilder:
    return VitalArticles(data_dir=str(folder), file_format="array_record")


class VitalArticles(tfds.core.GeneratorBasedBuilder):
    """Title, description, topic and summary of an article; split by a hash of the title."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

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
