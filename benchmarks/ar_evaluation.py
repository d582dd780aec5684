"""What the twin has learnt: its figures on held-out text, and samples in the form of the denoiser's."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ar_generation import generate
from ar_likelihood import held_out_text, score
from ar_model import count_parameters
from ar_training import Twin, open_twin

from sunfish_jax.data.batches import Batch
from sunfish_jax.data.sources import open_source
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.infill_accuracy import infill_accuracy, infill_table
from sunfish_jax.evaluation.sample_quality import (
    SAMPLE_LENGTH,
    SAMPLES_FILE,
    articles_to_write,
    judge_samples,
    prompts_of,
)
from sunfish_jax.generation.generator import sample_keys, take_rows, text_keys
from sunfish_jax.generation.options import SampleOptions
from sunfish_jax.generation.output import decode, jsonl_writer, provenance
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.workdir.json_file import write_json
from sunfish_jax.workdir.run import DATA_FOLDER

RESULT_FILE = "eval.json"


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


def evaluate(twin: Twin, split: str, num_samples: int, temperature: float) -> dict:
    """Prints the held-out figures and writes them to `eval.json` in the workdir.

    Args:
      twin: as `open_twin` gives it.
      split: `validation` or `test`.
      num_samples: texts to sample and judge, as `main.py --mode=eval` does; 0 for none.
      temperature: of those texts.

    Returns:
      What is written.

    Raises:
      UserError: the split is empty.
    """
    config = twin.config
    if not twin.prepared.splits[split].num_rows:
        raise UserError(f"--split={split}: the corpus has no {split} text; give the other one")
    held_out = score(
        twin.model, twin.params, held_out_text(twin.prepared, config, split, config.eval.num_rows), prompted=True
    )
    result = {
        "workdir": str(twin.workdir),
        "checkpoint_step": twin.step,
        "split": split,
        "parameters": count_parameters(twin.model),
        "dropout": config.model.dropout,
        "training_seconds": twin.progress.seconds,
        "training_tokens": twin.progress.real_tokens,
        "nats_per_token": held_out.nats_per_token,
        "bits_per_byte": {},
    }
    print(
        f"step {twin.step}, {split} text: {held_out.nats_per_token:.4f} nats a token "
        f"({len(held_out.nats)} rows, {int(held_out.num_tokens.sum())} tokens)",
        flush=True,
    )
    text = held_out_text(twin.prepared, config, split, config.eval.bound_rows)
    result["infill_accuracy"] = infill_figures(twin, text.rows)
    for name, prompted in (("with prompt", True), ("without prompt", False)):
        exact = score(twin.model, twin.params, text, prompted=prompted).bits_per_byte()
        result["bits_per_byte"][name.replace(" ", "_")] = dataclasses.asdict(exact)
        print(
            f"exact {name}: {exact.value:.3f} ± {exact.standard_error:.3f} bits per byte ({exact.num_rows} rows, "
            f"{exact.num_bytes} bytes)",
            flush=True,
        )
    if num_samples:
        result["temperature"] = temperature
        result["samples"] = sample_figures(twin, split, num_samples, temperature)
    write_json(twin.workdir / RESULT_FILE, result)
    return result


def infill_figures(twin: Twin, rows: Sequence[Batch]) -> dict[str, dict]:
    """Prints and returns how often gaps of each size are filled right: likeliest tokens, from the left alone."""

    def fill(known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        return generate(twin.model, twin.params, prompt, keys, known.tokens.shape[1], temperature=0, known=known)

    accuracies = infill_accuracy(fill, rows, most_frequent=int(np.argmax(twin.params["log_unigram"])))
    print(infill_table(accuracies), flush=True)
    return {str(size): dataclasses.asdict(accuracy) for size, accuracy in accuracies.items()}


def write_texts(twin: Twin, prompts: Sequence[str | None], temperature: float) -> list[str]:
    """One text for each of the prompts, without guidance; text i is sample i."""
    tokens = generate(
        twin.model,
        twin.params,
        encode_prompts(twin.prompt_encoder, prompts),
        sample_keys(0, np.arange(len(prompts))),
        min(twin.config.model.block_size, SAMPLE_LENGTH),
        temperature=temperature,
    )
    return [decode(row, twin.prepared.tokenizer) for row in tokens]


def sample_figures(twin: Twin, split: str, num_samples: int, temperature: float) -> dict[str, dict[str, float]]:
    """Samples a text for each of some held-out prompts, and prints and returns how good they are."""
    prepared = twin.prepared
    source = open_source(twin.config.data, twin.workdir / DATA_FOLDER)
    held_out = list(source.examples(split))
    articles = articles_to_write(held_out, prepared.splits[split], prepared.tokenizer, num_samples)
    texts = write_texts(twin, prompts_of(articles), temperature)
    return judge_samples(texts, list(source.examples("train")), articles, twin.workdir / SAMPLES_FILE)


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
    distinct = options.prompts or twin.config.logging.sample_prompts
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
            print(f"--- {prompt} (seed {options.seed}, sample {index})\n{text}\n", flush=True)
            write({"text": text, "prompt": prompt, "index": index} | origin)


def run(workdir: Path, split: str, eval_samples: int, options: SampleOptions, temperature: float) -> None:
    """Evaluates the best checkpoint of the twin in `workdir`, and samples from it."""
    twin = open_twin(workdir)
    evaluate(twin, split, eval_samples, temperature)
    write_samples(twin, options, temperature)
