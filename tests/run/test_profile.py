"""Profiles of iterations, with the method's steps by name."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.run.profile import Profiler, Window


@pytest.mark.parametrize("text", ["", "3", "0:4", "5:4", "a:b", "-1:2", "1:2:3", "1.5:2", "1:9999999999"])
def test_what_is_no_window(text):
    with pytest.raises(UserError, match=r"^--profile: found .*, expected the first and the last of some iterations"):
        Window.parse(text)


@pytest.mark.parametrize(("text", "done", "total"), [("3:5", 3, 9), ("3:5", 0, 4)])
def test_iterations_that_do_not_come(text, done, total):
    with pytest.raises(UserError, match=f"found {text}, expected iterations from {done + 1} to {total}"):
        Window.parse(text).check(done, total)


def test_a_window_that_comes():
    Window.parse("3:5").check(2, 5)


def events(folder):
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "name" in event}


def iterate(profiler, numbers):
    for number in numbers:
        with profiler.iteration(number), jax.profiler.TraceAnnotation(f"work {number}"):
            jnp.ones(3).block_until_ready()


def test_the_iterations_of_a_window_are_recorded_and_no_others(tmp_path):
    profiler = Profiler(Window(2, 3), tmp_path)
    iterate(profiler, [1, 2, 3, 4])
    profiler.close()
    assert {name for name in events(tmp_path) if name.startswith("work")} == {"work 2", "work 3"}


def test_a_window_that_is_broken_off_is_written(tmp_path):
    profiler = Profiler(Window(2, 9), tmp_path)
    iterate(profiler, [1, 2])
    assert not list(tmp_path.iterdir())
    profiler.close()
    assert "work 2" in events(tmp_path)


def test_without_a_window_nothing_is_written(tmp_path):
    profiler = Profiler(None, tmp_path)
    iterate(profiler, [1, 2])
    profiler.close()
    assert not list(tmp_path.iterdir())
