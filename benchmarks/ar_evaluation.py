"""What the twin has learnt: its figures on held-out text, and samples in the form of the denoiser's."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ar_generation import generate
from ar_likelihood import score
from ar_training import Twin, open_twin
from ml_collections import ConfigDict

from sunfish_jax.cache import data_folder
from sunfish_jax.data.sources import open_source
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.evaluation.bound import BitsPerByte
from sunfish_jax.evaluation.evaluate import evaluate
from sunfish_jax.evaluation.sample_quality import sample_length
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.generation.generator import sample_keys, take_rows, text_keys
from sunfish_jax.generation.options import SampleOptions
from sunfish_jax.generation.output import decode, jsonl_writer, provenance
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import PromptEncoder, encode_prompts
from sunfish_jax.workdir.progress import Progress


@dataclasses.dataclass(frozen=True)
class TwinSettings:
    """How to sample, in the words of the denoiser's `Settings`.

    Attributes:
      num_steps: passes, one for each token.
      guidance_scale: logits = uncond + scale (cond - uncond).
      temperature: divides the logits; 0 takes the likeliest token.
    """

    num_steps: int
    guidance_scale: float
    temperature: float
    scheduler: str = "autoregressive"


@dataclasses.dataclass(frozen=True)
class TwinSubject:
    """The twin, as the `Subject` of an evaluation.

    Attributes:
      twin: as `open_twin` gives it.
      temperature: of what it writes.
    """

    twin: Twin
    temperature: float
    likelihood_name = "likelihood, exact"
    filling = "the likeliest tokens, from the left alone"

    @property
    def workdir(self) -> Path:
        return self.twin.workdir

    @property
    def config(self) -> ConfigDict:
        return self.twin.config

    @property
    def tokenizer(self):
        return self.twin.prepared.tokenizer

    @property
    def prompt_encoder(self) -> PromptEncoder:
        return self.twin.prompt_encoder

    @property
    def params(self) -> Mapping:
        return self.twin.params

    @property
    def progress(self) -> Progress:
        return self.twin.progress

    @property
    def settings(self) -> TwinSettings:
        length = sample_length(self.config.model.block_size)
        return TwinSettings(num_steps=length, guidance_scale=1.0, temperature=self.temperature)

    def held_out(self, text: TextRows) -> dict[str, float]:
        """The exact cross-entropy."""
        scored = score(self.twin.model, self.params, text)
        print(f"{scored.nats_per_token:.4f} nats a token ({len(scored.nats)} rows)")
        return {"nats_per_token": scored.nats_per_token}

    def likelihood(self, text: TextRows, rough: bool) -> BitsPerByte:
        """Bits a byte, exact in any case."""
        del rough
        return score(self.twin.model, self.params, text).bits_per_byte()

    def fill(self, known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        """Fills gaps one token after another."""
        length = known.tokens.shape[1]
        return generate(self.twin.model, self.params, prompt, keys, length, temperature=0, known=known)

    def write(self, prompts: Sequence[str | None], length: int) -> list[str]:
        """One text of at most `length` tokens for each prompt, without guidance; text i is sample i."""
        tokens = generate(
            self.twin.model,
            self.params,
            encode_prompts(self.prompt_encoder, prompts),
            sample_keys(0, np.arange(len(prompts))),
            length,
            temperature=self.temperature,
        )
        return [decode(row, self.tokenizer) for row in tokens]


def write_samples(twin: Twin, options: SampleOptions, temperature: float) -> None:
    """Prints texts for each prompt, and writes them to `options.output`, as `main.py --mode=sample` does.

    Sample i of a prompt depends on the seed, i, the prompt and the settings alone. Without prompts in the options
    there is a text for each of the configuration's `logging.sample_prompts`.

    Args:
      twin: as `open_twin` gives it.
      options: prompts, num_samples, seq_len, guidance_scale [1], seed and output are read.
      temperature: 0 takes the likeliest token.

    Raises:
      UserError: the length is over the block, or the output cannot be written.
    """
    options.check_length(twin.config.model.block_size)
    seq_len = options.seq_len or twin.config.model.block_size
    settings = TwinSettings(
        num_steps=seq_len,
        guidance_scale=1.0 if options.guidance_scale is None else options.guidance_scale,
        temperature=temperature,
    )
    distinct = options.prompts or twin.config.logging.sample_prompts or (None,)
    rows = np.repeat(np.arange(len(distinct)), options.num_samples)
    indices = np.tile(np.arange(options.num_samples), len(distinct))
    with jsonl_writer(options.output) as write:
        tokens = generate(
            twin.model,
            twin.params,
            take_rows(encode_prompts(twin.prompt_encoder, distinct), rows),
            text_keys(options.seed, [distinct[number] for number in rows], indices),
            seq_len,
            temperature=temperature,
            guidance_scale=settings.guidance_scale,
        )
        origin = provenance(twin, options, settings) | {"seq_len": seq_len}
        for number, index, row in zip(rows, indices.tolist(), tokens, strict=True):
            prompt = distinct[number]
            text = decode(row, twin.prepared.tokenizer)
            print(f"--- {prompt or 'no prompt'} (seed {options.seed}, sample {index})\n{text}\n", flush=True)
            write({"text": text, "prompt": prompt, "index": index} | origin)


def run(workdir: Path, split: str, eval_samples: int, options: SampleOptions, temperature: float) -> None:
    """Evaluates the best checkpoint of the twin in `workdir`, and samples from it."""
    twin = open_twin(workdir)
    source = open_source(twin.config.data, data_folder())
    evaluate(TwinSubject(twin, temperature), source, twin.prepared.splits, split, eval_samples)
    write_samples(twin, options, temperature)
