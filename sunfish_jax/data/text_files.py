"""A `.txt` file, or all of a folder's, as one stream of text."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sunfish_jax.data.examples import Example, file_digest
from sunfish_jax.errors import UserError

# One section in this many is for validation and one for test. Sections come at regular intervals, not at the end:
# the end of a folder is often another book.
_PERIOD = 32
_HELD_OUT = {_PERIOD // 2 - 1: "validation", _PERIOD - 1: "test"}
# Characters of a section: a small corpus still gets every split, and a large one is never read whole.
_MIN_SECTION, _MAX_SECTION = 200, 50_000
# A section goes on to the end of its line, if that comes within this many characters and as many as it has.
_LINE_LIMIT = 10_000


class TextFiles:
    """Text without prompts. Each run of neighbouring sections of a split is one example."""

    continuous = True

    def __init__(self, path: Path):
        self._files = sorted(file for file in path.rglob("*.txt") if file.is_file()) if path.is_dir() else [path]
        if not self._files:
            raise UserError(f"data.source={path} has no .txt file in it")
        # Reading all of it once finds what cannot be read before anything is written.
        characters, is_blank = 0, True
        for file in self._files:
            with _opened(file) as text:
                while part := text.read(_MAX_SECTION):
                    characters += len(part)
                    is_blank = is_blank and part.isspace()
        if is_blank:
            raise UserError(f"data.source={path} is empty: it has no text")
        self._section = min(max(characters // (4 * _PERIOD), _MIN_SECTION), _MAX_SECTION)
        self.identity = f"text:{file_digest(self._files)}"

    def examples(self, split: str) -> Iterator[Example]:
        number = 0
        for file in self._files:
            run: list[str] = []
            for section in self._sections(file):
                if _HELD_OUT.get(number % _PERIOD, "train") == split:
                    run.append(section)
                elif run:
                    yield Example("".join(run))
                    run = []
                number += 1
            if run:
                yield Example("".join(run))

    def _sections(self, file: Path) -> Iterator[str]:
        with _opened(file) as text:
            while section := text.read(self._section):
                yield section + text.readline(min(_LINE_LIMIT, self._section))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    try:
        with file.open(encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x} in it): save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
