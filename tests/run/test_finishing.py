"""What is done at an end does not hide why it came."""

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.run.finishing import finishing


def fails():
    raise UserError("the disk is full")


def test_it_is_done_however_the_block_ends():
    done = []
    with finishing(lambda: done.append("well")):
        pass
    with pytest.raises(KeyboardInterrupt), finishing(lambda: done.append("interrupted")):
        raise KeyboardInterrupt
    assert done == ["well", "interrupted"]


def test_the_first_error_is_the_one_that_is_told():
    with pytest.raises(UserError, match="the disk is full"), finishing(fails):
        pass
    with pytest.raises(ValueError, match="first") as caught, finishing(fails), finishing(fails):
        raise ValueError("first")
    assert str(caught.value) == "first"
    assert caught.value.__notes__ == ["then: the disk is full"] * 2
