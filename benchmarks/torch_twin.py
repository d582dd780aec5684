"""The denoiser of `sunfish_jax.models.denoiser` in PyTorch, with its training step and its sampler.

Written as one writes it to be fast on a CPU: `nn.Linear`, `F.scaled_dot_product_attention` or plain products,
`F.cross_entropy`, bfloat16 autocast, the fused AdamW, `torch.compile`. Where PyTorch has two ways of doing a thing,
`Variant` has both, and the faster one counts. Given our weights the network returns our logits.

It runs in a process of its own (torch_worker.py) and imports nothing of JAX.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-6
_NUM_FREQUENCIES = 32
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The fields of `TextDenoiser` that say what is computed."""

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    embedding_dim: int
    mlp_ratio: int
    conditioning_dim: int
    conv_width: int
    dropout: float
    prompt_dim: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the ways to compute the same.

    Attributes:
      dtype: `bfloat16` (autocast) or `float32`.
      fused_attention: `F.scaled_dot_product_attention`, or two products and a softmax: in bfloat16 and for the
        backward pass the latter can be several times as fast on a CPU.
      passes_at_once: training: how many of a step's forward passes are made as one larger one.
      one_batch: sampling: the conditional and the unconditional pass as one.
      compiled: with `torch.compile`.
    """

    dtype: str
    fused_attention: bool = True
    passes_at_once: int = 1
    one_batch: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        parts = [self.dtype, "fused attention" if self.fused_attention else "attention in products"]
        if self.passes_at_once > 1:
            parts.append(f"{self.passes_at_once} passes at once")
        if self.one_batch:
            parts.append("both halves in one batch")
        return ", ".join([*parts, "compiled" if self.compiled else "eager"])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")


class Prompt(NamedTuple):
    """What every layer attends to.

    Attributes:
      keys, values: for each layer, [B, H, P, d].
      mask: [B, P] bool, at least one True a row.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor

    def every(self, start: int, step: int) -> "Prompt":
        """Those of every step-th row."""
        keys, values = ([part[start::step] for part in parts] for parts in (self.keys, self.values))
        return Prompt(keys, values, self.mask[start::step])


def rms_norm(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2)) * scale over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPSILON) * scale


def convolved(h: Tensor, taps: Tensor | None) -> Tensor:
    """h and a depthwise convolution of it, [B, S, W]; taps [K, W].

    As shifted sums, in the dtype that the product after it wants: `F.conv1d` with a group a feature takes three
    times as long in float32 and half as long again in bfloat16.
    """
    if taps is None:
        return h
    if torch.is_autocast_enabled("cpu"):
        h, taps = h.bfloat16(), taps.bfloat16()
    length, reach = h.shape[1], taps.shape[0] // 2
    padded = F.pad(h, (0, 0, reach, reach))
    return h + sum(taps[j] * padded[:, j : j + length] for j in range(taps.shape[0]))


def rotation(length: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, [S, d / 2]."""
    half = head_dim // 2
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for [B, H, S, d]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, fused: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: [B, H, S, d]; mask [B, 1, 1, T] is False at keys not to attend to."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return F.softmax(scores, -1) @ v


class Layer(nn.Module):
    """Self-attention, cross-attention and a squared-ReLU feed-forward layer; the residual stream is float32."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, hidden = sizes.width, sizes.mlp_ratio * sizes.width
        self.num_heads, self.dropout = sizes.num_heads, sizes.dropout
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.cross_in = nn.Linear(width, width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        for name in ("attention_taps", "mlp_taps"):
            taps = nn.Parameter(torch.zeros(sizes.conv_width, width)) if sizes.conv_width else None
            self.register_parameter(name, taps)

    def forward(self, x, scales, keys, values, mask, turn, fused: bool, train: bool) -> Tensor:
        """One layer: x [B, S, W], scales three [B, 1, W], keys and values [B, H, P, d], mask [B, 1, 1, P]."""

        def heads(y):
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        def merged(y):
            return y.transpose(1, 2).flatten(-2)

        def dropped(branch):
            return F.dropout(branch, self.dropout, train)

        h = convolved(rms_norm(x, scales[0]), self.attention_taps)
        q, k, v = map(heads, self.attention_in(h).chunk(3, -1))
        h = merged(attention(rotary(q, *turn), rotary(k, *turn), v, None, fused))
        x = x + dropped(self.attention_out(h))

        q = heads(self.cross_in(rms_norm(x, scales[1])))
        x = x + dropped(self.cross_out(merged(attention(q, keys, values, mask, fused))))

        h = convolved(rms_norm(x, scales[2]), self.mlp_taps)
        return x + dropped(self.mlp_out(F.relu(self.mlp_in(h)).square()))


class Denoiser(nn.Module):
    """The same function of the same inputs as `TextDenoiser`, whose docstrings say what they are."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        dim, width, noise = sizes.embedding_dim, sizes.width, sizes.conditioning_dim
        self.embedding = nn.Parameter(torch.randn(sizes.vocab_size, dim))
        self.register_buffer("log_unigram", torch.zeros(sizes.vocab_size))
        # The angles of the noise-level features.
        frequencies = np.geomspace(0.05, 2 * np.pi, _NUM_FREQUENCIES).astype(np.float32)
        self.register_buffer("frequencies", torch.from_numpy(frequencies))
        self.known_vector = nn.Parameter(torch.zeros(width))
        self.null_prompt = nn.Parameter(torch.randn(width))
        self.input = nn.Linear(3 * dim, width, bias=False)
        self.noise_in = nn.Linear(2 * _NUM_FREQUENCIES, noise)
        self.noise_out = nn.Linear(noise, noise, bias=False)
        self.scales = nn.Linear(noise, (3 * sizes.num_layers + 1) * width, bias=False)
        self.adapter = nn.Linear(sizes.prompt_dim, width, bias=False)
        self.prompt = nn.Linear(width, 2 * sizes.num_layers * width, bias=False)
        self.layers = nn.ModuleList([Layer(sizes) for _ in range(sizes.num_layers)])
        self.head_table = nn.Parameter(torch.zeros(sizes.vocab_size, width))

    @torch.no_grad()
    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes our weights, by the names in our tree joined with slashes.

        Kernels are [in, out] there, but for `mlp_out`, which is as in PyTorch.
        """
        kernels = {
            "noise_in": "noise_level/kernel_in",
            "noise_out": "noise_level/kernel_out",
            **{name: f"{name}_kernel" for name in ("scales", "adapter", "prompt")},
        }
        ours = {"input.weight": np.concatenate([weights["input_kernel"], weights["estimate_kernel"]]).T}
        ours |= {f"{name}.weight": weights[kernel].T for name, kernel in kernels.items()}
        tables = ("embedding", "head_table", "log_unigram", "known_vector", "null_prompt")
        ours |= {name: weights[name] for name in tables}
        ours["noise_in.bias"] = weights["noise_level/bias_in"]
        for path, value in weights.items():
            layer, _, name = path.partition("/")
            if layer.startswith("layers_"):
                number = layer.removeprefix("layers_")
                place = f"layers.{number}.{name}"
                if name.endswith("_taps"):
                    ours[place] = value
                else:
                    ours[f"{place}.weight"] = value if name == "mlp_out" else value.T
        ours["frequencies"] = self.frequencies.numpy()
        self.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in ours.items()})

    def embedding_table(self) -> Tensor:
        """[V, D], rows of norm sqrt(D)."""
        return F.normalize(self.embedding, dim=-1) * self.sizes.embedding_dim**0.5

    def encode_prompt(self, inputs: Tensor, mask: Tensor) -> Prompt:
        """Keys and values of every layer for states [B, P, d]; a row without a prompt gets the null prompt."""
        given = mask.any(-1, keepdim=True)
        states = rms_norm(torch.where(given[..., None], self.adapter(inputs.float()).float(), self.null_prompt))
        mask = torch.where(given, mask, torch.arange(mask.shape[1]) == 0)
        parts = self.prompt(states).chunk(2 * self.sizes.num_layers, -1)
        parts = [part.unflatten(-1, (self.sizes.num_heads, -1)).transpose(1, 2) for part in parts]
        return Prompt(parts[: self.sizes.num_layers], parts[self.sizes.num_layers :], mask)

    def logits(self, z, gamma, x_hat, known, prompt: Prompt, table, fused: bool, train: bool = False) -> Tensor:
        """[B, S, V]; table is `embedding_table()` in the dtype of the products."""
        # alpha / sigma^2 = exp((softplus(-gamma) - gamma) / 2)
        prior = (0.5 * (F.softplus(-gamma) - gamma)).exp()[:, None, None] * z
        with torch.no_grad():
            context_free = self.expected_embedding(F.linear(prior, table, self.log_unigram), table)
            context_free = torch.where(known[..., None], z, context_free)
        x = self.input(torch.cat([z, context_free, x_hat], -1)).float()
        x = rms_norm(x + known[..., None] * self.known_vector)

        angles = gamma[:, None] * self.frequencies
        noise = F.silu(self.noise_in(torch.cat([angles.sin(), angles.cos()], -1)))
        scales = 1.0 + self.scales(F.silu(self.noise_out(noise))).float()
        scales = scales[:, None].chunk(3 * self.sizes.num_layers + 1, -1)
        head_dim = self.sizes.width // self.sizes.num_heads
        turn = rotation(z.shape[1], head_dim, table.dtype)
        mask = prompt.mask[:, None, None]
        for i, layer in enumerate(self.layers):
            keys_values = prompt.keys[i], prompt.values[i]
            x = layer(x, scales[3 * i : 3 * i + 3], *keys_values, mask, turn, fused, train)
        features = torch.cat([prior, rms_norm(x, scales[-1])], -1)
        return F.linear(features, torch.cat([table, self.head_table.to(table.dtype)], -1), self.log_unigram)

    def expected_embedding(self, logits: Tensor, table: Tensor) -> Tensor:
        """softmax(logits) E: [B, S, V] -> [B, S, D]."""
        return F.softmax(logits, -1) @ table

    def estimate(self, z, gamma, x_hat, known, prompt: Prompt, table, fused: bool) -> Tensor:
        """x_hat = softmax(logits) E."""
        return self.expected_embedding(self.logits(z, gamma, x_hat, known, prompt, table, fused), table)

    def cross_entropy(self, targets, z, gamma, x_hat, known, prompt: Prompt, table, fused: bool) -> Tensor:
        """The sum of -log p(token), in nats, over targets that are not `_IGNORED`."""
        logits = self.logits(z, gamma, x_hat, known, prompt, table, fused, train=True)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum")


class Batch(NamedTuple):
    """An optimiser step's rows, leading axes [A, B]; the noise levels `gamma` [A, B] are drawn with the batch."""

    tokens: Tensor
    known_mask: Tensor
    gamma: Tensor
    prompt_inputs: Tensor
    prompt_mask: Tensor

    def merged(self, passes: int) -> "Batch":
        """The same rows in fewer forward passes of more rows."""
        return Batch(*(part.reshape(-1, passes * part.shape[1], *part.shape[2:]) for part in self))


@dataclasses.dataclass(frozen=True)
class Training:
    """The keys of the configuration that a training step depends on."""

    self_conditioning_every: int
    conditioning_dropout: float
    learning_rate: float
    table_multiplier: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    ema_decay: float


class Trainer:
    """The training step of `sunfish_jax.training.step`, with AdamW."""

    def __init__(self, model: Denoiser, training: Training):
        self.model, self.training = model, training
        self._parameters = list(model.parameters())
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        kernels = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        tables = [model.embedding, model.head_table]
        apart = {id(parameter) for parameter in [*tables, *kernels]}
        groups = [
            {"params": kernels},
            {"params": tables, "lr": training.learning_rate * training.table_multiplier},
            {"params": [parameter for parameter in self._parameters if id(parameter) not in apart]},
        ]
        groups[1]["weight_decay"] = groups[2]["weight_decay"] = 0.0
        betas, decay = (training.beta1, training.beta2), training.weight_decay
        self._optimizer = torch.optim.AdamW(groups, training.learning_rate, betas, weight_decay=decay, fused=True)
        # For each shape by itself: with sizes left open it would be other code from the second shape on.
        self._compiled = tuple(torch.compile(f, dynamic=False) for f in (model.cross_entropy, model.estimate))

    def step(self, batch: Batch, variant: Variant) -> float:
        """One optimiser step; returns the mean loss over the positions to predict."""
        num_targets = (~batch.known_mask).sum()
        batch = batch.merged(variant.passes_at_once)
        rows_a_pass = batch.tokens.shape[1]
        total = torch.zeros(())
        for index, microbatch in enumerate(zip(*batch, strict=True)):
            with variant.autocast():
                loss = self.loss(Batch(*microbatch), index * rows_a_pass, variant) / num_targets
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._parameters, self.training.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - self.training.ema_decay)
        return total.item()

    def loss(self, rows: Batch, first_row: int, variant: Variant) -> Tensor:
        """The summed loss of one forward pass, whose rows have no leading axis A."""
        model, every, fused = self.model, self.training.self_conditioning_every, variant.fused_attention
        cross_entropy, estimate = self._compiled if variant.compiled else (model.cross_entropy, model.estimate)
        known, gamma = rows.known_mask, rows.gamma
        table = model.embedding_table()
        clean = F.embedding(rows.tokens, table)
        level = gamma[:, None, None]
        noisy = torch.sigmoid(-level).sqrt() * clean + torch.sigmoid(level).sqrt() * torch.randn(clean.shape)
        z = torch.where(known[..., None], clean, noisy)
        table = table.to(variant.torch_dtype)
        kept = torch.rand(len(gamma), 1) >= self.training.conditioning_dropout
        prompt = model.encode_prompt(rows.prompt_inputs, rows.prompt_mask & kept)

        # A first estimate of one row in so many, by the row's number within the step.
        x_hat = torch.zeros_like(z)
        start = -first_row % every if every else len(gamma)
        if start < len(gamma):
            some = slice(start, None, every)
            with torch.no_grad():
                given = z[some], gamma[some], x_hat[some], known[some], prompt.every(start, every)
                x_hat[some] = estimate(*given, table, fused).to(x_hat.dtype)
        targets = rows.tokens.masked_fill(known, _IGNORED)
        return cross_entropy(targets, z, gamma, x_hat, known, prompt, table, fused)


class Steps(NamedTuple):
    """What the sampler does at each of its N passes, as `sunfish_jax.diffusion.samplers.make_steps` tabulates it.

    Attributes:
      gamma, z, x_hat: [N]: the noise level, and the factors of z and x_hat in the next z (DDIM has no others).
      guided: [N] bool, where guidance acts.
      told_both: [N] bool, where what it adds is made anew, by a pass without the prompt beside the one with it.
    """

    gamma: list[float]
    z: list[float]
    x_hat: list[float]
    guided: list[bool]
    told_both: list[bool]


class Sampler:
    """DDIM with guidance and self-conditioning, weights in the dtype of the products."""

    def __init__(self, model: Denoiser, variant: Variant):
        self._variant = variant
        self._model = copy.deepcopy(model).requires_grad_(False)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(variant.torch_dtype)
        self._model.head_table.data = self._model.head_table.to(variant.torch_dtype)
        self._logits = torch.compile(self._model.logits, dynamic=False) if variant.compiled else self._model.logits

    @torch.inference_mode()
    def sample(self, z: Tensor, inputs: Tensor, mask: Tensor, steps: Steps, guidance_scale: float) -> Tensor:
        """From noise z [B, S, D] and prompts [B, P] to tokens [B, S]."""
        with self._variant.autocast():
            return self._sample(z, inputs, mask, steps, guidance_scale)

    def _sample(self, z, inputs, mask, steps, guidance_scale):
        model, rows, fused = self._model, len(z), self._variant.fused_attention
        table = model.embedding_table().to(self._variant.torch_dtype)
        inputs = inputs.float()
        # Keys and values once: with the prompt, then without.
        both = model.encode_prompt(torch.cat([inputs, inputs]), torch.cat([mask, torch.zeros_like(mask)]))
        conditional, unconditional = (
            Prompt([k[half] for k in both.keys], [v[half] for v in both.values], both.mask[half])
            for half in (slice(rows), slice(rows, None))
        )

        def logits(prompt, z, gamma, x_hat):
            known = torch.zeros(z.shape[:2], dtype=torch.bool)
            return self._logits(z, torch.full((len(z),), gamma), x_hat, known, prompt, table, fused)

        def told(prompts, z, gamma, x_hat):
            if self._variant.one_batch:
                return logits(both, z.repeat(2, 1, 1), gamma, x_hat.repeat(2, 1, 1)).chunk(2)
            return [logits(prompt, z, gamma, x_hat) for prompt in prompts]

        x_hat = torch.zeros_like(z)
        for gamma, z_factor, x_hat_factor, guided, told_both in zip(*steps, strict=True):
            if told_both:
                predicted, without = told((conditional, unconditional), z, gamma, x_hat)
                difference = predicted - without
            else:
                predicted = logits(conditional, z, gamma, x_hat)
            if guided:
                predicted = predicted + (guidance_scale - 1.0) * difference
            x_hat = model.expected_embedding(predicted, table).float()
            z = z_factor * z + x_hat_factor * x_hat
        return predicted.argmax(-1)
