"""One training step as one compiled program, and the state it carries."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxclus import _compile, _pytree, models, parallel
from jaxclus.compose import Chain
from jaxclus.data import Augmentation, to_float
from jaxclus.threat import image_keys
from jaxclus.training._config import TrainingConfig, optimizer
from jaxclus.training.objectives import Head, Metrics, Objective, Seen, TrainingModel

Weights = dict[str, Any]


@_pytree.register
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training; a pytree of arrays, saved as it is.

    Attributes:
        step: number of steps taken, int32 scalar.
        weights: {"params", "stats"}: trained parameters and running statistics.
        opt_state: the optimiser's state.
        average: moving average of `weights`, or None.
        objective: the objective's state.
        head: what the objective classifies embeddings with, or None for the network's own head.
        best: {"score", "weights", "head"} of the best validation so far, or None without.
    """

    step: jax.Array
    weights: Weights
    opt_state: Any
    average: Weights | None
    objective: Any
    head: Head | None
    best: dict[str, Any] | None

    @property
    def current(self) -> Weights:
        """The weights to evaluate: the average where there is one."""
        return self.weights if self.average is None else self.average

    @property
    def selected(self) -> tuple[Weights, Head | None]:
        """The weights and the head to return: the best validated where there are any."""
        best = self.best
        return (self.current, self.head) if best is None else (best["weights"], best["head"])


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything of a run that is fixed when it compiles; hashable.

    Two runs with equal programs, as with two seeds, share the compiled code.
    """

    train: Any
    evaluate: Any
    objective: Objective
    config: TrainingConfig
    augmentation: Augmentation
    steps_per_epoch: int
    mesh: Mesh

    @classmethod
    def of(cls, model: nnx.Module, **fields: Any) -> "Program":
        """The program that trains a model of this architecture."""
        return cls(train=_train_graph(model, fields["config"]), evaluate=_graph(model), **fields)

    def model(self, weights: Weights) -> Any:
        """The network with these weights, in eval mode and float32."""
        return nnx.merge(self.evaluate, weights["params"], weights["stats"])

    def classifier(self, weights: Weights, head: Head | None) -> Any:
        """The network with these weights, its embeddings classified by the head if there is one."""
        network = self.model(weights)
        return network if head is None else Chain(models.features(network), head)


def _graph(model: nnx.Module) -> Any:
    frozen = nnx.view(model, use_running_average=True, raise_if_not_found=False)
    return nnx.split(frozen, nnx.Param, nnx.BatchStat)[0]


def _train_graph(model: nnx.Module, config: TrainingConfig) -> Any:
    if config.precision != "float32":
        spec = getattr(model, "spec", None)
        if spec is None:
            raise ValueError(
                "`precision` must be float32 for a model that jc.models.create did not make, "
                f"got {config.precision!r}: build it with that dtype instead"
            )
        model = dataclasses.replace(spec, dtype=config.precision).abstract()
    train = nnx.view(model, use_running_average=False, raise_if_not_found=False)
    return nnx.split(train, nnx.Param, nnx.BatchStat)[0]


def weights_of(model: nnx.Module) -> Weights:
    """Parameters and running statistics of a network as plain dicts."""
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}


def initial_state(
    program: Program, weights: Weights, objective_state: Any, *, validated: bool
) -> TrainState:
    """The state before the first step; shares no buffer with the given weights."""
    head = program.objective.head(objective_state)
    best = {"score": jnp.array(-1.0), "weights": weights, "head": head}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        opt_state=optimizer(program.config, program.steps_per_epoch).init(weights["params"]),
        average=weights if program.config.ema_decay is not None else None,
        objective=objective_state,
        head=head,
        best=best if validated else None,
    )
    return parallel.copy_to(state, parallel.replicated(program.mesh))


def abstract_state(
    program: Program, weights: Weights, objective_state: Any, *, validated: bool
) -> TrainState:
    """Shapes, dtypes and placement of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(
        partial(initial_state, program, validated=validated), weights, objective_state
    )
    placement = parallel.replicated(program.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), shapes
    )


@partial(jax.jit, static_argnames=("count",))
def epoch_order(key: jax.Array, epoch: jax.Array, *, count: int) -> jax.Array:
    """The order [count] in which an epoch visits the images; it is where the key is."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


@partial(_compile.jit, static_argnames=("program",), donate_argnames=("state",))
def train_step(
    state: TrainState,
    key: jax.Array,
    order: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    program: Program,
) -> tuple[TrainState, Metrics]:
    """One step: batch, augmentation, objective, update.

    All randomness comes from key, number of the batch and number of the image, so that a resumed
    run continues bit for bit and the device count does not matter.
    """
    config, objective = program.config, program.objective
    number = state.step // objective.steps_per_batch
    batch_key, image_key = jax.random.split(jax.random.fold_in(key, number))
    index = objective.batch(batch_key, number, state.objective, config.batch_size)
    if index is None:
        batches_per_epoch = program.steps_per_epoch // objective.steps_per_batch
        start = number % batches_per_epoch * config.batch_size
        index = jax.lax.dynamic_slice(order, (start,), (config.batch_size,))
    index = jax.lax.with_sharding_constraint(index, parallel.over_batch(program.mesh))
    keys = jax.vmap(partial(jax.random.split, num=2))(image_keys(image_key, index))
    x = program.augmentation(keys[:, 0], to_float(images[index]))
    y = labels[index]
    x_adv = objective.perturb(keys[:, 1], program.model(state.weights), x, y, state.objective)

    def loss(params, x_adv):
        model = TrainingModel(program.train, params, state.weights["stats"])
        found = objective.loss(model, x, x_adv, y, keys[:, 1], state.objective)
        return found.loss, (found.metrics, model.stats, found.noted)

    params = state.weights["params"]
    x_adv = jax.lax.stop_gradient(x_adv)
    of_both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (metrics, stats, noted)), (grads, image_grads) = of_both(params, x_adv)
    transform = optimizer(config, program.steps_per_epoch)
    updates, opt_state = transform.update(grads, state.opt_state, params)
    weights = {"params": optax.apply_updates(params, updates), "stats": stats}
    average = state.average
    if average is not None and config.ema_decay is not None:
        average = optax.incremental_update(weights, average, 1 - config.ema_decay)
    seen = Seen(index, x, x_adv, image_grads, noted)
    objective_state = objective.update(state.objective, seen)
    everywhere = parallel.replicated(program.mesh)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        weights=weights,
        opt_state=opt_state,
        average=average,
        objective=jax.lax.with_sharding_constraint(objective_state, everywhere),
    )
    return state, metrics | {"loss": value}


@jax.jit
def is_finite(weights: Weights) -> jax.Array:
    """Whether no weight or statistic is NaN or infinite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all()
