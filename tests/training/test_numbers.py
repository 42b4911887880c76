"""Numbers of an iteration that no CPU has."""

from types import SimpleNamespace

import jax
import pytest

from egrpo_jax.training import numbers


def test_each_phase_has_its_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(numbers, "peak_flops", lambda _: 100.0)
    job = SimpleNamespace(
        config=SimpleNamespace(prompts_per_iteration=2, learner=SimpleNamespace(epochs=1, is_scored=lambda _: False)),
        pipeline=SimpleNamespace(forward_flops=3.0, decode_flops=None),
    )
    plan = SimpleNamespace(rollout_passes=10, images=4, branches=(0, 1), update_equivalents=lambda *_: 6)
    seconds = {"seconds/rollout": 2.0, "seconds/update": 0.5, "seconds/iteration": 4.0}
    found = numbers.speed_numbers(job, plan, SimpleNamespace(take=lambda: seconds), [0.5, 0.25])
    most = 100.0 * jax.device_count()
    assert found["mfu/rollout"] == pytest.approx(2 * 10 * 3 / (2.0 * most))
    assert found["mfu/update"] == pytest.approx(2 * 6 * 3 / (0.5 * most))
    assert "mfu/decode" not in found
    assert (found["compilations"], found["seconds/compile"], found["images_per_second"]) == (2, 0.75, 2.0)
