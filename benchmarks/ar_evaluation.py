"""What the twin has learnt: its figures on held-out text, and samples in the form of the denoiser's."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ar_generation import generate
from ar_likelihood import score
from ar_model import count_parameters
from ar_training import Twin, open_twin

from sunfish_jax.data.batches import Batch
from sunfish_jax.data.sources import open_source
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import frequency_figure, likelihood_line
from sunfish_jax.evaluation.infill_accuracy import infill_accuracy, infill_table
from sunfish_jax.evaluation.report import Report
from sunfish_jax.evaluation.sample_quality import (
    SAMPLES_FILE,
    QualityJudge,
    articles_to_write,
    beginnings,
    judge_samples,
    prompts_of,
    sample_length,
)
from sunfish_jax.evaluation.text_rows import TextRows, likelihood_texts
from sunfish_jax.generation.generator import sample_keys, take_rows, text_keys
from sunfish_jax.generation.options import SampleOptions
from sunfish_jax.generation.output import decode, jsonl_writer, provenance
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.workdir.run import DATA_FOLDER


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
    """Prints the figures of `main.py --mode=eval`, and writes `eval.json` and TensorBoard's files in the workdir.

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
    config, splits = twin.config, twin.prepared.splits
    if not splits[split].num_rows:
        raise UserError(f"--split={split}: the corpus has no {split} text; give the other one")
    report = Report(twin.workdir, split, twin.step)
    report.result |= {
        "parameters": count_parameters(twin.model),
        "dropout": config.model.dropout,
        "training_seconds": twin.progress.seconds,
        "training_tokens": twin.progress.real_tokens,
    }
    print(f"step {twin.step}, {split} text", flush=True)
    with report.section("held-out cross-entropy") as result:
        rows = TextRows.of(splits[split], config.eval.num_rows, config, twin.prompt_encoder)
        held_out = score(twin.model, twin.params, rows)
        result["held_out"] = {"nats_per_token": held_out.nats_per_token}
        print(f"{held_out.nats_per_token:.4f} nats a token ({len(held_out.nats)} rows)", flush=True)
    scored = likelihood_texts(splits, split, config, twin.prompt_encoder)
    with report.section("gaps") as result:
        result["infill_accuracy"] = infill_figures(twin, scored["with prompt"].rows)
    with report.section("likelihood, exact") as result:
        result["bits_per_byte"] = likelihood_figures(twin, scored)
    if num_samples:
        with report.section("samples") as result:
            result["sampling"] = {"scheduler": "autoregressive", "temperature": temperature}
            result["samples"] = sample_figures(twin, split, num_samples, temperature)
    report.log()
    return report.result


def likelihood_figures(twin: Twin, texts: Mapping[str, TextRows]) -> dict[str, dict]:
    """Prints and returns the exact likelihood of each of `likelihood_texts`."""
    result = {}
    for name, text in texts.items():
        exact = score(twin.model, twin.params, text).bits_per_byte()
        print(likelihood_line(name, exact, "exact"), flush=True)
        result[name.replace(" ", "_")] = dataclasses.asdict(exact)
    return result | {"frequencies": frequency_figure(texts, twin.params)}


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
        sample_length(twin.config.model.block_size),
        temperature=temperature,
    )
    return [decode(row, twin.prepared.tokenizer) for row in tokens]


def sample_figures(twin: Twin, split: str, num_samples: int, temperature: float) -> dict[str, dict[str, float]]:
    """Samples a text for each of some held-out prompts, and prints and returns how good they are."""
    prepared = twin.prepared
    source = open_source(twin.config.data, twin.workdir / DATA_FOLDER)
    held_out = list(source.examples(split))
    articles = articles_to_write(held_out, prepared.splits[split], prepared.tokenizer, num_samples)
    print(f"autoregressive, temperature {temperature:g}", flush=True)
    texts = write_texts(twin, prompts_of(articles), temperature)
    length = sample_length(twin.config.model.block_size)
    judge = QualityJudge(list(source.examples("train")), articles, beginnings(articles, prepared.tokenizer, length))
    return judge_samples(judge, texts, articles, twin.workdir / SAMPLES_FILE)


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
