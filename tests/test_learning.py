"""A run that has learned something: order of words, gaps filled from both sides, prompts followed."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = {"whale": "sea", "camel": "desert", "owl": "forest", "goat": "mountain"}


def make_corpus(path):
    """Sentences whose words follow from each other, and from the prompt."""
    sizes = ("small", "large", "old", "young", "quick", "quiet", "strong", "shy")
    deeds = ("sleeps", "eats", "hides", "plays", "waits", "sings", "rests", "hunts")
    times = ("at night", "in spring", "by day", "in winter", "at dawn", "in the rain", "all year", "after noon")
    with path.open("w") as file:
        for (animal, place), size, deed, time in itertools.product(PLACES.items(), sizes, deeds, times):
            text = f"The {size} {animal} lives in the {place}. There the {animal} {deed} {time}."
            print(json.dumps({"text": text, "prompt": f"Write about a {animal}"}), file=file)


def main(folder, *arguments):
    command = [sys.executable, str(ROOT / "main.py"), "--workdir=run", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_small_model_learns_order_gaps_and_prompts(tmp_path):
    make_corpus(tmp_path / "corpus.jsonl")
    main(
        tmp_path,
        f"--config={ROOT}/configs/nano.py",
        "--config.data.source=corpus.jsonl",
        "--config.tokenizer.vocab_size=400",
        "--config.train.num_steps=800",
        "--config.eval.every_steps=800",
        "--config.eval.num_rows=64",
        "--config.eval.bound_rows=32",
        "--config.logging.sample_every_steps=800",
        "--config.checkpoint.every_steps=800",
    )
    main(tmp_path, "--mode=eval", "--num_samples=0")
    result = json.loads((tmp_path / "run/eval.json").read_text())

    # The order of the words says much about each of them.
    assert result["held_out"]["context/gain"] > 0.2
    # So few words go together here that shuffled surroundings tell nearly as much of a gap: against guessing only.
    for gap in result["infill_accuracy"].values():
        assert gap["true"] > gap["unigram"] + 0.3
    # The prompt tells the animal and its place.
    bounds = result["bits_per_byte"]
    difference = bounds["without_prompt"]["value"] - bounds["with_prompt"]["value"]
    assert difference > 2 * max(bounds[name]["standard_error"] for name in bounds)

    prompts = [f"--prompt=Write about a {animal}" for animal in PLACES]
    main(tmp_path, "--mode=sample", *prompts, "--num_samples=4", "--seq_len=32", "--output=samples.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    right = sum(sample["prompt"].split()[-1] in sample["text"] for sample in samples)
    assert right >= 12
