"""The PyTorch side of a comparison: a process that answers requests, one JSON object a line, from stdin to stdout.

A request is `{"call": NAME, "arguments": {...}, "arrays": FILE or null, "answer": FILE}`: a method of `Worker`, its
arguments, an .npz file with its arrays, and where to put the arrays of the answer. The answer is
`{"result": {...}, "arrays": FILE or null}`, or `{"error": "one line"}`. torch_process.py is the other end.

It needs PyTorch and NumPy on Python 3.11 or newer, and nothing of JAX.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Arrays = Mapping[str, Any]


class Worker:
    """Holds the peers between requests. Methods take arrays by name, and return a result or (result, arrays)."""

    def start(self, arrays: Arrays, threads: int) -> dict:
        """Loads PyTorch."""
        try:
            import torch
        except ImportError as error:
            advice = "name one that has with --torch_python=PATH"
            raise RuntimeError(f"{sys.executable} has no PyTorch ({error}); {advice}") from None
        torch.set_num_threads(threads)
        # What is compiled is compiled for each shape of batch; beyond this many PyTorch would go on in eager.
        torch._dynamo.config.recompile_limit = 64
        self._batches, self._cases, self._samplers, self._warm = {}, {}, {}, set()
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def twin(self, arrays: Arrays, sizes: dict) -> dict:
        """Makes the twin from our weights."""
        import torch_twin

        self._twin = torch_twin.Denoiser(torch_twin.Sizes(**sizes))
        self._twin.load(arrays)
        return {"parameters": sum(parameter.numel() for parameter in self._twin.parameters())}

    def twin_logits(self, arrays: Arrays, dtype: str, fused_attention: bool) -> tuple[dict, Arrays]:
        """The twin's logits for z, gamma, x_hat, known_mask, prompt_inputs and prompt_mask."""
        import torch
        import torch_twin

        variant = torch_twin.Variant(dtype, fused_attention)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad(), variant.autocast():
            prompt = self._twin.encode_prompt(tensors.pop("prompt_inputs"), tensors.pop("prompt_mask"))
            table = self._twin.embedding_table().to(variant.torch_dtype)
            given = (tensors[name] for name in ("z", "gamma", "x_hat", "known_mask"))
            logits = self._twin.logits(*given, prompt, table, fused_attention)
        return {}, {"logits": logits.float().numpy()}

    def trainer(self, arrays: Arrays, training: dict) -> dict:
        """Prepares the twin's training."""
        import torch_twin

        self._trainer = torch_twin.Trainer(self._twin, torch_twin.Training(**training))
        return {}

    def batch(self, arrays: Arrays, name: str) -> dict:
        """Keeps a batch; its arrays are the fields of `torch_twin.Batch`."""
        import torch
        import torch_twin

        tensors = {field: torch.from_numpy(arrays[field]) for field in torch_twin.Batch._fields}
        self._batches[name] = torch_twin.Batch(**tensors | {"tokens": tensors["tokens"].long()})
        return {}

    def choose_training(self, arrays: Arrays, batch: str, dtypes: list[str], repeats: int, compiled: bool) -> dict:
        """Finds the fastest way to take the twin's step on a batch.

        Number format and attention first, then how many passes at once, then, if `compiled`, the best of these
        compiled, with either attention and in one pass at a time. Of the best in eager and the best compiled the
        faster is taken for each shape of batch, when a step is first asked for.
        """
        from torch_twin import Variant

        rows = self._batches[batch]
        choice = Choice(lambda variant: self._trainer.step(rows, variant), repeats)
        choice.among(Variant(dtype, fused) for dtype in dtypes for fused in (True, False))
        passes = len(rows.tokens)
        more = [number for number in (2, 4, 8, 16) if passes % number == 0]
        choice.among(dataclasses.replace(choice.best, passes_at_once=number) for number in more)
        eager = choice.best
        ways = {
            dataclasses.replace(eager, compiled=True),
            dataclasses.replace(eager, compiled=True, fused_attention=not eager.fused_attention),
            dataclasses.replace(eager, compiled=True, passes_at_once=1),
        }
        choice.among(sorted(ways, key=lambda variant: variant.name) * compiled)
        self._finalists = [eager, *choice.fastest([variant for variant in choice.tried if variant.compiled])]
        self._taken = {}
        return choice.account()

    def twin_step(self, arrays: Arrays, batch: str) -> dict:
        """Times an optimiser step of the twin, which is warm."""
        rows = self._batches[batch]
        if batch not in self._taken:
            choice = Choice(lambda variant: self._trainer.step(rows, variant), repeats=3)
            choice.among(self._finalists)
            self._taken[batch] = choice.best
        start = time.perf_counter()
        loss = self._trainer.step(rows, self._taken[batch])
        return {"seconds": time.perf_counter() - start, "loss": loss, "variant": self._taken[batch].name}

    def case(self, arrays: Arrays, name: str, guidance_scale: float) -> dict:
        """Keeps a task of sampling: noise, prompt_inputs, prompt_mask and the fields of `torch_twin.Steps`."""
        import torch
        import torch_twin

        given = [torch.from_numpy(arrays[field]) for field in ("noise", "prompt_inputs", "prompt_mask")]
        steps = torch_twin.Steps(*(arrays[field].tolist() for field in torch_twin.Steps._fields))
        self._cases[name] = (*given, steps, guidance_scale)
        return {}

    def choose_sampling(self, arrays: Arrays, case: str, dtypes: list[str], repeats: int, compiled: bool) -> dict:
        """Finds the twin's fastest way to sample a case, and keeps to it; compiling is tried if `compiled`."""
        from torch_twin import Sampler, Variant

        samplers: dict[Variant, Sampler] = {}

        def sample(variant):
            if variant not in samplers:
                samplers[variant] = Sampler(self._twin, variant)
            samplers[variant].sample(*self._cases[case])

        choice = Choice(sample, repeats)
        choice.among(
            Variant(dtype, fused, one_batch=together)
            for dtype in dtypes
            for fused in (True, False)
            for together in (True, False)
        )
        eager = choice.best
        choice.among(
            [dataclasses.replace(eager, compiled=True, fused_attention=fused) for fused in (True, False)] * compiled
        )
        self._samplers[case] = samplers[choice.best]
        return choice.account()

    def twin_sample(self, arrays: Arrays, case: str) -> tuple[dict, Arrays]:
        """Times the twin's sampler, after one to warm up."""
        sampler = self._samplers[case]
        if case not in self._warm:
            self._warm.add(case)
            sampler.sample(*self._cases[case])
        start = time.perf_counter()
        tokens = sampler.sample(*self._cases[case])
        return {"seconds": time.perf_counter() - start}, {"tokens": tokens.numpy()}

    def first_sunfish(self, arrays: Arrays, sizes: dict) -> dict:
        """Makes the first SunFish; `sizes` is what differs from its own."""
        import first_sunfish

        sizes = first_sunfish.Sizes(**sizes)
        self._first = first_sunfish.FirstSunFish(sizes)
        parameters = sum(parameter.numel() for parameter in self._first.model.parameters())
        positions = sizes.accumulate_steps * sizes.rows * sizes.block_size
        return {"parameters": parameters, "positions": positions, "block_size": sizes.block_size}

    def first_step(self, arrays: Arrays) -> dict:
        """Times an optimiser step of the first SunFish, after one to warm up."""
        if "first" not in self._warm:
            self._warm.add("first")
            self._first.step()
        start = time.perf_counter()
        loss = self._first.step()
        return {"seconds": time.perf_counter() - start, "loss": loss}

    def first_sample(self, arrays: Arrays, rows: int, length: int, num_steps: int) -> tuple[dict, Arrays]:
        """Times the sampler of the first SunFish, after one to warm up."""
        task = (rows, length, num_steps)
        if task not in self._warm:
            self._warm.add(task)
            self._first.sample(*task)
        start = time.perf_counter()
        tokens = self._first.sample(*task)
        return {"seconds": time.perf_counter() - start}, {"tokens": tokens.numpy()}


class Choice:
    """Times variants of the same computation.

    Attributes:
      best: the fastest so far.
      tried: those that were timed.
    """

    def __init__(self, run: Callable[[Any], Any], repeats: int):
        self.best, self.tried, self._run, self._repeats = None, [], run, repeats
        self._seconds: dict[str, float] = {}
        self._failed: dict[str, str] = {}

    def among(self, variants: Iterable[Any]) -> None:
        """Times each, in turn, after a run to warm up."""
        able = [variant for variant in variants if self._works(variant)]
        self.tried += able
        times = {variant: [] for variant in able}
        for _ in range(self._repeats):
            for variant in able:
                start = time.perf_counter()
                self._run(variant)
                times[variant].append(time.perf_counter() - start)
        for variant in able:
            self._seconds[variant.name] = statistics.median(times[variant])
            if self.best is None or self._seconds[variant.name] < self._seconds[self.best.name]:
                self.best = variant

    def fastest(self, variants: Iterable[Any]) -> list[Any]:
        """The fastest of some that were timed; none of none."""
        return sorted(variants, key=lambda variant: self._seconds[variant.name])[:1]

    def _works(self, variant: Any) -> bool:
        try:
            self._run(variant)
        except Exception as error:  # Compiling needs a C++ compiler, and fails in many ways.
            if not variant.compiled:
                raise
            self._failed[variant.name] = _one_line(error)
            return False
        return True

    def account(self) -> dict:
        """Median seconds of each variant, those that failed with the reason, and the name of the best."""
        return {"seconds": self._seconds, "failed": self._failed, "best": self.best.name}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _answer(worker: Worker, request: dict) -> dict:
    import numpy as np

    arrays = {}
    if request["arrays"]:
        with np.load(request["arrays"]) as file:
            arrays = dict(file)
    result = getattr(worker, request["call"])(arrays, **request["arguments"])
    if isinstance(result, dict):
        return {"result": result, "arrays": None}
    result, arrays = result
    np.savez(request["answer"], **arrays)
    return {"result": result, "arrays": request["answer"]}


def main() -> None:
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = _answer(worker, json.loads(line))
        except Exception as error:  # Whatever it is, the other process must hear of it.
            import traceback

            traceback.print_exc()
            answer = {"error": str(error) if isinstance(error, RuntimeError) else _one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
