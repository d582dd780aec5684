"""`--mode=eval`: what a run has learnt, measured on held-out text and on samples."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sunfish_jax.data.batches import Batch
from sunfish_jax.data.examples import Example
from sunfish_jax.data.sources import Source, open_source
from sunfish_jax.data.tokens import prepare
from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import bits_per_byte, frequency_figure, likelihood_line
from sunfish_jax.evaluation.held_out import held_out_cross_entropy, nearest_neighbour_distance
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
from sunfish_jax.evaluation.text_rows import REFERENCES, TextRows, likelihood_texts
from sunfish_jax.generation.gaps import ANY, PADDING, allowed_tokens
from sunfish_jax.generation.generator import Constraint, generate
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.workdir.run import DATA_FOLDER, Run, load_run

# Gaps are compared with what stood there: a likely token is asked for, not one of many.
_INFILL_STEPS, _INFILL_TEMPERATURE = 16, 0.1


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
    report = Report(workdir, split, run.step)
    print(f"step {run.step}, {split} text", flush=True)
    with report.section("held-out cross-entropy") as result:
        rows = TextRows.of(texts, config.eval.num_rows, config, run.prompt_encoder).rows
        result["held_out"] = held_out_figures(run, rows)
    scored = likelihood_texts(splits, split, config, run.prompt_encoder)
    with report.section("gaps") as result:
        result["infill_accuracy"] = infill_figures(run, scored["with prompt"].rows)
    with report.section("bound on the likelihood") as result:
        result["bits_per_byte"] = bound_figures(run, scored)
    if num_samples:
        with report.section("samples") as result:
            settings = Settings.make(config.sampling)
            result["sampling"] = dataclasses.asdict(settings)
            articles = articles_to_write(list(source.examples(split)), texts, run.tokenizer, num_samples)
            result["samples"] = sample_figures(run, source, articles, settings)
    report.log()
    return report.result


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


def infill_figures(run: Run, rows: Sequence[Batch]) -> dict[str, dict]:
    """Prints and returns how often gaps of each size are filled right, sampling near to the likeliest text."""
    sampling = run.config.sampling
    settings = dataclasses.replace(
        Settings.make(sampling), num_steps=min(sampling.num_steps, _INFILL_STEPS), temperature=_INFILL_TEMPERATURE
    )
    print(f"{settings.scheduler}, {settings.num_steps} steps, temperature {settings.temperature}")
    allowed = allowed_tokens(run.tokenizer, run.model.vocab_size)

    def fill(known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        # As in --mode=infill: words in gaps, nothing behind the end.
        before_end = np.flip(np.logical_or.accumulate(np.flip(known.mask, axis=-1), axis=-1), axis=-1)
        constraint = Constraint(known, np.where(before_end, ANY, PADDING), allowed)
        length = known.tokens.shape[1]
        return generate(run.model, run.params, run.schedule, prompt, keys, length, settings, constraint=constraint)

    accuracies = infill_accuracy(fill, rows, int(np.argmax(run.params["log_unigram"])))
    print(infill_table(accuracies))
    return {str(size): dataclasses.asdict(accuracy) for size, accuracy in accuracies.items()}


def bound_figures(run: Run, texts: Mapping[str, TextRows]) -> dict[str, dict]:
    """Prints and returns the likelihood bound of each of `likelihood_texts`."""
    result = {}
    for name, text in texts.items():
        # What is only there to compare with need not be as exact.
        draws = max(1, run.config.eval.bound_draws // (4 if name in REFERENCES else 1))
        bound = bits_per_byte(run.model, run.params, run.schedule, text, num_draws=draws)
        parts = ", ".join(f"{term} {value:.3f}" for term, value in bound.terms.items())
        print(likelihood_line(name, bound, parts), flush=True)
        result[name.replace(" ", "_")] = dataclasses.asdict(bound)
    return result | {"frequencies": frequency_figure(texts, run.params)}


def sample_figures(
    run: Run, source: Source, articles: Sequence[Example], settings: Settings
) -> dict[str, dict[str, float]]:
    """Samples a text for each of some held-out articles, and prints and returns their quality."""
    length = sample_length(run.config.model.block_size)
    samples = sample_texts(
        run.model,
        run.params,
        run.schedule,
        run.tokenizer,
        encode_prompts(run.prompt_encoder, prompts_of(articles)),
        seq_len=length,
        settings=settings,
        counter=StepCounter.on_terminal(),
    )
    print(
        f"{settings.scheduler}, {settings.num_steps} steps, guidance {settings.guidance_scale:g}, "
        f"temperature {settings.temperature:g}"
    )
    judge = QualityJudge(list(source.examples("train")), articles, beginnings(articles, run.tokenizer, length))
    return judge_samples(judge, samples, articles, run.workdir / SAMPLES_FILE)


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
