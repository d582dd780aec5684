import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.errors import UserError
from sunfish_jax.generation import gaps


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["The lion is a large cat of Africa.", "The Nile is a river of Africa.", "Dogs are loyal."] * 5
    return train_tokenizer(texts, 300)


def test_gaps_take_the_space_before_them(tokenizer):
    template = gaps.parse("The [MASK] is a [MASK:6] of Africa.", tokenizer)
    assert template.pieces == ("The", " is a", " of Africa.")
    assert [gap.length for gap in template.gaps] == [None, 6]
    assert {gap.start for gap in template.gaps} == {gaps.AFTER_SPACE}
    # Tokenised as in the running text, where a word carries the space before it.
    assert template.piece_ids[2] == tuple(tokenizer.encode(" of Africa."))


@pytest.mark.parametrize(
    ("text", "pieces", "starts"),
    [
        ("[MASK] is.", ("", " is."), [gaps.NO_SPACE]),
        ("([MASK:2])", ("(", ")"), [gaps.NO_SPACE]),
        ("a [MASK][MASK] [MASK]", ("a", "", "", ""), [gaps.AFTER_SPACE, gaps.NO_SPACE, gaps.AFTER_SPACE]),
        ("a  [MASK]ing", ("a ", "ing"), [gaps.AFTER_SPACE]),
    ],
)
def test_gaps_anywhere(tokenizer, text, pieces, starts):
    template = gaps.parse(text, tokenizer)
    assert template.pieces == pieces
    assert [gap.start for gap in template.gaps] == starts


@pytest.mark.parametrize("gap", ["[MASK:0]", "[MASK:]", "[MASK:-2]", "[MASK:two]", "[mask]", "[MASK", "[ MASK ]"])
def test_malformed_gaps_are_named(tokenizer, gap):
    with pytest.raises(UserError, match=r"malformed gap.*character 4"):
        gaps.parse(f"The {gap} is a [MASK].", tokenizer)


def test_no_gap_and_too_long(tokenizer):
    with pytest.raises(UserError, match="no gap"):
        gaps.parse("The lion.", tokenizer)
    template = gaps.parse("The [MASK] [MASK:3].", tokenizer)
    needed = template.num_given + 8 + 3 + 1
    assert gaps.check_length(template, max_gap=8, block_size=needed) == needed
    with pytest.raises(UserError, match=rf"takes {needed} tokens.*{needed - 1} fit"):
        gaps.check_length(template, max_gap=8, block_size=needed - 1)


def test_lay_out(tokenizer):
    template = gaps.parse("The [MASK] is [MASK:2].", tokenizer)
    layout = gaps.lay_out(template, [3, 2], 48, tokenizer)
    the, is_, stop = template.piece_ids
    ids = [*the, *[0] * 3, *is_, *[0] * 2, *stop, tokenizer.eos_token_id]
    np.testing.assert_array_equal(layout.tokens, ids + [0] * (48 - len(ids)))
    known = [1] * len(the) + [0] * 3 + [1] * len(is_) + [0] * 2 + [1] * (len(stop) + 1)
    np.testing.assert_array_equal(layout.known, known + [0] * (48 - len(ids)))
    (a, b), (c, d) = layout.gaps
    assert layout.kinds[a:b].tolist() == [gaps.AFTER_SPACE, gaps.ANY, gaps.ANY]
    assert layout.kinds[c:d].tolist() == [gaps.AFTER_SPACE, gaps.ANY]
    assert set(layout.kinds[len(ids) :]) == {gaps.PADDING}


def test_allowed_tokens(tokenizer):
    vocab_size = len(tokenizer) + 5
    allowed = gaps.allowed_tokens(tokenizer, vocab_size)
    assert allowed[gaps.PADDING].nonzero()[0].tolist() == [tokenizer.pad_token_id]
    for kind in (gaps.ANY, gaps.AFTER_SPACE, gaps.NO_SPACE):
        assert not allowed[kind, [tokenizer.pad_token_id, tokenizer.eos_token_id]].any()
        assert not allowed[kind, len(tokenizer) :].any()
    for i in allowed[gaps.AFTER_SPACE].nonzero()[0]:
        assert tokenizer.decode([i]).startswith(" ")
    np.testing.assert_array_equal(allowed[gaps.ANY], allowed[gaps.AFTER_SPACE] ^ allowed[gaps.NO_SPACE])
    assert allowed[gaps.AFTER_SPACE].any()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.text(max_size=12), min_size=2, max_size=4), st.randoms())
def test_given_words_come_back_exactly(tokenizer, pieces, random):
    hypothesis.assume(not any("[" in piece for piece in pieces))
    template = gaps.parse("[MASK:2]".join(pieces), tokenizer)
    layout = gaps.lay_out(template, [2] * len(template.gaps), 256, tokenizer)
    allowed = gaps.allowed_tokens(tokenizer, len(tokenizer))
    tokens = layout.tokens.copy()
    for start, stop in layout.gaps:
        for i in range(start, stop):
            tokens[i] = random.choice(allowed[layout.kinds[i]].nonzero()[0].tolist())
    text, _ = gaps.fill(template, layout, tokens, tokenizer)
    assert text.startswith(pieces[0])
    assert text.endswith(pieces[-1])
    at = 0
    for piece in pieces:
        at = text.index(piece, at) + len(piece)
