import types

import jax
import numpy as np
import pytest

from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.training import watching
from sunfish_jax.training.watching import Stopped, make_evaluate, make_sample

STATE = types.SimpleNamespace(
    ema_params={"log_unigram": np.zeros(4, np.float32)}, params=None, schedule={"mu": np.float32(2.0)}
)
PREPARED = types.SimpleNamespace(
    model="model",
    tokenizer="tokenizer",
    prompt_encoder="encoder",
    splits={"validation": "validation text", "train": types.SimpleNamespace(lengths=np.array([3, 1, 3]))},
)
CONFIG = types.SimpleNamespace(eval=types.SimpleNamespace(num_rows=7))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def held_out(model, params, rows):
        assert params.keys() == STATE.ema_params.keys()
        return {"held_out/mean": float(len(list(rows)))}

    class TextRows:
        @staticmethod
        def of(split, num_rows, config, encoder):
            assert (split, num_rows, config, encoder) == ("validation text", 7, CONFIG, "encoder")
            return types.SimpleNamespace(rows=["first batch", "second batch"])

    monkeypatch.setattr(watching, "TextRows", TextRows)
    monkeypatch.setattr(watching, "held_out_cross_entropy", held_out)
    monkeypatch.setattr(watching, "nearest_neighbour_distance", lambda model, params: np.float32(0.5))
    monkeypatch.setattr(watching, "encode_prompts", lambda encoder, prompts: prompts)


def test_the_averaged_parameters_are_evaluated_on_all_held_out_rows():
    figures = make_evaluate(CONFIG, PREPARED, stop=False)(STATE)
    assert figures == {"held_out/mean": 2.0, "embeddings/nearest_neighbour_distance": 0.5}


def test_an_evaluation_gives_way_to_a_stop():
    with pytest.raises(Stopped):
        make_evaluate(CONFIG, PREPARED, stop=True)(STATE)


def test_there_is_a_sample_for_each_prompt_and_one_without(monkeypatch):
    from configs import nano

    def sample_texts(model, params, schedule, tokenizer, prompts, keys, *, seq_len, settings, row_lengths):
        assert params.keys() == STATE.ema_params.keys()
        assert schedule == STATE.schedule
        assert row_lengths.tolist() == [0, 1, 0, 2]
        assert (seq_len, settings.num_steps) == (config.model.block_size, config.sampling.num_steps)
        np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(sample_keys(7, np.arange(3))))
        return [f"about {prompt}" for prompt in prompts]

    config = nano.get_config()
    config.train.seed = 7
    config.logging.sample_prompts = ("dogs", "Rome")
    monkeypatch.setattr(watching, "sample_texts", sample_texts)
    texts = make_sample(config, PREPARED)(STATE)
    assert texts == {"dogs": "about dogs", "Rome": "about Rome", "no prompt": "about None"}
