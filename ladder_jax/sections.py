"""The sections of a run's configuration: frozen dataclasses that check their values.

The comment above a field is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from ladder_jax import schedule
from ladder_jax.addresses import is_address
from ladder_jax.checks import (
    LARGEST_SIZE,
    ConfigError,
    Section,
    require,
    short_repr,
    to_bytes,
)

# What a run's own folders may be.
FOLDER = "a folder (of a bucket, mount it)"
MOST_LAYERS = 10_000  # each is an entry of the schedule, the cache and the program


@dataclass(frozen=True)
class RopeScaling(Section):
    """Scaling of rotary frequencies for longer contexts."""

    section = "model.rope_scaling"
    # llama3 and yarn divide low frequencies by `factor`, linear divides all.
    kind: Literal["llama3", "linear", "yarn"] = "llama3"
    # What frequencies are divided by. 1: no scaling.
    factor: float = 1.0
    # llama3: frequencies are low if they turn at most this often in original_length
    # tokens.
    low_freq_factor: float = 1.0
    # llama3: frequencies stay as they are if they turn at least this often.
    high_freq_factor: float = 4.0
    # The context that the model was trained with before, in tokens.
    original_length: int = 8192
    # yarn: frequencies stay as they are if they turn at least this often.
    beta_fast: float = 32.0
    # yarn: frequencies are low if they turn at most this often.
    beta_slow: float = 1.0
    # yarn: the frequencies between these two begin and end at whole indices.
    truncate: bool = True
    # yarn: what cosines and sines are multiplied by. None: it follows from factor.
    attention_factor: float | None = None
    # yarn: if both are given, attention_factor follows from factor and these two.
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def check(self) -> None:
        self.positive("factor", "low_freq_factor", "original_length")
        self.positive("beta_fast", "beta_slow")
        self.need(
            "beta_fast",
            self.beta_fast >= self.beta_slow,
            "at least as large as beta_slow",
        )
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            self.need(name, value is None or value > 0, "greater than 0, or None")
        self.need(
            "high_freq_factor",
            self.high_freq_factor > self.low_freq_factor,
            "greater than low_freq_factor",
        )


@dataclass(frozen=True)
class Model(Section):
    """A Llama-family decoder and the residual schedule that its blocks follow."""

    section = "model"
    largest = LARGEST_SIZE
    # At least the number of the tokenizer's tokens.
    vocab_size: int = 320
    # The width of the residual stream.
    dim: int = 256
    layers: int = 4
    # Query heads.
    heads: int = 8
    # Key and value heads: a divisor of heads.
    kv_heads: int = 8
    # The width of a head, an even number.
    head_dim: int = 32
    # The hidden width of the MLP.
    ffn_dim: int = 768
    # The longest context, in tokens.
    max_length: int = 2048
    # The residual schedule: standard, parallel, ladder, hybrid:last16, desync:2, dtp:1,
    # ... (see schedule.py).
    residual: str = "ladder"
    # The base of the rotary embedding.
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    # The input and the output share one embedding.
    tie_embeddings: bool = False
    # RMSNorm on the query and key of every head, as in Qwen3.
    qk_norm: bool = False
    # Biases on query, key and value, as in Qwen2.
    qkv_bias: bool = False
    # A bias on attention's output.
    out_bias: bool = False
    # Biases on the MLP's gate, up and down projections.
    mlp_bias: bool = False
    # The function on the MLP's gate; gelu is the exact one.
    activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    # The tokens that attention sees: a token and those right before it. None: all.
    sliding_window: int | None = None
    # The layers with the sliding window: all, none, last16, or layers such as 0,2,5-9.
    window_layers: str = "all"
    # The layers whose attention has no rotary embedding (NoPE), written the same way.
    nope_layers: str = "none"
    # The standard deviation of initial weights.
    init_std: float = 0.02
    # The dtype of compute; parameters are float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def check(self) -> None:
        self.positive("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim")
        self.positive("ffn_dim", "max_length", "rope_theta", "norm_eps", "init_std")
        self.need("layers", self.layers <= MOST_LAYERS, f"at most {MOST_LAYERS}")
        self.need(
            "kv_heads",
            self.heads % self.kv_heads == 0,
            f"a divisor of model.heads={self.heads}",
        )
        self.need("head_dim", self.head_dim % 2 == 0, "even, for rotary embedding")
        self.need(
            "rope_theta",
            self.rope_theta > 1 or self.rope_scaling.kind != "yarn",
            "greater than 1 with yarn",
        )
        has_window = self.sliding_window is not None
        self.need(
            "sliding_window",
            self.sliding_window is None or self.sliding_window > 0,
            "greater than 0, or None for all tokens",
        )
        self.need(
            "window_layers",
            has_window or self.window_layers == "all",
            "all, unless model.sliding_window is given",
        )
        for name, read in (
            ("residual", schedule.parse),
            ("window_layers", schedule.parse_layers),
            ("nope_layers", schedule.parse_layers),
        ):
            try:
                read(getattr(self, name), self.layers)
            except ValueError as error:
                value = short_repr(getattr(self, name))
                raise ConfigError(
                    f"model.{name}={value} is not accepted: {error}"
                ) from None

    def residual_schedule(self) -> schedule.Schedule:
        """The blocks, layer by layer, with what their attention sees."""
        windowed = "none" if self.sliding_window is None else self.window_layers
        return schedule.parse(
            self.residual,
            self.layers,
            window_layers=windowed,
            nope_layers=self.nope_layers,
        )


@dataclass(frozen=True)
class Mesh(Section):
    """Devices along each mesh axis; one axis may be -1, for all remaining devices."""

    section = "mesh"
    largest = LARGEST_SIZE
    # Replicas of the parameters.
    data: int = -1
    # Shards of every parameter and of the optimizer state, gathered layer by layer.
    fsdp: int = 1
    # Shards of every block's work (tensor parallelism).
    tensor: int = 1
    # The algorithm that sums partials over the tensor axis. auto: the fastest one for
    # the machine and the size of each message; psum on machines that residual/choose.py
    # does not know.
    reduction: Literal[
        "auto",
        "psum",
        "one-shot",
        "recursive-doubling",
        "halving-doubling",
        "direct",
        "ring",
    ] = "auto"
    # Training divides the residual stream's tokens over the tensor axis (sequence
    # parallelism). The stream, its sums and its norms take a shard's part of the memory
    # and the time; XLA's reduce-scatter and all-gather take the reduction's place. GPUs
    # run them beside compute; TPUs wait for most of them, so that a step is longer.
    sequence_parallel: bool = False

    def check(self) -> None:
        axes = ("data", "fsdp", "tensor")
        for name in axes:
            size = getattr(self, name)
            self.need(
                name, size > 0 or size == -1, "greater than 0, or -1 for the rest"
            )
        rest = [name for name in axes if getattr(self, name) == -1]
        for name in rest[1:]:
            self.need(name, False, f"given, where mesh.{rest[0]} is -1")
        self.need(
            "reduction",
            not self.sequence_parallel or self.reduction in ("auto", "psum"),
            "auto or psum with mesh.sequence_parallel=True, which takes XLA's own "
            "reduce-scatter and all-gather",
        )


@dataclass(frozen=True)
class Data(Section):
    """Where text comes from and how it becomes tokens."""

    section = "data"
    # "builtin" (Python's own documentation), or a folder, file or glob; also of a
    # bucket, as s3://bucket/folder or gs://bucket/folder.
    source: str = "builtin"
    # What the source holds: text, or rows of chat (messages, conversations, prompt and
    # completion, instruction and output). auto: chat, if its first rows are.
    format: Literal["auto", "text", "chat"] = "auto"
    # The field of JSONL rows and Parquet columns that holds the text.
    text_field: str = "text"
    # Which tokens of chat count in the loss: the assistant's, those of its last answer
    # alone, or all.
    train_on: Literal["assistant", "all", "last"] = "assistant"
    # "bytes", or the path of a Hugging Face tokenizer.json, of SentencePiece's
    # tokenizer.model, of a folder that has one, or of a run.
    tokenizer: str = "bytes"
    # The share of the documents that is reserved for evaluation.
    held_out_fraction: float = 0.02
    # The folder that stores tokens, so that a corpus is tokenised once.
    token_cache: str = "~/.cache/ladder_jax"

    def check(self) -> None:
        self.need(
            "held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1"
        )
        for name in ("source", "text_field", "tokenizer", "token_cache"):
            self.need(name, getattr(self, name) != "", "non-empty")
        self.need("token_cache", not is_address(self.token_cache), FOLDER)


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW, a learning-rate schedule in steps, and global-norm clipping."""

    section = "optimizer"
    # The peak of the learning rate.
    learning_rate: float = 3e-4
    # After warm-up, cosine falls at once, wsd stays constant and falls linearly at the
    # end, and constant does not fall.
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    # Steps in which the learning rate rises to its peak.
    warmup_steps: int = 100
    # Steps of the final decay. None: all steps after warm-up (cosine), a fifth of the
    # run (wsd).
    decay_steps: int | None = None
    # The learning rate after the decay, as a fraction of learning_rate.
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # The decay of matrices; norms and biases do not decay.
    weight_decay: float = 0.1
    # The largest global gradient norm. None: no clipping.
    clip_norm: float | None = 1.0

    def check(self) -> None:
        self.positive("learning_rate", "eps")
        for name in ("warmup_steps", "weight_decay"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            self.need(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self.need("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "from 0 to 1")
        self.need(
            "decay_steps",
            self.decay_steps is None or self.decay_steps > 0,
            "greater than 0",
        )
        self.need(
            "clip_norm",
            self.clip_norm is None or self.clip_norm > 0,
            "greater than 0, or None for no clipping",
        )


@dataclass(frozen=True)
class Train(Section):
    """Length of the run, size of a step, and what the run reports and saves."""

    section = "train"
    # The folder of metrics, checkpoints and plots; or an address, s3://bucket/folder or
    # gs://bucket/folder, to which a run copies them from train.work_dir.
    out: str = "runs/default"
    # The folder of this machine with the work folders of runs whose train.out is an
    # address; all hosts of a run share it. Empty: ~/.cache/ladder_jax/runs.
    work_dir: str = ""
    # A checkpoint whose weights the run starts from, with a new optimizer: a run's
    # folder, its checkpoints folder or the folder of one step. If the section model has
    # its defaults, the model's shape and residual schedule are the checkpoint's too; so
    # is the tokenizer if data.tokenizer has its default. Empty: random weights.
    init_from: str = ""
    steps: int = 1000
    # Sequences in a step, over all devices.
    global_batch: int = 8
    # Tokens in a sequence.
    seq_len: int = 256
    # The parts of a batch that a step computes one after another, to take less memory.
    grad_accum_steps: int = 1
    # Activations that stay in memory for the backward pass, which recomputes the rest.
    # none: all stay; dots: matrix products and reductions; reductions: reductions;
    # full: the input of each layer.
    remat: Literal["none", "dots", "reductions", "full"] = "none"
    # Tokens whose logits exist at one time on a device. 0: all of them.
    loss_chunk: int = 0
    # Seeds the initial weights, the order of the documents and the sample.
    seed: int = 0
    # A step is bad if its loss or gradient norm is not finite, or a spike
    # (spike_factor). It changes nothing but the position in the data. After this many
    # bad steps in a row, the run goes back to its newest checkpoint. 0: no step is left
    # out; one that is not finite makes the run go back at once.
    skip_steps: int = 0
    # A loss or gradient norm is a spike if it is more than this many times the mean of
    # the good steps before it. None: nothing is a spike.
    spike_factor: float | None = None
    # How often a run goes back to its newest checkpoint, and on with data that it has
    # not seen, before it ends. 0: it ends the first time.
    rollbacks: int = 2
    # Steps from one line of output to the next.
    log_every: int = 10
    # Steps from one evaluation on held-out documents to the next.
    eval_every: int = 200
    # Batches of an evaluation.
    eval_batches: int = 8
    # Steps from one checkpoint to the next.
    save_every: int = 200
    # How many of the newest checkpoints stay on disk.
    keep_checkpoints: int = 3
    # Steps that the profiler traces, after the first two steps. 0: no trace.
    profile_steps: int = 0
    # Tokens of text that the model writes after the last step. 0: none.
    sample_tokens: int = 0
    # Write metrics for TensorBoard too.
    tensorboard: bool = False
    # Peak TFLOP/s of one device, for MFU. None: from the table in hardware/chips.py.
    peak_tflops: float | None = None

    def check(self) -> None:
        self.positive("steps", "global_batch", "seq_len", "grad_accum_steps")
        self.positive("log_every", "eval_every", "eval_batches", "save_every")
        self.positive("keep_checkpoints")
        for name in ("global_batch", "seq_len"):
            ok = getattr(self, name) <= LARGEST_SIZE
            self.need(name, ok, f"at most {LARGEST_SIZE}")
        for name in ("loss_chunk", "profile_steps", "sample_tokens", "skip_steps"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        self.need("rollbacks", self.rollbacks >= 0, "0 or more")
        self.need(
            "spike_factor",
            self.spike_factor is None or self.spike_factor > 1,
            "greater than 1, or None",
        )
        self.need(
            "spike_factor",
            self.spike_factor is None or self.skip_steps > 0,
            "None, unless train.skip_steps is greater than 0",
        )
        self.need("seed", 0 <= self.seed < 2**32, "from 0 to 2 ** 32 - 1")
        self.need("out", self.out != "", "a folder, or an address such as s3://b/run")
        self.need("work_dir", not is_address(self.work_dir), FOLDER)
        self.need(
            "grad_accum_steps",
            self.global_batch % self.grad_accum_steps == 0,
            f"a divisor of train.global_batch={self.global_batch}",
        )
        self.need(
            "peak_tflops",
            self.peak_tflops is None or self.peak_tflops > 0,
            "greater than 0",
        )


@dataclass(frozen=True)
class Distill(Section):
    """Training toward the predictions of a parent model, and the annealed delay."""

    section = "distill"
    # The checkpoint of the parent: a run's folder, its checkpoints folder or the folder
    # of one step. The loss is then KL(parent || model), computed from the logits of
    # both, and a share of the cross-entropy. Empty: the cross-entropy alone.
    parent: str = ""
    # The weight of the cross-entropy beside the divergence.
    cross_entropy: float = 0.1
    # Compare the parent's probabilities of this many most probable tokens, and the sum
    # of all others. 0: of all tokens.
    top_k: int = 0
    # Divides the logits of both models; the divergence is multiplied by its square.
    temperature: float = 1.0
    # Steps in which the stream that blocks read goes from the fresh one to that of
    # model.residual. The last step of the run has model.residual's. 0: all steps have.
    anneal_steps: int = 0
    # The change pauses while the held-out loss of the blended model is more than this
    # above that of the fresh model before the first step, in nats a token. None: it
    # does not pause.
    anneal_tolerance: float | None = 0.2

    def check(self) -> None:
        for name in ("cross_entropy", "top_k", "anneal_steps"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        self.positive("temperature")
        self.need(
            "anneal_tolerance",
            self.anneal_tolerance is None or self.anneal_tolerance >= 0,
            "0 or more, or None",
        )


@dataclass(frozen=True)
class Decode(Section):
    """The decode engine: the memory that it takes, and how long one call of it runs."""

    section = "decode"
    largest = LARGEST_SIZE
    # The most requests that decode together. None: as many as kv_memory holds.
    slots: int | None = 8
    # The most prefilled requests that wait on the device. None: half of slots, 2 or
    # more.
    staging: int | None = None
    # The longest request, prompt and output, in tokens. None: model.max_length.
    max_length: int | None = None
    # The most decode iterations of one jitted call.
    steps_per_call: int = 16
    # Milliseconds that the iterations of one call may take, as far as the engine can
    # tell from the calls before: a call has fewer than steps_per_call if not so many
    # fit. Tokens reach clients when a call ends. 0: no limit, for most throughput.
    burst_ms: float = 50.0
    # The most requests that wait on the host.
    queue_size: int = 1024
    # The dtype of cached keys and values. auto: the model's; float32 on CPUs, where
    # a write into a bfloat16 cache copies the cache. int8 and float8_e4m3fn take half
    # of bfloat16's memory; int8 is nearer to the values.
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"] = "auto"
    # pages: requests share pages, and take as many as they have tokens. rows: each slot
    # has memory for the longest request. auto: the faster one: pages if the slots' rows
    # would take 48 MiB or more of a device, and on TPUs and GPUs if a kernel fits
    # (page_kernels.kernel_for), else rows.
    kv_layout: Literal["auto", "pages", "rows"] = "auto"
    # Tokens of a page; prefix_block is a multiple of it. None: 32, or 64 for the TPU's
    # kernel, or fewer if prefix_block needs it.
    page_size: int | None = None
    # The dtype of the weights' matrices. auto: the model's. int8: each output channel
    # has a scale, and products are in the model's dtype.
    weights_dtype: Literal["auto", "int8"] = "auto"
    # The most tokens that an iteration drafts for a request: what followed the same
    # words earlier in its text. The tokens stay the same; they come in fewer iterations
    # where text repeats itself. 0: no drafts.
    speculate: int = 0
    # Memory of one device for keys and values, such as 512MiB. None: as much as slots
    # and staging can take. With pages, it may be less than slots and staging could
    # take: a request whose pages run out waits again.
    kv_memory: str | None = None
    # The most prompt tokens of one prefill call, and of all prefill calls between two
    # decode calls.
    prefill_budget: int = 256
    # The part of kv_memory that stores prefixes shared by prompts.
    prefix_memory: str = "0"
    # Tokens of a shared prefix that are stored and looked up together.
    prefix_block: int = 32
    # The most alternatives to each token whose log-probabilities a request may ask for.
    max_logprobs: int = 0
    # Whether requests may ask for the log-probabilities of their prompts. They need a
    # few more compiled programs.
    prompt_logprobs: bool = True
    # The most token ids that a request may stop at.
    max_stop_ids: int = 4
    # The most token ids that a request may bias.
    max_logit_bias: int = 16
    # Run programs compiled for fewer slots and shorter requests where those suffice.
    fit_shapes: bool = True
    # Store one array a layer, not one stack of all: decoding copies less, and XLA
    # compiles longer.
    unroll_layers: bool = True
    # while: a call ends early when no request is left. fixed: a call runs all its
    # iterations. auto: fixed on GPUs, while on other devices.
    loop: Literal["auto", "while", "fixed"] = "auto"

    def check(self) -> None:
        self.positive("steps_per_call", "queue_size", "prefill_budget", "prefix_block")
        self.need(
            "slots",
            self.slots is not None or self.kv_memory is not None,
            "a number, unless decode.kv_memory gives the memory for them",
        )
        self.need(
            "slots", self.slots is None or self.slots > 0, "greater than 0, or None"
        )
        for name in ("burst_ms", "max_logprobs", "max_stop_ids", "max_logit_bias"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        self.need("speculate", 0 <= self.speculate <= 64, "from 0 to 64")
        for name in ("staging", "max_length", "page_size"):
            value = getattr(self, name)
            self.need(name, value is None or value > 0, "greater than 0, or None")
        for name in ("kv_memory", "prefix_memory"):
            if getattr(self, name) is not None:
                to_bytes(getattr(self, name), self.path(name))


@dataclass(frozen=True)
class Config(Section):
    """Everything that defines a run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)

    def check(self) -> None:
        require(
            self.distill.anneal_steps <= self.train.steps,
            "distill.anneal_steps",
            self.distill.anneal_steps,
            f"at most train.steps={self.train.steps}",
        )
        if self.mesh.sequence_parallel:
            self._check_sequence_parallel()
        longest = self.model.max_length
        require(
            self.train.seq_len <= longest,
            "train.seq_len",
            self.train.seq_len,
            f"at most model.max_length={longest}",
        )
        require(
            self.train.sample_tokens < longest,
            "train.sample_tokens",
            self.train.sample_tokens,
            f"less than model.max_length={longest}",
        )

    def _check_sequence_parallel(self) -> None:
        require(
            not self.model.residual_schedule().local,
            "model.residual",
            self.model.residual,
            "standard, ladder, hybrid, delays or parallel with "
            "mesh.sequence_parallel=True: the others give each tensor shard a residual "
            "stream of its own, which cannot be divided by tokens",
        )
        require(
            not self.distill.anneal_steps,
            "distill.anneal_steps",
            self.distill.anneal_steps,
            "0 with mesh.sequence_parallel=True",
        )
