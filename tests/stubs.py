"""Denoisers for tests that write down logits and nothing else."""

import flax.linen as nn
import jax.numpy as jnp

from sunfish_jax.models.denoiser import Vocabulary


class LogitsAsFeatures(nn.Module):
    """What sampling asks of a model, from `logits` and `embeddings`: the head passes the logits on."""

    def vocabulary(self):
        embeddings = self.embeddings()
        return Vocabulary(embeddings, jnp.eye(len(embeddings)), jnp.zeros(len(embeddings)))

    def features(self, vocabulary, z, gamma, x_hat, known_mask, *prompts, packed=None):
        logits = [self.logits(vocabulary, z, gamma, x_hat, known_mask, prompt) for prompt in prompts]
        return jnp.concatenate(logits)
