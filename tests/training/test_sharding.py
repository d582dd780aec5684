import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sunfish_jax.errors import UserError
from sunfish_jax.training.sharding import batch_sharding, make_mesh, state_shardings


def specs(shapes, num_devices):
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    shardings = state_shardings(state, make_mesh(num_devices))
    return {name: sharding.spec for name, sharding in shardings.items()}


def test_large_arrays_are_split_along_their_longest_divisible_dimension():
    shapes = {"kernel": (256, 512), "tall": (514, 256), "odd": (513, 255), "small": (64, 64), "scalar": ()}
    assert specs(shapes, 2) == {
        "kernel": P(None, "data"),
        "tall": P("data", None),
        "odd": P(None, None),
        "small": P(None, None),
        "scalar": P(),
    }


def test_one_device_holds_everything_whole():
    assert specs({"kernel": (256, 512)}, 1) == {"kernel": P(None, None)}


def test_rows_of_a_batch_are_shared_out():
    rows = jax.device_put(np.arange(24).reshape(2, 4, 3), batch_sharding(make_mesh(2)))
    held = {shard.index[1].start or 0: np.asarray(shard.data) for shard in rows.addressable_shards}
    np.testing.assert_array_equal(held[0], np.arange(24).reshape(2, 4, 3)[:, :2])
    np.testing.assert_array_equal(held[2], np.arange(24).reshape(2, 4, 3)[:, 2:])


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"train.num_devices is 3, but there are 2 devices"):
        make_mesh(3)
