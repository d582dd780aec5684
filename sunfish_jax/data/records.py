"""Texts with optional prompts, one a record: `.jsonl` and `.csv` files."""

import abc
import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from sunfish_jax.data.examples import PROMPT_KEY, Example, split_of, uniform_hash
from sunfish_jax.errors import UserError


class Records(abc.ABC):
    """Examples split by a hash of their text, so that a text is in one split however often it occurs.

    The text with the lowest hash is always for validation and that with the next for testing, so that a small
    corpus has both.
    """

    continuous = False

    def __init__(self, path: Path, text_key: str, prompt_key: str):
        """Reads the file once: what is broken is found before anything is written.

        Raises:
          UserError: the file is empty or broken, or has no `text_key`, or no prompt under a name that was given.
        """
        self._path, self._text_key, self._prompt_key = path, text_key, prompt_key
        digest = hashlib.blake2b(digest_size=16)
        lowest: list[float] = []
        num_prompts = 0
        for example in self._read():
            num_prompts += len(example.prompts)
            digest.update(json.dumps([example.text, *example.prompts]).encode())
            lowest = sorted({*lowest, uniform_hash(example.text)})[:3]
        if not lowest:
            raise UserError(f"data.source={path} is empty: it has no text")
        if not num_prompts and prompt_key != PROMPT_KEY:
            raise UserError(
                f"data.source={path} has no prompt under data.prompt_key={prompt_key}: give another key, or leave "
                "it out to train without prompts"
            )
        # With three texts or more, none of the splits is empty.
        self._stand_ins = dict(zip(lowest, ("validation", "test"), strict=False)) if len(lowest) == 3 else {}
        self.identity = f"records:{digest.hexdigest()}"

    def examples(self, split: str) -> Iterator[Example]:
        for example in self._read():
            position = uniform_hash(example.text)
            if self._stand_ins.get(position, split_of(position)) == split:
                yield example

    @abc.abstractmethod
    def _records(self) -> Iterator[tuple[int, dict]]:
        """The number of each record's line, counted from 1, and its fields."""

    def _read(self) -> Iterator[Example]:
        try:
            for line, record in self._records():
                text = self._string(record, self._text_key, line)
                if text is None:
                    raise UserError(
                        f"{self._path}, line {line}: no `{self._text_key}` (it has {_names(record)}); "
                        "rename it, or set data.text_key"
                    )
                if text.strip():
                    prompt = self._string(record, self._prompt_key, line)
                    yield Example(text, (prompt,) if prompt and prompt.strip() else ())
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path} is not UTF-8 text: save it as UTF-8") from error
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}") from error

    def _string(self, record: dict, key: str, line: int) -> str | None:
        value = record.get(key)
        if value is None or isinstance(value, str):
            # JSON can spell half of a surrogate pair, which no encoding can write.
            return value and value.encode(errors="replace").decode()
        raise UserError(f"{self._path}, line {line}: `{key}` is {json.dumps(value)[:40]}, not a string")


class JsonlRecords(Records):
    """A JSON object a line; blank lines are passed over."""

    def _records(self) -> Iterator[tuple[int, dict]]:
        with self._path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", "nested too deeply, or a number too long")
                    raise UserError(
                        f"{self._path}, line {number}: broken JSON ({reason}); mend the line"
                    ) from error
                if not isinstance(record, dict):
                    raise UserError(
                        f"{self._path}, line {number}: {line.strip()[:40]} is not a JSON object "
                        f'like {{"{self._text_key}": "..."}}'
                    )
                yield number, record


class CsvRecords(Records):
    """Comma-separated values whose first line names the columns."""

    def _records(self) -> Iterator[tuple[int, dict]]:
        csv.field_size_limit(2**31 - 1)  # The default, 131,072 characters, is less than a long article.
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: else a quotation mark that is not closed would take the rest of the file into one field.
            reader = csv.DictReader(file, restval="", strict=True)
            try:
                if reader.fieldnames is not None and self._text_key not in reader.fieldnames:
                    raise UserError(
                        f"{self._path} has no column `{self._text_key}` (it has {_names(reader.fieldnames)}); "
                        "rename one, or set data.text_key"
                    )
                for record in reader:
                    yield reader.line_num, record
            except csv.Error as error:
                raise UserError(
                    f"{self._path}, line {reader.line_num + 1}: broken CSV ({error}); close its quotation marks, "
                    "and double those within a field"
                ) from error


def _names(names) -> str:
    return ", ".join(map(str, names)) or "nothing"
