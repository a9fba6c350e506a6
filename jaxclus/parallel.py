"""All devices through one mesh: batches are split over its axis "data", all else is replicated.

Programs are plain `jax.jit`; XLA places the communication. A batch must divide by the device count.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the given devices, by default all of them, with the one axis "data"."""
    chosen = list(jax.devices() if devices is None else devices)
    if not chosen:
        raise ValueError("`devices` must name at least one device, got none")
    # Auto axes: with explicit ones, gathers from sharded arrays raise ShardingTypeError.
    return Mesh(np.array(chosen), ("data",), axis_types=(AxisType.Auto,))


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array is placed on, or None where it is on none."""
    placement = getattr(array, "sharding", None)
    mesh = placement.mesh if isinstance(placement, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of weights and data sets: a whole copy on every device."""
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: its leading axis is split over the devices."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises unless the batch divides evenly among the devices."""
    if batch_size % mesh.size:
        raise ValueError(
            f"`{name}` must be a multiple of the number of devices, {mesh.size}, got {batch_size}"
        )


def copy_to(tree: Tree, placement: NamedSharding) -> Tree:
    """A copy of the arrays, wherever they are, at the placement; shares no buffer with them.

    `jax.device_put` may alias its input, and donating the alias would delete the caller's array.
    """
    return jax.tree.map(jax.numpy.copy, jax.device_put(tree, placement))
