"""Rewards as people write them: right, odd and wrong."""
# ruff: noqa: ARG001, ARG002, ARG005  # a reward takes images and prompts, whether it needs them or not

import numpy as np


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def python_list(images, prompts):
    return [float(x) for x in images.mean((1, 2, 3))]


def numpy_list(images, prompts):
    return list(np.asarray(images.mean((1, 2, 3))))


def column(images, prompts):
    return np.asarray(images.mean((1, 2, 3)))[:, None]


def float64(images, prompts):
    return np.asarray(images, np.float64).mean((1, 2, 3))


def bfloat16(images, prompts):
    return np.asarray(images.mean((1, 2, 3))).astype("bfloat16")


def ints(images, prompts):
    return np.arange(len(prompts))


def bools(images, prompts):
    return images.mean((1, 2, 3)) > 0.5


class Tensor:
    """A tensor of PyTorch that requires a gradient: NumPy cannot read it."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, "torch.float32"

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def __float__(self):
        raise RuntimeError("a Tensor is not asked this way")

    def detach(self):
        return self

    def tolist(self):
        return self.values.tolist()


def torch(images, prompts):
    return Tensor(np.asarray(images.mean((1, 2, 3))))


def torch_list(images, prompts):
    return [Tensor(value) for value in np.asarray(images.mean((1, 2, 3)))]


def background(images, prompts):
    raise AssertionError("start is there")


background.start = lambda images, prompts: lambda: images.mean((1, 2, 3))


class Made:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def nan_always(images, prompts):
    return np.full(len(prompts), np.nan, np.float32)


def inf_some(images, prompts):
    scores = np.array(images.mean((1, 2, 3)), np.float32)
    scores[::3] = np.inf
    return scores


def none_some(images, prompts):
    return [None if i % 3 == 0 else x for i, x in enumerate(images.mean((1, 2, 3)).tolist())]


def huge(images, prompts):
    return np.where(np.arange(len(prompts)) % 3 == 0, -1e39, np.asarray(images.mean((1, 2, 3)), np.float64))


def no_square(images, prompts):
    """1e38 is finite in float32, its square is not: a spread of such would be infinite, and every advantage 0."""
    return np.where(np.arange(len(prompts)) % 3 == 0, 1e38, np.asarray(images.mean((1, 2, 3))))


def scalar(images, prompts):
    return float(np.mean(np.asarray(images)))


def short(images, prompts):
    return np.asarray(images.mean((1, 2, 3)))[:-1]


def short_list(images, prompts):
    return [0.5]


def row(images, prompts):
    return np.asarray(images.mean((1, 2, 3)))[None]


def ragged(images, prompts):
    return [[0.5], [0.5, 0.5]]


def none(images, prompts):
    return None


def strings(images, prompts):
    return ["a"] * len(prompts)


def objects(images, prompts):
    return np.array([object()] * len(prompts))


def complex_numbers(images, prompts):
    return np.full(len(prompts), 1j)


def mapping(images, prompts):
    return {"scores": [0.5, 0.5]}


def lazy(images, prompts):
    return (value for value in (0.5, 0.5))


def raises(images, prompts):
    raise RuntimeError("boom\nover two lines")


def raises_in_numpy(images, prompts):
    return np.reshape(np.asarray(images), 7)


def raises_waiting(images, prompts):
    raise AssertionError("start is there")


def _wait():
    raise OSError("gone")


raises_waiting.start = lambda images, prompts: _wait


def numpy_only(images, prompts):
    if not isinstance(images, np.ndarray):  # as torch.from_numpy
        raise TypeError(f"expected np.ndarray (got {type(images).__name__})")
    return images.mean((1, 2, 3))


def keyint(images, prompts):
    raise KeyboardInterrupt


def one_arg(images):
    return images.mean((1, 2, 3))


class NeedsArgs:
    def __init__(self, x):
        pass

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class Boom:
    def __init__(self):
        raise FileNotFoundError("model.bin")

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class NotAReward:
    pass


not_callable = 3


def silent(images, prompts):
    return np.full(len(prompts), np.nan, np.float32)
