"""The training step: what it computes, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import FrozenEncoder

from configs import nano
from sunfish_jax.data.batches import Batch
from sunfish_jax.diffusion.noisy_rows import NoisyRows, first_estimates, self_conditioned_rows
from sunfish_jax.diffusion.process import stratified_uniforms
from sunfish_jax.models.denoiser import compute_params, make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.passes import draw_rows, estimates, pass_loss
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import create_state, learning_rate_schedule
from sunfish_jax.training.step import ema_decay, make_train_step

VOCAB, LENGTH, PROMPT_LENGTH = 60, 16, 4
ENCODER = FrozenEncoder(output_dim=24)


@pytest.fixture
def config():
    config = nano.get_config()
    config.model.compute_dtype = "float32"
    config.model.dropout = 0.1
    config.model.num_layers = 1
    config.optimizer.warmup_steps = 1
    config.train.accumulate_steps = 2
    config.train.batch_size = 4
    return config


def random_batch(accumulate=2, rows=4):
    rng = np.random.default_rng(0)
    shape = (accumulate, rows, LENGTH)
    known = rng.random(shape) < 0.3
    known[:, ::2] = False
    return Batch(
        tokens=rng.integers(0, VOCAB, shape, dtype=np.int32),
        padding_mask=np.ones(shape, bool),
        known_mask=known,
        prompt=Prompt(
            inputs=rng.normal(size=(accumulate, rows, PROMPT_LENGTH, ENCODER.output_dim)).astype(np.float16),
            mask=rng.random((accumulate, rows, PROMPT_LENGTH)) < 0.8,
        ),
    )


def moved_state(config, model):
    """Its parameters away from the zeros they start from, so that prompts and estimates change the losses."""
    rng = np.random.default_rng(1)
    state = create_state(config, model)
    moved = {
        path: p if path[-1].key == "log_unigram" else p + 0.1 * rng.normal(size=p.shape).astype(np.float32)
        for path, p in jax.tree.leaves_with_path(state.params)
    }
    return state.replace(params=jax.tree.map_with_path(lambda path, _: moved[path], state.params))


def trained(config, batch, devices=1, steps=3):
    """The losses of a few steps, and the state after them."""
    model = make_model(config, VOCAB, ENCODER)
    mesh = make_mesh(devices)
    state = moved_state(config, model)
    state = jax.device_put(state, state_shardings(state, mesh))
    step = make_train_step(config, model, mesh)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_states_close(first, second, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_one_and_two_devices_compute_the_same(config):
    # Adam's first steps divide rounding errors by themselves; a larger epsilon is not ours to set, so the
    # comparison is of the losses over several steps, each of which follows from the whole state before it.
    # Kernels of three layers, of which one device orthogonalises two.
    config.model.num_layers = 3
    one, _ = trained(config, random_batch(), devices=1)
    two, _ = trained(config, random_batch(), devices=2)
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_devices_share_muons_work(config):
    """What each device multiplies in an update, besides the few kernels that have no equals in other layers."""
    # An odd number: `full` too has no multiple of its devices.
    config.model.num_layers = 3
    config.model.width = 128

    def operations(devices):
        model, mesh = make_model(config, VOCAB, ENCODER), make_mesh(devices)
        state = jax.eval_shape(lambda: create_state(config, model))
        step = make_train_step(config, model, mesh)
        gradients = jax.eval_shape(step.gradients, state, random_batch())
        return step.update.lower(state, gradients).compile().cost_analysis()["flops"]

    assert operations(2) < 0.75 * operations(1)


def test_accumulation_is_a_larger_batch(config):
    # With known tokens unevenly spread, a mean of means would differ.
    batch = random_batch()
    whole = jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), batch)
    split, _ = trained(config, batch)
    together, _ = trained(config, whole)
    np.testing.assert_allclose(split, together, rtol=1e-4)


def test_the_same_steps_give_the_same_bits(config):
    _, first = trained(config, random_batch())
    _, second = trained(config, random_batch())
    assert_states_close(first, second, 0.0)


def test_the_compiled_step_is_the_same_and_its_update_is_compiled_once(config):
    model, mesh = make_model(config, VOCAB, ENCODER), make_mesh(1)
    step, state = make_train_step(config, model, mesh), create_state(config, model)
    compiled, jitted_update = [], step.update

    class CountingUpdate:
        def __call__(self, *arguments):
            return jitted_update(*arguments)

        def lower(self, *arguments):
            compiled.append(arguments)
            return jitted_update.lower(*arguments)

    step.update = CountingUpdate()
    batches = random_batch(rows=4), random_batch(rows=2)
    losses = []
    for batch in batches:
        compiled_step = step.compile(state, batch)
        expected, _ = step(jax.tree.map(jnp.copy, state), batch)
        state, metrics = compiled_step(state, batch)
        losses.append(float(metrics["loss"]))
        for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(compiled) == 1
    assert losses[0] != losses[1]


def test_noise_changes_with_the_step(config):
    config.optimizer.learning_rate = 0.0
    config.diffusion.schedule_learning_rate = 0.0
    losses, _ = trained(config, random_batch())
    assert len(set(losses)) == 3


def test_the_state_moves_as_it_should(config):
    model = make_model(config, VOCAB, ENCODER)
    counts = np.arange(VOCAB)
    state = create_state(config, model, counts)
    before = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    np.testing.assert_allclose(np.exp(before.params["log_unigram"]), (counts + 1) / (counts + 1).sum(), rtol=1e-5)
    step = make_train_step(config, model, make_mesh(1))
    # The head and the layers' outputs start at zero, so it takes a few steps until everything moves.
    for _ in range(5):
        state, _ = step(state, random_batch())
    after = state
    assert int(after.step) == 5
    np.testing.assert_array_equal(after.params["log_unigram"], before.params["log_unigram"])
    moved = {
        jax.tree_util.keystr(path): bool(np.any(a != b))
        for (path, a), b in zip(
            jax.tree.leaves_with_path(after.params), jax.tree.leaves(before.params), strict=True
        )
    }
    assert [path for path, did in moved.items() if not did] == ["['log_unigram']"]
    assert float(after.schedule.mu) != float(before.schedule.mu)


def test_ema_follows_its_definition(config):
    model = make_model(config, VOCAB, ENCODER)
    state = create_state(config, model)
    initial = jax.device_get(state.params["embedding"])
    state, _ = make_train_step(config, model, make_mesh(1))(state, random_batch())
    # At the first step the decay is 1/10.
    np.testing.assert_allclose(
        state.ema_params["embedding"], 0.1 * initial + 0.9 * state.params["embedding"], rtol=1e-5, atol=1e-6
    )


def test_ema_decay_warms_up():
    assert float(ema_decay(0.999, jnp.int32(0))) == pytest.approx(0.1)
    assert float(ema_decay(0.999, jnp.int32(100_000))) == pytest.approx(0.999)


def test_learning_rate_warms_up_and_decays_to_zero(config):
    config.optimizer.warmup_steps = 10
    rate = learning_rate_schedule(config.optimizer, 100)
    peak = config.optimizer.learning_rate
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, peak / 2, peak], rtol=1e-5)
    assert float(rate(55)) == pytest.approx(peak / 2, rel=1e-3)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-9)


def test_untrained_loss_is_the_single_token_posteriors(config):
    """The whole path from tokens to loss against a float64 loop over positions."""
    model = make_model(config, VOCAB, ENCODER)
    params = create_state(config, model, np.arange(VOCAB)).params
    gamma = jnp.asarray([-2.0, 0.0, 2.0, 4.0])
    keys = jax.random.split(jax.random.key(5), 3)
    batch = random_batch(accumulate=1)
    rows = draw_rows(batch, gamma[None], keys, 8 + jnp.arange(4)[None], dropout=0.0)
    rows, batch = jax.tree.map(lambda leaf: leaf[0], (rows, batch))
    vocabulary = vocabulary_of(model, params)
    no_estimates = jnp.zeros((4, LENGTH, model.embedding_dim))
    _, row_losses = pass_loss(model, params, vocabulary, rows, no_estimates, 1.0)

    table = np.asarray(vocabulary.embeddings, np.float64)
    bias = np.asarray(params["log_unigram"], np.float64)
    for row in range(4):
        row_key = jax.random.fold_in(keys[0], 8 + row)
        noise = np.asarray(jax.random.normal(row_key, (LENGTH, model.embedding_dim)), np.float64)
        g = float(gamma[row])
        alpha, sigma = np.sqrt(1 / (1 + np.exp(g))), np.sqrt(1 / (1 + np.exp(-g)))
        total = 0.0
        for position in range(LENGTH):
            if batch.known_mask[row, position]:
                continue
            token = batch.tokens[row, position]
            z = alpha * table[token] + sigma * noise[position]
            scores = alpha / sigma**2 * (table @ z) + bias
            total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[token]
        assert float(row_losses[row]) == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_known_positions_are_given_clean():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(VOCAB, 8)), jnp.float32)
    batch = jax.tree.map(lambda leaf: leaf[0], random_batch())
    rows = NoisyRows(batch.tokens, batch.known_mask, jnp.zeros(4), jnp.ones((4, LENGTH, 8)))
    z = np.asarray(rows.noisy_embeddings(table))
    clean = np.asarray(table)[batch.tokens]
    np.testing.assert_array_equal(z[batch.known_mask], clean[batch.known_mask])
    np.testing.assert_allclose(z[~batch.known_mask], np.sqrt(0.5) * (clean[~batch.known_mask] + 1.0), rtol=1e-5)


def vocabulary_of(model, params):
    return model.apply({"params": params}, method="vocabulary")


@pytest.mark.parametrize("num_passes", [1, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 6])
@pytest.mark.parametrize("every", [1, 3, 4])
def test_self_conditioned_rows_are_every_so_manieth_of_the_step(num_passes, num_rows, every):
    for num_devices in (1, 2, 3):
        chosen = self_conditioned_rows(num_passes, num_rows, num_devices, every)
        assert chosen.shape[2] <= num_rows
        numbers = []
        for device, indices in enumerate(chosen.reshape(num_devices, -1)):
            passes, rows = np.divmod(indices[indices >= 0], num_rows)
            numbers += list((passes * num_devices + device) * num_rows + rows)
        assert sorted(numbers) == list(range(0, num_passes * num_devices * num_rows, every))
        # What no device needs is not computed.
        assert (chosen >= 0).sum(axis=(1, 2)).max() > chosen[0].size - len(chosen[0])
    assert self_conditioned_rows(num_passes, num_rows, 1, 0).size == 0


def test_first_estimates_fill_only_the_chosen_rows_and_stop_gradients():
    z = jnp.ones((6, 2, 3))

    def x_hat(scale, chosen):
        return first_estimates(lambda rows: scale * z[rows], z.shape, np.array(chosen))

    expected = np.zeros((6, 2, 3))
    expected[[0, 4, 5]] = 5.0
    np.testing.assert_array_equal(x_hat(5.0, [[4, 0], [5, -1]]), expected)
    assert float(jax.grad(lambda scale: x_hat(scale, [[4, 0], [5, -1]]).sum())(5.0)) == 0.0
    assert not np.any(x_hat(5.0, np.zeros((0, 2), int)))


def test_estimates_are_the_models_own_for_each_row_by_itself(config):
    model = make_model(config, VOCAB, ENCODER)
    params = moved_state(config, model).params
    vocabulary = vocabulary_of(model, params)
    batch = jax.tree.map(jnp.asarray, random_batch(accumulate=2, rows=3))
    keys, numbers = jax.random.split(jax.random.key(5), 3), jnp.arange(6).reshape(2, 3)
    rows = draw_rows(batch, jnp.linspace(-1.0, 3.0, 6).reshape(2, 3), keys, numbers, dropout=0.5)
    got = estimates(model, params, vocabulary, rows, jnp.asarray([[1, 5], [3, -1]])).reshape(6, LENGTH, -1)
    np.testing.assert_array_equal(got[jnp.asarray([0, 2, 4])], 0.0)
    for index in (1, 3, 5):
        row = jax.tree.map(lambda leaf, index=index: leaf.reshape(6, *leaf.shape[2:])[index, None], rows)
        z = row.noisy_embeddings(vocabulary.embeddings)
        prompt = model.apply({"params": params}, row.prompt, method="encode_prompt")
        given = (vocabulary, z, row.gamma, jnp.zeros_like(z), row.known_mask, prompt)
        expected = model.apply({"params": params}, *given, method="estimate")[0]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got[index], expected, atol=1e-4)


def test_the_steps_gradient_is_that_of_the_mean_loss(config):
    """All passes and both ways to the tables, against one automatic gradient of the whole."""
    config.optimizer.name = "adamw"
    model, mesh = make_model(config, VOCAB, ENCODER), make_mesh(1)
    state = moved_state(config, model)
    batch = jax.tree.map(jnp.asarray, random_batch())
    got = make_train_step(config, model, mesh).gradients(state, batch)

    gamma_key, *keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
    gamma = state.schedule.gamma(stratified_uniforms(gamma_key, 8)).reshape(2, 4)
    rows = draw_rows(batch, gamma, keys, jnp.arange(8).reshape(2, 4), config.diffusion.conditioning_dropout)
    num_targets = np.sum(~batch.known_mask)

    def loss(params):
        vocabulary = vocabulary_of(model, params)
        x_hat = estimates(model, params, vocabulary, rows, jnp.asarray([[0, 4]]))
        passes = [jax.tree.map(lambda leaf, a=a: leaf[a], (rows, x_hat)) for a in range(2)]
        return sum(pass_loss(model, params, vocabulary, *one, num_targets)[0] for one in passes)

    value, expected = jax.value_and_grad(loss)(state.params)
    assert float(got.loss) == pytest.approx(float(value), rel=1e-5)
    expected["log_unigram"] = jnp.zeros(VOCAB)
    for (path, g), e in zip(jax.tree.leaves_with_path(got.params), jax.tree.leaves(expected), strict=True):
        tolerance = 1e-5 * max(1e-3, float(jnp.abs(e).max()))
        np.testing.assert_allclose(g, e, atol=10 * tolerance, err_msg=jax.tree_util.keystr(path))
    assert np.abs(expected["estimate_kernel"]).max() > 0


def test_prompts_are_dropped_at_the_stated_rate():
    batch = random_batch(1, 400)
    batch = batch.replace(prompt=batch.prompt.replace(mask=np.ones_like(batch.prompt.mask)))
    keys, numbers = jax.random.split(jax.random.key(5), 3), jnp.arange(400)[None]

    def given(dropout):
        rows = draw_rows(batch, jnp.zeros((1, 400)), keys, numbers, dropout)
        mask = np.asarray(rows.prompt.mask[0])
        assert (mask.all(axis=-1) == mask.any(axis=-1)).all()
        return mask.any(axis=-1)

    assert given(0.0).all()
    assert not given(1.0).any()
    # A binomial of 400: standard error 0.022.
    assert abs(given(0.25).mean() - 0.75) < 0.07


def test_what_products_read_as_it_is_is_cast_to_the_compute_dtype(config):
    model = make_model(config, VOCAB, ENCODER)
    narrow = compute_params(create_state(config, model).params, jnp.bfloat16)
    kept = {path[-1].key for path, leaf in jax.tree.leaves_with_path(narrow) if leaf.dtype == jnp.float32}
    vectors = {"known_vector", "null_prompt", "log_unigram", "bias_in", "attention_taps", "mlp_taps"}
    assert kept == {"embedding", "head_table"} | vectors
