"""The training step: what it computes, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import FrozenEncoder

from configs import nano
from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.diffusion.process import noise_quantiles, stratified_uniforms
from sunfish_jax.diffusion.self_conditioning import first_estimates, self_conditioned_packs
from sunfish_jax.models.denoiser import compute_params, make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.passes import DrawnPacks, draw_packs, estimates, have_given, pass_loss, targets
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import create_state, learning_rate_schedule
from sunfish_jax.training.step import BatchGradients, TrainStep, ema_decay, make_train_step

VOCAB, PROMPT_LENGTH = 60, 4
# Packs of two rows, the longest of 9, with positions of no row behind them.
ROWS, LONGEST, SIZE = 2, 9, 19
COUNTS = np.arange(VOCAB)
ENCODER = FrozenEncoder(output_dim=24)


def make_config(optimizer="adamw"):
    config = nano.get_config()
    config.model.compute_dtype = "float32"
    config.model.dropout = 0.1
    config.model.num_layers = 1
    config.model.conv_width = 3
    config.diffusion.self_conditioning_every = 4
    config.optimizer.name = optimizer
    config.optimizer.warmup_steps = 1
    config.train.accumulate_steps = 2
    config.train.batch_size = 4
    return config


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def model(config):
    return make_model(config, VOCAB, ENCODER)


@pytest.fixture(scope="module")
def step(config, model):
    return make_train_step(config, model, make_mesh(1))


@pytest.fixture(scope="module")
def new_state(config, model):
    """Makes a state for each step to give up."""
    return jax.jit(lambda: create_state(config, model, COUNTS))


def random_batch(accumulate=2, packs=4):
    rng = np.random.default_rng(0)
    shape = (accumulate, packs)
    # Of two lengths alone: rows by themselves are compiled for each.
    lengths = rng.choice([4, LONGEST], (*shape, ROWS))
    # A row that is missing, and one as long as may be.
    lengths[0, 0] = LONGEST, 0
    known = rng.random((*shape, SIZE)) < 0.3
    known[:, ::2] = False
    return PackedBatch(
        tokens=rng.integers(0, VOCAB, (*shape, SIZE), dtype=np.int32),
        padding_mask=np.arange(SIZE) < lengths.sum(-1, keepdims=True),
        known_mask=known,
        lengths=lengths.astype(np.int32),
        prompt=Prompt(
            inputs=rng.normal(size=(*shape, ROWS, PROMPT_LENGTH, ENCODER.output_dim)).astype(np.float16),
            mask=rng.random((*shape, ROWS, PROMPT_LENGTH)) < 0.8,
        ),
        longest=LONGEST,
    )


def in_one_pass(batch):
    return jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), batch)


def spans(lengths):
    """The positions of each row of one pack."""
    ends = np.cumsum(lengths)
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def moved(state):
    """Its parameters away from the zeros they start from, so that prompts and estimates change the losses."""
    rng = np.random.default_rng(1)
    leaves = {
        path: p if path[-1].key == "log_unigram" else p + 0.1 * rng.normal(size=p.shape).astype(np.float32)
        for path, p in jax.tree.leaves_with_path(state.params)
    }
    return state.replace(params=jax.tree.map_with_path(lambda path, _: leaves[path], state.params))


def trained(step, state, batch):
    """The losses of a few steps, and the state after them."""
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_states_close(first, second, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_one_and_two_devices_compute_the_same():
    # Adam's first steps divide rounding errors by themselves; a larger epsilon is not ours to set, so the
    # comparison is of the losses over several steps, each of which follows from the whole state before it.
    # What reads and what writes are three matrices of one shape each, of which one device orthogonalises two.
    config = make_config("muon")
    config.model.num_layers = 3
    model = make_model(config, VOCAB, ENCODER)
    state = moved(jax.jit(lambda: create_state(config, model, COUNTS))())

    def losses(devices):
        mesh = make_mesh(devices)
        placed = jax.device_put(jax.tree.map(jnp.copy, state), state_shardings(state, mesh))
        return trained(make_train_step(config, model, mesh), placed, random_batch())[0]

    np.testing.assert_allclose(losses(1), losses(2), rtol=1e-4)


def test_devices_share_muons_work(monkeypatch):
    """What each device multiplies in an update of equal kernels."""
    # An odd number: `full` too has no multiple of its devices.
    kernels = {f"{name}_kernel": jnp.zeros((256, 512)) for name in "abc"}
    monkeypatch.setattr("sunfish_jax.training.state.init_params", lambda model, key: kernels.copy())
    config = make_config("muon")
    model = make_model(config, VOCAB, ENCODER)
    state = jax.eval_shape(lambda: create_state(config, model))
    gradients = BatchGradients(state.params, jnp.float32(0.0), state.schedule, state.schedule_opt_state)

    def operations(devices):
        update = make_train_step(config, model, make_mesh(devices)).update
        return update.lower(state, gradients).compile().cost_analysis()["flops"]

    assert operations(2) < 0.75 * operations(1)


def test_the_same_steps_give_the_same_bits(step, new_state):
    _, first = trained(step, moved(new_state()), random_batch())
    _, second = trained(step, moved(new_state()), random_batch())
    assert_states_close(first, second, 0.0)


def test_the_compiled_step_is_the_same_and_its_update_is_compiled_once(step, new_state):
    compiled, state = [], new_state()

    class CountingUpdate:
        def __call__(self, *arguments):
            return step.update(*arguments)

        def lower(self, *arguments):
            compiled.append(arguments)
            return step.update.lower(*arguments)

    counting_step = TrainStep(step.gradients, CountingUpdate())
    losses = []
    for batch in (random_batch(), in_one_pass(random_batch())):
        compiled_step = counting_step.compile(state, batch)
        expected, _ = step(jax.tree.map(jnp.copy, state), batch)
        state, metrics = compiled_step(state, batch)
        losses.append(float(metrics["loss"]))
        for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(compiled) == 1
    assert losses[0] != losses[1]


def test_noise_changes_with_the_step(step, new_state):
    # At one level, and before training, when neither dropout nor the prompts change the loss.
    state = new_state()
    state = state.replace(schedule=state.schedule.replace(log_beta=jnp.float32(-jnp.inf)))
    losses = [float(step.gradients(state.replace(step=jnp.int32(i)), random_batch()).loss) for i in range(3)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3


def test_the_state_moves_as_it_should(step, new_state):
    state = new_state()
    before = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    np.testing.assert_allclose(np.exp(before.params["log_unigram"]), (COUNTS + 1) / (COUNTS + 1).sum(), rtol=1e-5)
    # The head and the layers' outputs start at zero, so it takes a few steps until everything moves.
    for _ in range(5):
        state, _ = step(state, random_batch())
    after = jax.device_get(state.params)
    assert int(state.step) == 5
    still = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(before.params), strict=True)
        if np.array_equal(a, b)
    ]
    assert still == ["['log_unigram']"]
    assert float(state.schedule.mu) != float(before.schedule.mu)


def test_ema_follows_its_definition(step, new_state):
    state = new_state()
    initial = jax.device_get(state.params["embedding"])
    # The first step's learning rate is zero.
    state, _ = step(state, random_batch())
    first = jax.device_get(state.ema_params["embedding"])
    state, _ = step(state, random_batch())
    second = state.params["embedding"]
    assert np.abs(second - initial).max() > 1e-3
    # At the second step the decay is 2/11.
    np.testing.assert_allclose(
        state.ema_params["embedding"], first + (1 - 2 / 11) * (second - first), rtol=1e-5, atol=1e-6
    )


def test_ema_decay_warms_up():
    assert float(ema_decay(0.999, jnp.int32(0))) == pytest.approx(0.1)
    assert float(ema_decay(0.999, jnp.int32(100_000))) == pytest.approx(0.999)


def test_learning_rate_warms_up_and_decays_to_zero():
    config = make_config().optimizer
    config.warmup_steps = 10
    rate = learning_rate_schedule(config, 100)
    peak = config.learning_rate
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, peak / 2, peak], rtol=1e-5)
    assert float(rate(55)) == pytest.approx(peak / 2, rel=1e-3)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-9)


def test_untrained_loss_is_the_single_token_posteriors(model, new_state):
    """The whole path from tokens to loss against a float64 loop over positions."""
    params = new_state().params
    gamma = jnp.asarray([[-2.0, 3.0], [0.0, 1.0], [2.0, -1.0], [4.0, 0.5]])
    keys = jax.random.split(jax.random.key(5), 3)
    batch = random_batch(accumulate=1)
    packs = jax.jit(draw_packs)(batch, gamma[None], keys, 8 + jnp.arange(4)[None], dropout=0.0)
    packs, batch = jax.tree.map(lambda leaf: leaf[0], (packs, batch))
    vocabulary = vocabulary_of(model, params)
    no_estimates = jnp.zeros((4, SIZE, model.embedding_dim))
    loss, of_rows = jax.jit(pass_loss, static_argnums=0)(model, params, {}, vocabulary, packs, no_estimates, 2.0)

    table = np.asarray(vocabulary.embeddings, np.float64)
    bias = np.asarray(params["log_unigram"], np.float64)
    in_all = 0.0
    for pack in range(4):
        pack_key = jax.random.fold_in(keys[0], 8 + pack)
        noise = np.asarray(jax.random.normal(pack_key, (SIZE, model.embedding_dim)), np.float64)
        for row, span in enumerate(spans(batch.lengths[pack])):
            g = float(gamma[pack, row])
            alpha, sigma = np.sqrt(1 / (1 + np.exp(g))), np.sqrt(1 / (1 + np.exp(-g)))
            total, count = 0.0, 0
            for position in range(span.start, span.stop):
                if batch.known_mask[pack, position]:
                    continue
                token = batch.tokens[pack, position]
                z = alpha * table[token] + sigma * noise[position]
                scores = alpha / sigma**2 * (table @ z) + bias
                total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[token]
                count += 1
            np.testing.assert_allclose(of_rows[pack, row], [total, count], rtol=1e-4, atol=1e-4)
            in_all += total
    assert float(loss) == pytest.approx(in_all / 2.0, rel=1e-4)


def test_known_positions_are_given_clean(model, new_state):
    params = new_state().params
    batch, vocabulary = random_batch(), vocabulary_of(model, params)
    keys, numbers = jax.random.split(jax.random.key(5), 3), jnp.arange(8).reshape(2, 4)
    packs = jax.jit(draw_packs)(batch, jnp.zeros((2, 4, ROWS)), keys, numbers, dropout=0.0)
    packs, known, tokens = jax.tree.map(lambda leaf: leaf[0], (packs, batch.known_mask, batch.tokens))
    z, _ = jax.jit(DrawnPacks.inputs, static_argnums=1)(packs, model, {"params": params}, vocabulary)
    clean = np.asarray(vocabulary.embeddings)[tokens]
    noise = [jax.random.normal(key, (SIZE, model.embedding_dim)) for key in packs.noise_key]
    np.testing.assert_array_equal(z[known], clean[known])
    np.testing.assert_allclose(z[~known], np.sqrt(0.5) * (clean + np.stack(noise))[~known], rtol=1e-4, atol=1e-5)


def test_targets_are_the_positions_of_rows_that_are_not_given():
    batch = random_batch()
    predicted = np.asarray(targets(batch.lengths, batch.known_mask))
    for index in np.ndindex(2, 4):
        expected = np.zeros(SIZE, bool)
        for span in spans(batch.lengths[index]):
            expected[span] = ~batch.known_mask[index][span]
        np.testing.assert_array_equal(predicted[index], expected)


def test_which_rows_have_given_tokens():
    batch = jax.tree.map(jnp.asarray, random_batch(1, 40))
    expected = [
        [batch.known_mask[0, pack, span].any() for span in spans(batch.lengths[0, pack])] for pack in range(40)
    ]
    np.testing.assert_array_equal(have_given(batch)[0], expected)
    assert 0.2 < np.mean(expected) < 0.8


def test_the_schedule_is_fitted_to_rows_in_which_nothing_is_given(step, new_state):
    state, batch = moved(new_state()), random_batch()
    every_other = np.broadcast_to(np.arange(SIZE) % 2 == 0, batch.known_mask.shape)
    for known, moves in ((every_other, False), (np.zeros_like(every_other), True)):
        fitted = step.gradients(state, batch.replace(known_mask=known)).schedule
        assert (float(fitted.mu) != float(state.schedule.mu)) == moves


def test_what_lies_behind_the_rows_changes_nothing(step, new_state):
    state, batch = moved(new_state()), random_batch()
    behind = ~batch.padding_mask
    assert behind.any()
    # Dropout and noise are of the positions, and the loss of none of those.
    changed = batch.replace(
        tokens=np.where(behind, (batch.tokens + 1) % VOCAB, batch.tokens),
        known_mask=np.where(behind, ~batch.known_mask, batch.known_mask),
    )
    first, second = (step.gradients(state, given) for given in (batch, changed))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def vocabulary_of(model, params):
    return model.apply({"params": params}, method="vocabulary")


@pytest.mark.parametrize("num_passes", [1, 3, 8])
@pytest.mark.parametrize("num_packs", [1, 2, 6])
@pytest.mark.parametrize("every", [1, 3, 4])
def test_self_conditioned_packs_are_every_so_manieth_of_the_step(num_passes, num_packs, every):
    for num_devices in (1, 2, 3):
        turns = self_conditioned_packs(num_passes, num_packs, num_devices, every)
        assert turns.shape[3] <= num_packs
        per_step = num_passes * num_devices * num_packs
        assert (len(turns) == 1) == (per_step % every == 0)
        numbers = []
        for step in range(2 * len(turns)):
            for device, indices in enumerate(turns[step % len(turns)].reshape(num_devices, -1)):
                passes, packs = np.divmod(indices[indices >= 0], num_packs)
                numbers += list(step * per_step + (passes * num_devices + device) * num_packs + packs)
        assert sorted(numbers) == list(range(0, 2 * len(turns) * per_step, every))
        # What no device ever needs is not computed.
        assert (turns >= 0).sum(axis=(2, 3)).max() > turns[0, 0].size - turns.shape[2]
    assert self_conditioned_packs(num_passes, num_packs, 1, 0).size == 0


def test_first_estimates_fill_only_the_chosen_packs_and_stop_gradients():
    z = jnp.ones((6, 2, 3))

    def x_hat(scale, chosen):
        return first_estimates(lambda packs: scale * z[packs], z.shape, np.array(chosen))

    expected = np.zeros((6, 2, 3))
    expected[[0, 4, 5]] = 5.0
    np.testing.assert_array_equal(x_hat(5.0, [[4, 0], [5, -1]]), expected)
    assert float(jax.grad(lambda scale: x_hat(scale, [[4, 0], [5, -1]]).sum())(5.0)) == 0.0
    assert not np.any(x_hat(5.0, np.zeros((0, 2), int)))


def test_estimates_are_the_models_own_for_each_row_by_itself(model, new_state):
    params = moved(new_state()).params
    vocabulary = vocabulary_of(model, params)
    batch = jax.tree.map(jnp.asarray, random_batch(accumulate=2, packs=3))
    keys, numbers = jax.random.split(jax.random.key(5), 3), jnp.arange(6).reshape(2, 3)
    gamma = jnp.linspace(-1.0, 3.0, 12).reshape(2, 3, ROWS)
    packs = jax.jit(draw_packs)(batch, gamma, keys, numbers, dropout=0.5)
    chosen = jnp.asarray([[1, 5], [3, -1]])
    got = jax.jit(estimates, static_argnums=0)(model, params, {}, vocabulary, packs, chosen).reshape(6, SIZE, -1)
    np.testing.assert_array_equal(got[jnp.asarray([0, 2, 4])], 0.0)

    inputs = jax.jit(DrawnPacks.inputs, static_argnums=1)

    @jax.jit
    def estimate(params, prompt, *given):
        prompt = model.apply({"params": params}, prompt, method="encode_prompt")
        return model.apply({"params": params}, vocabulary, *given, prompt, method="estimate")

    for index in (1, 3, 5):
        pack = jax.tree.map(lambda leaf, i=index: leaf.reshape(6, *leaf.shape[2:])[i, None], packs)
        z, _ = inputs(pack, model, {"params": params}, vocabulary)
        for row, span in enumerate(spans(pack.lengths[0])):
            prompt = jax.tree.map(lambda leaf, r=row: leaf[0, r, None], pack.prompt)
            given = z[:, span], pack.gamma[0, row, None], jnp.zeros_like(z[:, span]), pack.known_mask[:, span]
            expected = estimate(params, prompt, *given)[0]
            assert np.abs(expected).max() > 0.1
            np.testing.assert_allclose(got[index, span], expected, atol=1e-4)


def test_the_steps_gradient_is_that_of_the_mean_loss(config, model, step, new_state):
    """Two passes and both ways to the tables, against one automatic gradient of all packs in one pass."""
    state = moved(new_state())
    batch = jax.tree.map(jnp.asarray, random_batch())
    got = step.gradients(state, batch)

    @jax.jit
    @jax.value_and_grad
    def loss(params, state, batch):
        gamma_key, *keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        uniforms = stratified_uniforms(gamma_key, 8 * ROWS).reshape(2, 4, ROWS)
        gamma = state.schedule.gamma(noise_quantiles(uniforms, have_given(batch)))
        numbers = jnp.arange(8).reshape(2, 4)
        packs = draw_packs(batch, gamma, keys, numbers, config.diffusion.conditioning_dropout)
        vocabulary = vocabulary_of(model, params)
        x_hat = estimates(model, params, {}, vocabulary, packs, jnp.asarray([[0, 4]]))
        one_pass = jax.tree.map(lambda leaf: leaf.reshape(8, *leaf.shape[2:]), (packs, x_hat))
        num_targets = jnp.sum(targets(batch.lengths, batch.known_mask))
        return pass_loss(model, params, {}, vocabulary, *one_pass, num_targets)[0]

    value, expected = loss(state.params, state, batch)
    assert float(got.loss) == pytest.approx(float(value), rel=1e-5)
    expected["log_unigram"] = jnp.zeros(VOCAB)
    for (path, g), e in zip(jax.tree.leaves_with_path(got.params), jax.tree.leaves(expected), strict=True):
        tolerance = 1e-5 * max(1e-3, float(jnp.abs(e).max()))
        np.testing.assert_allclose(g, e, atol=10 * tolerance, err_msg=jax.tree_util.keystr(path))
    assert np.abs(expected["estimate_kernel"]).max() > 0


def test_prompts_are_dropped_at_the_stated_rate():
    batch = random_batch(1, 200)
    batch = batch.replace(prompt=batch.prompt.replace(mask=np.ones_like(batch.prompt.mask)))
    keys, numbers = jax.random.split(jax.random.key(5), 3), jnp.arange(200)[None]
    drawn = jax.jit(draw_packs)

    def given(dropout):
        packs = drawn(batch, jnp.zeros((1, 200, ROWS)), keys, numbers, dropout)
        mask = np.asarray(packs.prompt.mask).reshape(200 * ROWS, -1)
        assert (mask.all(axis=-1) == mask.any(axis=-1)).all()
        return mask.any(axis=-1)

    assert given(0.0).all()
    assert not given(1.0).any()
    # A binomial of 400: standard error 0.022.
    assert abs(given(0.25).mean() - 0.75) < 0.07
    # Each row is drawn by itself.
    assert (given(0.5).reshape(200, ROWS).sum(axis=-1) == 1).mean() == pytest.approx(0.5, abs=0.12)


def test_what_products_read_as_it_is_is_cast_to_the_compute_dtype(new_state):
    narrow = compute_params(new_state().params, jnp.bfloat16)
    kept = {path[-1].key for path, leaf in jax.tree.leaves_with_path(narrow) if leaf.dtype == jnp.float32}
    vectors = {"known_vector", "null_prompt", "log_unigram", "bias_in", "attention_taps", "mlp_taps"}
    assert kept == {"embedding", "head_table"} | vectors


def test_gradients_in_eight_bits_point_where_those_in_float32_do(config, step, new_state):
    state, batch = moved(new_state()), random_batch()
    exact = step.gradients(state, batch)

    def gradients(number_format):
        changed = config.copy_and_resolve_references()
        changed.model.compute_dtype = number_format
        model = make_model(changed, VOCAB, ENCODER)
        return make_train_step(changed, model, make_mesh(1)).gradients(state, batch)

    def errors(approximate):
        """Of each layer's kernels, relative to the kernel's gradient."""
        pairs = zip(exact.params["layers_0"].items(), approximate.params["layers_0"].values(), strict=True)
        return {name: np.linalg.norm(g - e) / np.linalg.norm(e) for (name, e), g in pairs if e.shape[0] > 3}

    bfloat16, int8 = errors(gradients("bfloat16")), errors(gradients("int8"))
    assert set(int8) == {"attention_in", "attention_out", "cross_in", "cross_out", "mlp_in", "mlp_out"}
    for name in int8:
        assert 0 < bfloat16[name] < int8[name] < 0.1
