"""`--mode=eval`: what a run has learnt, measured on held-out text."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sunfish_jax.data.batches import held_out_row_numbers, held_out_rows
from sunfish_jax.data.buckets import choose_buckets
from sunfish_jax.data.sources import open_source
from sunfish_jax.data.tokens import prepare
from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import bits_per_byte
from sunfish_jax.evaluation.held_out import held_out_cross_entropy, nearest_neighbour_distance
from sunfish_jax.evaluation.infill_accuracy import infill_accuracy
from sunfish_jax.generation.options import Settings
from sunfish_jax.models.prompt_table import PromptTable
from sunfish_jax.workdir.json_file import write_json
from sunfish_jax.workdir.run import load_run

RESULT_FILE = "eval.json"
_INFILL_STEPS = 16


def run(workdir: Path, checkpoint: str, split: str) -> dict:
    """Prints the held-out figures and the likelihood bound, and writes them to `eval.json` in the workdir.

    Args:
        workdir: The run's folder.
        checkpoint: `latest`, `best` or a step.
        split: `validation` or `test`.

    Returns:
        What is written.

    Raises:
        UserError: There is no such checkpoint, or the split is empty.
    """
    run = load_run(workdir, checkpoint)
    config, network = run.config, (run.model, run.params)
    data_dir = workdir / "data"
    source = open_source(config.data, data_dir)
    if source.identity != run.data_identity:
        # Other text is split elsewhere: some that the run was trained on would be taken for held-out text.
        raise UserError(
            f"the text of data.source={config.data.source} changed since the run in --workdir={workdir} was "
            "trained on it: put back what was there"
        )
    splits = prepare(source, run.tokenizer, data_dir, block_size=config.model.block_size)
    texts = splits[split]
    if not texts.num_rows:
        raise UserError(f"--split={split}: the corpus has no {split} text; give the other one")
    buckets = choose_buckets(splits["train"].lengths, config.data.num_buckets, config.model.block_size)
    prompts = PromptTable(run.prompt_encoder, texts.num_prompts, texts.prompt_texts)
    batches_of = functools.partial(held_out_rows, texts, buckets=buckets, config=config, prompts=prompts)
    result = {"workdir": str(workdir), "checkpoint_step": run.step, "split": split}
    rows = batches_of(config.eval.num_rows)
    figures = held_out_cross_entropy(*network, rows, log_unigram=run.params["log_unigram"])
    figures["embeddings/nearest_neighbour_distance"] = float(nearest_neighbour_distance(*network))
    result["held_out"] = figures
    print(f"step {run.step}, {split} text\n\n{table(figures)}", flush=True)

    rows = batches_of(config.eval.bound_rows)
    numbers = held_out_row_numbers(texts, config.eval.bound_rows, buckets, config)
    row_bytes = [np.where(part < 0, 0, texts.row_bytes[part]) for _, part in numbers]
    settings = Settings.make(config.sampling).with_steps(min(config.sampling.num_steps, _INFILL_STEPS))
    accuracy = infill_accuracy(*network, run.schedule, rows, settings)
    result["infill_accuracy"] = dataclasses.asdict(accuracy)
    print(
        f"\ngaps of 1 to 4 tokens filled right: {accuracy.true:.3f}; with the words around them shuffled "
        f"{accuracy.shuffled:.3f} (difference ± {accuracy.standard_error:.3f}, {accuracy.num_tokens} tokens)",
        flush=True,
    )
    result["bits_per_byte"] = {}
    for name, prompted in (("with prompt", True), ("without prompt", False)):
        bound = bits_per_byte(
            *network, run.schedule, rows, row_bytes, prompted=prompted, num_draws=config.eval.bound_draws
        )
        result["bits_per_byte"][name.replace(" ", "_")] = dataclasses.asdict(bound)
        parts = ", ".join(f"{term} {value:.3f}" for term, value in bound.terms.items())
        print(
            f"bound {name}: {bound.value:.3f} ± {bound.standard_error:.3f} bits per byte ({parts}; "
            f"{bound.num_rows} rows, {bound.num_bytes} bytes)",
            flush=True,
        )
    write_json(workdir / RESULT_FILE, result)
    return result


def table(figures: Mapping[str, float]) -> str:
    """The held-out figures as a table, a line for each noise level."""
    lines = ["token SNR   cross-entropy   true context   shuffled   no context   (nats a token)"]
    for snr in HELD_OUT_SNRS:
        names = (f"held_out/rho_{snr:g}", *(f"context/{name}_{snr:g}" for name in ("true", "shuffled", "none")))
        values = [figures[name] for name in names]
        lines.append("{:9g}   {:13.3f}   {:12.3f}   {:8.3f}   {:10.3f}".format(snr, *values))
    lines += [
        f"mean {figures['held_out/mean']:.3f}; self-conditioning gains "
        f"{figures['held_out/self_conditioning_gain']:.3f}, the order of words {figures['context/gain']:.3f}",
        f"nearest-neighbour distance of the embeddings: "
        f"{figures['embeddings/nearest_neighbour_distance']:.3f} of their norm",
    ]
    return "\n".join(lines)
