"""The losses of the forward process, against restatements in plain loops of float64, gradients and draws included."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.rl.forward import (
    awm_log_density,
    density_ratio,
    nft_loss,
    noised,
    on_policy_soft_clip,
    permuted_times,
    stratified_times,
    velocity_penalty,
    vgrpo_error,
)
from egrpo_jax.rl.loss import clipped_ratio_loss

RNG = np.random.default_rng(0)
SAMPLES, SHAPE = (2, 3), (2, 3, 4, 2)  # [P, G, N, D]
VELOCITY, OLD, DATA, NOISE = RNG.normal(size=(4, *SHAPE)).astype(np.float32)
TIME = RNG.uniform(0.05, 1, SAMPLES).astype(np.float32)
LATENTS = np.asarray(noised(DATA, NOISE, TIME))
ADVANTAGE = np.array([[-7.0, -5.0, -0.5], [0.0, 1.5, 9.0]], np.float32)
TIMES = shifted_times(14, 3.0)


def per_sample(one, *arrays):
    """`one` of each sample's arrays, in float64, as an array over samples."""
    arrays = [np.asarray(x, np.float64) for x in arrays]
    return np.array([[one(*(x[p, g] for x in arrays)) for g in range(SAMPLES[1])] for p in range(SAMPLES[0])])


def numbers(*arrays):
    """The numbers of one sample's arrays, together, token by token and channel by channel."""
    return zip(*(x.reshape(-1).tolist() for x in arrays), strict=True)


def average(values):
    values = list(values)
    return math.fsum(values) / len(values)


def size_by_hand(velocity, latents, data, time):
    """The mean absolute error of the data that a velocity predicts."""
    return max(1e-5, average(abs((x - time * v) - x0) for v, x, x0 in numbers(velocity, latents, data)))


def error_by_hand(velocity, latents, data, time, at):
    """The squared error over its size, the latter being that of the velocity `at`."""
    squares = (((x - time * v) - x0) ** 2 for v, x, x0 in numbers(velocity, latents, data))
    return average(squares) / size_by_hand(at, latents, data, time)


def nft_by_hand(velocity, old, latents, data, time, advantage, at, strength, clip):
    certainty = min(max(0.5 + min(max(advantage, -clip), clip) / (2 * clip), 0.0), 1.0)
    total = 0.0
    for probability, sign in ((certainty, 1.0), (1 - certainty, -1.0)):
        branch, frozen = (old + sign * strength * (v - old) for v in (velocity, at))
        total += probability * error_by_hand(branch, latents, data, time, frozen) / strength
    return clip * total


def awm_by_hand(velocity, data, noise, time):
    density = -average((v - (e - x0)) ** 2 for v, x0, e in numbers(velocity, data, noise))
    return -((1e-10 - density) ** 0.25 - 1e-10**0.25) * time / 0.25


def penalty_by_hand(velocity, reference):
    return average((v - ref) ** 2 for v, ref in numbers(velocity, reference))


def gradient_by_hand(loss, point, step=1e-6):
    """Central differences of a float64 function of an array, element by element."""
    point = np.asarray(point, np.float64)
    grad = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        ends = []
        for sign in (1, -1):
            moved = point.copy()
            moved[index] += sign * step
            ends.append(loss(moved))
        grad[index] = (ends[0] - ends[1]) / (2 * step)
    return grad


def check(ours, by_hand, velocity=VELOCITY, scale=1.0):
    """Values of each sample, and the gradient of a weighted sum of them by the velocity."""
    weights = np.random.default_rng(1).normal(size=SAMPLES)
    np.testing.assert_allclose(ours(jnp.array(velocity)), by_hand(velocity), rtol=1e-5, atol=1e-6 * scale)
    grad = jax.jit(jax.grad(lambda v: (weights * ours(v)).sum()))(jnp.array(velocity))
    expected = gradient_by_hand(lambda v: (weights * by_hand(v)).sum(), velocity)
    assert np.abs(expected).max() > 1e-3 * scale
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5 * scale)


def test_latents_lie_between_data_and_noise():
    by_hand = lambda data, noise, time: [(1 - time) * x0 + time * e for x0, e in numbers(data, noise)]
    expected = per_sample(by_hand, DATA, NOISE, TIME).reshape(SHAPE)
    np.testing.assert_allclose(LATENTS, expected, rtol=1e-6, atol=1e-6)
    for time, end in ((0.0, DATA), (1.0, NOISE)):
        np.testing.assert_array_equal(noised(DATA, NOISE, np.full(SAMPLES, time, np.float32)), end)


@pytest.mark.parametrize(("strength", "clip"), [(1.0, 5.0), (0.1, 5.0), (0.7, 2.0)])
def test_nft_equals_a_restatement(strength, clip):
    ours = lambda v: nft_loss(v, OLD, LATENTS, DATA, TIME, ADVANTAGE, strength=strength, advantage_clip=clip)
    one = lambda *arrays: nft_by_hand(*arrays, strength, clip)
    by_hand = lambda v: per_sample(one, v, OLD, LATENTS, DATA, TIME, ADVANTAGE, VELOCITY)
    check(ours, by_hand, scale=clip / strength)


def test_nft_pulls_to_good_samples_and_away_from_bad_ones_as_much():
    """On the policy the two branches have one error E, and the gradient is A / c times that of c E, whatever b is."""
    advantage = np.array([[-9.0, -5.0, -2.0], [0.0, 2.0, 5.0]], np.float32)
    for strength in (1.0, 0.1):
        loss = lambda v: nft_loss(v, OLD, LATENTS, DATA, TIME, advantage, strength=strength)
        grad = jax.grad(lambda v: loss(v).sum())(jnp.array(OLD))
        of_error = jax.grad(lambda v: vgrpo_error(v, LATENTS, DATA, TIME).sum())(jnp.array(OLD))
        expected = np.clip(advantage, -5, 5)[..., None, None] * of_error
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(loss(OLD), 5 / strength * vgrpo_error(OLD, LATENTS, DATA, TIME), rtol=1e-4)


def test_nft_clips_at_5_by_default_and_stops_the_old_policy():
    loss = lambda v, old, **clip: nft_loss(v, old, LATENTS, DATA, TIME, ADVANTAGE, strength=0.3, **clip)
    np.testing.assert_array_equal(loss(VELOCITY, OLD), loss(VELOCITY, OLD, advantage_clip=5.0))
    of_old = jax.grad(lambda old: loss(VELOCITY, old).sum())(jnp.array(OLD))
    np.testing.assert_array_equal(of_old, np.zeros(SHAPE))


def test_vgrpo_equals_a_restatement():
    ours = lambda v: vgrpo_error(v, LATENTS, DATA, TIME)
    check(ours, lambda v: per_sample(error_by_hand, v, LATENTS, DATA, TIME, VELOCITY))


def test_vgrpo_by_hand():
    """At t = 1/2 velocities off by 2 and 6 put the data off by 1 and 3: (1 + 9) / 2 over (1 + 3) / 2."""
    data = noise = np.zeros((1, 2), np.float32)
    time = np.float32(0.5)
    error = lambda v: vgrpo_error(v, noised(data, noise, time), data, time)
    value, grad = jax.value_and_grad(error)(jnp.array([[2.0, -6.0]]))
    np.testing.assert_allclose(value, 2.5, rtol=1e-6)
    # t (x0^ - x0) * 2 / (N D) / 2, the size being a constant
    np.testing.assert_allclose(grad, [[0.25, -0.75]], rtol=1e-6)


def test_vgrpo_s_ratio_is_of_the_mean_over_pairs_and_has_its_gradient():
    """The pairs' errors are averaged before the exponential; here the pairs are the axis of samples G."""
    old, error = (lambda v: vgrpo_error(v, LATENTS, DATA, TIME).mean(-1)), error_by_hand
    ours = lambda v: density_ratio(-vgrpo_error(v, LATENTS, DATA, TIME).mean(-1), -old(OLD))
    of_policy = lambda v: per_sample(error, v, LATENTS, DATA, TIME, VELOCITY).mean(-1)
    of_old = per_sample(error, OLD, LATENTS, DATA, TIME, OLD).mean(-1)
    by_hand = lambda v: np.exp(of_old - of_policy(v))
    np.testing.assert_allclose(ours(VELOCITY), by_hand(VELOCITY), rtol=1e-5)
    grad = jax.grad(lambda v: ours(v).sum())(jnp.array(VELOCITY))
    expected = gradient_by_hand(lambda v: by_hand(v).sum(), VELOCITY)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_has_neither_error_nor_gradient():
    perfect = jnp.array(NOISE - DATA)
    functions = {
        "vgrpo": lambda v: vgrpo_error(v, LATENTS, DATA, TIME),
        "nft": lambda v: nft_loss(v, perfect, LATENTS, DATA, TIME, ADVANTAGE, strength=1.0),
        "awm": lambda v: awm_log_density(v, DATA, NOISE, TIME),
    }
    for name, function in functions.items():
        np.testing.assert_allclose(function(perfect), 0, atol=1e-5, err_msg=name)
        assert np.isfinite(jax.grad(lambda v: function(v).sum())(perfect)).all(), name
    # exactly no error, where the size has only its floor
    zeros, time = np.zeros(SHAPE, np.float32), np.zeros(SAMPLES, np.float32)
    value, grad = jax.value_and_grad(lambda v: vgrpo_error(v, DATA, DATA, time).sum())(jnp.array(VELOCITY))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(grad, zeros)


def test_below_the_floor_the_error_is_divided_by_the_floor():
    data = np.zeros(SHAPE, np.float32)
    for offset in (0.5, 2e-5, 1e-6):
        found = vgrpo_error(data, data + np.float32(offset), data, TIME)
        np.testing.assert_allclose(found, offset**2 / max(offset, 1e-5), rtol=1e-5)


def test_awm_equals_a_restatement():
    ours = lambda v: awm_log_density(v, DATA, NOISE, TIME)
    check(ours, lambda v: per_sample(awm_by_hand, v, DATA, NOISE, TIME))


def test_awm_equals_a_restatement_near_the_target():
    close = (NOISE - DATA + 1e-2 * VELOCITY).astype(np.float32)
    ours = lambda v: awm_log_density(v, DATA, NOISE, TIME)
    by_hand = lambda v: per_sample(awm_by_hand, v, DATA, NOISE, TIME)
    np.testing.assert_allclose(ours(close), by_hand(close), rtol=1e-5)
    grad = jax.grad(lambda v: ours(v).sum())(jnp.array(close))
    np.testing.assert_allclose(grad, gradient_by_hand(lambda v: by_hand(v).sum(), close), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("offset", "time", "expected"),
    [(1.0, 1.0, -3.987351), (0.25, 0.5, -0.993675), (4.0, 0.25, -1.996838), (0.0, 0.7, 0.0)],
)
def test_awm_by_hand(offset, time, expected):
    """-4 t (sqrt(|offset|) - 10^-2.5), all velocities being off by `offset`; at 0 the gradient is 0 too."""
    target, time = NOISE - DATA, np.full(SAMPLES, time, np.float32)
    density = lambda v: awm_log_density(v, DATA, NOISE, time)
    np.testing.assert_allclose(density(target + np.float32(offset)), np.full(SAMPLES, expected), atol=2e-6)
    if offset == 0:
        np.testing.assert_array_equal(jax.grad(lambda v: density(v).sum())(jnp.array(target)), np.zeros(SHAPE))


def test_awm_s_ratio_and_its_gradient():
    density = lambda v: awm_log_density(v, DATA, NOISE, TIME)
    by_hand = lambda v: per_sample(awm_by_hand, v, DATA, NOISE, TIME)
    check(lambda v: density_ratio(density(v), density(OLD)), lambda v: np.exp(by_hand(v) - by_hand(OLD)))
    of_old = jax.grad(lambda old: density_ratio(density(VELOCITY), density(old)).sum())(jnp.array(OLD))
    np.testing.assert_array_equal(of_old, np.zeros(SHAPE))


@pytest.mark.parametrize("name", ["awm", "vgrpo"])
def test_on_the_policy_the_ratio_is_one_and_the_clip_drops_nothing(name):
    densities = {
        "awm": lambda v: awm_log_density(v, DATA, NOISE, TIME),
        "vgrpo": lambda v: -vgrpo_error(v, LATENTS, DATA, TIME),
    }
    density = densities[name]

    def loss(v):
        ratio = density_ratio(density(v), density(v))
        samples = clipped_ratio_loss(ratio, jnp.array(ADVANTAGE), 6e-3)
        return samples.loss.sum(), (ratio, samples)

    grad, (ratio, samples) = jax.grad(loss, has_aux=True)(jnp.array(VELOCITY))
    np.testing.assert_array_equal(ratio, np.ones(SAMPLES))
    assert not (samples.cut_high | samples.cut_low).any()
    expected = jax.grad(lambda v: -(ADVANTAGE * density(v)).sum())(jnp.array(VELOCITY))
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


def test_velocity_penalty_equals_a_restatement_and_stops_the_reference():
    check(lambda v: velocity_penalty(v, OLD), lambda v: per_sample(penalty_by_hand, v, OLD))
    of_reference = jax.grad(lambda ref: velocity_penalty(VELOCITY, ref).sum())(jnp.array(OLD))
    np.testing.assert_array_equal(of_reference, np.zeros(SHAPE))


@pytest.mark.parametrize("eta", [3.0, 5.0])
def test_soft_clip(eta):
    expected = [[eta * math.tanh(a / eta) for a in row] for row in ADVANTAGE.tolist()]
    np.testing.assert_allclose(on_policy_soft_clip(ADVANTAGE, eta), expected, rtol=1e-5)
    far = on_policy_soft_clip(jnp.array([-1e4, -1e-3, 0.0, 1e-3, 1e4]), eta)
    np.testing.assert_allclose(far, [-eta, -1e-3, 0, 1e-3, eta], rtol=1e-5)


CALLS = {
    "noised": lambda v, data, time, _: noised(v, data, time),
    "nft_loss": lambda v, data, time, a: nft_loss(v, v + 1, v + 2, data, time, a, strength=0.1),
    "vgrpo_error": lambda v, data, time, _: vgrpo_error(v, v + 2, data, time),
    "awm_log_density": lambda v, data, time, _: awm_log_density(v, data, v + 2, time),
    "velocity_penalty": lambda v, data, time, _: velocity_penalty(v, data) * jnp.ones_like(time),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_mapped_and_plain_calls_agree(name):
    call, arguments = CALLS[name], [jnp.array(x) for x in (VELOCITY, DATA, TIME, ADVANTAGE)]
    plain = call(*arguments)
    assert plain.dtype == jnp.float32
    assert plain.shape == (SHAPE if name == "noised" else SAMPLES)
    chex.assert_trees_all_close(jax.jit(call)(*arguments), plain, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.vmap(jax.vmap(call))(*arguments), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["noised", "nft_loss", "vgrpo_error", "awm_log_density"])
def test_shapes_that_would_broadcast_are_refused(name):
    arguments = [VELOCITY, DATA, TIME, ADVANTAGE]
    for place, wrong in ((1, DATA[:1]), (2, TIME[:, :1])):
        with pytest.raises(AssertionError):
            CALLS[name](*arguments[:place], wrong, *arguments[place + 1 :])


def draws(sampler, num_draws=4000):
    """The grid's indices that `num_draws` keys draw, `[draws, count]`; every draw is exactly a time of the grid."""
    keys = jax.random.split(jax.random.key(0), num_draws)
    found = np.asarray(jax.jit(jax.vmap(sampler))(keys))
    grid = np.asarray(TIMES, np.float32)
    index = np.abs(found[..., None] - grid).argmin(-1)
    np.testing.assert_array_equal(found, grid[index])
    return index


def assert_uniform(drawn, members):
    """Each of `members` about as often as the others: within five standard deviations."""
    counts = np.array([(drawn == member).sum() for member in members])
    assert counts.sum() == len(drawn), "something else was drawn"
    chance = 1 / len(members)
    deviation = math.sqrt(len(drawn) * chance * (1 - chance))
    np.testing.assert_allclose(counts, len(drawn) * chance, atol=5 * deviation)


PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize(
    ("count", "noisiest", "strata"),
    [
        (6, 0.9, PAIRS),  # as published: int(14 * 0.9) = 12 of 14 steps
        (4, 0.7, [[0, 1], [2, 3], [4, 5], [6, 7, 8]]),  # int(9.8) = 9, cut at 2.25, 4.5, 6.75
        (1, 0.5, [list(range(7))]),
        (14, 1.0, [[i] for i in range(14)]),
    ],
)
def test_awm_s_times_come_one_from_each_stratum(count, noisiest, strata):
    drawn = draws(lambda key: stratified_times(key, TIMES[: int(14 * noisiest) + 1], count))
    for column, members in zip(drawn.T, strata, strict=True):
        assert_uniform(column, members)


def test_awm_s_strata_are_the_published_ones_without_pure_noise():
    """Cuts 1 + 11 j / 6, rounded down, from the second time of 14 to the twelfth."""
    cuts = np.linspace(1, 12, 7).astype(int)
    drawn = draws(lambda key: stratified_times(key, TIMES[1:13], 6))
    for column, low, high in zip(drawn.T, cuts[:-1], cuts[1:], strict=True):
        assert_uniform(column, range(low, high))


@pytest.mark.parametrize(
    ("count", "chunks"),
    [
        (2, [list(range(7)), list(range(7, 14))]),
        (7, [[2 * i, 2 * i + 1] for i in range(7)]),
        (4, [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]),
    ],
)
def test_vgrpo_s_times_come_one_from_each_chunk(count, chunks):
    drawn = draws(lambda key: stratified_times(key, TIMES, count))
    for column, members in zip(drawn.T, chunks, strict=True):
        assert_uniform(column, members)


def test_strata_are_drawn_independently():
    pairs = draws(lambda key: stratified_times(key, TIMES, 7)) % 2
    for first, second in itertools.combinations(pairs.T, 2):
        assert_uniform(2 * first + second, range(4))


@pytest.mark.parametrize("count", [1, 13, 14])
def test_nft_s_times_are_in_random_order_and_none_comes_twice(count):
    drawn = draws(lambda key: permuted_times(key, TIMES, count))
    assert drawn.shape[1] == count
    assert all(len(set(row)) == count for row in drawn.tolist())
    for column in drawn.T:
        assert_uniform(column, range(14))
    if count == 13:
        assert_uniform(sum(range(14)) - drawn.sum(1), range(14))  # the one left out


SAMPLERS = {
    "stratified": lambda key, count: stratified_times(key, TIMES, count),
    "of the noisiest": lambda key, count: stratified_times(key, TIMES[:13], count),
    "permuted": lambda key, count: permuted_times(key, TIMES, count),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_follow_from_the_key_and_compile(name):
    sampler, key = SAMPLERS[name], jax.random.key(7)
    found = sampler(key, 5)
    chex.assert_shape(found, (5,))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, jax.jit(lambda key: sampler(key, 5))(key))
    others = jax.vmap(lambda key: sampler(key, 5))(jax.random.split(key, 8))
    assert len(np.unique(others, axis=0)) > 1


@pytest.mark.parametrize(("name", "most"), [("stratified", 14), ("of the noisiest", 12), ("permuted", 14)])
def test_more_times_than_steps_are_refused(name, most):
    SAMPLERS[name](jax.random.key(0), most)
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"1 to {most} times, .*found {count}"):
            SAMPLERS[name](jax.random.key(0), count)
