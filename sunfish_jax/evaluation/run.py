"""`--mode=eval`: what a run has learnt, measured on held-out text and on samples."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from sunfish_jax.data.batches import Batch, held_out_row_numbers, held_out_rows
from sunfish_jax.data.examples import Example
from sunfish_jax.data.sources import Source, open_source
from sunfish_jax.data.tokens import TokenizedSplit, prepare
from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import bits_per_byte
from sunfish_jax.evaluation.held_out import held_out_cross_entropy, nearest_neighbour_distance
from sunfish_jax.evaluation.infill_accuracy import infill_accuracy, infill_table
from sunfish_jax.evaluation.sample_quality import (
    SAMPLE_LENGTH,
    SAMPLES,
    SAMPLES_FILE,
    articles_to_write,
    judge_samples,
    prompts_of,
)
from sunfish_jax.generation.generator import Constraint, generate
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.models.prompt_table import PromptTable
from sunfish_jax.workdir.event_writer import SummaryWriter
from sunfish_jax.workdir.json_file import write_json
from sunfish_jax.workdir.run import DATA_FOLDER, Run, load_run

RESULT_FILE = "eval.json"
_INFILL_STEPS = 16


def run(workdir: Path, checkpoint: str, split: str, num_samples: int) -> dict:
    """Prints what was measured, and writes it to `eval.json`, the samples, and TensorBoard's files in the workdir.

    Args:
        workdir: The run's folder.
        checkpoint: `latest`, `best` or a step.
        split: `validation` or `test`.
        num_samples: Texts to sample, fewer where there are fewer held-out prompts; 0 for none.

    Returns:
        What is written to `eval.json`.

    Raises:
        UserError: There is no such checkpoint, or the split is empty.
    """
    run = load_run(workdir, checkpoint)
    config, source = run.config, source_of(run)
    splits = prepare(source, run.tokenizer, workdir / DATA_FOLDER, block_size=config.model.block_size)
    texts = splits[split]
    if not texts.num_rows:
        raise UserError(f"--split={split}: the corpus has no {split} text; give the other one")
    prompts = PromptTable(run.prompt_encoder, texts.num_prompts, texts.prompt_texts)
    batches_of = functools.partial(held_out_rows, texts, config=config, prompts=prompts)
    print(f"step {run.step}, {split} text", flush=True)

    result = {"workdir": str(workdir), "checkpoint_step": run.step, "split": split}
    with _section("held-out cross-entropy"):
        result["held_out"] = held_out_figures(run, batches_of(config.eval.num_rows))
    rows = batches_of(config.eval.bound_rows)
    with _section("gaps"):
        result["infill_accuracy"] = infill_figures(run, rows)
    with _section("bound on the likelihood"):
        numbers = held_out_row_numbers(texts, config.eval.bound_rows, config)
        result["bits_per_byte"] = bound_figures(run, rows, [_row_bytes(texts, part) for _, part in numbers])
    if num_samples:
        with _section("samples"):
            articles = articles_to_write(list(source.examples(split)), texts, run.tokenizer, num_samples)
            result["samples"] = sample_figures(run, list(source.examples("train")), articles)
    write_json(workdir / RESULT_FILE, result)
    _log(run, result)
    return result


def source_of(run: Run) -> Source:
    """The corpus that a run was trained on. Raises a UserError if it has changed since."""
    source = open_source(run.config.data, run.workdir / DATA_FOLDER)
    if source.identity != run.data_identity:
        # Other text is split elsewhere: some that the run was trained on would be taken for held-out text.
        raise UserError(
            f"the text of data.source={run.config.data.source} changed since the run in --workdir={run.workdir} "
            "was trained on it: put back what was there"
        )
    return source


def held_out_figures(run: Run, rows: list[Batch]) -> dict[str, float]:
    """Prints and returns the cross-entropy on the grid of noise levels."""
    figures = held_out_cross_entropy(run.model, run.params, rows, log_unigram=run.params["log_unigram"])
    distance = nearest_neighbour_distance(run.model, run.params)
    figures["embeddings/nearest_neighbour_distance"] = float(distance)
    print(grid_table(figures))
    return figures


def infill_figures(run: Run, rows: list[Batch]) -> dict[str, dict]:
    """Prints and returns how often gaps of each size are filled right."""
    sampling = run.config.sampling
    settings = Settings.make(sampling).with_steps(min(sampling.num_steps, _INFILL_STEPS))
    most_frequent = int(np.argmax(run.params["log_unigram"]))
    anything = np.ones((1, run.model.vocab_size), bool)

    def fill(known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        constraint = Constraint(known, np.zeros_like(known.tokens), anything)
        length = known.tokens.shape[1]
        return generate(run.model, run.params, run.schedule, prompt, keys, length, settings, constraint=constraint)

    accuracies = infill_accuracy(fill, rows, most_frequent)
    print(infill_table(accuracies))
    return {str(size): dataclasses.asdict(accuracy) for size, accuracy in accuracies.items()}


def bound_figures(run: Run, rows: list[Batch], row_bytes: list[np.ndarray]) -> dict[str, dict]:
    """Prints and returns the likelihood bound with and without prompts."""
    result = {}
    for name, prompted in (("with prompt", True), ("without prompt", False)):
        draws = run.config.eval.bound_draws
        bound = bits_per_byte(
            run.model, run.params, run.schedule, rows, row_bytes, prompted=prompted, num_draws=draws
        )
        parts = ", ".join(f"{term} {value:.3f}" for term, value in bound.terms.items())
        print(
            f"{name}: {bound.value:.3f} ± {bound.standard_error:.3f} bits per byte ({parts}; "
            f"{bound.num_rows} rows, {bound.num_bytes} bytes)",
            flush=True,
        )
        result[name.replace(" ", "_")] = dataclasses.asdict(bound)
    return result


def sample_figures(run: Run, train: list[Example], articles: list[Example]) -> dict[str, dict[str, float]]:
    """Samples a text for each held-out article, and prints and returns their quality."""
    settings = Settings.make(run.config.sampling)
    texts = sample_texts(
        run.model,
        run.params,
        run.schedule,
        run.tokenizer,
        encode_prompts(run.prompt_encoder, prompts_of(articles)),
        seq_len=min(run.config.model.block_size, SAMPLE_LENGTH),
        settings=settings,
        counter=StepCounter.on_terminal(),
    )
    print(f"{settings.scheduler}, {settings.num_steps} steps")
    return judge_samples(texts, train, articles, run.workdir / SAMPLES_FILE)


def grid_table(figures: Mapping[str, float]) -> str:
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


def _row_bytes(texts: TokenizedSplit, rows: np.ndarray) -> np.ndarray:
    return np.where(rows < 0, 0, texts.row_bytes[rows])


@contextlib.contextmanager
def _section(title: str) -> Iterator[None]:
    """Says what is being measured, which may take minutes, and how long it took."""
    began = time.monotonic()
    print(f"\n{title} ...", flush=True)
    yield
    print(f"({time.monotonic() - began:.0f}s)", flush=True)


def _log(run: Run, result: Mapping) -> None:
    """Writes the figures to TensorBoard, at the checkpoint's step."""
    groups = {
        "infill": result["infill_accuracy"],
        "bits_per_byte": result["bits_per_byte"],
        "samples": {SAMPLES: result["samples"][SAMPLES]} if "samples" in result else {},
    }
    scalars = dict(result["held_out"])
    for group, members in groups.items():
        for member, figures in members.items():
            for name, value in figures.items():
                if isinstance(value, int | float) and not math.isnan(value):
                    scalars[f"{group}/{member}/{name}"] = value
    # A folder of its own, which TensorBoard shows beside the training curves: an older checkpoint may be measured.
    writer = SummaryWriter(str(run.workdir / f"eval_{result['split']}"))
    writer.write_scalars(run.step, scalars)
    writer.close()
