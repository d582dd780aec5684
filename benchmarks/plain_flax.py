"""The denoiser of `sunfish_jax.models.denoiser` and its training step, as one writes them in Flax by habit.

`nn.Dense`, einsum attention, `nn.Dropout`, optax's cross-entropy and Muon, `jax.grad`: no operation has a gradient
of its own and nothing is laid out for a processor. Given our weights the network returns our logits. It is what the
speed of the training step is compared with, so it changes only when the network does.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.process import diffuse, noise_quantiles, posterior_scale, stratified_uniforms
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.diffusion.self_conditioning import first_estimates, self_conditioned_packs
from sunfish_jax.models.denoiser import TABLES, PromptKeysValues, TextDenoiser
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.sharding import batch_sharding
from sunfish_jax.training.state import learning_rate_schedule


class PlainLayer(nn.Module):
    """Self-attention, cross-attention and a squared-ReLU feed-forward layer; the residual stream is float32."""

    width: int
    num_heads: int
    mlp_ratio: int
    conv_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, scales, prompt_keys, prompt_values, prompt_mask, dropout_keys):
        """One layer.

        Args:
          x: [B, S, W] float32.
          scales: three [B, 1, W].
          prompt_keys, prompt_values: [B, H, P, d].
          prompt_mask: [B, P] bool.
          dropout_keys: three random keys, or None for no dropout.

        Returns:
          [B, S, W] float32.
        """
        batch, length, width = x.shape

        def dense(features, name):
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def heads(y):
            return y.reshape(batch, length, self.num_heads, -1).transpose(0, 2, 1, 3)

        def merged(y):
            return y.transpose(0, 2, 1, 3).reshape(batch, length, width)

        def convolved(y, name):
            if not self.conv_width:
                return y
            taps = self.param(name, nn.initializers.zeros, (self.conv_width, width))
            reach = self.conv_width // 2
            # Shifted sums: `nn.Conv` with a group for each feature is many times slower on a CPU.
            padded = jnp.pad(y, ((0, 0), (reach, reach), (0, 0)))
            return y + sum(taps[j] * padded[:, j : j + length] for j in range(self.conv_width))

        def dropped(branch, site):
            key = None if dropout_keys is None else dropout_keys[site]
            return nn.Dropout(self.dropout, deterministic=key is None)(branch, rng=key)

        h = convolved(rms_norm(x) * scales[0], "attention_taps")
        q, k, v = (heads(part) for part in jnp.split(dense(3 * width, "attention_in")(h), 3, axis=-1))
        h = merged(attention(rotary(q), rotary(k), v))
        x = x + dropped(dense(width, "attention_out")(h), 0)

        q = heads(dense(width, "cross_in")(rms_norm(x) * scales[1]))
        h = merged(attention(q, prompt_keys, prompt_values, prompt_mask))
        x = x + dropped(dense(width, "cross_out")(h), 1)

        h = convolved(rms_norm(x) * scales[2], "mlp_taps")
        h = jnp.square(nn.relu(dense(self.mlp_ratio * width, "mlp_in")(h)))
        return x + dropped(dense(width, "mlp_out")(h), 2)


class PlainDenoiser(nn.Module):
    """The same function of the same inputs as `TextDenoiser`, whose docstrings say what they are."""

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    embedding_dim: int
    mlp_ratio: int
    conditioning_dim: int
    conv_width: int
    dropout: float
    dtype: jnp.dtype
    prompt_dim: int

    def setup(self):
        def dense(features, **options):
            return nn.Dense(features, **{"use_bias": False, "dtype": self.dtype} | options)

        self.tokens = nn.Embed(self.vocab_size, self.embedding_dim)
        self.log_unigram = self.param("log_unigram", nn.initializers.zeros, (self.vocab_size,))
        self.known_vector = self.param("known_vector", nn.initializers.zeros, (self.width,))
        self.null_prompt = self.param("null_prompt", nn.initializers.zeros, (self.width,))
        self.input = dense(self.width)
        self.earlier_estimate = dense(self.width)
        self.noise_in = dense(self.conditioning_dim, use_bias=True, dtype=jnp.float32)
        self.noise_out = dense(self.conditioning_dim, dtype=jnp.float32)
        self.scales = dense((3 * self.num_layers + 1) * self.width, dtype=jnp.float32)
        self.adapter = dense(self.width)
        self.prompt = dense(2 * self.num_layers * self.width)
        sizes = (self.width, self.num_heads, self.mlp_ratio, self.conv_width, self.dropout, self.dtype)
        self.layers = [PlainLayer(*sizes) for _ in range(self.num_layers)]
        self.head_table = self.param("head_table", nn.initializers.zeros, (self.vocab_size, self.width))

    def embedding_table(self) -> jax.Array:
        """[V, D], rows of norm sqrt(D)."""
        table = self.tokens.embedding
        return table * self.embedding_dim**0.5 / jnp.linalg.norm(table, axis=-1, keepdims=True)

    def encode_prompt(self, prompt: Prompt) -> PromptKeysValues:
        """Keys and values of every layer."""
        batch, length = prompt.mask.shape
        given = prompt.mask.any(axis=-1, keepdims=True)
        states = rms_norm(jnp.where(given[..., None], self.adapter(prompt.inputs), self.null_prompt))
        mask = jnp.where(given, prompt.mask, jnp.arange(length) == 0)
        parts = [
            part.reshape(batch, length, self.num_heads, -1).transpose(0, 2, 1, 3)
            for part in jnp.split(self.prompt(states), 2 * self.num_layers, axis=-1)
        ]
        return PromptKeysValues(tuple(parts[: self.num_layers]), tuple(parts[self.num_layers :]), mask)

    def logits(self, z, gamma, x_hat, known_mask, prompt: PromptKeysValues, dropout_key=None) -> jax.Array:
        """[B, S, V] float32."""
        prior = posterior_scale(gamma)[:, None, None] * z
        context_free = jax.lax.stop_gradient(self.expected_embedding(self._posterior_logits(prior)))
        context_free = jnp.where(known_mask[..., None], z, context_free)
        x = self.input(jnp.concatenate([z, context_free], axis=-1)) + self.earlier_estimate(x_hat)
        x = rms_norm(x + known_mask[..., None] * self.known_vector)
        noise_level = nn.silu(self.noise_out(nn.silu(self.noise_in(noise_level_waves(gamma)))))
        scales = jnp.split(1.0 + self.scales(noise_level)[:, None], 3 * self.num_layers + 1, axis=-1)
        for i, layer in enumerate(self.layers):
            keys = None if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, i), 3)
            x = layer(x, scales[3 * i : 3 * i + 3], prompt.keys[i], prompt.values[i], prompt.mask, keys)
        correction = self._products(rms_norm(x) * scales[-1], self.head_table)
        return self._posterior_logits(prior) + correction

    def _posterior_logits(self, prior):
        return self._products(prior, self.embedding_table()) + jax.lax.stop_gradient(self.log_unigram)

    def _products(self, features, table):
        features, table = features.astype(self.dtype), table.astype(self.dtype)
        return jnp.einsum("bsd,vd->bsv", features, table, preferred_element_type=jnp.float32)

    def expected_embedding(self, logits: jax.Array) -> jax.Array:
        """softmax(logits) E: [B, S, V] -> [B, S, D] float32."""
        table = self.embedding_table().astype(self.dtype)
        probabilities = nn.softmax(logits).astype(self.dtype)
        return jnp.einsum("bsv,vd->bsd", probabilities, table, preferred_element_type=jnp.float32)

    def estimate(self, z, gamma, x_hat, known_mask, prompt: PromptKeysValues) -> jax.Array:
        """[B, S, D] float32."""
        return self.expected_embedding(self.logits(z, gamma, x_hat, known_mask, prompt))

    def __call__(self, z, gamma, x_hat, known_mask, prompt: Prompt) -> jax.Array:
        """The logits straight from a prompt's states."""
        return self.logits(z, gamma, x_hat, known_mask, self.encode_prompt(prompt))


def rms_norm(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2)) in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotary(x: jax.Array) -> jax.Array:
    """Rotary positions for [B, H, S, d]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[-2])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = [
        first * jnp.cos(angles) - second * jnp.sin(angles),
        second * jnp.cos(angles) + first * jnp.sin(angles),
    ]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention(q, k, v, mask=None) -> jax.Array:
    """[B, H, S, d]; `mask` [B, T] is False at keys not to attend to."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    return jnp.einsum("bhqk,bhkd->bhqd", nn.softmax(scores).astype(v.dtype), v)


def noise_level_waves(gamma: jax.Array) -> jax.Array:
    """[B] -> [B, 64]."""
    angles = gamma[:, None] * jnp.geomspace(0.05, 2 * jnp.pi, 32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def make_plain(model: TextDenoiser, dtype: jnp.dtype) -> PlainDenoiser:
    """The plain network of the same sizes, computing in `dtype`; the prompt encoder must be a frozen one."""
    fields = {name: getattr(model, name) for name in PlainDenoiser.__dataclass_fields__ if hasattr(model, name)}
    return PlainDenoiser(**fields | {"dtype": dtype, "parent": None, "name": None})


def plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our weights in the plain network's tree. The arrays are the same ones, but for the transposed `mlp_out`."""
    dense = {
        "embedding": ("tokens", "embedding"),
        "input_kernel": ("input", "kernel"),
        "estimate_kernel": ("earlier_estimate", "kernel"),
        "noise_level/kernel_in": ("noise_in", "kernel"),
        "noise_level/bias_in": ("noise_in", "bias"),
        "noise_level/kernel_out": ("noise_out", "kernel"),
        "scales_kernel": ("scales", "kernel"),
        "adapter_kernel": ("adapter", "kernel"),
        "prompt_kernel": ("prompt", "kernel"),
    }

    def place(name):
        if name.endswith(("_in", "_out")) and name.startswith("layers_"):
            return (*name.split("/"), "kernel")
        return dense.get(name) or tuple(name.split("/"))

    flat = flatten_dict(params, sep="/")
    return unflatten_dict({place(name): flat[name].T if name.endswith("mlp_out") else flat[name] for name in flat})


@flax.struct.dataclass
class PlainState:
    """What the plain step changes: as `TrainState`, without the noise schedule, which takes no time to fit."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState


@flax.struct.dataclass
class NoisyRows:
    """Rows with their noise; leading axes [B] or, of all passes, [A, B].

    Attributes:
      tokens: [..., S] int32.
      known_mask: [..., S] bool, True where the clean embedding is given.
      gamma: [...] float32 noise levels.
      noise: [..., S, D] standard normal.
    """

    tokens: jax.Array
    known_mask: jax.Array
    gamma: jax.Array
    noise: jax.Array

    def noisy_embeddings(self, table: jax.Array) -> jax.Array:
        """z [..., S, D]: alpha e + sigma n, and e itself where known; `table` is E [V, D]."""
        clean = table[self.tokens]
        return jnp.where(self.known_mask[..., None], clean, diffuse(clean, self.noise, self.gamma))


def make_plain_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """As `training.state.make_optimizer`, from optax's own parts.

    Its Muon orthogonalises each kernel by itself, where ours takes those of a layer side by side. It averages
    momentum rather than sums it up, which orthogonalising takes no notice of, corrects the bias of the first steps,
    and makes five iterations of Newton-Schulz, in float32.

    Args:
      config: the `optimizer` group.
      num_steps: length of the run.
    """

    def matrices(updates):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

    def rms_of_adam(updates, params=None):
        del params
        return jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)

    def table_rate(updates, params=None):
        del params
        scale = config.table_multiplier
        return jax.tree.map_with_path(lambda path, u: u * scale if path[-1].key in TABLES else u, updates)

    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    direction = optax.scale_by_adam(config.beta1, config.beta2)
    if config.name == "muon":
        muon = optax.contrib.scale_by_muon(weight_dimension_numbers=matrices)
        muon = optax.chain(muon, optax.stateless(rms_of_adam))
        direction = optax.partition({True: muon, False: direction}, kernels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.stateless(table_rate),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )


def make_plain_state(config: ConfigDict, params: Mapping[str, Any], mesh: Mesh) -> PlainState:
    """The state before the first step, whole on every device; `params` of the plain network are copied."""

    def create(params):
        opt_state = make_plain_optimizer(config.optimizer, config.train.num_steps).init(params)
        return PlainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)

    return jax.jit(create, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)


def make_plain_step(config: ConfigDict, plain: PlainDenoiser, mesh: Mesh, schedule: Schedule, key: jax.Array):
    """One optimiser step of the same training: (state, batch) -> (state, loss)."""
    optimizer = make_plain_optimizer(config.optimizer, config.train.num_steps)
    diffusion = config.diffusion

    def inputs(params, rows: NoisyRows, prompt: Prompt):
        """z, gamma, known_mask and the encoded prompts of rows."""
        z = rows.noisy_embeddings(plain.apply({"params": params}, method="embedding_table"))
        return z, rows.gamma, rows.known_mask, plain.apply({"params": params}, prompt, method="encode_prompt")

    def estimates(params, step, rows: NoisyRows, prompt: Prompt):
        """First estimates of one in so many of all steps' rows, zeros for the others."""
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (rows, prompt))

        def estimate(chosen):
            z, gamma, *given = inputs(params, *jax.tree.map(lambda leaf: leaf[chosen], flat))
            return plain.apply({"params": params}, z, gamma, jnp.zeros_like(z), *given, method="estimate")

        turns = self_conditioned_packs(*rows.gamma.shape, 1, diffusion.self_conditioning_every)
        chosen = jnp.asarray(turns)[step % len(turns), 0]
        return first_estimates(estimate, flat[0].noise.shape, chosen).reshape(rows.noise.shape)

    def loss(params, rows: NoisyRows, prompt: Prompt, x_hat, dropout_key, num_targets):
        z, gamma, *given = inputs(params, rows, prompt)
        logits = plain.apply({"params": params}, z, gamma, x_hat, *given, dropout_key, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens)
        return jnp.sum(losses * ~rows.known_mask) / num_targets

    def step(state: PlainState, batch: PaddedBatch):
        shape = batch.tokens.shape[:2]
        gamma_key, noise_key, dropout_key, prompt_key = jax.random.split(jax.random.fold_in(key, state.step), 4)
        uniforms = stratified_uniforms(gamma_key, shape[0] * shape[1]).reshape(shape)
        gamma = schedule.gamma(noise_quantiles(uniforms, batch.known_mask.any(axis=-1)))
        noise = jax.random.normal(noise_key, (*batch.tokens.shape, plain.embedding_dim))
        rows = NoisyRows(batch.tokens, batch.known_mask, gamma, noise)
        dropped = jax.random.uniform(prompt_key, shape) < diffusion.conditioning_dropout
        prompt = batch.prompt.replace(mask=batch.prompt.mask & ~dropped[..., None])
        x_hat = estimates(state.params, state.step, rows, prompt)
        num_targets = jnp.sum(~batch.known_mask).astype(jnp.float32)

        def accumulate(total, of_pass):
            value_and_grads = jax.value_and_grad(loss)(state.params, *of_pass, num_targets)
            return jax.tree.map(jnp.add, total, value_and_grads), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        passes = (rows, prompt, x_hat, jax.random.split(dropout_key, shape[0]))
        (value, grads), _ = jax.lax.scan(accumulate, zeros, passes)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - config.optimizer.ema_decay)
        return PlainState(state.step + 1, params, ema_params, opt_state), value

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, batch_sharding(mesh)), out_shardings=(whole, None))
