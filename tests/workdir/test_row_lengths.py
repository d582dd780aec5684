import numpy as np
import pytest

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.row_lengths import load_row_lengths, save_row_lengths


def test_counts_come_back(tmp_path):
    save_row_lengths(tmp_path, np.array([3, 1, 3]))
    np.testing.assert_array_equal(load_row_lengths(tmp_path), [0, 1, 0, 2])


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "[0, 0]", "3", '["a"]', "[[1]]"])
def test_missing_or_damaged_ones_are_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "row_lengths.json").write_text(text)
    with pytest.raises(UserError, match=r"row_lengths.json is missing or damaged"):
        load_row_lengths(tmp_path)
