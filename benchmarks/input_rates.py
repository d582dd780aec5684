"""The measurement behind input_pipeline.py."""

import json
import time
from pathlib import Path

from comparison import Course, make_state, our_steps, real_tokens
from epoch_mix import typical_batches
from ml_collections import ConfigDict

from sunfish_jax.data.batches import BatchSource, batch_iterator
from sunfish_jax.data.sources import open_source
from sunfish_jax.data.tokenizer import load_tokenizer
from sunfish_jax.data.tokens import prepare
from sunfish_jax.training.preparation import Prepared, corpus_tokenizer, prepare_run
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.workdir.run import TOKENIZER_FOLDER


def run(name: str, config: ConfigDict, workdir: Path, repeats: int, batches: int) -> None:
    """Measures and prints; the arguments are those of input_pipeline.py, `workdir` an empty folder.

    Raises:
      UserError: the configuration cannot be prepared.
    """
    result = {"config": name} | prepare_corpus(config, workdir)
    prepared = prepare_run(config, workdir / TOKENIZER_FOLDER)
    trained = training_rate(config, prepared, repeats)
    # Two sources of their own, whose prompts nobody has asked for yet. The first compiles MiniLM for each width of
    # them: training dropped its programs.
    warm_up, source = (prepared.training_batches(config) for _ in range(2))
    batches = min(batches, source.steps_per_epoch)
    _, new_prompts, known_prompts = (batch_rate(of, batches) for of in (warm_up, source, source))
    print(
        f"real tokens/s: trained {trained:,.0f}, made ready {new_prompts:,.0f} with new prompts and "
        f"{known_prompts:,.0f} with prompts encoded before ({batches} batches)"
    )
    result |= {
        "tokens_per_s": round(trained, 1),
        "new_prompts_ratio": round(new_prompts / trained, 1),
        "ratio": round(known_prompts / trained, 1),
    }
    print(json.dumps(result), flush=True)


def prepare_corpus(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Makes and saves the tokenizer and writes the tokens; returns the seconds that each took."""
    source, path = open_source(config.data, workdir / "data"), config.tokenizer.path
    began = time.perf_counter()
    tokenizer = load_tokenizer(path) if path else corpus_tokenizer(source, config.tokenizer.vocab_size)
    trained = time.perf_counter()
    splits = prepare(source, tokenizer, workdir / "data", block_size=config.model.block_size)
    written = time.perf_counter()
    tokenizer.save_pretrained(workdir / TOKENIZER_FOLDER)
    print(
        f"a tokenizer of {len(tokenizer):,} tokens in {trained - began:.1f}s, "
        f"{sum(len(split.tokens) for split in splits.values()):,} tokens written in {written - trained:.1f}s",
        flush=True,
    )
    return {
        "tokenizer_seconds": round(trained - began, 2),
        "tokenizing_seconds": round(written - trained, 2),
    }


def training_rate(config: ConfigDict, prepared: Prepared, repeats: int) -> float:
    """Real tokens a second of training steps, in the mix of an epoch."""
    mesh = make_mesh(config.train.num_devices)
    steps = our_steps(config, prepared.model, mesh, make_state(config, prepared, mesh))
    course = Course.of(steps, typical_batches(config, prepared))
    for index in range(len(course.mix)):
        for _ in range(repeats):
            course.repeat(index)
    return course.per_second(real_tokens)


def batch_rate(source: BatchSource, batches: int) -> float:
    """Real tokens a second of the first batches, made as for training, one after the other."""
    began = time.perf_counter()
    tokens = sum(real_tokens(batch) for batch in batch_iterator(source, 0, batches))
    return tokens / (time.perf_counter() - began)
