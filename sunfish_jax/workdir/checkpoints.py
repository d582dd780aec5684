"""A run's checkpoints: the one importer of Orbax."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.disk import disk_problem

CHECKPOINTS_FOLDER = "checkpoints"
_METRIC = "held_out"


class Checkpoints:
    """The checkpoints in a workdir; a context manager.

    Kept are the newest `keep`, the one with the lowest held-out loss and every `keep_every_steps`-th. Saving is
    synchronous: when `save` returns, the checkpoint is whole on disk under its final name, whatever happens to
    the process next.
    """

    def __init__(self, workdir: Path, config: ConfigDict | None = None):
        """Opens the checkpoints.

        Args:
            workdir: the run's folder.
            config: the `checkpoint` group, to save; None to read only.
        """
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._workdir = workdir
        folder = (workdir / CHECKPOINTS_FOLDER).absolute()
        if config is None and not folder.is_dir():
            raise UserError(f"{workdir} has no checkpoint yet: train until the first one is saved")
        self._manager = ocp.CheckpointManager(
            folder, options=_options(config), item_handlers={"state": ocp.PyTreeCheckpointHandler()}
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, in rising order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the newest step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the lowest held-out loss, or None where none was measured."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Saves `state`, a pytree of arrays, as `step`; a step that is there already is left as it is.

        Args:
            step: optimiser steps taken.
            state: the train state.
            metrics: `{"held_out": loss}` where it was measured at this step.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(jax.tree.map(_key_to_words, state))),
                metrics=metrics,
            )
            self._manager.wait_until_finished()
        except Exception as error:
            reason = disk_problem(error)
            if reason is None:
                raise
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self._workdir} ({reason}): "
                f"free some space and run the same command; steps kept: {_listed(self.steps())}"
            ) from error

    def resolve(self, step: int | str) -> int:
        """Returns the number of `latest`, `best` or a step.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self._workdir} has no checkpoint yet: train until the first one is saved")
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self.best_step()
            if best is None:
                raise UserError(
                    f"{self._workdir} has no best checkpoint: no held-out loss was measured yet; take the latest"
                )
            return best
        if int(step) not in steps:
            raise UserError(f"{self._workdir} has no checkpoint of step {step}; it has the steps {_listed(steps)}")
        return int(step)

    def restore(self, abstract_state: Any, step: int | str = "latest") -> Any:
        """Returns the state of a step, or some of its fields without reading the others.

        Args:
            abstract_state: the state or its `jax.eval_shape`, or a dict of some of the state's fields. A leaf gets
                the sharding that it has there, or else the first device, wherever it was saved from.
            step: `latest`, `best` or a number.

        Raises:
            UserError: there is no such step, or it was saved from another architecture.
        """
        number = self.resolve(step)
        saved_form = jax.tree.map(_saved_form, abstract_state)
        self._check_shapes(number, saved_form)
        args = ocp.args.PyTreeRestore(
            item=saved_form,
            restore_args=ocp.checkpoint_utils.construct_restore_args(saved_form),
            partial_restore=True,
        )
        restored = self._manager.restore(number, args=ocp.args.Composite(state=args)).state
        return jax.tree.map(_words_to_key, restored, abstract_state)

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        saved = _shapes(self._manager.item_metadata(step).state.tree)
        wanted = _shapes(abstract_state)
        fields = {name.partition(".")[0] for name in wanted}
        saved = {name: shape for name, shape in saved.items() if name.partition(".")[0] in fields}
        differing = [
            f"{name} is {saved.get(name, 'not there')}, not {wanted.get(name, 'there')}"
            for name in wanted | saved
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"step {step} in {self._workdir} was saved from another architecture: "
                f"{'; '.join(differing[:3])}{more}; use the configuration that it was trained with"
            )


def _options(config: ConfigDict | None) -> ocp.CheckpointManagerOptions:
    best = {"best_fn": lambda metrics: metrics[_METRIC], "best_mode": "min"}
    if config is None:
        return ocp.CheckpointManagerOptions(read_only=True, create=False, **best)
    kept = preservation_policy.AnyPreservationPolicy(
        [
            preservation_policy.LatestN(config.keep),
            preservation_policy.EveryNSteps(config.keep_every_steps),
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[_METRIC],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    return ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        enable_async_checkpointing=False,
        # What a killed process left half written.
        cleanup_tmp_directories=True,
        **best,
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_to_words(leaf: jax.Array) -> jax.Array:
    # A typed random key is saved as its words.
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _saved_form(abstract: Any) -> jax.ShapeDtypeStruct:
    words = jax.eval_shape(_key_to_words, abstract)
    # Without a sharding, Orbax would look for the devices that the checkpoint was saved from.
    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)


def _words_to_key(restored: jax.Array, abstract: Any) -> jax.Array:
    return jax.random.wrap_key_data(restored) if _is_key(abstract) else restored


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # Its accounts of every save are not for the terminal; its errors are.
    return record.levelno >= logging.ERROR or "orbax" not in Path(record.pathname).parts


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
