"""A language of which everything is known: letters in alphabetical order, and a denoiser that knows it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from stubs import LogitsAsFeatures

from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.models.prompt import Prompt

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = train_tokenizer([" ".join(LETTERS)] * 5, 300)
DIM = 16


class AlphabetDenoiser(LogitsAsFeatures):
    """logits = prior + what the noisy neighbours say, which is exact when they are clean."""

    vocab_size: int = len(TOKENIZER)
    embedding_dim: int = DIM
    dtype: jnp.dtype = jnp.dtype("float32")
    quantized: bool = False

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (self.vocab_size, DIM))
        letters = [TOKENIZER.encode(f" {letter}")[0] for letter in LETTERS]
        follows = np.full((self.vocab_size, self.vocab_size), 1e-4)
        follows[letters[:-1], letters[1:]] = 1
        follows[TOKENIZER.encode("a")[0], letters[1]] = 1
        self.follows = follows / follows.sum(axis=-1, keepdims=True)
        self.precedes = follows / follows.sum(axis=0)

    def embeddings(self):
        return self.table * DIM**0.5 / jnp.linalg.norm(self.table, axis=-1, keepdims=True)

    def encode_prompt(self, prompt: Prompt):
        return prompt.mask

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        similarity = z @ vocabulary.embeddings.T
        prior = posterior_scale(gamma)[:, None, None] * similarity
        belief = jax.nn.softmax(jnp.where(known_mask[..., None], 100 * similarity, prior))
        left = jnp.log(belief[:, :-1] @ self.follows)
        right = jnp.log(belief[:, 1:] @ self.precedes.T)
        return prior + jnp.pad(left, ((0, 0), (1, 0), (0, 0))) + jnp.pad(right, ((0, 0), (0, 1), (0, 0)))

    def cross_entropy(self, vocabulary, tokens, z, gamma, x_hat, known_mask, prompt):
        log_probs = jax.nn.log_softmax(self.logits(vocabulary, z, gamma, x_hat, known_mask, prompt))
        return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


MODEL = AlphabetDenoiser()
PARAMS = {"table": jax.random.normal(jax.random.key(0), (MODEL.vocab_size, DIM))}
SCHEDULE = make_schedule("gumbel", DIM, MODEL.vocab_size)
NO_PROMPT = Prompt(np.zeros((1, 16), np.int32), np.zeros((1, 16), bool))
