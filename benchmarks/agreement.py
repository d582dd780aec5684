"""Whether the plain network is the same function as ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from plain_flax import make_plain, plain_params

from sunfish_jax.models.denoiser import TextDenoiser
from sunfish_jax.models.prompt import Prompt


def both_logits(model: TextDenoiser, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ours and the plain network's, in float32, on random inputs that use every path of the network.

    Args:
      model: our denoiser, with a frozen prompt encoder.
      params: its parameters. They are moved away from their initial zeros, which would hide whole layers.

    Returns:
      Two arrays [B, S, V].
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape, np.float32), params)
    rows, length, prompt_length = 3, 32, 8
    z, x_hat = rng.standard_normal((2, rows, length, model.embedding_dim), np.float32)
    known_mask = rng.random((rows, length)) < 0.2
    prompt = Prompt(
        inputs=rng.standard_normal((rows, prompt_length, model.prompt_dim), np.float32).astype(np.float16),
        # A whole prompt, a short one, and none.
        mask=np.arange(prompt_length) < np.array([[prompt_length], [3], [0]]),
    )
    inputs = (z, jnp.array([1.0, 3.0, 6.0]), x_hat, known_mask)
    float32 = jnp.dtype("float32")

    def logits(network, params):
        keys_values = network.apply({"params": params}, prompt, method="encode_prompt")
        return network.apply({"params": params}, *inputs, keys_values, method="logits")

    ours = jax.jit(lambda params: logits(dataclasses.replace(model, dtype=float32), params))(params)
    plain = jax.jit(lambda params: logits(make_plain(model, float32), params))(plain_params(params))
    return np.asarray(ours), np.asarray(plain)
