"""Whether the networks that ours is compared with are the same function as ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from plain_flax import make_plain, plain_params
from torch_process import TorchProcess

from sunfish_jax.models.denoiser import TextDenoiser, Vocabulary
from sunfish_jax.models.prompt import Prompt

# The logits differ from ours by less than this share of the largest, in float32.
_TOLERANCE = 1e-4
_FLOAT32 = jnp.dtype("float32")


@flax.struct.dataclass
class Inputs:
    """Random inputs that use every path of the network; B rows of S tokens.

    Attributes:
      z: [B, S, D] noisy embeddings.
      gamma: [B] noise levels.
      x_hat: [B, S, D] an earlier estimate.
      known_mask: [B, S] bool.
      prompt: [B, P]: a whole one, a short one and none.
    """

    z: np.ndarray
    gamma: np.ndarray
    x_hat: np.ndarray
    known_mask: np.ndarray
    prompt: Prompt

    @classmethod
    def random(cls, model: TextDenoiser) -> "Inputs":
        rng = np.random.default_rng(0)
        rows, length, prompt_length = 3, 32, 8
        z, x_hat = rng.standard_normal((2, rows, length, model.embedding_dim), np.float32)
        states = rng.standard_normal((rows, prompt_length, model.prompt_dim), np.float32)
        return cls(
            z=z,
            gamma=np.array([1.0, 3.0, 6.0], np.float32),
            x_hat=x_hat,
            known_mask=rng.random((rows, length)) < 0.2,
            prompt=Prompt(
                inputs=states.astype(np.float16),
                mask=np.arange(prompt_length) < np.array([[prompt_length], [3], [0]]),
            ),
        )


def moved(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters away from their initial zeros, which would hide whole layers."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape, np.float32), params)


def our_logits(model: TextDenoiser, params: Mapping[str, Any], inputs: Inputs) -> np.ndarray:
    """[B, S, V] in float32."""
    model = dataclasses.replace(model, dtype=_FLOAT32, quantized=False)
    return _logits(model, params, inputs, jax.jit(lambda: model.apply({"params": params}, method="vocabulary"))())


def plain_logits(model: TextDenoiser, params: Mapping[str, Any], inputs: Inputs) -> np.ndarray:
    """Those of the plain network, given our weights."""
    return _logits(make_plain(model, _FLOAT32), plain_params(params), inputs)


def _logits(network, params, inputs: Inputs, *vocabulary: Vocabulary) -> np.ndarray:
    # The vocabulary too is an argument: XLA would work at folding a constant of that size for seconds, and say so.
    @jax.jit
    def logits(params, *vocabulary):
        keys_values = network.apply({"params": params}, inputs.prompt, method="encode_prompt")
        given = (inputs.z, inputs.gamma, inputs.x_hat, inputs.known_mask, keys_values)
        return network.apply({"params": params}, *vocabulary, *given, method="logits")

    return np.asarray(logits(params, *vocabulary))


def twin_logits(
    torch: TorchProcess, inputs: Inputs, dtype: str = "float32", fused_attention: bool = True
) -> np.ndarray:
    """Those of the PyTorch twin with the weights that the process was given last."""
    arrays = {
        "z": inputs.z,
        "gamma": inputs.gamma,
        "x_hat": inputs.x_hat,
        "known_mask": inputs.known_mask,
        "prompt_inputs": inputs.prompt.inputs,
        "prompt_mask": inputs.prompt.mask,
    }
    return torch.call("twin_logits", arrays, dtype=dtype, fused_attention=fused_attention)["logits"]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of our largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def check_same(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Prints how far another network's logits are from ours; raises an AssertionError if that is too far."""
    apart = difference(ours, theirs)
    if not apart < _TOLERANCE:
        raise AssertionError(f"{name}'s logits differ from ours by {apart:.1e} of the largest")
    print(f"{name}, given our weights, returns our logits to {apart:.0e} of the largest (float32)", flush=True)
