"""The memory that a configuration's training step needs on one device and on several, from shapes alone.

uv run benchmarks/memory.py --config=configs/full.py --devices=1 --devices=8
"""

from absl import app, flags
from command_line import check_config, parser
from ml_collections import config_flags

from sunfish_jax.startup import prepare_process

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
_DEVICES = flags.DEFINE_multi_integer("devices", [1, 8], "Numbers of devices", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    prepare_process(num_cpu_devices=max(_DEVICES.value))
    import jax

    from sunfish_jax.models.denoiser import make_model
    from sunfish_jax.models.prompt_encoder import make_prompt_encoder
    from sunfish_jax.training.memory import step_memory
    from sunfish_jax.training.sharding import make_mesh
    from sunfish_jax.training.state import init_params

    config = _CONFIG.value
    # On an accelerator the kernels are bfloat16, whatever this machine multiplies fastest.
    config.model.compute_dtype = "bfloat16"
    encoder = make_prompt_encoder(config.prompt_encoder, None)
    model = make_model(config, config.tokenizer.vocab_size, encoder)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    print(f"{config.logging.name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} trainable parameters")
    print(f"{'devices':>7} {'state':>9} {'params':>9} {'grads':>9} {'activations':>12} {'total':>9}  GB a device")
    for devices in _DEVICES.value:
        config.train.num_devices = devices
        memory = step_memory(config, model, make_mesh(devices))
        columns = memory.state, memory.parameters, memory.gradients, memory.activations, memory.total
        gigabytes = [value / 1e9 for value in columns]
        print("{:7d} {:9.2f} {:9.2f} {:9.2f} {:12.2f} {:9.2f}".format(devices, *gigabytes))


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check_config))
