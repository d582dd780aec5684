"""`--mode=sample`: a prompt in, text out."""

from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.generation.generator import drawn_lengths, generate, take_rows, text_keys
from sunfish_jax.generation.options import SampleOptions, Settings
from sunfish_jax.generation.output import StepCounter, decode, jsonl_writer, provenance
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import encode_prompts, say_what_is_unread
from sunfish_jax.workdir.run import load_run


def run(workdir: Path, options: SampleOptions) -> None:
    """Prints texts for each prompt (or without one), and writes them to `options.output`.

    Sample i of a prompt depends on the seed, i, the prompt and the settings alone: asking for more samples or
    for other prompts beside it does not change it.

    Raises:
        UserError: There is no such checkpoint, the length is over the block, or the output cannot be written.
    """
    with jsonl_writer(options.output) as write:
        run = load_run(workdir, options.checkpoint)
        options.check_length(run.config.model.block_size)
        seq_len = options.seq_len or run.config.model.block_size
        settings = Settings.make(run.config.sampling, options)
        say_what_is_unread(run.prompt_encoder, options.prompts)
        distinct = options.prompts or (None,)
        rows = np.repeat(np.arange(len(distinct)), options.num_samples)
        indices = np.tile(np.arange(options.num_samples), len(distinct))
        texts = sample_texts(
            run.model,
            run.params,
            run.schedule,
            run.tokenizer,
            take_rows(encode_prompts(run.prompt_encoder, distinct), rows),
            text_keys(options.seed, [distinct[number] for number in rows], indices),
            seq_len=seq_len,
            settings=settings,
            row_lengths=run.row_lengths,
            counter=StepCounter.on_terminal(),
        )
        origin = provenance(run, options, settings) | {"seq_len": seq_len}
        for number, index, text in zip(rows, indices.tolist(), texts, strict=True):
            prompt = distinct[number]
            print(f"--- {prompt or 'no prompt'} (seed {options.seed}, sample {index})\n{text}\n", flush=True)
            write({"text": text, "prompt": prompt, "index": index} | origin)


def sample_texts(
    model: nn.Module,
    params: Mapping,
    schedule: Schedule,
    tokenizer,
    prompt: Prompt,
    keys: jax.Array,
    *,
    seq_len: int,
    settings: Settings,
    row_lengths: np.ndarray,
    counter: StepCounter | None = None,
) -> list[str]:
    """One text of at most `seq_len` tokens for each of the prompts [n, P] and random keys [n].

    `row_lengths` are the counts of `drawn_lengths`.
    """
    lengths = drawn_lengths(keys, row_lengths, seq_len)
    tokens = generate(model, params, schedule, prompt, keys, seq_len, settings, lengths=lengths, counter=counter)
    return [decode(row[:length], tokenizer) for row, length in zip(tokens, lengths, strict=True)]
