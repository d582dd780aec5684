"""The configuration of a run: checked, saved in its workdir, and compared when the run goes on."""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sunfish_jax.diffusion.names import SCHEDULERS, SCHEDULES
from sunfish_jax.errors import UserError
from sunfish_jax.workdir.json_file import write_json

CONFIG_FILE = "config.json"
HISTORY_FILE = "config_history.jsonl"

# What a trained state depends on. `model` keys that only say how to compute it may change, and so may the place of
# what a run keeps a fingerprint of.
_FIXED_GROUPS = ("data", "tokenizer", "model", "prompt_encoder")
_FREE_MODEL_KEYS = ("model.dropout", "model.compute_dtype", "model.remat")
_PATH_KEYS = ("data.source", "tokenizer.path", "prompt_encoder.path")
_FIXED_KEYS = ("diffusion.schedule", "optimizer.name", "train.seed", "train.init_from")

_CHOICES = {
    "model.compute_dtype": ("auto", "float32", "bfloat16", "int8"),
    "prompt_encoder.name": ("minilm", "transformer", "gpt2"),
    "diffusion.schedule": SCHEDULES,
    "optimizer.name": ("muon", "adamw"),
    "sampling.scheduler": SCHEDULERS,
}

_Check = Callable[[float], bool]
# Key -> (what must hold, in words, and the check itself); every other number must be at least 1.
_AT_LEAST_0: tuple[str, _Check] = ("0 or more", lambda value: value >= 0)
_ABOVE_0: tuple[str, _Check] = ("above 0", lambda value: value > 0)
_SHARE: tuple[str, _Check] = ("from 0 to 1", lambda value: 0 <= value <= 1)
_SHARE_BELOW_1: tuple[str, _Check] = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_RANGES = {
    "model.conv_width": ("0 or an odd number", lambda value: value == 0 or (value > 0 and value % 2 == 1)),
    "model.dropout": _SHARE_BELOW_1,
    "model.mlp_ratio": _ABOVE_0,
    "diffusion.schedule_learning_rate": _AT_LEAST_0,
    "diffusion.self_conditioning_every": _AT_LEAST_0,
    "diffusion.conditioning_dropout": _SHARE,
    "diffusion.infill_fraction": _SHARE,
    "optimizer.learning_rate": _ABOVE_0,
    "optimizer.table_multiplier": _AT_LEAST_0,
    "optimizer.warmup_steps": _AT_LEAST_0,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.beta1": _SHARE_BELOW_1,
    "optimizer.beta2": _SHARE_BELOW_1,
    "optimizer.clip_norm": _ABOVE_0,
    "optimizer.ema_decay": _SHARE_BELOW_1,
    "train.seed": ("from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    "sampling.guidance_scale": _AT_LEAST_0,
    "sampling.temperature": _ABOVE_0,
}
_AT_LEAST_1: tuple[str, _Check] = ("1 or more", lambda value: value >= 1)


def validate_config(config: ConfigDict, reference: ConfigDict) -> None:
    """Raises a UserError if `config` cannot be trained.

    Args:
        config: the configuration to check.
        reference: the defaults, which have every key with a value of the right type.
    """
    values, defaults = _flatten(config), _flatten(reference)
    for key in values:
        if key not in defaults:
            raise UserError(f"config.{key} is not a configuration key{nearest(key, defaults)}")
    for key, default in defaults.items():
        if key not in values:
            raise UserError(f"config.{key} is missing: start the configuration from configs/default.py's")
        _check_type(key, values[key], default)
        _check_range(key, values[key])
    _check_relations(config)


def _check_type(key: str, value: Any, default: Any) -> None:
    wanted = type(default)
    fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
    if not fits or isinstance(value, bool) != (wanted is bool):
        raise UserError(f"config.{key}={value!r}: give a value of type {wanted.__name__}, such as {default!r}")
    if wanted is tuple and any(not _same_kind(item, default[0]) for item in value):
        raise UserError(f"config.{key}={value!r}: give values such as {default!r}")


def _same_kind(item: Any, default: Any) -> bool:
    return isinstance(item, str) if isinstance(default, str) else isinstance(item, int | float)


def _check_range(key: str, value: Any) -> None:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"config.{key}={value!r}: give one of {', '.join(_CHOICES[key])}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    wanted, check = _RANGES.get(key, _AT_LEAST_1)
    if not math.isfinite(value) or not check(value):
        raise UserError(f"config.{key}={value}: give a number that is {wanted}")


def _check_relations(config: ConfigDict) -> None:
    for group in ("model", "prompt_encoder"):
        width, num_heads = config[group].width, config[group].num_heads
        if width % (2 * num_heads):
            raise UserError(
                f"config.{group}.width={width} does not give each of {group}.num_heads={num_heads} heads "
                f"an even width: give a multiple of {2 * num_heads}"
            )
    if config.train.num_devices > config.train.batch_size:
        # Each device has room for a row of any length in each pass.
        raise UserError(
            f"config.train.num_devices={config.train.num_devices} is more than "
            f"train.batch_size={config.train.batch_size}: give each device a row in each pass"
        )
    if config.model.block_size % 16:
        raise UserError(f"config.model.block_size={config.model.block_size}: give a multiple of 16")
    if not config.data.source:
        raise UserError("config.data.source is empty: give vital_articles, a file or folder, or tfds:NAME")
    if not config.tokenizer.path and config.tokenizer.vocab_size < 258:
        raise UserError(
            f"config.tokenizer.vocab_size={config.tokenizer.vocab_size}: give at least 258, "
            "for 256 bytes, padding and end of text"
        )
    if config.prompt_encoder.name == "gpt2" and not config.prompt_encoder.path:
        raise UserError("config.prompt_encoder.path is empty: give a folder with GPT-2's model.safetensors")
    if not all(prompt.strip() for prompt in config.logging.sample_prompts):
        raise UserError(
            f"config.logging.sample_prompts={config.logging.sample_prompts!r}: one is empty; leave it out, a text "
            "without a prompt is sampled anyway"
        )
    interval = config.sampling.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"config.sampling.guidance_interval={interval}: give two rising numbers from 0 to 1")


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """Returns `: did you mean ...?` with the known key that is nearest to `key`, or an empty string."""
    # The last part alone finds a key that was put into the wrong group.
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f": did you mean config.{close[0]}?" if close else ": configs/default.py lists them all"


def unknown_key(key: str, config: ConfigDict) -> UserError:
    """Returns the error for an override of `key`, which `config` has not."""
    return UserError(f"config.{key} is not a configuration key{nearest(key, _flatten(config))}")


def has_config(workdir: Path) -> bool:
    """Whether a run was started in `workdir`."""
    return (workdir / CONFIG_FILE).is_file()


def load_config(workdir: Path) -> ConfigDict:
    """Returns the configuration saved in `workdir`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"--workdir={workdir} holds no run: train one there first, or name another workdir")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): put back the one that training wrote") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged (not a JSON object): put back the one that training wrote")
    return ConfigDict(_with_tuples(saved))


def record_config(workdir: Path, config: ConfigDict, step: int) -> dict[str, tuple[Any, Any]]:
    """Saves `config` as that of the run in `workdir` from `step` on.

    A change to a run that is there already is appended to `config_history.jsonl` with its step.

    Args:
        workdir: made if it does not exist.
        config: the resolved configuration.
        step: the step that the run goes on from; 0 for a new one.

    Returns:
        The changed keys, each with the old and the new value; empty for a new run.

    Raises:
        UserError: a key was changed that cannot be. Nothing is written then.
    """
    changes = {}
    if has_config(workdir):
        saved = load_config(workdir)
        check_resumable(saved, config)
        changes = changed_keys(saved, config)
        if not changes:
            return changes
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if changes:
            with open(workdir / HISTORY_FILE, "a", encoding="utf-8") as history:
                history.write(json.dumps({"step": step, "changed": changes}) + "\n")
        write_json(workdir / CONFIG_FILE, config.to_dict())
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return changes


def check_resumable(saved: ConfigDict, new: ConfigDict) -> None:
    """Raises a UserError that names every key that differs and that a trained state depends on."""
    fixed = [
        f"{key} is {old!r} there and {value!r} now"
        for key, (old, value) in changed_keys(saved, new).items()
        if _is_fixed(key)
    ]
    if fixed:
        raise UserError(
            f"the workdir's run has another configuration ({'; '.join(fixed)}): "
            "undo these changes, or start a new run with another --workdir"
        )


def _is_fixed(key: str) -> bool:
    in_group = key.partition(".")[0] in _FIXED_GROUPS
    return (in_group and key not in _FREE_MODEL_KEYS + _PATH_KEYS) or key in _FIXED_KEYS


def changed_keys(saved: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns every key whose value differs, with the saved and the new value (None: no such key)."""
    old_values, new_values = _flatten(saved), _flatten(new)
    return {
        key: (old_values.get(key), new_values.get(key))
        for key in old_values | new_values
        if old_values.get(key) != new_values.get(key)
    }


def _flatten(config: ConfigDict) -> dict[str, Any]:
    return dict(_leaves(config, ""))


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_tuples(value: Any) -> Any:
    # JSON has lists only; the configuration has tuples only.
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
