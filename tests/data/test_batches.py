import itertools
import threading

import jax
import numpy as np
import pytest

from configs import default
from sunfish_jax.data import batches as batches_module
from sunfish_jax.data.batches import BatchSource, batch_iterator
from sunfish_jax.data.buckets import choose_buckets
from sunfish_jax.data.packs import packs_per_pass
from sunfish_jax.data.padded_rows import held_out_row_numbers, held_out_rows
from sunfish_jax.data.sources import open_source
from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.data.tokens import TokenizedSplit, prepare
from sunfish_jax.errors import UserError
from sunfish_jax.models.prompt import Prompt

PAD = 0


def prompts(numbers):
    """A stand-in for the prompt encoder that keeps the numbers to look at."""
    return Prompt(inputs=numbers[..., None], mask=(numbers >= 0)[..., None])


def make_split(num_rows=600, seed=0, phrasings=3) -> TokenizedSplit:
    """Row i is all token i + 1, so that every token tells where it came from."""
    lengths = np.random.default_rng(seed).integers(1, 65, num_rows)
    first = np.arange(num_rows) * phrasings
    return TokenizedSplit(
        tokens=np.repeat(np.arange(1, num_rows + 1), lengths).astype(np.uint16),
        row_starts=np.concatenate([[0], np.cumsum(lengths)]),
        row_bytes=lengths * 4,
        row_prompts=np.stack([first, np.full(num_rows, phrasings)], axis=-1),
        prompt_bounds=np.zeros(num_rows * phrasings + 1, np.int64),
        prompt_text=np.zeros(0, np.uint8),
        pad_id=PAD,
    )


def make_source(split=None, **train):
    config = default.get_config()
    config.model.block_size = 64
    config.train.update({"batch_size": 4, "accumulate_steps": 2, "seed": 5, **train})
    split = split or make_split()
    return BatchSource(split, choose_buckets(split.lengths, 3, 64), config, prompts), config


def places_of(batch):
    """Of each row that is there, in order: its pass, pack and number in the pack, and its positions."""
    for place in np.ndindex(batch.lengths.shape):
        end = batch.lengths[place[:2]][: place[2] + 1].sum()
        if batch.lengths[place]:
            yield place, slice(end - batch.lengths[place], end)


def rows_of(batch):
    """The rows in a batch, by the token they are made of."""
    return np.array([batch.tokens[place[:2]][span][0] - 1 for place, span in places_of(batch)])


def check_whole(batch, split):
    """That a batch holds whole rows of `make_split` with their own prompts; returns how many of them are padded."""
    padded = 0
    assert batch.padding_mask.shape == batch.known_mask.shape == batch.tokens.shape
    assert (batch.lengths <= batch.longest).all() and (batch.lengths.sum(-1) <= batch.tokens.shape[2]).all()
    seen = np.zeros(batch.tokens.shape, bool)
    for place, span in places_of(batch):
        tokens, mask = batch.tokens[place[:2]][span], batch.padding_mask[place[:2]][span]
        row = tokens[0] - 1
        length = split.lengths[row]
        np.testing.assert_array_equal(tokens, np.pad(split.row(row), (0, len(tokens) - length)))
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < length)
        assert batch.prompt.inputs[place].item() // 3 == row
        seen[place[:2]][span] = True
        padded += len(tokens) > length
    assert not (batch.padding_mask & ~seen).any() and (batch.tokens[~batch.padding_mask] == PAD).all()
    assert not (batch.known_mask & ~batch.padding_mask).any()
    np.testing.assert_array_equal(batch.prompt.mask[..., 0], batch.lengths > 0)
    return padded


def test_batches_hold_whole_rows_and_their_own_prompts():
    split = make_split()
    source, config = make_source(split)
    padded = 0
    for step in range(source.steps_per_epoch):
        batch = source[step]
        shape = batch.tokens.shape
        assert shape[:2] == batch.lengths.shape[:2] == (2, packs_per_pass(config)) == (2, 2)
        # About as many positions as 4 rows of 64; a pass has a multiple of 16.
        assert abs(shape[1] * shape[2] - 4 * 64) <= 64 and shape[1] * shape[2] % 16 == 0
        padded += check_whole(batch, split)
    # One row in eight, but for those as long as may be.
    assert 0.05 < padded / split.num_rows < 0.2


def test_batches_are_whole_where_packs_have_too_little_room(monkeypatch):
    split = make_split()
    monkeypatch.setattr(batches_module, "pack_size", lambda fullest, longest, num_packs: max(longest, fullest - 8))
    source, _ = make_source(split)
    batches = [source[step] for step in range(source.steps_per_epoch)]
    for batch in batches:
        check_whole(batch, split)
    waiting = np.concatenate([batch.lengths.ravel() == 0 for batch in batches])
    assert 0 < waiting.mean() < 0.4


def test_few_rows_wait_in_a_small_corpus():
    """Whose rows differ from epoch to epoch in how many positions they take."""
    split = make_split(num_rows=130)
    source, _ = make_source(split)
    batches = [source[step] for step in range(30 * source.steps_per_epoch)]
    for batch in batches:
        check_whole(batch, split)
    # Were they not to lose padding first, three times as many would wait.
    assert 0 < np.mean([(batch.lengths == 0).mean() for batch in batches]) < 0.005


def test_one_and_two_devices_are_given_the_same():
    one, two = (make_source(num_devices=num_devices)[0] for num_devices in (1, 2))
    for step in range(3):
        jax.tree.map(np.testing.assert_array_equal, one[step], two[step])


def test_little_of_a_batch_is_padding():
    split = make_split()
    source, _ = make_source(split)
    masks = [source[step].padding_mask for step in range(source.steps_per_epoch)]
    assert np.sum([mask.sum() for mask in masks]) / np.sum([mask.size for mask in masks]) > 0.9


def test_an_epoch_has_every_row_once_but_for_less_than_a_step():
    split = make_split()
    source, _ = make_source(split)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        rows = np.concatenate([rows_of(source[step]) for step in steps])
        # In later epochs a few wait that do not fit into their pack.
        assert len(set(rows)) == len(rows) > split.num_rows - 2 * 2 * 3 - 0.01 * epoch * split.num_rows
        epochs.append(rows)
    assert not np.array_equal(*epochs)


def test_phrasings_change_from_epoch_to_epoch():
    source, _ = make_source()
    chosen = []
    for epoch in range(6):
        phrasing = {}
        for step in range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch):
            batch = source[step]
            for row, (place, _) in zip(rows_of(batch).tolist(), places_of(batch), strict=True):
                phrasing[row] = batch.prompt.inputs[place].item() % 3
        chosen.append(phrasing)
    everywhere = set.intersection(*map(set, chosen))
    table = np.array([[phrasing[row] for row in sorted(everywhere)] for phrasing in chosen])
    np.testing.assert_allclose(np.bincount(table.ravel()) / table.size, 1 / 3, atol=0.04)
    assert np.mean(table[0] == table[1]) < 0.45


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = make_source()[0], make_source()[0]
    far = 3 * one.steps_per_epoch + 2
    expected = [one[step] for step in range(far + 2)]
    for step in (far, 0, far + 1, 2):
        jax.tree.map(np.testing.assert_array_equal, other[step], expected[step])
    known = [batch.known_mask for batch in expected if batch.longest == 64 and batch.known_mask.any()]
    assert not any(np.array_equal(*pair) for pair in itertools.pairwise(known))
    assert not np.array_equal(rows_of(make_source(seed=6)[0][0]), rows_of(one[0]))


def test_prompts_of_a_few_steps_are_made_together(monkeypatch):
    source, _ = make_source()
    calls = []
    monkeypatch.setattr(source, "_prompts", lambda numbers: calls.append(numbers) or prompts(numbers))
    batches = [source[step] for step in range(2 * batches_module._STEPS_ENCODED_TOGETHER)]
    assert len(calls) == 2
    asked = np.concatenate([batch.prompt.inputs.ravel() for batch in batches])
    np.testing.assert_array_equal(np.concatenate(calls), asked)


def test_iterator_starts_anywhere_and_goes_past_epochs():
    source, _ = make_source()
    start = source.steps_per_epoch - 2
    for step, batch in zip(range(start, start + 5), batch_iterator(source, start), strict=False):
        jax.tree.map(np.testing.assert_array_equal, batch, source[step])


def test_iterator_begins_at_once_and_makes_no_more_than_it_is_to():
    source, _ = make_source()
    asked, two_asked = [], threading.Event()

    class Watched:
        def __len__(self):
            return len(source)

        def __getitem__(self, step):
            asked.append(step)
            if len(asked) == 2:
                two_asked.set()
            return source[step]

    batches = batch_iterator(Watched(), 3, 5)
    assert two_asked.wait(30), "before the first is asked for"
    assert len(list(itertools.islice(batches, 3))) == 2
    assert asked == [3, 4]


def test_rows_without_prompts():
    split = make_split(phrasings=0)
    source, config = make_source(split)
    assert not source[0].prompt.mask.any() and (source[0].prompt.inputs == -1).all()
    assert not any(
        batch.prompt.mask.any() for batch in held_out_rows(split, held_out_row_numbers(split, 50, config), prompts)
    )


def test_too_few_rows_for_one_step():
    make_source(make_split(num_rows=40), batch_size=8, accumulate_steps=4)  # The short ones move up.
    with pytest.raises(UserError, match=r"31 rows of training text.*takes 32 of up to 64 tokens"):
        make_source(make_split(num_rows=31), batch_size=8, accumulate_steps=4)


def test_held_out_rows_are_fixed_and_of_every_length():
    split = make_split(seed=1)
    _, config = make_source()
    numbers = held_out_row_numbers(split, 100, config)
    batches = held_out_rows(split, numbers, prompts)
    assert len(batches) == len(numbers)
    seen = []
    for batch, (length, rows) in zip(batches, numbers, strict=True):
        assert batch.tokens.shape == (1, len(rows), length)
        np.testing.assert_array_equal(batch.padding_mask[0].any(-1), rows >= 0)
        np.testing.assert_array_equal(batch.padding_mask[0].sum(-1)[rows >= 0], split.lengths[rows[rows >= 0]])
        np.testing.assert_array_equal((batch.tokens[0, :, 0] - 1)[rows >= 0], rows[rows >= 0])
        np.testing.assert_array_equal(batch.prompt.inputs[0, :, 0] // 3, rows)
        assert not batch.known_mask.any()
        seen += rows[rows >= 0].tolist()
    assert len(set(seen)) == len(seen) == 100
    assert len({length for length, _ in numbers}) == 3
    assert abs(split.lengths[seen].mean() - split.lengths.mean()) < 6, "not the shortest or longest alone"
    everything = np.concatenate([rows for _, rows in held_out_row_numbers(split, 10_000, config)])
    assert sorted(everything[everything >= 0]) == list(range(split.num_rows))
    assert held_out_row_numbers(make_split(num_rows=0), 100, config) == []


def test_most_of_a_micro_step_on_the_default_corpus_is_text(tmp_path):
    config = default.get_config()
    corpus = open_source(config.data, tmp_path)
    texts = (example.text for example in corpus.examples("train"))
    tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
    block_size = config.model.block_size
    train = prepare(corpus, tokenizer, tmp_path, block_size=block_size)["train"]
    buckets = choose_buckets(train.lengths, config.data.num_buckets, block_size)
    source = BatchSource(train, buckets, config, prompts)
    masks = [source[step].padding_mask for step in range(source.steps_per_epoch)]
    real = sum(int(mask.sum()) for mask in masks)
    assert real / sum(mask.size for mask in masks) > 0.95
    assert real / len(train.tokens) > 0.99
