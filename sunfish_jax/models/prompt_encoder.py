"""Prompt encoders: from a prompt's text to what the denoiser attends to."""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from sunfish_jax.errors import UserError
from sunfish_jax.models.minilm import MiniLMStates, minilm_folder
from sunfish_jax.models.prompt import Prompt, round_up
from sunfish_jax.models.prompt_transformer import PromptTransformer

if TYPE_CHECKING:  # Importing transformers takes 1.5 s.
    from transformers import PreTrainedTokenizerFast

# What a frozen encoder does: tokens [n, P] int32, mask [n, P] bool -> states [n, P, d] float16.
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PromptEncoder:
    """A tokenizer, and either frozen states or a module to train.

    Attributes:
        identity: Name and fingerprint. A model works only with the encoder it was trained with.
        max_length: The longest prompt, in tokens; the rest of a longer one is not read.
        output_dim: d, of the states.
        tokenizer: Of this encoder alone: its truncation is set.
        add_special_tokens: Whether the tokenizer's own, such as BERT's `[CLS]`, are put around a prompt.
        encode: A frozen encoder's states of tokens; None if the encoder is trained.
        module: The Flax module of an encoder that is trained, `module(tokens, mask) -> states`; None if frozen.
    """

    identity: str
    max_length: int
    output_dim: int
    tokenizer: Tokenizer
    add_special_tokens: bool
    encode: Encode | None = None
    module: nn.Module | None = None

    @property
    def frozen(self) -> bool:
        """Whether prompts hold states, which are not trained, rather than tokens."""
        return self.encode is not None

    def unread(self, prompt: str) -> int:
        """The number of tokens of a prompt that are beyond `max_length`."""
        encoding = self.tokenizer.encode(_encodable(prompt), add_special_tokens=False)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(False) * self.add_special_tokens
        return max(0, len(encoding.ids) + sum(len(rest.ids) for rest in encoding.overflowing) - room)

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Splits prompts into tokens.

        Args:
            prompts: n texts. Longer ones are truncated to `max_length` tokens.

        Returns:
            Tokens `[n, P]` int32 and mask `[n, P]` bool, False at padding. P is the length of the longest
            rounded up to a multiple of 16.
        """
        prompts = [_encodable(prompt) for prompt in prompts]
        encodings = self.tokenizer.encode_batch_fast(prompts, add_special_tokens=self.add_special_tokens)
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int32)
        mask = np.arange(round_up(lengths.max(initial=0))) < lengths[:, None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = [token for encoding in encodings for token in encoding.ids]
        return tokens, mask


def encode_prompts(encoder: PromptEncoder, prompts: Sequence[str | None]) -> Prompt:
    """Encodes prompts given by a person.

    Args:
        encoder: As `make_prompt_encoder` makes it.
        prompts: n texts; None for no prompt.

    Returns:
        Prompt with leading axis n.

    Raises:
        UserError: A prompt is empty.
    """
    for prompt in prompts:
        if prompt is not None and not prompt.strip():
            raise UserError(f"the prompt {prompt!r} is empty: give some text, or no prompt at all")
    tokens, mask = encoder.tokenize([prompt or "" for prompt in prompts])
    mask &= np.array([prompt is not None for prompt in prompts], bool)[:, None]
    return Prompt(inputs=encoder.encode(tokens, mask) if encoder.frozen else tokens, mask=mask)


def say_what_is_unread(encoder: PromptEncoder, prompts: Sequence[str]) -> None:
    """Says on stderr which of the prompts are read in part."""
    for prompt in prompts:
        if rest := encoder.unread(prompt):
            print(f"the last {rest} tokens of the prompt {prompt[:20]!r}... are not read", file=sys.stderr)


def make_prompt_encoder(config: ConfigDict, tokenizer: "PreTrainedTokenizerFast | None" = None) -> PromptEncoder:
    """Makes the prompt encoder that the configuration names. Frozen weights are read when first needed.

    Args:
        config: The group `prompt_encoder`.
        tokenizer: The corpus tokenizer, which an encoder trained from scratch reads prompts with.

    Raises:
        UserError: An unknown name, a length out of range, or files that are missing or broken.
    """
    makers = {"minilm": _make_minilm, "gpt2": _make_gpt2, "transformer": _make_transformer}
    if config.name not in makers:
        raise UserError(f"prompt_encoder.name={config.name!r} is unknown: choose one of {', '.join(makers)}")
    # Three are the least in which MiniLM, which adds two of its own, reads a token of the prompt.
    if not 3 <= config.max_length <= 512:
        raise UserError(f"prompt_encoder.max_length={config.max_length} is out of range: choose 3 to 512")
    return makers[config.name](config, tokenizer)


def _make_minilm(config: ConfigDict, _) -> PromptEncoder:
    folder = minilm_folder()
    states = MiniLMStates(folder)
    return PromptEncoder(
        identity=f"minilm {_fingerprint(folder)}",
        max_length=config.max_length,
        output_dim=states.module.width,
        tokenizer=_truncating(Tokenizer.from_file(str(folder / "tokenizer.json")), config.max_length),
        add_special_tokens=True,
        encode=states,
    )


def _make_gpt2(config: ConfigDict, _) -> PromptEncoder:
    folder = Path(os.path.expanduser(config.path))
    needed = ("model.safetensors", "tokenizer.json")
    missing = [name for name in needed if not config.path or not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"prompt_encoder.path={config.path!r} has no {' and no '.join(missing)}: "
            "give the folder of a saved GPT-2, which prompt_encoder.name='gpt2' takes its embeddings from"
        )
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # The tokenizers library raises no narrower class.
        raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    embeddings = _read_gpt2_embeddings(folder / "model.safetensors")
    if tokenizer.get_vocab_size() > len(embeddings):
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} tokens and the model "
            f"{len(embeddings)} embeddings: give a folder in which both belong together"
        )
    return PromptEncoder(
        identity=f"gpt2 {_fingerprint(folder)}",
        max_length=config.max_length,
        output_dim=embeddings.shape[1],
        tokenizer=_truncating(tokenizer, config.max_length),
        add_special_tokens=False,
        encode=lambda tokens, mask: np.where(mask[..., None], embeddings[tokens], np.float16(0)),
    )


def _read_gpt2_embeddings(path: Path) -> np.ndarray:
    """The token embeddings, `[V, d]` float16, without the positions."""
    try:
        with safe_open(path, "numpy") as weights:
            # Saved from the bare model, or from the one with a language-modelling head.
            names = [name for name in ("wte.weight", "transformer.wte.weight") if name in weights.keys()]
            if names:
                return weights.get_tensor(names[0]).astype(np.float16)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; save the model again") from error
    raise UserError(f"{path} holds no tensor `wte.weight`: give the folder of a saved GPT-2")


def _make_transformer(config: ConfigDict, tokenizer: "PreTrainedTokenizerFast | None") -> PromptEncoder:
    if tokenizer is None:
        raise ValueError("the prompt encoder `transformer` reads prompts with the corpus tokenizer: pass it")
    if config.num_heads < 1 or config.width < 1 or config.width % config.num_heads:
        raise UserError(
            f"prompt_encoder.width={config.width} is not divisible by prompt_encoder.num_heads="
            f"{config.num_heads}: change one of them"
        )
    module = PromptTransformer(
        vocab_size=len(tokenizer),
        max_length=round_up(config.max_length),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        width=config.width,
    )
    # A copy: the corpus tokenizer itself must not truncate.
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PromptEncoder(
        identity=f"transformer {config.num_layers} x {config.width}, vocabulary {len(tokenizer)}",
        max_length=config.max_length,
        output_dim=config.width,
        tokenizer=_truncating(copy, config.max_length),
        add_special_tokens=False,
        module=module,
    )


def _encodable(prompt: str) -> str:
    """The prompt without halves of surrogate pairs, which broken JSON can hold and which have no UTF-8 form."""
    return prompt.encode("utf-8", "replace").decode()


def _truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _fingerprint(folder: Path) -> str:
    """A hash of the weights and the tokenizer."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
