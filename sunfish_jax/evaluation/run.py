"""`--mode=eval`: what a run has learnt, measured on held-out text and on samples."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.cache import data_folder
from sunfish_jax.data.sources import Source, open_source
from sunfish_jax.data.tokens import prepare
from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import BitsPerByte, bits_per_byte
from sunfish_jax.evaluation.evaluate import evaluate
from sunfish_jax.evaluation.held_out import held_out_cross_entropy, nearest_neighbour_distance
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.generation.gaps import ANY, PADDING, allowed_tokens
from sunfish_jax.generation.generator import Constraint, generate, sample_keys
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import PromptEncoder, encode_prompts
from sunfish_jax.workdir.progress import Progress, load_totals
from sunfish_jax.workdir.run import Run, load_run

# What is only there to compare with gets so many times fewer draws.
_FEWER_DRAWS = 4


def run(workdir: Path, checkpoint: str, split: str, num_samples: int) -> dict:
    """Evaluates a run, as `evaluation.evaluate.evaluate` says.

    Args:
        workdir: The run's folder.
        checkpoint: `latest`, `best` or a step.
        split: `validation` or `test`.
        num_samples: Texts to sample.

    Raises:
        UserError: There is no such checkpoint, or the split is empty.
    """
    run = load_run(workdir, checkpoint)
    source = source_of(run)
    splits = prepare(source, run.tokenizer, data_folder(), block_size=run.config.model.block_size)
    return evaluate(Denoiser(run, Settings.make(run.config.sampling)), source, splits, split, num_samples)


def source_of(run: Run) -> Source:
    """The corpus that a run was trained on. Raises a UserError if it is gone or has changed since."""
    try:
        source = open_source(run.config.data, data_folder())
    except UserError as error:
        raise UserError(
            f"what --workdir={run.workdir} was trained on cannot be opened: {error} (where it was moved, run the "
            "training command with its new --config.data.source first)"
        ) from error
    if source.identity != run.data_identity:
        # Other text is split elsewhere: some that the run was trained on would be taken for held-out text.
        raise UserError(
            f"the text of data.source={run.config.data.source} changed since the run in --workdir={run.workdir} "
            "was trained on it: put back what was there"
        )
    return source


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A run of the denoiser, as the `Subject` of an evaluation.

    Attributes:
        run: The run.
        settings: How it samples.
    """

    run: Run
    settings: Settings
    likelihood_name = "bound on the likelihood"
    filling = "the likeliest token of each position, in one pass"

    @property
    def workdir(self) -> Path:
        return self.run.workdir

    @property
    def config(self) -> ConfigDict:
        return self.run.config

    @property
    def tokenizer(self):
        return self.run.tokenizer

    @property
    def prompt_encoder(self) -> PromptEncoder:
        return self.run.prompt_encoder

    @property
    def params(self) -> Mapping:
        return self.run.params

    @functools.cached_property
    def progress(self) -> Progress:
        return load_totals(self.run.workdir, self.run.step, self.run.step)

    def held_out(self, text: TextRows) -> dict[str, float]:
        """The cross-entropy on the grid of noise levels."""
        run = self.run
        figures = held_out_cross_entropy(run.model, run.params, text.rows)
        distance = nearest_neighbour_distance(run.model, run.params)
        figures["embeddings/nearest_neighbour_distance"] = float(distance)
        print(grid_table(figures))
        return figures

    def likelihood(self, text: TextRows, rough: bool) -> BitsPerByte:
        """The bound in bits a byte."""
        run = self.run
        draws = max(1, run.config.eval.bound_draws // (_FEWER_DRAWS if rough else 1))
        return bits_per_byte(run.model, run.params, run.schedule, text, num_draws=draws)

    def fill(self, known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        """As in --mode=infill, words in gaps and nothing behind the end, but the likeliest ones, by one pass.

        In more of them the noise would choose among likely ones, and these are compared with what stood there.
        """
        run, length = self.run, known.tokens.shape[1]
        before_end = np.flip(np.logical_or.accumulate(np.flip(known.mask, axis=-1), axis=-1), axis=-1)
        allowed = allowed_tokens(run.tokenizer, run.model.vocab_size)
        constraint = Constraint(known, np.where(before_end, ANY, PADDING), allowed)
        settings = self.settings.with_steps(1)
        return generate(run.model, run.params, run.schedule, prompt, keys, length, settings, constraint=constraint)

    def write(self, prompts: Sequence[str | None], length: int) -> list[str]:
        """One text of at most `length` tokens for each prompt."""
        run = self.run
        return sample_texts(
            run.model,
            run.params,
            run.schedule,
            run.tokenizer,
            encode_prompts(run.prompt_encoder, prompts),
            sample_keys(0, np.arange(len(prompts))),
            seq_len=length,
            settings=self.settings,
            row_lengths=run.row_lengths,
            counter=StepCounter.on_terminal(),
        )


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
