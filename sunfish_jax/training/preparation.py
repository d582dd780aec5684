"""What a run needs before its first step: tokenizer, tokens, prompts and model."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from sunfish_jax.cache import data_folder
from sunfish_jax.data.batches import BatchSource
from sunfish_jax.data.buckets import choose_buckets
from sunfish_jax.data.kept import made_once
from sunfish_jax.data.sources import Source, open_source
from sunfish_jax.data.tokenizer import load_tokenizer, tokenizer_identity, train_tokenizer
from sunfish_jax.data.tokens import TokenizedSplit, prepare
from sunfish_jax.errors import UserError
from sunfish_jax.models.denoiser import TextDenoiser, make_model
from sunfish_jax.models.prompt_encoder import PromptEncoder, make_prompt_encoder
from sunfish_jax.models.prompt_table import PromptTable
from sunfish_jax.workdir.config import CONFIG_FILE, HISTORY_FILE, record_config
from sunfish_jax.workdir.row_lengths import save_row_lengths
from sunfish_jax.workdir.run import IDENTITY_FILE, TOKENIZER_FOLDER, saved_identity
from sunfish_jax.workdir.writers import WANDB_RUN_FILE

# What a tokenizer is trained on: as many characters, spread over the corpus. The words of a whole gigabyte took
# three minutes to count, and 1.6 GB of memory.
_TOKENIZER_CHARACTERS = 10**8


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What does not change during a run.

    Attributes:
        tokenizer: of the corpus.
        prompt_encoder: turns prompts into what the model reads.
        splits: the tokenized corpus by name of split.
        buckets: the longest rows that are packed together, rising.
        model: the denoiser.
        identity: fingerprints of `data`, `tokenizer` and `prompt_encoder`; a run resumes only on the same.
    """

    tokenizer: PreTrainedTokenizerFast
    prompt_encoder: PromptEncoder
    splits: Mapping[str, TokenizedSplit]
    buckets: tuple[int, ...]
    model: TextDenoiser
    identity: Mapping[str, str]

    def training_batches(self, config: ConfigDict) -> BatchSource:
        """The training batches, indexable by step."""
        split = self.splits["train"]
        prompts = PromptTable(self.prompt_encoder, split.num_prompts, split.prompt_texts, data_folder())
        return BatchSource(split, self.buckets, config, prompts)

    def token_counts(self) -> np.ndarray:
        """How often each token occurs in the training text, [V] int64."""
        return self.splits["train"].token_counts(self.model.vocab_size)


def prepare_run(config: ConfigDict, tokenizer_path: Path | None = None, *, resumed: Path | None = None) -> Prepared:
    """Prepares data and model; what was prepared before, for this run or another, is found again in the cache.

    Args:
        config: the whole configuration.
        tokenizer_path: a saved tokenizer to use, such as that of a run to start from. None: the one that the
            configuration names, or one trained on the corpus.
        resumed: the folder of a run that goes on, which it does only with what it began with, its tokenizer first.

    Raises:
        UserError: the data, the tokenizer or the prompt encoder cannot be used, or is not what the run began with.
    """
    source = open_source(config.data, data_folder())
    saved = tokenizer_path if resumed is None else resumed / TOKENIZER_FOLDER
    tokenizer = _tokenizer(config.tokenizer, source, saved)
    encoder = make_prompt_encoder(config.prompt_encoder, tokenizer)
    identity = {
        "data": source.identity,
        "tokenizer": tokenizer_identity(tokenizer),
        "prompt_encoder": encoder.identity,
    }
    # Before a corpus is tokenized, which may take minutes.
    if resumed is not None:
        _check_identity(resumed, identity)
    splits = prepare(source, tokenizer, data_folder(), block_size=config.model.block_size)
    train = splits["train"]
    print(
        f"training text: {train.num_rows:,} rows, {len(train.tokens):,} tokens, {train.num_prompts:,} prompts",
        flush=True,
    )
    return Prepared(
        tokenizer=tokenizer,
        prompt_encoder=encoder,
        splits=splits,
        buckets=choose_buckets(train.lengths, config.data.num_buckets, config.model.block_size),
        model=make_model(config, len(tokenizer), encoder),
        identity=identity,
    )


def _tokenizer(config: ConfigDict, source: Source, path: Path | None) -> PreTrainedTokenizerFast:
    def train(folder):
        print(f"training a tokenizer of {config.vocab_size:,} tokens", flush=True)
        corpus_tokenizer(source, config.vocab_size).save_pretrained(folder)

    key = f"tokenizer {tokenizers.__version__}|{source.identity}|{config.vocab_size}|{_TOKENIZER_CHARACTERS}"
    return load_tokenizer(path or config.path or made_once(data_folder(), key, train))


def corpus_tokenizer(source: Source, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the training texts; of a large corpus on every second, third and so on."""
    characters = sum(len(example.text) for example in source.examples("train"))
    every = max(1, round(characters / _TOKENIZER_CHARACTERS))
    some = itertools.islice(source.examples("train"), 0, None, every)
    return train_tokenizer((example.text for example in some), vocab_size)


def begin_workdir(workdir: Path, config: ConfigDict, prepared: Prepared):
    """Makes `workdir` that of a new run. Without a checkpoint, what an earlier one left there is of no use."""
    for name in (CONFIG_FILE, HISTORY_FILE, WANDB_RUN_FILE):
        (workdir / name).unlink(missing_ok=True)
    record_config(workdir, config, step=0)
    prepared.tokenizer.save_pretrained(workdir / TOKENIZER_FOLDER)
    (workdir / IDENTITY_FILE).write_text(json.dumps(prepared.identity, indent=2) + "\n", encoding="utf-8")
    save_row_lengths(workdir, prepared.splits["train"].lengths)


def _check_identity(workdir: Path, identity: Mapping[str, str]):
    """Raises a UserError if the run in `workdir` was trained on other data, tokens or prompt states."""
    saved = saved_identity(workdir)
    names = {"data": "text of data.source", "tokenizer": "tokenizer", "prompt_encoder": "prompt encoder"}
    changed = [name for key, name in names.items() if saved[key] != identity[key]]
    if changed:
        # Weights can go on with other text, but not with other tokens or prompt states.
        instead = f", or start a new run in another workdir with --config.train.init_from={workdir}"
        raise UserError(
            f"the {' and the '.join(changed)} changed since the run in --workdir={workdir} began: put back what "
            f"was there{instead if changed == [names['data']] else ''}"
        )
