"""Signals."""

import os
import signal

import pytest

from egrpo_jax.run.preemption import PreemptionGuard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_preemption_sets_a_flag(number):
    before = signal.getsignal(number)
    with PreemptionGuard() as guard:
        assert guard.requested is None
        os.kill(os.getpid(), number)
        assert guard.requested == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
