"""Text to tokens: a byte-level BPE trained on the corpus, or any saved `transformers` tokenizer."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sunfish_jax.errors import UserError

PAD, EOS = "<pad>", "<eos>"
_GPT2_EOS = "<|endoftext|>"
# 256 bytes and the two special tokens: below this some text could not be written.
MIN_VOCAB_SIZE = 258


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every text has an encoding and decodes back exactly.

    Args:
      texts: read once.
      vocab_size: the size asked for, special tokens included; a small corpus may give fewer.

    Returns:
      A tokenizer with `<pad>` = 0 and `<eos>` = 1, which adds no special tokens by itself.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"tokenizer.vocab_size={vocab_size} is too small: give at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer saved by `save_pretrained` (or downloaded, such as GPT-2's) from a folder.

    One without a padding token, such as GPT-2's, gets `<pad>` as its last token; end-of-text has to exist.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        raise UserError(f"tokenizer.path={path} is not a folder: give one with a saved tokenizer in it")
    try:
        # Not `AutoTokenizer`, which also wants the model's config.json.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # The library behind it raises nothing more precise.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"tokenizer.path={path} holds no tokenizer that can be read: {reason[0]}") from error
    if tokenizer.eos_token_id is None and _GPT2_EOS in tokenizer.get_vocab():
        tokenizer.eos_token = _GPT2_EOS  # GPT-2's files leave its name to the code.
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.path={path} has no end-of-text token: set its eos_token, save it again")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Where text ends and where nothing is are different things to learn.
        tokenizer.add_special_tokens({"pad_token": PAD})
    last = max(tokenizer.get_vocab().values())
    if last >= len(tokenizer):
        raise UserError(
            f"tokenizer.path={path} leaves numbers out: it has {len(tokenizer)} tokens, and the last is number "
            f"{last}; give one that numbers its tokens without gaps"
        )
    return tokenizer


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """A fingerprint of everything that decides which tokens a text becomes."""
    state = f"{tokenizer.backend_tokenizer.to_str()}|{tokenizer.pad_token_id}|{tokenizer.eos_token_id}"
    return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
