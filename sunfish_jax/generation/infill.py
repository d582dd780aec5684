"""`--mode=infill`: a text with gaps in, the gaps filled."""

from pathlib import Path

import numpy as np

from sunfish_jax.generation import gaps
from sunfish_jax.generation.gap_lengths import choose_lengths
from sunfish_jax.generation.generator import Constraint, generate, take_rows, text_keys
from sunfish_jax.generation.options import InfillOptions, Settings
from sunfish_jax.generation.output import StepCounter, jsonl_writer, provenance
from sunfish_jax.models.prompt import round_up
from sunfish_jax.models.prompt_encoder import encode_prompts, say_what_is_unread
from sunfish_jax.workdir.run import load_run


def run(workdir: Path, options: InfillOptions) -> None:
    """Prints the text with its gaps filled, and writes it to `options.output`.

    The given words come back exactly. Every sample of a prompt has gaps of the same lengths; where a length is
    free, the seed decides it together with the model (`choose_lengths`).

    Raises:
        UserError: There is no such checkpoint, the gaps are malformed, the text is over the block, or the
            output cannot be written.
    """
    with jsonl_writer(options.output) as write:
        run = load_run(workdir, options.checkpoint)
        block_size, max_gap = run.config.model.block_size, run.config.sampling.max_gap
        options.check_length(block_size)
        template = gaps.parse(options.text, run.tokenizer)
        longest = gaps.check_length(template, max_gap, options.seq_len or block_size)
        settings = Settings.make(run.config.sampling, options)
        network = (run.model, run.params, run.schedule)
        allowed = gaps.allowed_tokens(run.tokenizer, run.model.vocab_size)
        counter = StepCounter.on_terminal()
        origin = provenance(run, options, settings) | {"template": options.text, "seq_len": options.seq_len}
        indices = np.arange(options.num_samples)
        say_what_is_unread(run.prompt_encoder, options.prompts)
        for prompt in options.prompts or (None,):
            encoded = encode_prompts(run.prompt_encoder, [prompt])
            # In steps of 16, so that few lengths are compiled; training rows have little padding after their end.
            lengths = choose_lengths(
                *network, run.tokenizer, template, encoded, min(round_up(longest), block_size), settings,
                max_gap=max_gap, seed=options.seed, counter=counter,
            )  # fmt: skip
            seq_len = min(round_up(template.num_given + sum(lengths) + 1), block_size)
            layout = gaps.lay_out(template, lengths, seq_len, run.tokenizer)
            tokens = generate(
                *network,
                take_rows(encoded, np.zeros_like(indices)),
                text_keys(options.seed, [prompt] * len(indices), indices),
                seq_len,
                settings,
                constraint=Constraint.of([layout] * len(indices), allowed),
                counter=counter,
            )
            for index, row in zip(indices.tolist(), tokens, strict=True):
                text, fills = gaps.fill(template, layout, row, run.tokenizer)
                title = f"{prompt or 'no prompt'} (seed {options.seed}, sample {index})"
                print(f"--- {title}\n{text}\n", flush=True)
                record = {"text": text, "fills": fills, "lengths": lengths, "prompt": prompt, "index": index}
                write(record | origin)
