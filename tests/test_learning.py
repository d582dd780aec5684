"""A run that has learned something: order of words, gaps filled from both sides, prompts followed."""

import itertools
import json
import random
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


def make_chains(path):
    """Words each of which only two others may follow: their order tells a missing one, their choice hardly."""
    words = [first + last for first, last in itertools.product("bdfgklmn", ("ab", "er", "ik", "ol", "um"))][:37]
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(2000):
            place, text = rng.randrange(37), []
            for _ in range(24):
                text.append(words[place])
                place = rng.choice(((2 * place + 1) % 37, (5 * place + 3) % 37))
            print(json.dumps({"text": " ".join(text)}), file=file)


def main(folder, *arguments):
    command = [sys.executable, str(ROOT / "main.py"), "--workdir=run", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(folder):
    """Trains a `nano` of 800 steps on folder/corpus.jsonl and returns its evaluation."""
    main(
        folder,
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
    main(folder, "--mode=eval", "--num_samples=0")
    return json.loads((folder / "run/eval_validation.json").read_text())


@pytest.mark.slow
def test_a_small_model_learns_order_and_prompts(tmp_path):
    make_corpus(tmp_path / "corpus.jsonl")
    result = train(tmp_path)

    # The order of the words says much about each of them.
    assert result["held_out"]["context/gain"] > 0.2
    # The prompt tells the animal and its place.
    bounds = result["bits_per_byte"]
    difference = bounds["without_prompt"]["value"] - bounds["with_prompt"]["value"]
    assert difference > 2 * max(bounds[name]["standard_error"] for name in ("with_prompt", "without_prompt"))

    prompts = [f"--prompt=Write about a {animal}" for animal in PLACES]
    main(tmp_path, "--mode=sample", *prompts, "--num_samples=4", "--seq_len=32", "--output=samples.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    right = sum(sample["prompt"].split()[-1] in sample["text"] for sample in samples)
    assert right >= 12


@pytest.mark.slow
def test_gaps_are_filled_to_fit_both_sides(tmp_path):
    make_chains(tmp_path / "corpus.jsonl")
    gaps = train(tmp_path)["infill_accuracy"]
    for size in ("1", "2", "4"):
        gap = gaps[size]
        assert gap["true"] - gap["shuffled"] > max(0.2, 3 * gap["margin_error"])
        assert gap["true"] > gap["unigram"] + 0.2
