from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.run import grid_table, source_of


def test_corpus_that_is_gone_or_changed_is_not_evaluated_on(tmp_path):
    path = tmp_path / "text.txt"
    config = ConfigDict({"data": {"source": str(path), "text_key": "text", "prompt_key": "prompt"}})
    run = SimpleNamespace(config=config, workdir=tmp_path, data_identity="of other text")
    with pytest.raises(UserError, match=r"does not exist.*where it was moved"):
        source_of(run)
    path.write_text("Some text. " * 1000)
    with pytest.raises(UserError, match="put back what was there"):
        source_of(run)


def test_table_has_a_line_for_each_level():
    figures = {"held_out/mean": 1.0, "held_out/self_conditioning_gain": 0.5, "context/gain": 0.25}
    figures["embeddings/nearest_neighbour_distance"] = 0.75
    for i, snr in enumerate(HELD_OUT_SNRS):
        for j, name in enumerate(("held_out/rho", "context/true", "context/shuffled", "context/none")):
            figures[f"{name}_{snr:g}"] = 10 * i + j
    lines = grid_table(figures).splitlines()
    for i, (snr, line) in enumerate(zip(HELD_OUT_SNRS, lines[1:], strict=False)):
        assert [float(number) for number in line.split()] == [snr, *(10 * i + j for j in range(4))]
    assert len({len(line.split("(")[0].rstrip()) for line in lines[: len(HELD_OUT_SNRS) + 1]}) == 1
