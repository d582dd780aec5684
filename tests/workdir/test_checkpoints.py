import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.checkpoints import Checkpoints

KEEP = ConfigDict({"keep": 2, "keep_every_steps": 10, "every_steps": 1})


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    counts: tuple
    key: jax.Array


def state(step: int = 0) -> State:
    return State(
        step=jnp.int32(step),
        params={"kernel": jnp.arange(6.0).reshape(2, 3) + step, "half": jnp.ones((3,), jnp.bfloat16) / 3},
        counts=(jnp.uint32(step), ()),
        key=jax.random.fold_in(jax.random.key(0), step),
    )


def same(left, right) -> bool:
    def equal(a, b):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return a.dtype == b.dtype and np.array_equal(a, b)

    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        jax.tree.leaves(jax.tree.map(equal, left, right))
    )


def test_a_state_comes_back_bit_for_bit_and_keys_still_draw(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(7, state(7))
        restored = checkpoints.restore(jax.eval_shape(lambda: state(0)))
    assert isinstance(restored, State) and same(restored, state(7))
    assert jax.random.bits(restored.key) == jax.random.bits(state(7).key)


def test_kept_are_the_newest_the_best_and_every_tenth(tmp_path):
    losses = {2: 5.0, 4: 1.0, 8: 3.0, 10: 4.0, 11: None, 12: 2.0, 13: 2.5}
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.best_step() is None
        for step, loss in losses.items():
            checkpoints.save(step, state(step), loss and {"held_out": loss})
        assert checkpoints.steps() == [4, 10, 12, 13]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 10, 12, 13]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (4, 13)
        restored = {step: int(checkpoints.restore(state(), step).step) for step in ("best", "latest", "12", 10)}
    assert restored == {"best": 4, "latest": 13, "12": 12, 10: 10}


def test_a_step_saved_twice_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(5, state(1))
        checkpoints.save(5, state(2))
        assert same(checkpoints.restore(state()), state(1))


def test_some_fields_are_restored_alone(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(3, state(3))
    with Checkpoints(tmp_path) as checkpoints:
        fields = checkpoints.restore({"params": state().params, "key": state().key})
    assert fields.keys() == {"params", "key"}
    assert same(fields["params"], state(3).params) and same(fields["key"], state(3).key)


def test_another_architecture_is_named_by_its_arrays(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(3, state(3))
        other = state()
        other.params["kernel"] = jnp.zeros((2, 4))
        other.params["bias"] = other.params.pop("half")
        with pytest.raises(UserError) as error:
            checkpoints.restore(other)
    message = str(error.value)
    assert "params.kernel is (2, 3), not (2, 4)" in message
    assert "params.bias" in message and "params.half" in message and "\n" not in message


def test_missing_steps_and_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet"):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint yet"):
            checkpoints.restore(state())
        checkpoints.save(3, state(3))
        checkpoints.save(4, state(4))
        with pytest.raises(UserError, match=r"no checkpoint of step 5; it has the steps 3, 4$"):
            checkpoints.restore(state(), 5)
        with pytest.raises(UserError, match="no held-out loss"):
            checkpoints.restore(state(), "best")


def test_a_half_written_checkpoint_is_ignored_then_removed(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(3, state(3))
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "part").write_text("x")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert unfinished.exists(), "reading must change nothing"
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.steps() == [3] and same(checkpoints.restore(state()), state(3))
        assert not unfinished.exists()
        checkpoints.save(4, state(4))
        assert checkpoints.latest_step() == 4


# Run on its own: it needs two devices, a limit on file sizes and an exit without any closing.
OTHER_PROCESS = """
import os, resource, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict
from sunfish_jax.errors import UserError
from sunfish_jax.workdir.checkpoints import Checkpoints

mesh = jax.make_mesh((2,), ("data",))
rows = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
everywhere = jax.device_put(jax.random.key(3), NamedSharding(mesh, P()))
checkpoints = Checkpoints(Path(sys.argv[1]), ConfigDict({"keep": 2, "keep_every_steps": 10}))
checkpoints.save(1, {"rows": rows, "key": everywhere})

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(2, {"rows": jax.random.normal(jax.random.key(0), (100_000,)), "key": everywhere})
except UserError as error:
    print(error)
os._exit(0)
"""


def test_two_devices_a_full_disk_and_an_exit_without_closing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "step 2 could not be saved" in done.stdout and "steps kept: 1\n" in done.stdout
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1
    abstract = {"rows": jax.ShapeDtypeStruct((8,), jnp.float32), "key": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(abstract)
    assert same(restored, {"rows": jnp.arange(8.0), "key": jax.random.key(3)})
    assert len(restored["rows"].devices()) == 1
