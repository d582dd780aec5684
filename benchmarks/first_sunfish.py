"""The first SunFish as it shipped: PyTorch, float32, predicted noise, every row as long as a block.

Eight layers of self-attention, cross-attention to 64 prompt tokens and a 4x GELU feed-forward layer at width 512,
with `nn.MultiheadAttention`; 8 x 4 x 256 tokens an optimiser step; AdamW. The rest is as in its source
(Sculptor-AI/Sunfish on GitHub, commit e0344c6: `config/micro_config.py`, and `models/` in `sunfish_demo_6k/`):
dropout of 0.1, also of the attention weights, which are asked for; gradients clipped; and no cross-attention in
passes without a prompt. Left out in its favour: PyTorch Lightning, its logs, and reading the prompts, which are
random here.

It runs in a process of its own (torch_worker.py) and imports nothing of JAX.
"""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 5e-4, (0.9, 0.95), 0.01, 1.0
DROPOUT = 0.1
GUIDANCE_SCALE = 7.0
# The linear schedule of DDPM (arXiv 2006.11239), in half as many levels.
LEVELS, FIRST_BETA, LAST_BETA = 500, 1e-4, 0.02


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
    """Self-attention, cross-attention if there is a prompt, and a feed-forward layer, each after a LayerNorm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.self_attention = nn.MultiheadAttention(width, num_heads, DROPOUT, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, num_heads, DROPOUT, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(4 * width, width),
            nn.Dropout(DROPOUT),
        )

    def forward(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        h = self.norms[0](x)
        # Attention also returns its weights, averaged over heads, unless it is told not to: it was not.
        x = x + self.self_attention(h, h, h)[0]
        if prompt is not None:
            x = x + self.cross_attention(self.norms[1](x), prompt, prompt)[0]
        return x + self.mlp(self.norms[2](x))


class NoisePredictor(nn.Module):
    """From noisy embeddings, their noise level and a prompt to the noise."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.tokens = nn.Embedding(sizes.vocab_size, width)
        self.positions = nn.Embedding(sizes.block_size, width)
        self.prompt = _two_layers(sizes.prompt_dim, 2 * width, nn.GELU(), width)
        self.noise_level = _two_layers(width, 4 * width, nn.Mish(), width)
        self.layers = nn.ModuleList([Layer(width, sizes.num_heads) for _ in range(sizes.num_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width, bias=False)

    def clean(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> [B, S, W], what noise is added to: embeddings of tokens and of their positions."""
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, z: Tensor, level: Tensor, prompt: Tensor | None) -> Tensor:
        """z [B, S, W], level [B] int, prompt [B, P, W] or None -> [B, S, W]."""
        x = z + self.noise_level(_sinusoids(level, z.shape[-1]))[:, None]
        for layer in self.layers:
            x = layer(x, prompt)
        return self.head(self.norm(x))


def _two_layers(inputs: int, hidden: int, activation: nn.Module, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


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
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
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
            clean = self.model.clean(tokens)
            level, noise = torch.randint(LEVELS, tokens.shape[:1]), torch.randn_like(clean)
            signal = self._signal[level][:, None, None]
            z = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            loss = F.mse_loss(self.model(z, level, self.model.prompt(prompt)), noise) / len(self._tokens)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total.item()

    @torch.no_grad()
    def sample(self, rows: int, length: int, num_steps: int) -> Tensor:
        """Tokens [rows, length] by DDIM (arXiv 2010.02502), guided at every step."""
        self.model.eval()
        prompt = self.model.prompt(torch.randn(rows, self.sizes.prompt_length, self.sizes.prompt_dim))
        z = torch.randn(rows, length, self.sizes.width)
        levels = torch.linspace(LEVELS - 1, 0, num_steps).long()
        # After the last level nothing is left of the noise.
        signals = [*self._signal[levels], torch.ones(())]
        for level, (signal, next_signal) in zip(levels, itertools.pairwise(signals), strict=True):
            at = level.expand(rows)
            without = self.model(z, at, None)
            noise = without + GUIDANCE_SCALE * (self.model(z, at, prompt) - without)
            clean = (z - (1 - signal).sqrt() * noise) / signal.sqrt()
            z = next_signal.sqrt() * clean + (1 - next_signal).sqrt() * noise
        # The nearest embedding by cosine.
        return (z @ F.normalize(self.model.tokens.weight, dim=-1).T).argmax(-1)
