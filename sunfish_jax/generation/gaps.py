"""A text with gaps, `The [MASK] is a [MASK:6] of Africa.`, as rows of tokens."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import shortened

_GAP = re.compile(r"\[MASK(?::([1-9]\d*))?\]")
_LOOKS_LIKE_A_GAP = re.compile(r"\[\s*MASK[^\]\s]*\s*\]?", re.IGNORECASE)
# How the vocabularies in use write the space at the start of a token: byte-level BPE and SentencePiece.
_SPACE_MARKS = ("Ġ", "▁")

# What may stand at a position: the rows of `allowed_tokens`.
ANY, AFTER_SPACE, NO_SPACE, PADDING = range(4)


@dataclasses.dataclass(frozen=True)
class Gap:
    """A gap to fill.

    Attributes:
        length: Tokens, or None when the model chooses.
        start: What its first token may be: `AFTER_SPACE`, `NO_SPACE` or `ANY`.
    """

    length: int | None
    start: int


@dataclasses.dataclass(frozen=True)
class Template:
    """A parsed text: `pieces[0] gaps[0] pieces[1] gaps[1] ... pieces[-1]`.

    Attributes:
        text: What the user wrote.
        pieces: The given parts, one more than there are gaps. The space before a gap belongs to the gap's
            first token, as it did in training, so it is missing from the piece.
        piece_ids: Their tokens.
        gaps: The gaps.
    """

    text: str
    pieces: tuple[str, ...]
    piece_ids: tuple[tuple[int, ...], ...]
    gaps: tuple[Gap, ...]

    @property
    def num_given(self) -> int:
        """Given tokens, without the end of text."""
        return sum(map(len, self.piece_ids))


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row: where its given tokens and its gaps are.

    Attributes:
        tokens: [S] int32, the given tokens at their places, padding elsewhere.
        known: [S] bool, True at the given tokens and the end of text.
        kinds: [S] int32, what may stand there: `ANY`, `AFTER_SPACE`, `NO_SPACE` or `PADDING`.
        gaps: (start, stop) of each gap.
    """

    tokens: np.ndarray
    known: np.ndarray
    kinds: np.ndarray
    gaps: tuple[tuple[int, int], ...]


def parse(text: str, tokenizer) -> Template:
    """Splits a text at its gaps and tokenises what is between them.

    Raises:
        UserError: There is no gap, or a malformed one such as `[MASK:0]`.
    """
    for match in _LOOKS_LIKE_A_GAP.finditer(text):
        if not _GAP.fullmatch(match.group()):
            raise UserError(
                f"--text has the malformed gap {match.group()!r} at character {match.start()}: write [MASK], "
                "or [MASK:3] for three tokens"
            )
    matches = list(_GAP.finditer(text))
    if not matches:
        raise UserError(f"--text has no gap to fill: {shortened(text)!r}; mark one with [MASK] or [MASK:3]")
    marks_spaces = bool(_space_tokens(tokenizer).any())
    pieces, gaps, begin = [], [], 0
    for match in matches:
        piece = text[begin : match.start()]
        start = ANY
        if marks_spaces:
            start = AFTER_SPACE if piece.endswith(" ") else NO_SPACE
            piece = piece.removesuffix(" ")
        pieces.append(piece)
        gaps.append(Gap(int(match.group(1)) if match.group(1) else None, start))
        begin = match.end()
    pieces.append(text[begin:])
    ids = tuple(tuple(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces)
    return Template(text, tuple(pieces), ids, tuple(gaps))


def check_length(template: Template, max_gap: int, block_size: int) -> int:
    """The tokens a text takes when every free gap takes `max_gap`, with its end of text.

    Raises:
        UserError: That is more than the model's block.
    """
    free = sum(gap.length is None for gap in template.gaps)
    total = template.num_given + 1 + sum(gap.length or max_gap for gap in template.gaps)
    if total > block_size:
        parts = f"{template.num_given} given, {total - 1 - template.num_given} in gaps, 1 at the end"
        hint = f"; a [MASK] without a length counts {max_gap}" if free else ""
        raise UserError(
            f"--text takes {total} tokens ({parts}{hint}), and {block_size} fit (--seq_len, or the model's block): "
            "shorten it"
        )
    return total


def lay_out(template: Template, lengths: Sequence[int], seq_len: int, tokenizer) -> Layout:
    """Puts a template into a row of `seq_len` tokens, with gaps of the lengths given."""
    tokens = np.full(seq_len, tokenizer.pad_token_id, np.int32)
    known = np.zeros(seq_len, bool)
    kinds = np.full(seq_len, PADDING, np.int32)
    spans, at = [], 0
    for i, ids in enumerate(template.piece_ids):
        tokens[at : at + len(ids)] = ids
        known[at : at + len(ids)] = True
        at += len(ids)
        if i < len(lengths):
            kinds[at : at + lengths[i]] = ANY
            kinds[at] = template.gaps[i].start
            spans.append((at, at + lengths[i]))
            at += lengths[i]
    # Every training text ends with an end of text; where it stands tells the model that nothing follows.
    tokens[at], known[at] = tokenizer.eos_token_id, True
    return Layout(tokens, known, kinds, tuple(spans))


def allowed_tokens(tokenizer, vocab_size: int) -> np.ndarray:
    """Which tokens may stand at a position of each kind: [4, V] bool, rows `ANY` to `PADDING`."""
    ordinary = np.ones(vocab_size, bool)
    ordinary[[i for i in tokenizer.all_special_ids if i < vocab_size]] = False
    # Rows of the embedding table beyond the tokenizer's own vocabulary mean nothing.
    ordinary[len(tokenizer) :] = False
    space = np.zeros(vocab_size, bool)
    space[: len(tokenizer)] = _space_tokens(tokenizer)
    padding = np.zeros(vocab_size, bool)
    padding[tokenizer.pad_token_id] = True
    return np.stack([ordinary, ordinary & space, ordinary & ~space, padding])


def fill(template: Template, layout: Layout, tokens: np.ndarray, tokenizer) -> tuple[str, list[str]]:
    """The whole text and the gaps' texts, from a row of filled tokens [S].

    The given parts are the user's own strings, so they come back exactly whatever the tokenizer is.
    """
    fills = [
        tokenizer.decode(tokens[start:stop].tolist(), clean_up_tokenization_spaces=False)
        for start, stop in layout.gaps
    ]
    text = template.pieces[0]
    for filled, piece in zip(fills, template.pieces[1:], strict=True):
        text += filled + piece
    return text, [filled.strip() for filled in fills]


def _space_tokens(tokenizer) -> np.ndarray:
    """Which tokens begin with a space: [len(tokenizer)] bool."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([token is not None and token.startswith(_SPACE_MARKS) for token in tokens])
