import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import default
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.evaluation import evaluate
from sunfish_jax.evaluation.bound import BitsPerByte
from sunfish_jax.evaluation.evaluate import infill_figures, likelihood_figures
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.models.prompt import Prompt

END, VOCAB, LENGTH = 0, 8, 40


@pytest.fixture(scope="module")
def rows():
    """Texts of tokens 1 to 7, each with its end."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (1, 12, LENGTH)).astype(np.int32)
    tokens[..., -1] = END
    mask = np.ones(tokens.shape, bool)
    prompt = Prompt(np.zeros((1, 12, 2), np.int32), np.zeros((1, 12, 2), bool))
    return [PaddedBatch(tokens, mask, np.zeros_like(mask), prompt)]


def make_subject(**methods):
    words = Tokenizer(models.WordLevel({"<end>": END, **{f"w{i}": i for i in range(1, VOCAB)}}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    return types.SimpleNamespace(tokenizer=tokenizer, filling="by a stub", **methods)


def test_the_guess_for_a_gap_is_a_word_though_the_end_is_more_frequent(rows):
    seen = []

    def fill(known, prompt, keys):
        seen.append(known.mask)
        return np.full(known.tokens.shape, 3)

    log_unigram = np.full(VOCAB, -3.0)
    log_unigram[[END, 3]] = -1.0, -1.5
    figures = infill_figures(make_subject(fill=fill), rows, log_unigram)
    assert set(figures) == {"1", "2", "4", "8"}
    assert not np.any([mask.all() for mask in seen])
    assert [of["unigram"] for of in figures.values()] == [of["true"] for of in figures.values()]
    assert figures["1"]["unigram"] > 0


def test_each_text_is_scored_and_references_roughly(rows, capsys):
    text = TextRows(rows, [np.full(12, 2 * LENGTH)])
    texts = {"with prompt": text, "shuffled": text}

    def likelihood(of, rough):
        return BitsPerByte(2.5 if rough else 1.25, 0.125, {} if rough else {"recon": 1.25}, 12, 99)

    # Three bits for each of eight tokens as frequent as one another, which stand for two bytes each.
    even = np.full(VOCAB, -np.log(VOCAB))
    figures = likelihood_figures(make_subject(likelihood=likelihood), texts, even)
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "with_prompt": 1.25,
        "shuffled": 2.5,
        "frequencies": pytest.approx(1.5),
    }
    assert capsys.readouterr().out.splitlines() == [
        "with prompt: 1.250 ± 0.125 bits per byte (recon 1.250; 12 rows, 99 bytes)",
        "shuffled: 2.500 ± 0.125 bits per byte (exact; 12 rows, 99 bytes)",
        "by the tokens' frequencies alone: 1.500 bits per byte",
    ]


def test_frequencies_are_those_of_the_corpus_though_the_model_began_with_others(tmp_path, monkeypatch):
    seen, none = [], types.SimpleNamespace(rows=[])
    monkeypatch.setattr(evaluate, "TextRows", types.SimpleNamespace(of=lambda *_: none))
    monkeypatch.setattr(evaluate, "likelihood_texts", lambda *_: {})
    for name in ("infill_figures", "likelihood_figures"):
        monkeypatch.setattr(evaluate, name, lambda *arguments: seen.append(arguments[-1]) or {})
    counts = np.array([0, 1, 3, 4, 0, 0, 0, 0])
    splits = {
        "train": types.SimpleNamespace(token_counts=lambda vocab_size: counts[:vocab_size]),
        "validation": types.SimpleNamespace(num_rows=1),
    }
    subject = make_subject(
        workdir=tmp_path,
        config=default.get_config(),
        params={"log_unigram": np.full(VOCAB, -2.0)},
        progress=types.SimpleNamespace(step=1, seconds=1.0, real_tokens=1),
        prompt_encoder=None,
        likelihood_name="likelihood",
        held_out=lambda text: {},
    )
    evaluate.evaluate(subject, None, splits, "validation", num_samples=0)
    # One count more for each.
    assert len(seen) == 2
    for log_unigram in seen:
        np.testing.assert_allclose(np.exp(log_unigram), (counts + 1) / 16, rtol=1e-6)
