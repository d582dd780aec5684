"""The first SunFish as it shipped: PyTorch, float32, predicted noise, every row as long as a block.

Eight layers of self-attention, cross-attention to 64 prompt tokens and a 4x GELU feed-forward layer at width 512,
with `nn.MultiheadAttention`; 8 x 4 x 256 tokens an optimiser step; AdamW. What its description leaves open is
chosen in its favour: no dropout, no attention weights asked for (which lets PyTorch fuse the attention), no moving
average, no clipping of gradients.

It runs in a process of its own (torch_worker.py) and imports nothing of JAX.
"""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 5e-4
GUIDANCE_SCALE = 7.0
# Noise levels of the linear schedule of DDPM (arXiv 2006.11239).
LEVELS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 0.02


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the network and of an optimiser step; the prompt's width is that of frozen GPT-2 embeddings."""

    vocab_size: int = 8192
    width: int = 512
    num_layers: int = 8
    num_heads: int = 8
    block_size: int = 256
    prompt_length: int = 64
    prompt_dim: int = 768
    accumulate_steps: int = 8
    rows: int = 4


class Layer(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each after a LayerNorm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.noise_level = nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.self_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, noise_level: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.noise_level(noise_level)[:, None]
        h = self.norms[0](x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        x = x + self.cross_attention(self.norms[1](x), prompt, prompt, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class NoisePredictor(nn.Module):
    """From noisy embeddings, their noise level and a prompt to the noise."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.tokens = nn.Embedding(sizes.vocab_size, width)
        self.positions = nn.Embedding(sizes.block_size, width)
        self.prompt_positions = nn.Embedding(sizes.prompt_length, width)
        self.prompt = nn.Sequential(nn.Linear(sizes.prompt_dim, width), nn.GELU(), nn.Linear(width, width))
        self.noise_level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList([Layer(width, sizes.num_heads) for _ in range(sizes.num_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width)

    def forward(self, z: Tensor, level: Tensor, prompt: Tensor) -> Tensor:
        """z [B, S, W], level [B] int, prompt [B, P, d] -> [B, S, W]."""
        prompt = self.prompt(prompt) + self.prompt_positions.weight
        noise_level = self.noise_level(_sinusoids(level, z.shape[-1]))
        x = z + self.positions.weight[: z.shape[1]]
        for layer in self.layers:
            x = layer(x, noise_level, prompt)
        return self.head(self.norm(x))


def _sinusoids(level: Tensor, width: int) -> Tensor:
    """[B] -> [B, W]."""
    half = width // 2
    angles = level[:, None] * torch.exp(torch.arange(half) * (-math.log(10_000.0) / half))
    return torch.cat([angles.sin(), angles.cos()], -1)


class FirstSunFish:
    """Its training step and its sampler, on random tokens: the time does not depend on what they are."""

    def __init__(self, sizes: Sizes):
        torch.manual_seed(0)
        self.sizes, self.model = sizes, NoisePredictor(sizes)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        # alpha^2 of every level.
        self._signal = torch.cumprod(1 - torch.linspace(FIRST_BETA, LAST_BETA, LEVELS), 0)
        shape = (sizes.accumulate_steps, sizes.rows)
        self._tokens = torch.randint(sizes.vocab_size, (*shape, sizes.block_size))
        self._prompts = torch.randn(*shape, sizes.prompt_length, sizes.prompt_dim)

    def step(self) -> float:
        """One optimiser step; returns its loss, the mean squared error of the predicted noise."""
        self.model.train()
        total = torch.zeros(())
        for tokens, prompt in zip(self._tokens, self._prompts, strict=True):
            clean = self.model.tokens(tokens)
            level, noise = torch.randint(LEVELS, tokens.shape[:1]), torch.randn(clean.shape)
            signal = self._signal[level][:, None, None]
            z = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            loss = F.mse_loss(self.model(z, level, prompt), noise) / len(self._tokens)
            loss.backward()
            total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total.item()

    @torch.no_grad()
    def sample(self, rows: int, length: int, num_steps: int, one_batch: bool) -> Tensor:
        """Tokens [rows, length] by DDIM (arXiv 2010.02502), guided at every step.

        Args:
          rows, length, num_steps: what to sample.
          one_batch: the passes with and without the prompt as one of twice the rows.
        """
        self.model.eval()
        prompt = torch.randn(rows, self.sizes.prompt_length, self.sizes.prompt_dim)
        prompts = torch.cat([prompt, torch.zeros_like(prompt)])
        z = torch.randn(rows, length, self.sizes.width)
        levels = torch.linspace(LEVELS - 1, 0, num_steps + 1).long().tolist()
        for level, following in itertools.pairwise(levels):
            at = torch.full((2 * rows,), level)
            if one_batch:
                predicted, without = self.model(z.repeat(2, 1, 1), at, prompts).chunk(2)
            else:
                predicted, without = (self.model(z, at[:rows], half) for half in prompts.chunk(2))
            noise = without + GUIDANCE_SCALE * (predicted - without)
            signal, next_signal = self._signal[level], self._signal[following]
            clean = (z - (1 - signal).sqrt() * noise) / signal.sqrt()
            z = next_signal.sqrt() * clean + (1 - next_signal).sqrt() * noise
        return (z @ self.model.tokens.weight.T).argmax(-1)
