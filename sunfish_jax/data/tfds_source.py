"""Texts from TFDS datasets in ArrayRecord, which are read without TensorFlow."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from sunfish_jax.data.examples import PROMPT_KEY, Example, split_of, uniform_hash
from sunfish_jax.errors import UserError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TFDS's reports of every file it looks at; its progress bars stay."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


class TfdsDataset:
    """Any TFDS dataset with a text feature and perhaps a prompt feature.

    It is looked for under `data_dir` and in TFDS's own folder. One without a validation and a test split of its
    own is split by a hash of the text.
    """

    continuous = False

    def __init__(self, name: str, text_key: str, prompt_key: str, data_dir: Path):
        self._name, self._text_key, self._prompt_key = name, text_key, prompt_key
        self._builder = _prepared_builder(name, data_dir)
        features = self._builder.info.features or {}
        for option, key in (("text_key", text_key), ("prompt_key", prompt_key)):
            if key not in features and (option, key) != ("prompt_key", PROMPT_KEY):
                raise UserError(
                    f"data.source=tfds:{name} has no feature `{key}` (it has {', '.join(features)}); "
                    f"set data.{option}"
                )
        splits = self._builder.info.splits
        self._own_splits = all(split in splits for split in ("train", "validation", "test"))
        # Of a dataset that is prepared anew, other texts have other lengths, in all likelihood.
        extent = ",".join(f"{split}={of.num_examples}/{of.num_bytes}" for split, of in sorted(splits.items()))
        self.identity = f"tfds:{self._builder.info.full_name}:{text_key}:{prompt_key}:{extent}"

    def examples(self, split: str) -> Iterator[Example]:
        for row in self._rows(split if self._own_splits else "train"):
            text, prompt = self._string(row, self._text_key), self._string(row, self._prompt_key)
            if self._own_splits or split_of(uniform_hash(text)) == split:
                yield Example(text, (prompt,) if prompt.strip() else ())

    def _rows(self, split: str):
        try:
            with quiet():
                return self._builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"data.source=tfds:{self._name} cannot be read: it needs a `train` split, prepared with "
                "file_format='array_record'"
            ) from error

    def _string(self, row: dict, key: str) -> str:
        value = row.get(key, b"")
        if not isinstance(value, bytes):
            raise UserError(f"data.source=tfds:{self._name}: the feature `{key}` is not text")
        return value.decode(errors="replace")


def _prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    reason = ""
    for folder in (str(data_dir), None):
        try:
            with quiet():
                builder = tfds.builder(name, data_dir=folder)
        except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            continue
        if builder.is_prepared():
            return builder
        reason = "it is known but not prepared"
    raise UserError(
        f"data.source=tfds:{name} cannot be opened ({reason}): prepare it first, with file_format='array_record'"
    )
