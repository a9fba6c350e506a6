"""The loop that drives attacks: batches of images, each at its own round and step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclus import compose
from jaxclus._classifier import Classifier, verdict
from jaxclus.attacks._base import Images, Queries, Search, State, SteppedAttack


class Slots(NamedTuple):
    """A batch at work: one image at one round in each slot.

    Attributes:
        images: the images of the slots.
        steps: number of steps taken in the round [b]; the end of a round counts as one more.
        state: the attack's state.
        live: whether the slot's round goes on [b].
    """

    images: Images
    steps: jax.Array
    state: State
    live: jax.Array


def select(which: jax.Array, new: Any, old: Any) -> Any:
    """The new pytree's entries where `which` [b], else the old one's."""

    def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(which.reshape(which.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(leaf, new, old)


def begin(attack: SteppedAttack, images: Images, live: jax.Array) -> Slots:
    """Slots at the start of a round."""
    # Weak types, which `jnp.full` gives, would have `advance` compiled a second time.
    state = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), attack.start(images))
    return Slots(images, jnp.zeros(live.shape, jnp.int32), state, live)


def advance(
    attack: SteppedAttack,
    model: Classifier,
    slots: Slots,
    limit: jax.Array | int,
    enough: jax.Array | int,
) -> Slots:
    """Takes at most `limit` steps, while at least `enough` slots (1 or more) are live.

    A slot leaves when it succeeds, or has taken its steps and was finished.
    """

    def body(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        taken, slots = carry
        stepped = attack.step(model, slots.images, slots.steps, slots.state)
        stepped = _confirmed(model, slots.images, slots.live, slots.state, stepped)
        state = select(slots.live, stepped, slots.state)
        if not finishes:  # then nobody reads what a slot remembers that is live no more
            state = state._replace(memory=stepped.memory)
        steps = slots.steps + slots.live
        live = slots.live & ~state.success & (steps < attack.steps_per_round)
        return taken + 1, Slots(slots.images, steps, state, live)

    def more(carry: tuple[jax.Array, Slots]) -> jax.Array:
        return (carry[0] < limit) & (carry[1].live.sum() >= enough)

    was_live, finishes = slots.live, attack.finish_cost != (0, 0)
    slots = lax.while_loop(more, body, (jnp.array(0), slots))[1]
    if not finishes:
        return slots
    ended = was_live & ~slots.live & ~slots.state.success

    def finish(slots: Slots) -> Slots:
        last = attack.finish(model, slots.images, slots.state)
        last = _confirmed(model, slots.images, ended, slots.state, last)
        state = select(ended, last, slots.state)
        return slots._replace(state=state, steps=slots.steps + ended)

    return lax.cond(ended.any(), finish, lambda slots: slots, slots)


def _confirmed(
    model: Classifier, images: Images, which: jax.Array, old: State, new: State
) -> State:
    """The new state, but for successes that a stochastic classifier's verdict does not confirm.

    The verdict that counts in the end is drawn with other keys than the passes of a step: an image
    that left on a step's word alone could come back as unbroken. Where the verdict disagrees, the
    candidate is the old one again, and the search goes on.
    """
    if not compose.is_stochastic(model):
        return new
    claimed = new.success & ~old.success & which

    def judged(claimed: jax.Array) -> jax.Array:
        return claimed & (verdict(model, images.verdict_keys, new.x_adv)[1] == images.y)

    rejected = lax.cond(claimed.any(), judged, lambda none: none, claimed)
    x_adv, value = select(rejected, (old.x_adv, old.value), (new.x_adv, new.value))
    return new._replace(x_adv=x_adv, value=value, success=new.success & ~rejected)


def queries(attack: SteppedAttack, steps: Any) -> Queries:
    """What so many steps [b] of a round, of JAX or NumPy, asked of the model."""
    ended = steps > attack.steps_per_round
    taken = steps - ended
    forward, gradient = zip(attack.cost, attack.finish_cost, strict=True)
    return Queries(*(taken * step + ended * end for step, end in (forward, gradient)))


def search(
    attack: SteppedAttack,
    keys: jax.Array,
    model: Classifier,
    x: jax.Array,
    y: jax.Array,
    logits: jax.Array,
    active: jax.Array,
    *,
    trace: bool,
    member: int | None = None,
) -> Search:
    """All rounds of an attack on a batch; an image that is broken takes no further part.

    Of each image the first success counts, else the candidate of highest value. With `trace`, the
    images go on to the end, and the candidates still are the same.
    """
    none = jnp.zeros(y.shape, jnp.int32)
    own = keys if member is None else compose.split(keys, member)
    ranking = jnp.argsort(-logits, axis=-1, stable=True)

    def one_round(carry: tuple[Any, ...], number: jax.Array) -> tuple[Any, jax.Array | None]:
        x_best, value, broken, spent = carry
        images = Images(compose.split(own, number), keys, x, y, ranking, none + number)
        live = active & ~broken
        slots, history = begin(attack, images, live), None
        if trace:
            slots, history = _trace(attack, model, slots)
        else:
            slots = advance(attack, model, slots, attack.steps_per_round, 1)
        state, used = slots.state, queries(attack, slots.steps)
        better = live & (state.success | (state.value > value))
        best = select(better, (state.x_adv, state.value), (x_best, value))
        spent = jax.tree.map(lambda total, new: total + jnp.where(live, new, 0), spent, used)
        return (*best, broken | (live & state.success), spent), history

    nothing = (x, jnp.full(y.shape, -jnp.inf), none > 0, Queries(none, none))
    numbers = jnp.arange(attack.rounds(logits.shape[-1]))
    (x_adv, _, broken, spent), history = lax.scan(one_round, nothing, numbers)
    spent = jax.tree.map(lambda passes: passes * attack.samples(model), spent)
    return Search(x_adv, broken, spent, history)


def _trace(attack: SteppedAttack, model: Classifier, slots: Slots) -> tuple[Slots, jax.Array]:
    """All steps of a round, and the loss at every iterate [steps, b]."""

    def keep(old: State, new: State) -> State:
        """The new state, with the candidate of the first success."""
        first = select(old.success, old[:3], new[:3])
        return new._replace(**dict(zip(State._fields[:3], first, strict=True)))

    def body(carry: tuple[State, jax.Array], number: jax.Array) -> tuple[Any, jax.Array]:
        state, steps = carry
        steps = jnp.where(slots.live & ~state.success, number + 1, steps)
        new = attack.step(model, slots.images, jnp.full_like(steps, number), state)
        new = _confirmed(model, slots.images, slots.live, state, new)
        return (keep(state, new), steps), new.loss

    numbers = jnp.arange(attack.steps_per_round)
    (state, steps), history = lax.scan(body, (slots.state, slots.steps), numbers)
    if attack.finish_cost != (0, 0):
        steps += slots.live & ~state.success
        last = attack.finish(model, slots.images, state)
        last = _confirmed(model, slots.images, slots.live, state, last)
        state, history = keep(state, last), jnp.concatenate([history, last.loss[None]])
    return slots._replace(state=state, steps=steps, live=slots.live & False), history
