"""What a person asked for when generating, checked before anything heavy is imported, and the settings it makes."""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from sunfish_jax.diffusion.names import SCHEDULERS
from sunfish_jax.errors import UserError

# An encoder reads 64 tokens or so: what is much longer than that was not meant as a prompt.
MAX_PROMPT_CHARACTERS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What sampling and infilling have in common. `None` stands for the run's own `sampling` value.

    Attributes:
        prompts: each is generated from `num_samples` times; none: unconditional.
        num_samples: samples a prompt.
        seq_len: tokens, end of text included, that a text may come to; None: the model's `block_size`.
        num_steps: denoising steps.
        scheduler: one of `SCHEDULERS`.
        guidance_scale: logits = uncond + scale (cond - uncond).
        temperature: divides the logits.
        seed: the same seed and options give the same text.
        checkpoint: `latest`, `best` or a step's number.
        output: a file that gets one JSON object a sample.
    """

    prompts: tuple[str, ...] = ()
    num_samples: int = 1
    seq_len: int | None = None
    num_steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    seed: int = 0
    checkpoint: str = "latest"
    output: Path | None = None

    def __post_init__(self):
        for prompt in self.prompts:
            check_prompt(prompt)
        for name in ("num_samples", "seq_len", "num_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: give a whole number of at least 1")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise UserError(f"--scheduler={self.scheduler}: give one of {', '.join(SCHEDULERS)}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance_scale={self.guidance_scale}: give 0 (ignore the prompt) or more")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature={self.temperature}: give a number above 0; 1 is the model's own")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed={self.seed}: give a whole number from 0 to 4294967295")
        check_checkpoint(self.checkpoint)
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UserError(f"--output={self.output}: there is no folder {self.output.parent}; make it first")
        # A device, too, is no place for a file that is put in place when it is whole.
        if self.output is not None and self.output.exists() and not self.output.is_file():
            raise UserError(f"--output={self.output}: this is a folder or a device; give the name of a file")

    def check_length(self, block_size: int) -> None:
        """Raises a UserError if `seq_len` is more than the model's `block_size`."""
        if self.seq_len is not None and self.seq_len > block_size:
            raise UserError(f"--seq_len={self.seq_len}: the model's texts have at most {block_size} tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(GenerationOptions):
    """Text for a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfillOptions(GenerationOptions):
    """Text around which gaps are filled.

    Attributes:
        text: has gaps written `[MASK:n]`, n tokens long, or `[MASK]`, whose length the model chooses.
    """

    text: str

    def __post_init__(self):
        super().__post_init__()
        if not self.text.strip():
            raise UserError("--text is empty: give a text with gaps, such as 'The [MASK] is a [MASK:6] of Africa.'")
        _check_utf8("text", self.text)
        if "[MASK" not in self.text:
            raise UserError(
                f"--text={shortened(self.text)!r} has no gap: write [MASK] or [MASK:n] where one is to be"
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample: the keys of `config.sampling` that decide what comes out."""

    scheduler: str
    num_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    temperature: float

    @classmethod
    def make(cls, sampling: ConfigDict, options: GenerationOptions | None = None) -> "Settings":
        """The run's own settings, with what the options give in their place."""
        values = {field.name: sampling[field.name] for field in dataclasses.fields(cls)}
        values["guidance_interval"] = tuple(values["guidance_interval"])
        for name in values:
            if getattr(options, name, None) is not None:
                values[name] = getattr(options, name)
        return cls(**values)

    def with_steps(self, num_steps: int) -> "Settings":
        """The same in another number of steps."""
        return dataclasses.replace(self, num_steps=num_steps)


def check_prompt(prompt: str) -> None:
    """Raises a UserError if no encoder could make anything of `prompt`."""
    if not prompt.strip():
        raise UserError("--prompt is empty: write what the text is to be about, or leave --prompt out")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"--prompt={shortened(prompt)!r} has {len(prompt)} characters: give at most {MAX_PROMPT_CHARACTERS}"
        )
    if not any(character.isalnum() for character in prompt):
        raise UserError(f"--prompt={shortened(prompt)!r} has no letter or digit: write it in words")
    _check_utf8("prompt", prompt)


def _check_utf8(flag: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{flag}={shortened(text)!r} is not UTF-8 text: set the terminal to UTF-8") from None


def check_checkpoint(checkpoint: str) -> None:
    """Raises a UserError unless `checkpoint` is `latest`, `best` or a step's number."""
    if checkpoint not in ("latest", "best") and not (checkpoint.isascii() and checkpoint.isdigit()):
        raise UserError(f"--checkpoint={checkpoint}: give latest, best or the number of a step")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Reads the prompts in a UTF-8 file, one a line; blank lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts_file={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file={path} is not UTF-8 text: byte {error.start}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompts_file={path} is empty: write one prompt a line")
    return prompts


def shortened(text: str) -> str:
    """Returns the beginning of `text`, short enough for an error message."""
    return text if len(text) <= 40 else text[:37] + "..."
