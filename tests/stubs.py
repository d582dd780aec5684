"""Denoisers for tests that write down logits and nothing else."""

import flax.linen as nn
import jax.numpy as jnp


class LogitsAsFeatures(nn.Module):
    """What sampling asks of a model, from `logits` and `embedding_table`: the head passes the logits on."""

    def features(self, z, gamma, x_hat, known_mask, *prompts):
        return jnp.concatenate([self.logits(z, gamma, x_hat, known_mask, prompt) for prompt in prompts])

    def head(self):
        vocab_size = len(self.embedding_table())
        return jnp.eye(vocab_size), jnp.zeros(vocab_size)
