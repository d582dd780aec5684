"""Texts with optional prompts, one a record: `.jsonl` and `.csv` files."""

import abc
import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from sunfish_jax.data.examples import Example, split_of, uniform_hash
from sunfish_jax.errors import UserError


class Records(abc.ABC):
    """Examples split by a hash of their text, so that a text is in one split however often it occurs.

    Where a small corpus has no text in the validation or test share, the texts nearest to it stand in.
    """

    continuous = False

    def __init__(self, path: Path, text_key: str, prompt_key: str):
        """Reads the file once: what is broken is found before anything is written.

        Raises:
          UserError: the file is empty or broken, or has no `text_key`.
        """
        self._path, self._text_key, self._prompt_key = path, text_key, prompt_key
        digest = hashlib.blake2b(digest_size=16)
        lowest: list[float] = []
        for example in self._read():
            digest.update(json.dumps([example.text, *example.prompts]).encode())
            lowest = sorted({*lowest, uniform_hash(example.text)})[:3]
        if not lowest:
            raise UserError(f"data.source={path} is empty: it has no text")
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
            reader = csv.DictReader(file, restval="")
            if reader.fieldnames is not None and self._text_key not in reader.fieldnames:
                raise UserError(
                    f"{self._path} has no column `{self._text_key}` (it has {_names(reader.fieldnames)}); "
                    "rename one, or set data.text_key"
                )
            try:
                for record in reader:
                    yield reader.line_num, record
            except csv.Error as error:
                raise UserError(f"{self._path}, line {reader.line_num}: broken CSV ({error})") from error


def _names(names) -> str:
    return ", ".join(map(str, names)) or "nothing"
