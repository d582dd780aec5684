"""What a text is conditioned on, in the form in which the denoiser reads it."""

from collections.abc import Callable

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Prompt:
    """A batch of prompts, as made by a prompt encoder. P is the prompt length; leading axes are the batch's.

    Attributes:
        inputs: `[..., P]` int32 tokens for an encoder that is trained, or `[..., P, d]` float16 states from a
            frozen one.
        mask: `[..., P]` bool, True where there is a prompt token. All False means no prompt: the learned null
            prompt is used.
    """

    inputs: np.ndarray | jax.Array
    mask: np.ndarray | jax.Array


# Numbers of prompts, -1 for none, to what the model reads; the axes stay.
Prompts = Callable[[np.ndarray], Prompt]


def round_up(length: int, multiple: int = 16) -> int:
    """The width in which a prompt of `length` tokens is kept: few widths, so that little is compiled."""
    return max(1, -(-int(length) // multiple)) * multiple
