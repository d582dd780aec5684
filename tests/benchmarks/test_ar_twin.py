"""The autoregressive twin: that it reads nothing it must not, is what it claims to be, and trains."""

import dataclasses
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import ar_generation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_budget import Budget, learning_rate_share
from ar_generation import draw, empty_cache, generate, next_logits
from ar_likelihood import score
from ar_model import count_parameters, init_twin, make_twin
from ar_training import TwinLoop, create_twin_state, make_twin_step
from encoders import FrozenEncoder

from configs import micro, mini, nano, tiny
from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.rows import PackedRows
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.progress import Progress, load_totals
from sunfish_jax.workdir.run import load_run

ROOT = Path(__file__).parents[2]
END = 1
ROWS, LENGTH, PROMPT_LENGTH, STATES = 3, 14, 5, 24


def make_config(**model):
    config = nano.get_config()
    config.model.update({"num_layers": 2, "width": 32, "conv_width": 3, "compute_dtype": "float32"} | model)
    config.tokenizer.vocab_size = 40
    config.train.batch_size = 4
    config.model.block_size = 16
    return config


def make_nano_twin(**model):
    config = make_config(**model)
    return make_twin(make_model(config, config.tokenizer.vocab_size, FrozenEncoder(STATES)), END)


@pytest.fixture(scope="module")
def model():
    return make_nano_twin()


def trained_params(model):
    """Parameters away from their initial zeros and ones, as after some training."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_twin(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    params["norm_scales"] += 1
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def params(model):
    return trained_params(model)


@pytest.fixture(scope="module")
def small():
    """One layer, its parameters: what is quick to compile a decoding loop of."""
    model = make_nano_twin(num_layers=1)
    return model, trained_params(model)


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(0).integers(2, model.vocab_size, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def prompt():
    states = np.random.default_rng(1).normal(size=(ROWS, PROMPT_LENGTH, STATES)).astype(np.float16)
    # A whole prompt, a shorter one, and none.
    return Prompt(inputs=states, mask=np.arange(PROMPT_LENGTH) < np.array([[PROMPT_LENGTH], [2], [0]]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(model, params, tokens, prompt, method):
    keys_values = model.apply({"params": params}, prompt, method="encode_prompt")
    return model.apply({"params": params}, tokens, keys_values, method=method)


def all_logits(model, params, tokens, prompt):
    return np.array(apply(model, params, tokens, prompt, "logits"))


@pytest.mark.parametrize("at", [0, 6, LENGTH - 1])
def test_no_logit_reads_its_own_token_or_a_later_one(model, params, tokens, prompt, at):
    changed = tokens.copy()
    changed[:, at] = 2 + (changed[:, at] - 1) % (model.vocab_size - 2)
    before, after = all_logits(model, params, tokens, prompt), all_logits(model, params, changed, prompt)
    np.testing.assert_array_equal(before[:, : at + 1], after[:, : at + 1])
    # And every later one reads it.
    assert (before[:, at + 1 :] != after[:, at + 1 :]).any(axis=-1).all()


def test_every_logit_reads_the_prompt_where_there_is_one(model, params, tokens, prompt):
    other = prompt.replace(inputs=prompt.inputs[:, ::-1])
    before, after = all_logits(model, params, tokens, prompt), all_logits(model, params, tokens, other)
    assert (before[:2] != after[:2]).any(axis=-1).all()
    np.testing.assert_array_equal(before[2], after[2])


def test_dropout_reaches_what_goes_into_the_first_layer(tokens, prompt):
    model = make_nano_twin(num_layers=1, dropout=0.5)
    params = trained_params(model)
    # Nothing comes out of the layer, so that only its input is left.
    for name in ("attention_out", "cross_out", "mlp_out"):
        params["layers_0"][name] *= 0

    @jax.jit
    def hidden(seeds):
        keys_values = model.apply({"params": params}, prompt, method="encode_prompt")
        return model.apply({"params": params}, tokens, keys_values, dropout_seeds=seeds, method="hidden")

    dropped = np.asarray(hidden(jnp.arange(ROWS, dtype=jnp.uint32))) == 0
    assert 0.3 < dropped.mean() < 0.7
    assert not (np.asarray(hidden(None)) == 0).any()


def test_untrained_it_predicts_the_tokens_frequencies(tokens, prompt):
    model = make_nano_twin(num_layers=1)
    params = jax.jit(init_twin, static_argnums=0)(model, jax.random.key(0))
    params["log_unigram"] = jnp.linspace(-3.0, 0.0, model.vocab_size)
    logits = all_logits(model, params, tokens, prompt)
    np.testing.assert_array_equal(logits, np.broadcast_to(params["log_unigram"], logits.shape))


class Reference:
    """The twin once more, in float64 NumPy, row by row and position by position."""

    def __init__(self, model, params):
        self.model = model
        self.p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(self, x, scale=1.0):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def softmax(self, scores):
        e = np.exp(scores - scores.max())
        return e / e.sum()

    def attend(self, q, keys, values):
        """One query [W] over keys and values [T, W], head by head."""
        out = []
        for part in np.split(np.arange(self.model.width), self.model.num_heads):
            weights = self.softmax(keys[:, part] @ q[part] / np.sqrt(len(part)))
            out.append(weights @ values[:, part])
        return np.concatenate(out)

    def turn(self, x, position):
        """Rotary positions of a vector [W], head by head."""
        d = self.model.width // self.model.num_heads
        angles = position * 10_000.0 ** (-np.arange(d // 2) / (d // 2))
        heads = x.reshape(-1, 2, d // 2)
        spun = (heads[:, 0] + 1j * heads[:, 1]) * np.exp(1j * angles)
        return np.stack([spun.real, spun.imag], axis=1).reshape(-1)

    def convolve(self, h, taps):
        """h [S, W] plus what the taps take of it and of the positions before."""
        out = h.copy()
        for s, back in itertools.product(range(len(h)), range(len(taps))):
            if s >= back:
                out[s] += taps[-1 - back] * h[s - back]
        return out

    def losses(self, tokens, states, mask):
        """-log p of each token of one row [S] under its prompt [P, d]."""
        p, width, layers = self.p, self.model.width, self.model.num_layers
        if mask.any():
            states = states[mask].astype(np.float64) @ p["adapter_kernel"]
        else:
            states = p["null_prompt"][None]
        both = np.split(self.norm(states) @ p["prompt_kernel"], 2 * layers, axis=-1)
        x = self.norm(p["embedding"][[END, *tokens[:-1]]])
        for i in range(layers):
            layer, scales = p[f"layers_{i}"], p["norm_scales"][3 * i : 3 * i + 3]
            h = self.convolve(self.norm(x, scales[0]), layer["attention_taps"])
            q, k, v = np.split(h @ layer["attention_in"], 3, axis=-1)
            k = np.stack([self.turn(row, s) for s, row in enumerate(k)])
            read = [self.attend(self.turn(q[s], s), k[: s + 1], v[: s + 1]) for s in range(len(x))]
            x = x + np.stack(read) @ layer["attention_out"]
            q = self.norm(x, scales[1]) @ layer["cross_in"]
            read = [self.attend(row, both[i], both[layers + i]) for row in q]
            x = x + np.stack(read) @ layer["cross_out"]
            h = self.convolve(self.norm(x, scales[2]), layer["mlp_taps"])
            x = x + np.maximum(h @ layer["mlp_in"], 0) ** 2 @ layer["mlp_out"].T
        h = self.norm(x, p["norm_scales"][-1])
        logits = h @ p["head_table"].T + p["log_unigram"]
        assert h.shape == (len(tokens), width)
        return np.array([-np.log(self.softmax(row)[token]) for row, token in zip(logits, tokens, strict=True)])


def reference_losses(model, params, tokens, prompt):
    reference = Reference(model, params)
    return np.stack([reference.losses(*row) for row in zip(tokens, prompt.inputs, prompt.mask, strict=True)])


def test_losses_are_those_of_a_float64_reference(model, params, tokens, prompt):
    losses = apply(model, params, tokens, prompt, "cross_entropy")
    expected = reference_losses(model, params, tokens, prompt)
    assert expected.std() > 0.5
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-4)


def test_packed_rows_are_as_by_themselves(model, params, tokens, prompt):
    lengths = np.array([[5, 3, LENGTH]])
    pack = np.concatenate([row[:length] for row, length in zip(tokens, lengths[0], strict=True)])[None]
    packed = PackedRows.in_packs(jnp.asarray(lengths), pack.shape[1], LENGTH)
    keys_values = model.apply({"params": params}, prompt, method="encode_prompt")
    losses = model.apply({"params": params}, pack, keys_values, packed=packed, method="cross_entropy")
    alone = reference_losses(model, params, tokens, prompt)
    expected = np.concatenate([row[:length] for row, length in zip(alone, lengths[0], strict=True)])
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4, atol=1e-4)


def test_a_score_is_the_chain_rule_over_real_tokens(model, params, tokens, prompt):
    lengths = np.array([LENGTH, 5, 0])
    batch = PaddedBatch(
        tokens=tokens[None],
        padding_mask=(np.arange(LENGTH) < lengths[:, None])[None],
        known_mask=np.zeros((1, ROWS, LENGTH), bool),
        prompt=jax.tree.map(lambda leaf: leaf[None], prompt),
    )
    text = TextRows([batch, batch], [np.array([50, 9, 0])] * 2)
    none = prompt.replace(mask=np.zeros_like(prompt.mask))
    for rows, given in ((text, prompt), (text.without_prompts(), none)):
        losses = reference_losses(model, params, tokens, given)
        nats = [losses[0].sum(), losses[1, :5].sum()] * 2
        scored = score(model, params, rows)
        # The empty row is left out.
        np.testing.assert_allclose(scored.nats, nats, rtol=1e-4)
        assert scored.nats_per_token == pytest.approx(sum(nats) / (2 * (LENGTH + 5)), rel=1e-4)
        bits = scored.bits_per_byte()
        assert bits.value == pytest.approx(sum(nats) / math.log(2) / 118, rel=1e-4)
        assert (bits.num_rows, bits.num_bytes) == (4, 118)
        deviation = np.array(nats) / math.log(2) - bits.value * np.array([50, 9] * 2)
        assert bits.standard_error == pytest.approx(math.sqrt(np.sum(deviation**2) * 4 / 3) / 118, rel=1e-2)


@pytest.mark.parametrize("config", [nano, tiny, mini, micro])
def test_it_has_the_denoisers_parameters(config):
    config = config.get_config()
    config.model.compute_dtype = "float32"
    denoiser = make_model(config, config.tokenizer.vocab_size, FrozenEncoder(384))
    twin = make_twin(denoiser, END)
    assert count_parameters(twin) == pytest.approx(count_parameters(denoiser), rel=0.05)
    shapes = jax.eval_shape(lambda: init_twin(twin, jax.random.key(0)))
    assert count_parameters(twin) == sum(p.size for p in jax.tree.leaves(shapes)) - config.tokenizer.vocab_size
    same = ("num_layers", "num_heads", "width", "conv_width", "vocab_size", "dropout", "prompt_dim", "dtype")
    assert all(getattr(twin, name) == getattr(denoiser, name) for name in same)
    if config.logging.name in ("mini", "micro"):
        assert twin.mlp_ratio == denoiser.mlp_ratio


@pytest.mark.parametrize("changes", [{}, {"conv_width": 0}])
def test_cached_decoding_gives_the_logits_of_the_whole_row(tokens, prompt, changes):
    model = make_nano_twin(**changes)
    params = trained_params(model)
    expected = all_logits(model, params, tokens, prompt)
    keys_values = jax.jit(lambda: model.apply({"params": params}, prompt, method="encode_prompt"))()
    # More room than the row takes: what is not written yet is not read.
    cache = empty_cache(model, ROWS, LENGTH + 3)
    read = np.full(ROWS, END, np.int32)
    step = jax.jit(functools.partial(next_logits, model))
    for position in range(LENGTH):
        logits, cache = step(params, read, jnp.int32(position), keys_values, cache)
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-4, rtol=1e-4)
        read = tokens[:, position]


def written(model, params, prompt, **settings):
    return generate(model, params, prompt, sample_keys(0, np.arange(len(prompt.mask))), LENGTH, **settings)


def test_greedy_decoding_takes_the_likeliest_token_each_time(small, prompt):
    first = written(*small, prompt, temperature=0)
    np.testing.assert_array_equal(first, written(*small, prompt, temperature=0))
    likeliest = all_logits(*small, first, prompt).argmax(axis=-1)
    for row, expected in zip(first, likeliest, strict=True):
        ends = np.flatnonzero(row == END)
        length = ends[0] + 1 if len(ends) else LENGTH
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert (row[length:] == END).all()


def test_nothing_follows_the_end_of_a_text(small, prompt):
    model, params = small
    params = dict(params, log_unigram=params["log_unigram"].at[END].set(2.5))
    rows = written(model, params, jax.tree.map(lambda leaf: leaf[[0] * 12], prompt))
    ended = np.maximum.accumulate(rows == END, axis=-1)
    assert len(set(ended.sum(axis=-1))) > 3
    np.testing.assert_array_equal(rows[ended], END)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_combines_logits(small, prompt, scale):
    rows = written(*small, prompt, temperature=0, guidance_scale=scale)
    none = prompt.replace(mask=np.zeros_like(prompt.mask))
    conditional, unconditional = (all_logits(*small, rows, given) for given in (prompt, none))
    guided = (unconditional + scale * (conditional - unconditional)).argmax(axis=-1)
    assert not (rows[:2] == END).all(axis=-1).any()
    for row, expected in zip(rows, guided, strict=True):
        length = np.append(np.flatnonzero(row == END), LENGTH - 1)[0] + 1
        np.testing.assert_array_equal(row[:length], expected[:length])


def test_given_tokens_are_kept_read_and_never_cut_off(small, tokens, prompt):
    # An end of text as likely as can be, but not where given tokens follow.
    model, params = small
    params = dict(params, log_unigram=params["log_unigram"].at[END].set(50.0))
    mask = np.zeros(tokens.shape, bool)
    mask[:, 4:7] = mask[:, 9] = True
    rows = written(model, params, prompt, temperature=0, known=Known(tokens, mask))
    np.testing.assert_array_equal(rows[mask], tokens[mask])
    assert (rows[:, :10] != END).all()
    assert (rows[:, 10:] == END).all()
    logits = all_logits(model, params, rows, prompt)
    logits[:, :10, END] = -np.inf
    np.testing.assert_array_equal(rows[~mask], logits.argmax(axis=-1)[~mask])


def test_a_given_end_with_more_behind_it_ends_nothing(small, tokens, prompt):
    known = tokens.copy()
    known[:, 4] = END
    mask = np.zeros(tokens.shape, bool)
    mask[:, :5] = mask[:, -1] = True
    rows = written(*small, prompt, temperature=0, known=Known(known, mask))
    np.testing.assert_array_equal(rows[mask], known[mask])
    assert (rows[:, 5:-1] != END).all()


def test_a_row_depends_on_its_own_key_alone(small, prompt):
    together = written(*small, prompt)
    one = jax.tree.map(lambda leaf: leaf[1:2], prompt)
    alone = generate(*small, one, sample_keys(0, np.array([1])), LENGTH)
    np.testing.assert_array_equal(alone[0], together[1])
    assert (written(*small, jax.tree.map(lambda leaf: leaf[[1, 1, 1]], prompt)) != together[1]).any()


def test_more_rows_than_fit_are_done_in_turns(small, prompt, monkeypatch):
    expected = written(*small, prompt)
    monkeypatch.setattr(ar_generation, "_ROWS_AT_ONCE", 2)
    np.testing.assert_array_equal(written(*small, prompt), expected)


def test_draws_follow_the_softmax_at_a_temperature():
    logits = np.array([0.0, 1.0, -math.inf, 2.5], np.float32)
    n = 20_000
    with jax.enable_x64(True):
        drawn = draw(jnp.tile(logits, (n, 1)), sample_keys(0, np.arange(n)), 0.7)
    assert drawn.dtype == np.int32
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    share = np.bincount(drawn, minlength=4) / n
    assert share[2] == 0
    assert np.abs(share - expected).max() < 4 * math.sqrt(0.25 / n)


def test_only_the_drawing_is_in_float64(model, params, prompt):
    known = Known(np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool))
    keys = sample_keys(0, np.arange(ROWS))
    with jax.enable_x64(True):
        arguments = model, params, prompt, known, keys, np.float64(1.0), np.float32(2.0)
        how = {"readings": ("with", "without"), "greedy": False}
        text = ar_generation._generate.lower(*arguments, **how).as_text()
    shapes = set(re.findall(r"tensor<([0-9x]*)f64>", text))
    vocabulary = f"{ROWS}x{model.vocab_size}x"
    assert vocabulary in shapes
    assert shapes <= {"", f"{ROWS}x", "1x", f"{ROWS}x1x", "1x1x", vocabulary}


PATTERN = np.array([5, 9, 7, 21, 9, 30, 7, 7, 12, 5, 33], np.int32)


def repetitive_batch(config, length=16):
    """Packs of one row that goes round a pattern of tokens from anywhere in it; the last positions are padding."""
    shape = (config.train.accumulate_steps, 8)
    starts = np.arange(shape[0] * shape[1]).reshape(shape)
    tokens = PATTERN[(starts[..., None] + np.arange(length)) % len(PATTERN)].copy()
    padding_mask = np.broadcast_to(np.arange(length) < length - 2, tokens.shape).copy()
    tokens[~padding_mask] = 0
    states = np.random.default_rng(0).normal(size=(*shape, 1, PROMPT_LENGTH, STATES)).astype(np.float16)
    prompt = Prompt(states, np.ones((*shape, 1, PROMPT_LENGTH), bool))
    lengths = np.full((*shape, 1), length, np.int32)
    return PackedBatch(tokens, padding_mask, np.zeros_like(padding_mask), lengths, prompt, longest=length)


def token_counts(model, batch):
    return np.bincount(batch.tokens[batch.padding_mask], minlength=model.vocab_size)


@pytest.fixture(scope="module")
def course():
    """A configuration, its one-layer twin, what makes its first state, the step and the repetitive batch."""
    config = make_config(num_layers=1, dropout=0.1)
    config.train.accumulate_steps = 2
    config.optimizer.update({"name": "adamw", "learning_rate": 0.01, "warmup_steps": 3, "ema_decay": 0.9})
    model = make_twin(make_model(config, config.tokenizer.vocab_size, FrozenEncoder(STATES)), END)
    batch = repetitive_batch(config)
    mesh = make_mesh(1)
    return config, model, first_state_on(mesh, config, model, batch), make_twin_step(config, model, mesh), batch


def first_state_on(mesh, config, model, batch):
    """A function that makes the first state, laid out as the step gives it back: the step compiles once."""

    def create():
        return create_twin_state(config, model, token_counts(model, batch))

    return jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))


@pytest.fixture(scope="module")
def learning(course):
    """The state after 60 steps, and the metrics of each."""
    _, _, first_state, step, batch = course
    state, metrics = first_state(), []
    for _ in range(60):
        state, figures = step(state, batch)
        metrics.append({name: float(value) for name, value in figures.items()})
    return state, metrics


def test_it_learns_a_repetitive_text(course, learning):
    _, model, *_, batch = course
    _, metrics = learning
    counts = token_counts(model, batch)
    shares, smoothed = counts / counts.sum(), (counts + 1) / (counts + 1).sum()
    assert metrics[0]["loss"] == pytest.approx(-np.sum(shares * np.log(smoothed)), rel=1e-5)
    entropy = -np.sum(shares[counts > 0] * np.log(shares[counts > 0]))
    assert np.mean([figures["loss"] for figures in metrics[-5:]]) < 0.5 * entropy


def test_its_average_goes_on_with_the_text(course, learning):
    _, model, *_, batch = course
    prompt = jax.tree.map(lambda leaf: leaf[0, :1, 0], batch.prompt)
    row = batch.tokens[0, :1, :LENGTH]
    known = Known(row, np.arange(LENGTH)[None] < 8)
    keys = sample_keys(0, np.arange(1))
    rows = generate(model, learning[0].ema_params, prompt, keys, LENGTH, temperature=0, known=known)
    np.testing.assert_array_equal(rows, row)


def test_some_prompts_are_dropped_in_training_and_some_are_not(course, learning):
    before, after = course[2]().params, learning[0].params
    for name in ("null_prompt", "adapter_kernel"):
        assert np.abs(before[name] - after[name]).max() > 0.01


def test_dropout_is_new_with_every_key(course):
    _, _, first_state, step, batch = course
    # Without prompts there are none to drop.
    batch = batch.replace(prompt=batch.prompt.replace(mask=np.zeros_like(batch.prompt.mask)))
    # The head is still zero: the loss says nothing of what it reads, but its gradient does.
    norms = []
    for seed in (0, 0, 1):
        state = first_state()
        state = state.replace(key=jax.random.fold_in(state.key, seed))
        norms.append(float(step(state, batch)[1]["grad_norm"]))
    assert norms[0] == norms[1] != norms[2]


def test_a_step_at_rate_zero_moves_nothing(course):
    _, _, first_state, step, batch = course
    # The optimiser's first step moves nothing either way.
    state, _ = step(first_state(), batch)
    before = jax.tree.map(np.array, state.params)
    state, _ = step(state.replace(learning_rate_share=0 * state.learning_rate_share), batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state.params))


def test_what_stands_at_padding_is_not_learned(course, learning):
    _, _, first_state, step, batch = course
    other = batch.replace(tokens=np.where(batch.padding_mask, batch.tokens, 3))
    _, metrics = step(first_state(), other)
    assert {name: float(value) for name, value in metrics.items()} == learning[1][0]


@pytest.mark.slow
def test_two_devices_take_the_same_step(course, learning):
    config, model, *_, batch = course
    mesh = make_mesh(2)
    step, state = make_twin_step(config, model, mesh), first_state_on(mesh, config, model, batch)()
    for expected in learning[1][:4]:
        state, metrics = step(state, batch)
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_rises_and_falls_within_the_budget():
    def shares(num_steps, warmup_steps):
        return [learning_rate_share(step / num_steps, step, warmup_steps) for step in range(num_steps + 1)]

    without = shares(8, 0)
    np.testing.assert_allclose(without[1:], [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(1, 9)], atol=1e-9)
    # Two steps of warm-up; and of a hundred steps only the half of the budget.
    np.testing.assert_allclose(shares(8, 2), np.array(without) * np.minimum(1, np.arange(9) / 2), atol=1e-9)
    np.testing.assert_allclose(shares(8, 100), np.array(without) * np.minimum(1, np.arange(9) / 4), atol=1e-9)
    # A slow machine has taken few steps when its time is over.
    assert learning_rate_share(1.2, 3, 100) == 0.0


class ScriptedStep:
    """Counts steps as the only parameter; each takes half a second by the loop's own clock."""

    def __init__(self, clock, after=None):
        self.clock, self.after, self.rates = clock, after or {}, []

    def compile(self, state, batch):
        self.clock.now += 100.0
        return 100.0

    def __call__(self, state, batch):
        self.clock.now += 0.5
        self.rates.append(float(state.learning_rate_share))
        step = int(state.step) + 1
        self.after.get(step, lambda: None)()
        return state.replace(step=np.asarray(step), params={"w": np.full(2, float(step))}), {
            "loss": 2.0,
            "grad_norm": 1.0,
        }


@dataclasses.dataclass
class ScriptedState:
    step: int
    params: dict
    learning_rate_share: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(ScriptedState, ["step", "params", "learning_rate_share"], [])


class Stop:
    asked = False

    def ask(self):
        self.asked = True

    def __bool__(self):
        return self.asked


def run_loop(workdir, monkeypatch, *, budget, losses=None, after=None, stop=None, first_step=0):
    """Runs the loop on a clock of its own; returns the step function and the evaluated steps."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("ar_training.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    evaluated = []

    def evaluate(state):
        clock.now += 50.0
        evaluated.append(int(state.step))
        nats = (losses or {}).get(int(state.step), 9.0)
        return {"nats_per_token": nats, "bits_per_byte": nats / 2}

    from ar_training import _KEPT

    step = ScriptedStep(clock, after)
    state = ScriptedState(np.asarray(first_step), {"w": np.zeros(2, np.float32)}, jnp.ones(()))
    batch = types.SimpleNamespace(longest=8, padding_mask=np.ones((1, 1, 5), bool))
    with Checkpoints(workdir, _KEPT) as checkpoints:
        loop = TwinLoop(
            budget=budget,
            warmup_steps=3,
            eval_every=4,
            every_steps=5,
            workdir=workdir,
            checkpoints=checkpoints,
            writer=types.SimpleNamespace(write_scalars=lambda **_: None, flush=lambda: None),
            stop=Stop() if stop is None else stop,
            evaluate=evaluate,
            progress=load_totals(workdir, first_step, 0),
        )
        loop.run(state, step, itertools.repeat(batch))
        return loop, step, evaluated, checkpoints.steps(), checkpoints.best_step()


def test_it_stops_at_the_time_limit_and_keeps_the_best(tmp_path, monkeypatch):
    losses = {4: 3.0, 8: 2.0, 12: 2.5, 13: 2.75}
    loop, step, evaluated, steps, best = run_loop(tmp_path, monkeypatch, budget=Budget(seconds=6.4), losses=losses)
    # 13 steps of half a second: compiling and evaluating do not count.
    assert loop.finished
    assert loop.progress.step == 13
    assert evaluated == [4, 8, 12, 13]
    assert (steps, best) == ([8, 13], 8)
    with Checkpoints(tmp_path) as checkpoints:
        params = checkpoints.restore({"params": {"w": jax.ShapeDtypeStruct((2,), np.float32)}}, "best")["params"]
    np.testing.assert_array_equal(params["w"], 8.0)
    assert step.rates == pytest.approx([learning_rate_share(0.5 * i / 6.4, i, 3) for i in range(13)])


def test_a_stop_saves_and_the_next_sitting_takes_the_time_that_is_left(tmp_path, monkeypatch):
    stop = Stop()
    budget = Budget(seconds=6.4)
    loop, _, evaluated, steps, _ = run_loop(tmp_path, monkeypatch, budget=budget, after={6: stop.ask}, stop=stop)
    assert not loop.finished
    assert (evaluated, steps) == ([4], [4, 6])
    losses = {8: 1.0, 12: 2.0, 13: 1.5}
    loop, step, evaluated, steps, best = run_loop(tmp_path, monkeypatch, budget=budget, losses=losses, first_step=6)
    assert loop.finished
    assert loop.progress.step == 13
    assert (evaluated, steps, best) == ([8, 12, 13], [8, 13], 8)
    assert step.rates[0] == pytest.approx(learning_rate_share(3.0 / 6.4, 6, 3))


def test_a_run_of_some_steps_takes_them_whatever_the_time(tmp_path, monkeypatch):
    stop, budget = Stop(), Budget(num_steps=10)
    loop, _, _, steps, _ = run_loop(tmp_path, monkeypatch, budget=budget, after={6: stop.ask}, stop=stop)
    assert (loop.finished, steps) == (False, [4, 6])
    loop, step, evaluated, steps, _ = run_loop(tmp_path, monkeypatch, budget=budget, first_step=6)
    assert loop.finished
    assert (loop.progress.step, evaluated) == (10, [8, 10])
    assert step.rates == pytest.approx([learning_rate_share(i / 10, i, 3) for i in range(6, 10)])


def test_a_stop_before_the_first_step_is_saved_too(tmp_path, monkeypatch, capsys):
    stop = Stop()
    stop.ask()
    for budget in (Budget(seconds=6.4), Budget(num_steps=10)):
        _, _, _, steps, _ = run_loop(tmp_path, monkeypatch, budget=budget, stop=stop)
        assert steps == [0]
        assert "stopped at step 0, 0% of the way" in capsys.readouterr().out


def test_the_time_left_is_that_of_the_steps_left():
    progress = Progress(0, step=3, seconds=12.0)
    assert Budget(num_steps=10).seconds_left(progress) == pytest.approx(7 * 4.0)
    assert Budget(seconds=30.0).seconds_left(progress) == pytest.approx(18.0)
    assert Budget(seconds=11.0).seconds_left(progress) == 0.0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    loop = TwinLoop(Budget(num_steps=4), 3, 4, 5, tmp_path, None, None, Stop(), None, Progress(0, step=3))
    with pytest.raises(UserError, match=r"not finite at step 3 \(loss=nan\)"):
        loop._report({"loss": math.nan, "grad_norm": 1.0})


def ar_twin(*arguments, folder):
    command = [sys.executable, str(ROOT / "benchmarks/ar_twin.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_help_comes_at_once(tmp_path):
    code = "import sys, ar_twin; print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "benchmarks", check=True
    )
    assert done.stdout == "[]\n"
    done = ar_twin("--help", folder=tmp_path)
    assert done.returncode == 0
    assert "--minutes:" in done.stdout


NANO = f"--config={ROOT}/configs/nano.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        ([NANO, "--minutes=0"], "--minutes=0.0: give a number above 0"),
        ([NANO, "--minutes=soon"], "minutes"),
        ([NANO, "--num_steps=0"], "num_steps"),
        ([NANO, "--minutes=3", "--num_steps=5"], "--minutes=3.0 --num_steps=5: give one of them"),
        ([NANO, "--dropout=1.5"], "config.model.dropout=1.5"),
        ([NANO, "--split=train"], "--split=train: give validation or test"),
        ([NANO, "--temperature=-1"], "--temperature=-1.0"),
        ([NANO, "--eval_every=0"], "--eval_every=0"),
        ([NANO, "--seq_len=65"], "--seq_len=65"),
        ([NANO, "--prompts_file=nowhere.txt"], "--prompts_file=nowhere.txt cannot be read"),
        ([NANO, "--minuts=3"], "minuts"),
        ([NANO, "train"], "'train' is not a flag"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(tmp_path, arguments, message):
    done = ar_twin(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_one_command_trains_evaluates_and_samples(tmp_path, animals):
    (tmp_path / "prompts.txt").write_text("Write about a whale\nWrite about a camel\n")
    command = [
        NANO,
        *animals,
        "--workdir=run",
        "--minutes=0.05",
        "--dropout=0.05",
        "--eval_every=10",
        "--prompts_file=prompts.txt",
        "--num_samples=2",
        "--eval_samples=2",
        "--temperature=0.5",
        "--output=samples.jsonl",
    ]
    done = ar_twin(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(sample["prompt"][-5:], sample["index"]) for sample in samples] == [
        ("whale", 0),
        ("whale", 1),
        ("camel", 0),
        ("camel", 1),
    ]
    needed = {"text", "seed", "scheduler", "num_steps", "temperature", "checkpoint_step", "seq_len", "config_hash"}
    assert needed <= samples[0].keys()
    result = json.loads((tmp_path / "run/eval_validation.json").read_text())
    assert result["dropout"] == 0.05
    assert result["training_seconds"] <= 3.0 + 2.0
    # A few seconds teach it the frequencies of the tokens at least, and nothing of an order that is wrong.
    bits = {name: of["value"] for name, of in result["bits_per_byte"].items()}
    assert bits["with_prompt"] != bits["without_prompt"]
    assert bits["with_prompt"] < bits["frequencies"] + 0.3
    assert bits["with_prompt"] < bits["shuffled"]
    assert result["training_tokens"] > 0 and result["parameters"] > 10_000
    assert result["judged"]["texts"] == 2
    assert {"samples", "real text"} <= result["samples"].keys()
    assert {"entropy", "overlap_4", "mean_words_whole"} <= result["samples"]["samples"].keys()
    # Of the sizes 1, 2, 4 and 8 those that occur in so few texts.
    assert len(result["infill_accuracy"]) >= 3
    assert all(0 <= of["true"] <= 1 and of["num_tokens"] > 0 for of in result["infill_accuracy"].values())
    assert result["held_out"]["nats_per_token"] > 0
    assert result["sampling"]["temperature"] == samples[0]["temperature"] == 0.5
    assert list((tmp_path / "run/eval_validation").glob("events.*"))

    # The time is over: the same command evaluates and samples again, and gets the same.
    command.remove("--dropout=0.05")
    again = ar_twin(*command, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "compiled the step" not in again.stdout
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == samples
    assert json.loads((tmp_path / "run/eval_validation.json").read_text()) == result
    # Whoever takes it for a denoiser is told so.
    with pytest.raises(UserError, match="another architecture"):
        load_run(tmp_path / "run")
