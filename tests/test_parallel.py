import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxclus import parallel


def test_mesh_over_all_devices_or_some():
    assert parallel.mesh().size == len(jax.devices()) == 8
    assert parallel.mesh().axis_names == ("data",)
    some = parallel.mesh(jax.devices()[2:4])
    assert some.devices.tolist() == jax.devices()[2:4]
    assert some == parallel.mesh(tuple(jax.devices()[2:4]))
    with pytest.raises(ValueError, match="`devices` must name at least one device, got none"):
        parallel.mesh([])


def test_placements():
    mesh = parallel.mesh()
    whole = jax.device_put(jnp.arange(16.0), parallel.replicated(mesh))
    split = jax.device_put(jnp.arange(16.0), parallel.over_batch(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(16,)] * 8
    assert [shard.data.shape for shard in split.addressable_shards] == [(2,)] * 8
    assert parallel.over_batch(mesh).spec == PartitionSpec("data")


def test_gathers_and_permutations_of_split_arrays_work():
    # On a mesh of explicit axes, JAX's default, they raise.
    mesh = parallel.mesh()
    x = jax.device_put(jnp.arange(16.0), parallel.over_batch(mesh))
    order = jax.random.permutation(jax.random.key(0), x.shape[0])
    np.testing.assert_array_equal(x[order], np.asarray(x)[np.asarray(order)])


def test_check_batch_size():
    parallel.check_batch_size("batch_size", 24, parallel.mesh())
    parallel.check_batch_size("batch_size", 7, parallel.mesh(jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"`size` must be a multiple .* devices, 8, got 12"):
        parallel.check_batch_size("size", 12, parallel.mesh())


@pytest.mark.parametrize("start, end", [(slice(0, 1), slice(0, 8)), (slice(0, 8), slice(3, 4))])
def test_a_copy_survives_the_donation_of_the_other(start, end):
    begin = parallel.replicated(parallel.mesh(jax.devices()[start]))
    target = parallel.replicated(parallel.mesh(jax.devices()[end]))
    tree = {"a": jnp.arange(4.0), "key": jax.random.key(1), "none": None}
    tree = jax.device_put(tree, begin)
    copy = parallel.copy_to(tree, target)
    assert copy["a"].sharding == target
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
    donate(copy)
    assert copy["a"].is_deleted() and not tree["a"].is_deleted()
    np.testing.assert_array_equal(tree["a"], np.arange(4.0))
    assert (jax.random.key_data(tree["key"]) == jnp.array([0, 1], jnp.uint32)).all()


def test_a_copy_at_the_same_place_is_one():
    placement = parallel.replicated(parallel.mesh())
    tree = jax.device_put({"a": jnp.arange(4.0)}, placement)
    copy = parallel.copy_to(tree, placement)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(copy)
    assert copy["a"].is_deleted()
    np.testing.assert_array_equal(tree["a"], np.arange(4.0))
