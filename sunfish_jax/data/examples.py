"""A text with its prompts, the split it belongs to, and the fingerprint of the files it came from."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

VALIDATION_SHARE = 0.03
TEST_SHARE = 0.03
# Where records hold their prompts unless another name is given. Only under this name may they have none.
PROMPT_KEY = "prompt"


@dataclasses.dataclass(frozen=True)
class Example:
    """One text and the prompts it answers (none: it is trained without a prompt).

    `topic` is its subject, one of few in the corpus, where that is known. Only evaluation looks at it.
    """

    text: str
    prompts: tuple[str, ...] = ()
    topic: str | None = None


def file_digest(paths: Iterable[Path]) -> str:
    """A hash of the contents of files, whatever they are called: a moved file is still the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: the same on every machine and in every run."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(position: float) -> str:
    """The split of an example whose `uniform_hash` is `position`: 94 / 3 / 3 %."""
    if position < VALIDATION_SHARE:
        return "validation"
    return "test" if position < VALIDATION_SHARE + TEST_SHARE else "train"
