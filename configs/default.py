"""Every configuration key, with its default and its meaning. The other configs change only what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: the `micro` architecture and recipe, without a name."""
    config = ConfigDict()

    config.data = data = ConfigDict()
    # `vital_articles` (the default corpus), a .txt file or a folder of them, a .jsonl or .csv file,
    # or `tfds:NAME` for a prepared TensorFlow dataset.
    data.source = "vital_articles"
    # The column or feature that holds the text, and the one that holds the prompt (optional in the data).
    data.text_key = "text"
    data.prompt_key = "prompt"
    # Rows are packed with others of about their length, so that little is padding: into this many kinds of batch at
    # most. The step is compiled for each, for `micro` in half a minute and into some 85 MB; with fewer kinds
    # attention does more that is not needed, since each row gets the room of the longest of its kind.
    data.num_buckets = 4

    config.tokenizer = tokenizer = ConfigDict()
    # A folder with a saved `transformers` tokenizer; empty: train a byte-level BPE on the corpus.
    tokenizer.path = ""
    # Size of the trained vocabulary, special tokens included.
    tokenizer.vocab_size = 8192

    config.model = model = ConfigDict()
    model.num_layers = 8
    model.num_heads = 8
    model.width = 512
    # The longest text in tokens.
    model.block_size = 256
    # d_e, the dimension of the token embeddings in which the diffusion runs.
    model.embedding_dim = 128
    # Hidden width of the feed-forward layers, as a multiple of `width`.
    model.mlp_ratio = 4
    # Width of the noise-level representation from which every layer's adaptive scales are made.
    model.conditioning_dim = 160
    # Width of the short depthwise convolutions before attention and before the feed-forward layer; 0 for none.
    model.conv_width = 5
    model.dropout = 0.1
    # `auto` picks bfloat16 where the processor multiplies it at least 1.2 times as fast as float32, and there
    # `int8` where that is 1.4 times as fast again and layers are at least 256 wide: they then multiply with their
    # kernels in eight bits.
    model.compute_dtype = "auto"
    # Recompute each layer's activations in the backward pass: about a tenth slower, half the memory for them.
    model.remat = False

    config.prompt_encoder = prompt_encoder = ConfigDict()
    # `minilm` (frozen all-MiniLM-L6-v2), `transformer` (trained from scratch), `gpt2` (frozen embeddings).
    prompt_encoder.name = "minilm"
    # The longest prompt in the encoder's tokens; the rest of a longer one is not read. In training the few longest
    # in a thousand may be cut earlier.
    prompt_encoder.max_length = 64
    # `gpt2`: a folder with GPT-2's model.safetensors and tokenizer.json.
    prompt_encoder.path = ""
    # `transformer`: its size.
    prompt_encoder.num_layers = 2
    prompt_encoder.num_heads = 4
    prompt_encoder.width = 256

    config.diffusion = diffusion = ConfigDict()
    # `gumbel` (learned online), or fixed: `linear`, `cosine`, `sqrt`.
    diffusion.schedule = "gumbel"
    # Adam's, for the numbers of the learned schedule.
    diffusion.schedule_learning_rate = 1e-2
    # One pack of rows in this many is trained with its own first estimate as a further input; 0 for never.
    diffusion.self_conditioning_every = 8
    # Share of rows whose prompt is replaced by the learned null prompt.
    diffusion.conditioning_dropout = 0.1
    # Share of rows in which some spans are given clean, as in infilling, and the others noised more.
    diffusion.infill_fraction = 0.25

    config.optimizer = optimizer = ConfigDict()
    # `muon` (orthogonalised momentum for kernels, Adam for embeddings and vectors) or `adamw`.
    optimizer.name = "muon"
    optimizer.learning_rate = 5e-4
    # The learning rate of the tables of tokens (embeddings, head), as a multiple of `learning_rate`.
    optimizer.table_multiplier = 3.0
    # Steps in which the learning rate rises, at most half of the run; then it falls to zero at `train.num_steps`,
    # along half a cosine.
    optimizer.warmup_steps = 1000
    # Of kernels alone.
    optimizer.weight_decay = 0.01
    # Adam's; the momentum of Muon is 0.95.
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.99
    # The largest norm that the gradients of a step are left with.
    optimizer.clip_norm = 1.0
    # Of the moving average of the parameters, with which texts are made and evaluated; it is less at first.
    optimizer.ema_decay = 0.999

    config.train = train = ConfigDict()
    # Of the whole run: at its end the learning rate is zero.
    train.num_steps = 50_000
    # Rows of `block_size` in one forward pass; shorter rows come in proportionally larger numbers.
    train.batch_size = 4
    # Forward and backward passes whose gradients make one optimiser step.
    train.accumulate_steps = 8
    # Of the first parameters, the order of rows, noise and dropout.
    train.seed = 0
    # Devices that the packs of a pass are split over: host devices on a CPU.
    train.num_devices = 1
    # WORKDIR or WORKDIR@STEP: start from another run's weights.
    train.init_from = ""

    config.sampling = sampling = ConfigDict()
    # `ddim`, `ddpm` or `dpmpp`.
    sampling.scheduler = "ddpm"
    # Passes of the network, without those that guidance adds.
    sampling.num_steps = 64
    # logits = uncond + scale (cond - uncond); 1 is no guidance, 0 ignores the prompt. More follows the prompt's
    # words more closely, and repeats them.
    sampling.guidance_scale = 1.0
    # The part of the noise range, as quantiles u of the schedule, in which guidance above 1 acts: below 0.3 a scale
    # of 1.5 cost time and changed no figure of quality (docs/experiments.md).
    sampling.guidance_interval = (0.3, 0.9)
    # Divides the logits. At 0.6 texts are a little less varied than real ones (docs/experiments.md).
    sampling.temperature = 0.6
    # What an infilling `[MASK]` without a length may grow to, in tokens.
    sampling.max_gap = 8

    config.eval = evaluation = ConfigDict()
    # Steps of training between two evaluations.
    evaluation.every_steps = 1000
    # Held-out rows scored at each level of the fixed noise grid.
    evaluation.num_rows = 256
    # Stratified draws of the noise level a sequence in the likelihood bound.
    evaluation.bound_draws = 64
    # Held-out rows in the likelihood bound.
    evaluation.bound_rows = 64

    config.logging = logging = ConfigDict()
    # The run's name in the terminal and on Weights & Biases.
    logging.name = "sunfish"
    # Steps between two lines of figures, which come every half minute anyway, and between two times that samples
    # are shown.
    logging.every_steps = 20
    logging.sample_every_steps = 1000
    logging.sample_prompts = (
        "Write about dogs",
        "Physicist who developed the theory of relativity",
        "Volcano",
    )
    # Also write to Weights & Biases (needs the `wandb` extra).
    logging.wandb = False

    config.checkpoint = checkpoint = ConfigDict()
    # Steps between two checkpoints; besides, the state of each evaluation is saved, when its figures are known.
    checkpoint.every_steps = 500
    # Newest steps kept, besides the best by held-out loss and every `keep_every_steps`-th.
    checkpoint.keep = 5
    checkpoint.keep_every_steps = 5000
    return config
