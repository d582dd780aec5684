"""A text with its prompts, and the fingerprint of the files it came from."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Example:
    """One text and the prompts it answers (none: it is trained without a prompt)."""

    text: str
    prompts: tuple[str, ...] = ()


def file_digest(paths: Iterable[Path]) -> str:
    """A hash of the contents of files, whatever they are called: a moved file is still the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
