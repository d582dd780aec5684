"""Lays samples out as a page: JSONL files of `main.py --mode=sample --output=FILE`, in the order given.

uv run benchmarks/samples_page.py samples_2000.jsonl samples_5000.jsonl samples_9500.jsonl > docs/mini_samples.md

ar_twin.py writes such files too.
"""

import json
import sys
from pathlib import Path

from command_line import fail

from sunfish_jax.errors import UserError


def main(paths: list[str]) -> None:
    if {"--help", "-help", "-h"} & set(paths):
        print(__doc__)
        return
    try:
        texts = [Path(path).read_text(encoding="utf-8") for path in paths]
    except OSError as error:
        fail(UserError(f"{error.filename} cannot be read: {error.strerror}"))
    if not texts:
        fail(UserError("no file is named: give the JSONL files, in the order in which they are to stand"))
    try:
        pages = [[json.loads(line) for line in text.split("\n") if line] for text in texts]
    except json.JSONDecodeError as error:
        fail(UserError(f"no line of JSON: {error.doc[:40]!r}. Give files of --mode=sample --output=FILE.jsonl"))
    for path, samples in zip(paths, pages, strict=True):
        if not samples:
            fail(UserError(f"{path} is empty: give files of --mode=sample --output=FILE.jsonl"))
        first = samples[0]
        print(
            f"## {Path(first['workdir']).name}, step {first['checkpoint_step']}\n\n"
            f"{first['scheduler']}, {first['num_steps']} steps, guidance {first['guidance_scale']}, "
            f"temperature {first['temperature']}, at most {first['seq_len']} tokens, seed {first['seed']}\n"
        )
        prompt = None
        for sample in samples:
            if sample["prompt"] != prompt:
                prompt = sample["prompt"]
                print(f"### {prompt or 'no prompt'}\n")
            # A fence that no sample can close; the text is shown as it is.
            print(f"{sample['index']}.\n\n```````text\n{sample['text']}\n```````\n")


if __name__ == "__main__":
    main(sys.argv[1:])
