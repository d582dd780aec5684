"""The measurement behind sampling.py."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from agreement import Inputs, check_same, moved, our_logits, twin_logits
from ml_collections import ConfigDict
from torch_peers import SamplingTask, make_twin, number_formats, print_choice
from torch_process import TorchProcess

from sunfish_jax.data.tokenizer import load_tokenizer
from sunfish_jax.diffusion.guidance import PASSES_A_DIFFERENCE
from sunfish_jax.diffusion.samplers import make_steps
from sunfish_jax.diffusion.schedules import Schedule, make_schedule
from sunfish_jax.errors import UserError
from sunfish_jax.generation.generator import generate, sample_keys
from sunfish_jax.generation.options import Settings
from sunfish_jax.models.denoiser import TextDenoiser, init_params, make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import PromptEncoder, encode_prompts, make_prompt_encoder
from sunfish_jax.workdir.run import load_run

PROMPTS = ("Write about dogs", "Physicist who developed the theory of relativity", "Volcano")
# Any scale that guides takes as long.
_GUIDANCE_SCALE = 1.5


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What is sampled from.

    Attributes:
      name: of it.
      config: the whole configuration.
      model, params, schedule: the denoiser, its parameters and the noise schedule.
      prompt_encoder: what reads the prompts.
    """

    name: str
    config: ConfigDict
    model: TextDenoiser
    params: Mapping[str, Any]
    schedule: Schedule
    prompt_encoder: PromptEncoder

    @classmethod
    def fresh(cls, name: str, config: ConfigDict) -> "Sampled":
        """A configuration's model with random weights, which take as long as trained ones."""
        if config.prompt_encoder.name == "transformer":
            raise UserError(
                "config.prompt_encoder.name='transformer' reads prompts with the corpus's tokenizer: give the "
                "--workdir of a run, or choose minilm or gpt2"
            )
        path = config.tokenizer.path
        vocab_size = len(load_tokenizer(Path(path))) if path else config.tokenizer.vocab_size
        encoder = make_prompt_encoder(config.prompt_encoder)
        model = make_model(config, vocab_size, encoder)
        params = moved(jax.jit(lambda key: init_params(model, key))(jax.random.key(config.train.seed)))
        schedule = make_schedule(config.diffusion.schedule, model.embedding_dim, vocab_size)
        return cls(name, config, model, params, schedule, encoder)

    @classmethod
    def of_run(cls, workdir: Path) -> "Sampled":
        """A run's newest checkpoint."""
        run = load_run(workdir)
        return cls(run.config.logging.name, run.config, run.model, run.params, run.schedule, run.prompt_encoder)


@dataclasses.dataclass(frozen=True)
class Task:
    """Texts to sample.

    Attributes:
      prompt: [B, P], one a text.
      keys: [B] random keys.
      length: S, of each text in tokens.
      settings: how.
    """

    prompt: Prompt
    keys: jax.Array
    length: int
    settings: Settings

    @classmethod
    def of(cls, sampled: Sampled, num_texts: int, length: int, num_steps: int) -> "Task":
        """DDIM with guidance, in the configured part of the noise range, in no longer texts than the model's."""
        settings = dataclasses.replace(
            Settings.make(sampled.config.sampling),
            scheduler="ddim",
            num_steps=num_steps,
            guidance_scale=_GUIDANCE_SCALE,
            temperature=1.0,
        )
        return cls(
            prompt=encode_prompts(sampled.prompt_encoder, PROMPTS[:num_texts]),
            keys=sample_keys(0, np.arange(num_texts)),
            length=min(length, sampled.config.model.block_size),
            settings=settings,
        )

    def __str__(self) -> str:
        steps = self.settings.num_steps
        return f"{len(self.keys)} text(s) of {self.length} tokens in {steps} DDIM steps with guidance"

    def sample(self, sampled: Sampled) -> np.ndarray:
        """Tokens [B, S]."""
        model, params, schedule = sampled.model, sampled.params, sampled.schedule
        return generate(model, params, schedule, self.prompt, self.keys, self.length, self.settings)

    def for_torch(self, sampled: Sampled) -> SamplingTask:
        """The same for the twin: the sampler's first noise, its steps, and where and how often it guides."""

        def noise(key):
            return jax.random.normal(jax.random.fold_in(key, 0), (self.length, sampled.model.embedding_dim))

        interval = np.asarray(self.settings.guidance_interval, np.float32)
        return SamplingTask(
            name=str(self),
            noise=np.asarray(jax.vmap(noise)(self.keys)),
            prompt=self.prompt,
            steps=make_steps(sampled.schedule, self.settings.num_steps, "ddim"),
            guided_gammas=tuple(np.asarray(sampled.schedule.gamma(interval)).tolist()),
            guidance_scale=self.settings.guidance_scale,
            passes_a_difference=PASSES_A_DIFFERENCE,
        )


def run(sampled: Sampled, repeats: int, torch: TorchProcess | None) -> None:
    """Measures and prints; `torch` is a process to compare with, or None.

    Raises:
      UserError: there is PyTorch to compare with, and the prompt encoder is trained, which the twin's is not.
    """
    task, short = Task.of(sampled, 3, 128, 20), Task.of(sampled, 1, 64, 10)
    print(f"{sampled.name}: products in {sampled.model.number_format}", flush=True)
    courses: dict[str, Callable[[], float]] = {
        "ours": lambda: seconds_of(lambda: task.sample(sampled)),
        "short": lambda: seconds_of(lambda: short.sample(sampled)),
    }
    if torch is not None:
        courses |= torch_courses(torch, sampled, task, repeats)
    for course in courses.values():
        course()
    times = {name: [] for name in courses}
    for _ in range(repeats):
        for name, course in courses.items():
            # The first after the others' turns is slower: memory that was freed went back to the system meanwhile.
            course()
            times[name].append(course())
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{task}: {medians['ours']:.3f} s\n{short}: {medians['short']:.3f} s")
    result = {
        "config": sampled.name,
        "seconds": round(medians["ours"], 4),
        "seconds_short": round(medians["short"], 4),
    }
    if torch is not None:
        if "torch" in sys.modules:
            raise AssertionError("PyTorch was imported beside JAX: the two did not have a process each")
        for name in ("torch_twin", "torch_twin_guided_throughout", "first_sunfish"):
            print(f"{name}: {medians[name]:.3f} s, {medians[name] / medians['ours']:.2f} times ours")
            result[f"ratio_{name}"] = round(medians[name] / medians["ours"], 3)
    print(json.dumps(result), flush=True)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_courses(
    torch: TorchProcess, sampled: Sampled, task: Task, repeats: int
) -> dict[str, Callable[[], float]]:
    """The PyTorch peers, ready to be timed, by name."""
    if sampled.model.prompt_module is not None:
        raise UserError(
            "--compare: the PyTorch twin has no trained prompt encoder; choose a run with minilm or gpt2"
        )
    params, inputs = moved(sampled.params), Inputs.random(sampled.model)
    make_twin(torch, sampled.model, params)
    ours = our_logits(sampled.model, params, inputs)
    for fused_attention in (True, False):
        check_same("the PyTorch twin", ours, twin_logits(torch, inputs, "float32", fused_attention))
    make_twin(torch, sampled.model, sampled.params)
    same = task.for_torch(sampled)
    throughout = same.guided_throughout()
    options = {"dtypes": number_formats(sampled.model), "repeats": repeats, "compiled": True}
    for case in (same, throughout):
        case.send(torch)
        choice = torch.call("choose_sampling", case=case.name, **options)
        print_choice(f"for {case.name}", choice)
    made = torch.call("first_sunfish", sizes={})
    print(f"the first SunFish: {made['parameters']:,} parameters", flush=True)
    sizes = {"rows": len(task.keys), "length": task.length, "num_steps": task.settings.num_steps}
    return {
        "torch_twin": lambda: torch.call("twin_sample", case=same.name)["seconds"],
        "torch_twin_guided_throughout": lambda: torch.call("twin_sample", case=throughout.name)["seconds"],
        "first_sunfish": lambda: torch.call("first_sample", **sizes)["seconds"],
    }
