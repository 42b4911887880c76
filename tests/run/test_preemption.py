"""Signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from egrpo_jax.run.preemption import PreemptionGuard
from tests.programs import ROOT

HELD = """
import functools, operator, signal, time
from egrpo_jax.run import preemption
preemption.GRACE = 0.1
with preemption.PreemptionGuard():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    # As if XLA compiled: no instruction of Python between the two.
    list(map(operator.call, [functools.partial(print, flush=True), functools.partial(time.sleep, 60)]))
"""


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def wait_for(condition):
    while not condition():
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "saving after this iteration\n"),
        (signal.SIGINT, "saving after this iteration; once more to stop at once\n"),
    ],
)
def test_while_iterating_the_first_signal_sets_a_flag_and_says_so(number, line, capsys):
    with PreemptionGuard() as guard, guard.iterating():
        assert guard.requested is None
        os.kill(os.getpid(), number)
        wait_for(lambda: guard.requested == number)
    assert capsys.readouterr().err == line


def test_a_second_interrupt_stops_at_once():
    with PreemptionGuard() as guard, guard.iterating():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: guard.requested == signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_before_and_after_the_iterations_an_interrupt_stops_at_once():
    with PreemptionGuard(), pytest.raises(KeyboardInterrupt):
        interrupt()
    with PreemptionGuard() as guard:
        with guard.iterating():
            pass
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        assert guard.requested is None


def test_before_the_iterations_sigterm_ends_the_process_with_a_line(capfd):
    with pytest.raises(SystemExit) as end, PreemptionGuard():
        terminate()
    assert end.value.code == 143
    assert "terminated\n" in capfd.readouterr().err  # threads of other tests may write there, too


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize(("number", "line"), [(signal.SIGTERM, "terminated\n"), (signal.SIGINT, "interrupted\n")])
def test_a_main_thread_that_does_not_hear_it_is_not_waited_for(number, line):
    process = subprocess.Popen(
        [sys.executable, "-c", HELD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == line
    assert process.returncode == 128 + number


IN_A_CALLBACK = """
import gc, signal, time
from egrpo_jax.run import preemption
def collecting(phase, details):
    if phase == "start":
        signal.raise_signal(signal.{name})
        time.sleep(60)
with preemption.PreemptionGuard():
    gc.callbacks.append(collecting)
    gc.collect()
    gc.callbacks.clear()
    try:
        time.sleep(60)
    finally:
        print("tidied up")
"""


@pytest.mark.parametrize(("name", "line"), [("SIGTERM", "terminated\n"), ("SIGINT", "KeyboardInterrupt\n")])
def test_where_python_drops_exceptions_the_signal_is_raised_once_more(name, line):
    program = IN_A_CALLBACK.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "tidied up\n"
    assert "ignored" not in done.stderr
    assert done.stderr.endswith(line)
