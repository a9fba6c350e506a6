"""One attack on many images, in full batches: broken images leave, waiting ones take their slots.

The work is one round (a restart, a target class) of one image. A fixed number of slots hold rounds
at different steps; a compiled loop steps them all until enough of them are free, then the host
notes what ended and fills the gaps. An image's rounds follow each other; once fewer images are left
than slots, later rounds of the same images fill up, and are dropped as soon as one of them
succeeds. When even those run out, the batch shrinks to the next of a few fixed sizes.

What is attacked together, and when, follows from the verdicts alone, never from the clock: so a
stopped and resumed run repeats an unbroken one bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxclus import _classifier, _compile, compose, parallel
from jaxclus.attacks import _search
from jaxclus.attacks._base import Images, SteppedAttack
from jaxclus.data import to_float
from jaxclus.threat import image_keys

# The sizes of a batch on one device, as shares of the largest.
_SHARES = tuple(ninths / 9 for ninths in (9, 8, 7, 6, 5, 4.5, 4, 3, 2, 1, 0.5))

# What a step costs beside its slots, as a share of the largest batch.
_FIXED_COST = 1 / 8

# A batch shrinks only if that spares so many floating-point operations of the model: compiling the
# program for another size takes seconds. Counted, not timed, for the sake of repeatable runs.
_WORTH_COMPILING = {"cpu": 1e12}
_WORTH_COMPILING_ACCELERATOR = 1e14

# Forward passes in one call of the compiled loop, counting a gradient as two: the host sees the
# verdicts, moves the progress bar and can save that often.
_PASSES = 100


class Batch(NamedTuple):
    """What the host puts into slots."""

    new: Any  # which slots are filled anew, bool [s]
    stop: Any  # which slots are given up, bool [s]
    index: Any  # number of the image in each slot, int32 [s]
    round: Any  # number of its round, int32 [s]
    keys: Any  # typed keys of the round [s]
    verdict_keys: Any  # typed keys of the image [s]
    images: Any  # uint8 [s, h, w, c]
    labels: Any  # int32 [s]
    ranking: Any  # classes by clean logit, highest first, int32 [s, k]


@functools.partial(_compile.jit, quickly=True)
def _keys(
    key: jax.Array, member: jax.Array | None, index: jax.Array, round_: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The data of the keys of rounds, and of their images."""
    own = image_keys(key, index)
    keys = compose.split(own if member is None else compose.split(own, member), round_)
    return jax.random.key_data(keys), jax.random.key_data(own)


def _begin(attack: SteppedAttack, batch: Batch) -> _search.Slots:
    x, y, ranking = to_float(batch.images), jnp.asarray(batch.labels), jnp.asarray(batch.ranking)
    images = Images(batch.keys, batch.verdict_keys, x, y, ranking, batch.round)
    return _search.begin(attack, images, batch.new)


@functools.partial(_compile.jit, quickly=True)
def _refill(attack: SteppedAttack, batch: Batch, slots: _search.Slots) -> _search.Slots:
    kept = slots._replace(live=slots.live & ~batch.stop)
    return _search.select(batch.new, _begin(attack, batch), kept)


def _batch(
    work: "Work", new: np.ndarray, stop: np.ndarray, index: np.ndarray, round_: np.ndarray
) -> Batch:
    """What the slots hold, on the devices."""
    size, largest = len(index), work.microbatch * work.mesh.size
    # In one size, and apart from what differs between attacks: one program to compile for all.
    data = _keys(work.key, work.member, np.resize(index, largest), np.resize(round_, largest))
    keys, own = (_wrapped(work, np.asarray(each)[:size]) for each in data)
    rest = (work.images[index], work.labels[index], work.ranking[index])
    batch = Batch(new, stop, index, round_, keys, own, *rest)
    return jax.device_put(batch, parallel.over_batch(work.mesh))


def _wrapped(work: "Work", data: np.ndarray) -> jax.Array:
    """Typed keys [s] of their data."""
    placed = jax.device_put(data, parallel.over_batch(work.mesh))
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(work.key))


def _advance(model, attack, slots, limit, enough):
    return _search.advance(attack, model, slots, limit, enough)


#: `bind(model)(attack, slots, limit, enough)`: `attacks._search.advance`, compiled.
bind = _classifier.jit_over_model(_advance)


def sizes(largest: int) -> list[int]:
    """The sizes of a batch on one device, downwards."""
    return sorted({max(1, round(share * largest)) for share in _SHARES}, reverse=True)


@dataclasses.dataclass
class Ledger:
    """What is known of each image of a data set under one attack; all arrays [n].

    Attributes:
        waiting: whether the image still is to be attacked.
        next_round: number of the next round to begin.
        running: number of its rounds in the slots.
        success: whether the search found an adversarial image.
        value: value of the best candidate.
        forward, gradient: passes spent.
        finished: number of images that are done with.
    """

    waiting: np.ndarray
    next_round: np.ndarray
    running: np.ndarray
    success: np.ndarray
    value: np.ndarray
    forward: np.ndarray
    gradient: np.ndarray
    finished: int = 0

    @classmethod
    def of(cls, attacked: np.ndarray) -> "Ledger":
        """The ledger before the attack on the images that are marked, bool [n]."""
        n = len(attacked)
        return cls(
            waiting=attacked.copy(),
            next_round=np.zeros(n, np.int32),
            running=np.zeros(n, np.int32),
            success=np.zeros(n, bool),
            value=np.full(n, -np.inf, np.float32),
            forward=np.zeros(n, np.int32),
            gradient=np.zeros(n, np.int32),
        )

    def take(self, count: int, rounds: int) -> list[tuple[int, int]]:
        """The next so many (image, round) to begin: first images that no slot holds."""
        taken: list[tuple[int, int]] = []
        while len(taken) < count:
            open_ = np.flatnonzero(self.waiting & (self.next_round < rounds))
            if not len(open_):
                break
            order = np.lexsort((self.next_round[open_], self.running[open_]))
            chosen = open_[order[: count - len(taken)]]
            taken += [(int(image), int(self.next_round[image])) for image in chosen]
            self.next_round[chosen] += 1
            self.running[chosen] += 1
        return taken

    def open(self, rounds: int) -> bool:
        """Whether a round is left to begin."""
        return bool((self.waiting & (self.next_round < rounds)).any())


class Pending(NamedTuple):
    """The slots at work, and what is in them: the state of an unfinished attack.

    Attributes:
        slots: on the devices.
        image: number of the image in each slot, -1 for none [s].
        round: number of its round [s].
    """

    slots: _search.Slots
    image: np.ndarray
    round: np.ndarray


class Work(NamedTuple):
    """What an attack needs to know of the data and the machine.

    Attributes:
        key: the evaluation's key, on every device.
        member: number of the attack in its ensemble, or None; it splits the images' keys.
        images: uint8 [n, h, w, c].
        labels: int32 [n].
        ranking: classes by clean logit, highest first, int32 [n, k].
        mesh: the devices.
        microbatch: largest number of slots on each device.
        flops: floating-point operations of a forward pass for one image.
    """

    key: jax.Array
    member: jax.Array | None
    images: np.ndarray
    labels: np.ndarray
    ranking: np.ndarray
    mesh: Mesh
    microbatch: int
    flops: float


def run(
    work: Work,
    advance: Callable[..., _search.Slots],
    attack: SteppedAttack,
    ledger: Ledger,
    x_adv: np.ndarray,
    pending: Pending | None,
    after: Callable[[Pending, int, float], None],
) -> None:
    """Attacks the images that the ledger has waiting.

    Args:
        work: the data and the machine.
        advance: `bind(model)`.
        attack: the attack.
        ledger: changed in place.
        x_adv: the best candidates, float32 [n, h, w, c], changed in place.
        pending: the state to go on from, or None.
        after: called after each call of the compiled loop, with the state, the number of images
            that it finished, and all the work done so far, in images.
    """
    rounds = attack.rounds(work.ranking.shape[1])
    ladder = [size * work.mesh.size for size in sizes(work.microbatch)]
    forward, gradient = attack.cost
    limit = max(1, _PASSES // (forward + 2 * gradient))
    attack = jax.device_put(attack, parallel.replicated(work.mesh))
    if pending is None:
        images = int(ledger.waiting.sum())
        pending = _fill(work, attack, ledger, rounds, None, _fitting(ladder, images * rounds))
    while (pending.image >= 0).any():
        size = len(pending.image)
        smaller = _smaller(work, attack, ladder, pending)
        enough = size - size // 4 + 1 if ledger.open(rounds) else smaller + 1
        live = int((pending.image >= 0).sum())
        slots = advance(attack, pending.slots, limit, min(enough, live))
        pending = pending._replace(slots=slots)
        pending, done, work_done = _collect(attack, ledger, rounds, x_adv, pending)
        held = int((pending.image >= 0).sum())
        if not ledger.open(rounds) and 0 < held <= smaller:
            pending = _shrunk(work, attack, pending, smaller)
        pending = _fill(work, attack, ledger, rounds, pending, len(pending.image))
        after(pending, done, work_done)


def _smaller(work: Work, attack: SteppedAttack, ladder: list[int], pending: Pending) -> int:
    """The size that the batch should shrink to once it can; 0 if that is not worth it."""
    size = len(pending.image)
    smaller = max((entry for entry in ladder if entry <= size // 2), default=0)
    forward, gradient = attack.cost
    left = attack.steps_per_round - int(np.asarray(pending.slots.steps)[pending.image >= 0].min())
    spared = left * (size - smaller) * (forward + 2 * gradient) * work.flops
    platform = work.mesh.devices.flat[0].platform
    worth = _WORTH_COMPILING.get(platform, _WORTH_COMPILING_ACCELERATOR)
    return smaller if spared > worth else 0


def _fitting(ladder: list[int], count: int) -> int:
    """The size in which so many rounds, one batch after the other, cost least.

    Images of long attacks that nothing breaks stay to the end: 310 of them are better served by
    two batches of 160 than by one of 288 and one that is almost empty.
    """
    return min(ladder, key=lambda size: -(-count // size) * (size + _FIXED_COST * ladder[0]))


def _fill(
    work: Work,
    attack: SteppedAttack,
    ledger: Ledger,
    rounds: int,
    pending: Pending | None,
    size: int,
) -> Pending:
    """Free slots filled with the next rounds; rounds of images that are done with, dropped."""
    if pending is None:
        image, round_ = np.full(size, -1, np.int32), np.zeros(size, np.int32)
    else:
        image, round_ = pending.image.copy(), pending.round.copy()
    stop = (image >= 0) & ~ledger.waiting[image]
    image[stop] = -1
    free = np.flatnonzero(image < 0)
    taken = ledger.take(len(free), rounds)
    new = np.zeros(size, bool)
    for slot, (number, at) in zip(free, taken, strict=False):
        image[slot], round_[slot], new[slot] = number, at, True
    if pending is not None and not (new.any() or stop.any()):
        return pending
    index = np.maximum(image, 0)
    batch = _batch(work, new, stop & ~new, index, round_)
    # Empty slots to start from spare the compilation of a program that only begins.
    slots = restored(work, attack, None, size) if pending is None else pending.slots
    return Pending(_refill(attack, batch, slots), image, round_)


def _collect(
    attack: SteppedAttack, ledger: Ledger, rounds: int, x_adv: np.ndarray, pending: Pending
) -> tuple[Pending, int, float]:
    """Notes the rounds that ended; also how many images that finished, and the work done so far."""
    slots, image = pending.slots, pending.image.copy()
    state = slots.state
    live, steps, success, value = jax.device_get(
        (slots.live, slots.steps, state.success, state.value)
    )
    ended = np.flatnonzero((image >= 0) & ~live)
    candidates = np.asarray(state.x_adv) if len(ended) else np.zeros(0)
    spent = _search.queries(attack, steps)
    done = 0
    for slot in ended:
        number = image[slot]
        image[slot] = -1
        ledger.running[number] -= 1
        if not ledger.waiting[number]:
            continue  # another round of the image ended first
        ledger.forward[number] += spent.forward[slot]
        ledger.gradient[number] += spent.gradient[slot]
        if success[slot] or value[slot] > ledger.value[number]:
            x_adv[number], ledger.value[number] = candidates[slot], value[slot]
        ledger.success[number] = success[slot]
        last = ledger.next_round[number] >= rounds and ledger.running[number] == 0
        if success[slot] or last:
            ledger.waiting[number] = False
            ledger.finished += 1
            done += 1
    held = image >= 0
    open_ = ledger.waiting.nonzero()[0]
    ended_rounds = (ledger.next_round - ledger.running)[open_].sum()
    partial = ended_rounds + (steps[held & ledger.waiting[image]] / attack.steps_per_round).sum()
    work_done = ledger.finished + float(partial) / rounds
    return Pending(slots, image, pending.round), done, work_done


def _shrunk(work: Work, attack: SteppedAttack, pending: Pending, size: int) -> Pending:
    """The slots that are in use, in a smaller batch."""
    order = np.argsort(pending.image < 0, kind="stable")[:size]
    # Through the host: on the devices, each array would be a program to compile.
    slots = restored(work, attack, [leaf[order] for leaf in leaves(pending.slots)], size)
    return Pending(slots, pending.image[order], pending.round[order])


def leaves(slots: _search.Slots) -> list[np.ndarray]:
    """The slots' arrays, on the host; keys as their data."""
    return [
        np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for leaf in jax.tree.leaves(slots)
    ]


def restored(
    work: Work, attack: SteppedAttack, saved: list[np.ndarray] | None, size: int
) -> _search.Slots:
    """The slots that `leaves` gave as `saved`, on the devices; empty ones for None."""
    data = np.asarray(jax.random.key_data(work.key))
    no_keys = _wrapped(work, np.zeros((size, *data.shape), data.dtype))
    index = np.zeros(size, np.int32)
    rest = (work.images[index], work.labels[index], work.ranking[index])
    batch = Batch(index > 0, index > 0, index, index, no_keys, no_keys, *rest)
    like, structure = jax.tree.flatten(jax.eval_shape(_begin, attack, batch))
    if saved is None:
        slots = [no_keys if _is_key(spec) else np.zeros(spec.shape, spec.dtype) for spec in like]
    else:
        slots = [
            _wrapped(work, leaf) if _is_key(spec) else leaf
            for leaf, spec in zip(saved, like, strict=True)
        ]
    placed = jax.device_put(slots, parallel.over_batch(work.mesh))
    return jax.tree.unflatten(structure, placed)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
