"""Prompt encoders that tests make models with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """What `make_model` reads of a prompt encoder that is not trained."""

    output_dim: int
    frozen: bool = True
