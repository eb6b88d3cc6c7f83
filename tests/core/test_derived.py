"""The cache of private layouts: built once, rebuilt after a write, gone with the tensor, never saved."""

import copy
import gc
import pickle
import threading

import pytest
import torch

from halfbyte import derived as module
from halfbyte import drop_derived
from halfbyte.derived import derived, derived_bytes


class Build:
    """Counts how often it was called."""

    def __init__(self, value=None):
        self.times, self.value = 0, value

    def __call__(self):
        self.times += 1
        return torch.full((4,), float(self.times)) if self.value is None else self.value


def test_derived_is_built_once():
    tensor, build = torch.zeros(8), Build()

    first, second = derived(tensor, "k", build), derived(tensor, "k", build)

    assert build.times == 1
    assert first is second


def test_derived_lasts_while_only_a_view_of_the_tensor_lives():
    tensor, build = torch.zeros(8), Build()
    view = tensor[:]
    derived(view, "k", build)
    del tensor
    gc.collect()
    derived(view, "k", build)

    assert build.times == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda t: (t, "other key"),
        lambda t: (t[:8], "k"),
        lambda t: (t[8:], "k"),
        lambda t: (t.view(4, 4), "k"),
        lambda t: (t.view(torch.int32), "k"),
        lambda t: (t.view(4, 4).t(), "k"),
        lambda t: (t.clone(), "k"),
    ],
)
def test_derived_tells_keys_and_views_apart(other):
    tensor, build = torch.zeros(16), Build()
    derived(tensor, "k", build)
    if other(tensor)[0].ndim == 2:
        derived(tensor.view(4, 4), "square", build)

    before = build.times
    derived(*other(tensor), build)

    assert build.times == before + 1


def test_derived_tells_a_transposed_square_apart():
    square, build = torch.arange(16.0).view(4, 4), Build()

    derived(square, "k", build)
    derived(square.t(), "k", build)

    assert build.times == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: t[2:].zero_(),
        lambda t: t.copy_(torch.ones(8)),
        lambda t: t.view(2, 4).mul_(2),
    ],
)
def test_derived_is_rebuilt_after_a_write(write):
    tensor, build = torch.zeros(8), Build()
    derived(tensor, "k", build)

    write(tensor)

    assert derived(tensor, "k", build)[0] == 2
    assert derived(tensor, "k", build)[0] == 2


def test_derived_of_an_inference_tensor_is_built_once():
    with torch.inference_mode():
        tensor, build = torch.zeros(8), Build()
        derived(tensor, "k", build)
    derived(tensor, "k", build)

    assert build.times == 1


def test_derived_goes_with_its_tensor():
    gc.collect()
    before, tensor = len(module._cache), torch.zeros(8)
    derived(tensor, "k", Build())
    assert len(module._cache) == before + 1

    del tensor
    gc.collect()

    assert len(module._cache) == before


def test_drop_derived_of_a_tensor():
    tensor, build = torch.zeros(8), Build()
    derived(tensor, "a", build)
    derived(tensor, "b", build)

    assert drop_derived(tensor) == 2
    assert drop_derived(tensor) == 0
    derived(tensor, "a", build)
    assert build.times == 3


def test_drop_derived_of_a_module_reaches_parameters_and_buffers():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    tensors = [layer[0].weight, layer[0].bias, layer[1].running_mean]
    for tensor in tensors:
        derived(tensor, "k", Build())

    assert drop_derived(layer) == 3


def test_derived_bytes_counts_tensors():
    tensor = torch.zeros(8)

    assert derived_bytes(tensor) == 0
    derived(tensor, "a", Build())
    derived(tensor, "b", Build(value="not a tensor"))
    assert derived_bytes(tensor) == 16


def test_derived_is_neither_copied_nor_saved():
    layer, build = torch.nn.Linear(4, 4), Build()
    derived(layer.weight, "k", build)
    plain = torch.nn.Linear(4, 4)

    assert list(layer.state_dict()) == list(plain.state_dict())
    assert len(pickle.dumps(layer)) == len(pickle.dumps(plain))
    derived(copy.deepcopy(layer).weight, "k", build)
    assert build.times == 2


def test_derived_that_fails_leaves_nothing():
    tensor, build = torch.zeros(8), Build()

    with pytest.raises(ZeroDivisionError):
        derived(tensor, "k", lambda: 1 / 0)

    assert derived(tensor, "k", build)[0] == 1


def test_derived_is_built_once_by_many_threads():
    tensor, build, seen = torch.zeros(8), Build(), []
    threads = [threading.Thread(target=lambda: seen.append(derived(tensor, "k", build))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert build.times == 1
    assert len({id(value) for value in seen}) == 1
