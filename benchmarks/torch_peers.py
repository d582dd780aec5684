"""Our side of the PyTorch peers: what they are sent, and their steps as contenders."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from torch_process import TorchProcess

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.process import noise_quantiles, stratified_uniforms
from sunfish_jax.diffusion.samplers import Steps
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.models.denoiser import TextDenoiser
from sunfish_jax.models.prompt import Prompt

_SIZES = (
    "vocab_size", "num_layers", "num_heads", "width", "embedding_dim", "mlp_ratio", "conditioning_dim",
    "conv_width", "dropout", "prompt_dim",
)  # fmt: skip
_OPTIMIZER = (
    "learning_rate", "table_multiplier", "beta1", "beta2", "weight_decay", "clip_norm", "ema_decay",
)  # fmt: skip


def make_twin(torch: TorchProcess, model: TextDenoiser, params: Mapping[str, Any]) -> int:
    """Gives the process our weights, for the twin of our network; returns how many parameters it has."""
    weights = {name: np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}
    sizes = {name: getattr(model, name) for name in _SIZES}
    return torch.call("twin", weights, sizes=sizes)["parameters"]


def number_formats(model: TextDenoiser) -> list[str]:
    """What the twin may multiply in: bfloat16 only where we do."""
    return ["float32"] if model.dtype == np.float32 else ["bfloat16", "float32"]


def print_choice(what: str, choice: Mapping[str, Any]) -> None:
    """Prints how long each variant took and which was taken."""
    for name, reason in choice["failed"].items():
        print(f"PyTorch twin, {name}: failed ({reason})")
    for name, seconds in choice["seconds"].items():
        print(f"PyTorch twin, seconds {what}, {name}: {seconds:.3g}{' (taken)' * (name == choice['best'])}")


class TwinSteps:
    """The twin's training steps, with the interface of `comparison.Contender`.

    Attributes:
      taken: the variant that is fastest at each row length.
    """

    def __init__(self, torch: TorchProcess, config: ConfigDict, schedule: Schedule):
        self._torch, self._schedule, self._key = torch, schedule, jax.random.key(config.train.seed)
        self._sent: set[str] = set()
        self.taken: dict[int, str] = {}
        diffusion, optimizer = config.diffusion, config.optimizer
        training = {name: getattr(optimizer, name) for name in _OPTIMIZER} | {
            "self_conditioning_every": diffusion.self_conditioning_every,
            "conditioning_dropout": diffusion.conditioning_dropout,
        }
        torch.call("trainer", training=training)

    def choose(self, batch: PaddedBatch, formats: list[str], repeats: int, compiled: bool = True) -> None:
        """Lets the process find its fastest way to take a step on `batch`; compiling takes minutes."""
        options = {"dtypes": formats, "repeats": repeats, "compiled": compiled}
        choice = self._torch.call("choose_training", batch=self._send(batch), **options)
        print_choice(f"a step of rows of {batch.tokens.shape[-1]}", choice)

    def seconds(self, batch: PaddedBatch) -> float:
        """Takes one optimiser step, from a batch in the host's memory to the new state computed."""
        step = self._torch.call("twin_step", batch=self._send(batch))
        self.taken[batch.tokens.shape[-1]] = step["variant"]
        return step["seconds"]

    def _send(self, batch: PaddedBatch) -> str:
        name = str(batch.tokens.shape)
        if name not in self._sent:
            self._sent.add(name)
            shape = batch.tokens.shape[:2]
            uniforms = stratified_uniforms(self._key, shape[0] * shape[1]).reshape(shape)
            quantiles = noise_quantiles(uniforms, batch.known_mask.any(axis=-1))
            arrays = {
                "tokens": batch.tokens,
                "known_mask": batch.known_mask,
                "gamma": np.asarray(self._schedule.gamma(quantiles)),
                "prompt_inputs": batch.prompt.inputs,
                "prompt_mask": batch.prompt.mask,
            }
            self._torch.call("batch", arrays, name=name)
        return name


class FirstSunFishSteps:
    """The first SunFish's training steps, which are all alike.

    Attributes:
      parameters: how many it has.
      positions: of a step.
      block_size: the positions of a row.
    """

    def __init__(self, torch: TorchProcess):
        self._torch = torch
        made = torch.call("first_sunfish", sizes={})
        self.parameters, self.positions, self.block_size = made["parameters"], made["positions"], made["block_size"]

    def seconds(self) -> float:
        """Takes one optimiser step."""
        return self._torch.call("first_step")["seconds"]


@dataclasses.dataclass(frozen=True)
class SamplingTask:
    """What the twin is to sample.

    Attributes:
      name: of the task.
      noise: [B, S, D], what it starts from.
      prompt: [B, P].
      steps: of DDIM.
      guided_gammas: lowest and highest noise level at which guidance acts.
      guidance_scale: of it.
      passes_a_difference: in how many guided passes what the prompt changes is added, once it is made.
    """

    name: str
    noise: np.ndarray
    prompt: Prompt
    steps: Steps
    guided_gammas: tuple[float, float]
    guidance_scale: float
    passes_a_difference: int

    def guided_throughout(self) -> "SamplingTask":
        """The same with guidance as it is usually done: in every step, from a pass with and one without."""
        return dataclasses.replace(
            self,
            name=f"{self.name} in each of them",
            guided_gammas=(-math.inf, math.inf),
            passes_a_difference=1,
        )

    def send(self, torch: TorchProcess) -> None:
        low, high = self.guided_gammas
        gamma = np.asarray(self.steps.gamma)
        guided = (low <= gamma) & (gamma <= high)
        arrays = {
            "noise": self.noise,
            "prompt_inputs": self.prompt.inputs,
            "prompt_mask": self.prompt.mask,
            "gamma": gamma,
            "z": self.steps.z,
            "x_hat": self.steps.x_hat,
            "guided": guided,
            "told_both": guided & ((np.cumsum(guided) - 1) % self.passes_a_difference == 0),
        }
        torch.call("case", arrays, name=self.name, guidance_scale=self.guidance_scale)
