from sunfish_jax.diffusion.process import HELD_OUT_SNRS
from sunfish_jax.evaluation.run import grid_table


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
