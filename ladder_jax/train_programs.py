"""The programs of a training job: its state, the step, the evaluation, their FLOPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

from ladder_jax import attention, initial, model, sharding, skipping
from ladder_jax.config import Config, Model
from ladder_jax.hardware import chips, malloc, xla_options
from ladder_jax.objective import (
    BATCH_SPECS,
    NO_EXTRAS,
    Batch,
    Extras,
    loss_and_gradients,
)


class State(NamedTuple):
    """The arrays that a training step updates."""

    model: model.Transformer
    optimizer: Any
    watch: skipping.Watch | None = None  # None: train.skip_steps=0

    def saved(self) -> dict[str, Any]:
        """The parts that a checkpoint stores as arrays."""
        return dict(model=self.model, optimizer=self.optimizer)


def abstract_state(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> State:
    """The state's shapes, dtypes and shardings on `mesh`; allocates nothing."""
    parameters = model.abstract(config.model)
    watch = skipping.start() if config.train.skip_steps else None
    shapes = State(parameters, jax.eval_shape(optimizer.init, parameters), watch)
    parameter_specs = sharding.parameter_specs(parameters)

    def is_model(node: object) -> bool:
        return isinstance(node, model.Transformer)

    # The optimizer's moments are shaped, and sharded, as the parameters.
    specs = jax.tree.map(
        lambda node: parameter_specs if is_model(node) else sharding.REPLICATED,
        shapes,
        is_leaf=is_model,
    )
    return sharding.abstract(shapes, mesh, specs)


def state_shardings(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> Any:
    """The state's tree of shardings on `mesh`."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh, optimizer))


def init_state(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> State:
    """A new state, with random parameters or those of train.init_from.

    Each device computes or loads its own shards and never holds more than them. Random
    values are the same on every mesh, except for rounding.
    """
    shardings = state_shardings(config, mesh, optimizer)
    if config.train.init_from:
        parameters = initial.load_weights(config, mesh)
        init_optimizer = jax.jit(optimizer.init, out_shardings=shardings.optimizer)
        state = State(parameters, init_optimizer(parameters))
    else:

        def init() -> State:
            parameters = model.init(config.model, jax.random.key(config.train.seed))
            return State(parameters, optimizer.init(parameters))

        state = jax.jit(init, out_shardings=shardings._replace(watch=None))()
    return watched(state, config, mesh)


def watched(
    state: State,
    config: Config,
    mesh: jax.sharding.Mesh,
    watch: dict[str, float] | None = None,
) -> State:
    """`state` with the watch of `skipping.start(watch)`, if steps are skipped."""
    if not config.train.skip_steps:
        return state
    replicated = sharding.named_shardings(mesh, sharding.REPLICATED)
    return state._replace(watch=jax.device_put(skipping.start(watch), replicated))


def make_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformationExtraArgs,
    kernel: attention.Kernel | None = None,
    extras: Extras = NO_EXTRAS,
) -> Callable[..., Any]:
    """The compiled training step: (state, batch) -> (state, results).

    It donates the state. `results` are scalars: loss (before the step), gradient_norm
    (before clipping) and parameter_norm (after the step; it is finite only if a
    checkpoint of the new state is); with a parent also divergence and cross_entropy,
    which make up the loss; with train.skip_steps also skipped_steps and bad_in_a_row.
    With `extras` its third argument is a dict of their arrays.
    """
    gradients_of = loss_and_gradients(config, mesh, kernel, extras)
    specs = sharding.parameter_specs(model.abstract(config.model))
    norm_of = sharding.shard_map(
        lambda tree: sharding.norm(tree, specs), mesh, (specs,), sharding.REPLICATED
    )

    def step(
        state: State, batch: Batch, *inputs: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        losses, gradients = gradients_of(state.model, batch, *inputs)
        norm = norm_of(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.model, norm=norm
        )
        new = State(optax.apply_updates(state.model, updates), optimizer_state)
        results = losses | dict(gradient_norm=norm)
        if state.watch is not None:
            bad, watch = skipping.judge(config.train, state.watch, losses["loss"], norm)
            new = skipping.choose(bad, state._replace(watch=None), new)
            new = new._replace(watch=watch)
            results |= dict(skipped_steps=watch.skipped, bad_in_a_row=watch.in_a_row)
        return new, results | dict(parameter_norm=norm_of(new.model))

    shardings = state_shardings(config, mesh, optimizer)
    inputs = (BATCH_SPECS, *extras.specs())
    return jax.jit(
        step,
        in_shardings=(shardings, *sharding.named_shardings(mesh, inputs)),
        out_shardings=(
            shardings,
            sharding.named_shardings(mesh, sharding.REPLICATED),
        ),
        donate_argnums=0,
        compiler_options=xla_options.options(mesh),
    )


def make_evaluation(
    config: Config, mesh: jax.sharding.Mesh, freshness: bool = False
) -> Callable[..., Any]:
    """(model, batch) -> (sum of losses in nats, sum of weights), compiled.

    With `freshness` its third argument is a dict with that array (objective.Extras).
    """
    platform = chips.platform(mesh)
    options: dict[str, Any] = dict(
        kernel=attention.kernel_for(platform, config.model, config.train.seq_len),
        chunk=config.train.loss_chunk,
    )

    def local(parameters: model.Transformer, batch: Batch, *inputs: Any) -> Any:
        fresh = dict(*inputs)
        loss = model.loss(parameters, config.model, batch, **options, **fresh)
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    specs = sharding.parameter_specs(model.abstract(config.model))
    inputs = Extras(freshness=freshness).specs()
    results = (sharding.REPLICATED, sharding.REPLICATED)
    return jax.jit(
        sharding.shard_map(local, mesh, (specs, BATCH_SPECS, *inputs), results),
        compiler_options=xla_options.options(mesh),
    )


def flops_per_token(model_config: Model, length: int) -> int:
    """Model FLOPs of training on one token: 6 N + 12 L heads H T.

    In layers with a sliding window it stands for T if it is less.

    N is the number of parameters without the input embedding, which is not multiplied
    (a tied embedding counts once, as the output's). Attention counts all T x T
    products, not the causal half; recomputation does not count. MFU is this number
    times tokens a second, over the devices' peak. Source: PaLM (arXiv 2204.02311),
    appendix B."""
    count = parameter_count(model.abstract(model_config))
    if not model_config.tie_embeddings:
        count -= model_config.vocab_size * model_config.dim
    width = model_config.heads * model_config.head_dim
    seen = model_config.layers * length
    if model_config.sliding_window is not None:
        blocks = [b for layer in model_config.residual_schedule().layers for b in layer]
        windows = sum(block.window for block in blocks)
        seen -= windows * max(length - model_config.sliding_window, 0)
    return 6 * count + 12 * seen * width


def flops_per_step(config: Config) -> int:
    """Model FLOPs of a training step; JAX need not have started."""
    tokens = config.train.global_batch * config.train.seq_len
    return tokens * flops_per_token(config.model, config.train.seq_len)


# FLOPs of a training step that takes a CPU 0.1 s or more. The few milliseconds that the
# host works between two steps are nothing then; a short step overlaps with them, and
# its temporaries are small.
LONG_STEP = 2e10


def run_long_steps_in_turn(config: Config) -> None:
    """Keeps the temporaries of one step in memory, not of several, where steps are long
    and JAX computes on CPUs (malloc.run_programs_in_turn).

    It has no effect if JAX has started.
    """
    if flops_per_step(config) >= LONG_STEP:
        malloc.run_programs_in_turn()


def parameter_count(tree: Any) -> int:
    """The number of elements of all arrays in `tree`."""
    return sum(x.size for x in jax.tree.leaves(tree))
