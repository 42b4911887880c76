"""Every algorithm on a flow model of points in the plane, where one sees what it does.

    python -m examples.points --out points.png

In under a minute on 2 CPU cores, most of which is compiling, this

1. trains a small network by flow matching until it turns noise into eight clusters on a ring: the base model;
2. tunes it by each algorithm of the package, for a reward that is highest at the uppermost cluster;
3. prints the mean reward before and after, and draws the points of each model and the random steps it learnt from.

It is a whole training run but for files, devices and prompts, and can be read from top to bottom; `make_iteration` is
its heart. Latents are `[B, N, D]`, as those of images: a point is one token of two channels. Time runs from 1, noise,
to 0, data. There is one prompt, so nothing to condition on. Only the model, the reward and the picture are made here:
plans, rollouts, advantages, losses and updates are the package's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from egrpo_jax import cli, rl
from egrpo_jax.figures.plots import new_figure, save_figure
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.solver import Euler, solve
from egrpo_jax.rl.algorithms.base import ALGORITHMS
from egrpo_jax.rl.deal import deal_states
from egrpo_jax.rl.rollout import walk_anchors
from egrpo_jax.rl.update import policy_gradient, score_batch, take_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "PNG file to write.", required=True, flag_values=FLAGS)

SHAPE = (1, 2)
"""(N, D) of the latents."""
RADIUS, CLUSTERS, SPREAD = 2.0, 8, 0.15
TARGET, REACH = (0.0, RADIUS), 1.5
"""Where the reward is highest, and how far from there it is felt."""

SETTINGS: dict[str, Any] = {"num_steps": 10, "shift": 1.0, "group_size": 8}
"""Of all algorithms; for the rest, each has its own defaults."""
MORE_SETTINGS: dict[str, dict[str, Any]] = {
    "g2rpo": {"active": 5},
    "mix_grpo": {"move_every": 5},
    "ada_grpo": {"candidates": 4},
    "branch_grpo": {"splits": (0, 2, 4)},
}
"""Where the defaults do not suit so few steps, samples and iterations."""
ITERATIONS, PROMPTS = 30, 16
LEARNER = rl.LearnerConfig()
OPTIMIZER = rl.make_optimizer(rl.OptimConfig(learning_rate=1e-3))
CAPTION = "dots: points of a model; shades: the reward; lines: random steps that train, in one rollout of the base"


class Network(nn.Module):
    """The velocity, noise - data, of points `[B, 1, 2]` at times `[B]`."""

    @nn.compact
    def __call__(self, latents: chex.Array, time: chex.Array, conditioning: tuple[()]) -> chex.Array:
        """`[B, 1, 2]`."""
        del conditioning
        x = jnp.concatenate([latents, jnp.broadcast_to(time[:, None, None], (len(latents), 1, 1))], axis=-1)
        for _ in range(3):
            x = nn.silu(nn.Dense(64)(x))
        return nn.Dense(SHAPE[-1])(x)


velocity = Network().apply
"""`(params, latents, time, conditioning) -> velocity`: all that the package needs to know of a model."""


def reward(latents: chex.Array) -> chex.Array:
    """Nearness of points `[..., 1, 2]` to the target: 1 there, 0 far away."""
    distance = jnp.linalg.norm(latents[..., 0, :] - jnp.array(TARGET), axis=-1)
    return jnp.exp(-0.5 * (distance / REACH) ** 2)


def draw_data(key: chex.PRNGKey, count: int) -> chex.Array:
    """Points of the clusters, `[count, 1, 2]`."""
    which, noise = jax.random.split(key)
    angle = jax.random.randint(which, (count, 1), 0, CLUSTERS) * (2 * jnp.pi / CLUSTERS)
    centre = RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return centre + SPREAD * jax.random.normal(noise, centre.shape)


def flow_matching_loss(params: Any, key: chex.PRNGKey, batch: int = 512) -> chex.Array:
    """The squared error of the velocity, at points between data and noise."""
    data_key, noise_key, time_key = jax.random.split(key, 3)
    data, time = draw_data(data_key, batch), jax.random.uniform(time_key, (batch,))
    noise, level = jax.random.normal(noise_key, data.shape), time[:, None, None]
    predicted = velocity(params, (1 - level) * data + level * noise, time, ())
    return jnp.square(predicted - (noise - data)).mean()


@jax.jit
def pretrain(key: chex.PRNGKey) -> Any:
    """The parameters of the base model."""
    keys = jax.random.split(key, 3000)
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, len(keys)))

    def step(carry: tuple[Any, Any], key: chex.PRNGKey) -> tuple[tuple[Any, Any], None]:
        params, moments = carry
        updates, moments = optimizer.update(jax.grad(flow_matching_loss)(params, key), moments)
        return (optax.apply_updates(params, updates), moments), None

    params = Network().init(key, jnp.zeros((1, *SHAPE)), jnp.zeros(1), ())
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


@jax.jit
def sample(params: Any) -> chex.Array:
    """A model's points by the deterministic flow, always from the same noise: `[1000, 1, 2]`."""
    noise = jax.random.normal(jax.random.key(1), (1000, *SHAPE))
    return solve(Euler(), velocity, params, noise, shifted_times(SETTINGS["num_steps"], SETTINGS["shift"]), ())


def mean_reward(params: Any) -> float:
    """The mean over `sample`."""
    return float(reward(sample(params)).mean())


def make_iteration(plan: rl.Plan) -> Callable[[rl.TrainState, Any, chex.PRNGKey], tuple[rl.TrainState, rl.Rollout]]:
    """An iteration by plans of this one's shape, compiled: `(state, schedule, key)` to the new state and a rollout."""
    rollouts = PROMPTS * plan.seeds
    candidates = rollouts * plan.candidates
    deal = plan.deal(rollouts, workers=1, slots=None)
    groups = (rollouts, len(plan.groups), len(plan.tail_solvers), plan.group_size)

    def iteration(state: rl.TrainState, schedule: Any, key: chex.PRNGKey) -> tuple[rl.TrainState, rl.Rollout]:
        given, keys = choose(plan, state.params, rl.prompt_keys(key, 0, candidates))
        rollout = plan.roll_out(velocity, state.params, deal, schedule, given, keys, SHAPE)
        scores = reward(rollout.latents)[np.argsort(deal.sample)].reshape(groups)
        normalise = lambda rewards, came: rl.credit(rewards, came, weights={"nearness": 1.0})
        advantage = plan.credit(normalise, {"nearness": scores}, jnp.ones(groups, bool))
        return update(plan, state, rollout, advantage), rollout

    # Compiling takes far longer than running does, so on the CPU, where it can be told so, XLA need not try hard.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(iteration, compiler_options=options)


def choose(plan: rl.Plan, params: Any, keys: chex.PRNGKey) -> tuple[Any, chex.PRNGKey]:
    """Conditioning and keys of the rollouts: of all, or of those of each so many whose anchors' rewards are usual."""
    if not isinstance(plan, rl.AnchorPlan) or plan.candidates == 1:
        return (), keys
    anchors, ends = walk_anchors(velocity, params, plan, (), keys, SHAPE)
    rewards = reward(ends).reshape(-1, plan.candidates)
    rows = jnp.abs(rewards - rewards.mean()).argmin(1) + plan.candidates * jnp.arange(len(rewards))
    return ((), jax.tree.map(lambda x: x[rows], anchors)), keys[rows]


def update(plan: rl.Plan, state: rl.TrainState, rollout: rl.Rollout, advantage: chex.Array) -> rl.TrainState:
    """The state after an update by what the rollout has to learn from."""
    model = (velocity, plan.objective(LEARNER))
    score = lambda params, batch: score_batch(*model, params, (), batch)
    gradient = lambda params, batches: policy_gradient(*model, params, (), batches)
    transitions = plan.prune(rollout.transitions, advantage)
    parts = zip(transitions, plan.blocks, plan.shares, strict=True)
    weights = plan.step_weights(LEARNER.step_weights)
    batches = tuple(
        take_batch(block, advantage, weights, deal_states(len(advantage), size.states, workers=1, share=share))
        for block, size, share in parts
    )
    return rl.update_policy(score, gradient, OPTIMIZER, LEARNER, state, batches)[0]


class Result(NamedTuple):
    """A model, and how it was tuned.

    Attributes:
      points: of `sample`, `[1000, 2]`.
      rewards: their mean after 0, 1, 2, ... iterations.
      steps: start and end of each random step of one rollout of the base model, `[S, 2, 2]`.
      passes: of the model, forward, in an iteration's rollouts.
    """

    points: np.ndarray
    rewards: list[float]
    steps: np.ndarray
    passes: int


def tune(name: str, base: Any, bar: tqdm) -> Result:
    """The model that `base` becomes by the algorithm `name`."""
    config = rl.Algorithm.variant({"algorithm": name})(**SETTINGS | MORE_SETTINGS.get(name, {}))
    iteration, key = make_iteration(plan := config.make_plan()), jax.random.key(2)
    state, rewards, rollouts = rl.init_state(base, OPTIMIZER, LEARNER), [mean_reward(base)], []
    for index in range(ITERATIONS):
        schedule = config.make_plan(index).schedule()  # which steps are random may change as training goes on
        state, rollout = iteration(state, schedule, jax.random.fold_in(key, index))
        rewards.append(mean_reward(state.params))
        rollouts.append(rollout)
        bar.update()
    points = np.asarray(sample(state.params))[:, 0]
    return Result(points, rewards, random_steps(rollouts[0]), PROMPTS * plan.rollout_passes)


def random_steps(rollout: rl.Rollout) -> np.ndarray:
    """Start and end of those of the first prompt, `[S, 2, 2]`; some algorithms have none."""
    found = [np.empty((0, 2, 2))]
    for block in rollout.transitions:
        if not isinstance(block, rl.Transitions):
            continue
        ends = np.asarray(block.next_latents)[0]  # [M, S, 1, 2], from M states
        starts = np.broadcast_to(np.asarray(block.latents)[0, :, None], ends.shape)
        found.append(np.concatenate([starts, ends], axis=2).reshape(-1, 2, 2))
    return np.concatenate(found)


def draw(base: Result, tuned: Mapping[str, Result], path: str, columns: int = 5) -> None:
    """A panel for each model's points, the base model's first, and one for all curves."""
    rows = -(-(len(tuned) + 2) // columns)
    figure = new_figure(2.8 * columns, 3 * rows + 0.3)
    first, *others, last = (figure.add_subplot(rows, columns, 1 + index) for index in range(len(tuned) + 2))
    draw_points(first, "base", base, "black")
    for index, (axes, (name, result)) in enumerate(zip(others, tuned.items(), strict=True)):
        draw_points(axes, name, result, f"C{index}")
        last.plot(result.rewards, "-" if index < 10 else "--", label=name, color=f"C{index}")  # there are ten colours
    last.set(title="mean reward by iteration", ylim=(0, 1), box_aspect=1)
    last.legend(fontsize=6.5, loc="lower center", ncols=2, labelspacing=0.1, borderpad=0.2)
    figure.supxlabel(CAPTION, fontsize=10)
    save_figure(figure, path)


def draw_points(axes: Axes, name: str, result: Result, colour: str) -> None:
    """Points and random steps, over shades of the reward."""
    plane = np.stack(np.meshgrid(ticks := np.linspace(-4, 4, 81), ticks), axis=-1)
    axes.contourf(ticks, ticks, reward(plane[..., None, :]), levels=8, cmap="Greys", alpha=0.35)
    axes.plot(*result.points.T, ".", markersize=2.5, alpha=0.5, color=colour)
    axes.plot(*result.steps.transpose(2, 1, 0), color="black", linewidth=0.6, alpha=0.7)
    change = " → ".join(f"{value:.2f}" for value in result.rewards[::ITERATIONS])  # the first and the last
    axes.set(title=f"{name}  {change}", aspect="equal", xlim=(-3.2, 3.2), ylim=(-2.9, 3.5))


def main() -> None:
    """Trains, tunes, prints and draws."""
    params, tuned = pretrain(jax.random.key(0)), {}
    base = Result(np.asarray(sample(params))[:, 0], [mean_reward(params)], np.empty((0, 2, 2)), 0)
    with tqdm(total=len(ALGORITHMS) * ITERATIONS, unit="it") as bar:
        for name in ALGORITHMS:
            bar.set_description(name)
            tuned[name] = tune(name, params, bar)
    print("algorithm       reward before  after  forward passes of an iteration's rollouts")
    for name, (_, rewards, _, passes) in tuned.items():
        print(f"{name:15}  {rewards[0]:12.3f}  {rewards[-1]:5.3f}  {passes:6}")
    draw(base, tuned, OUT.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
