"""Every instruction-set level of the CPU backend agrees bit for bit with the references: the optimizer updates."""

import functools

import pytest
import torch
from levels import DTYPES, for_each_level, on_offset, same

from halfbyte.ops import optimizer, rules
from halfbyte.testing import samples_optimizer
from halfbyte.testing.cases import to_device
from halfbyte.testing.draw import Draw

SIZES = ((5000, 1, 300), (513,), (16385, 64))
FACTS = {"update_32bit": optimizer.Facts, "update_8bit": optimizer.Facts8bit}


def situations(op):
    for dtype in DTYPES:
        for name in rules.RULES:
            for trust in (False, True):
                for stochastic in (False, True):
                    block = {"blocksize": 100 if trust else 256} if op == "update_8bit" else {}
                    facts = FACTS[op](torch.device("cpu"), dtype, name, **block, trust=trust, stochastic=stochastic)
                    if samples_optimizer.possible(facts):
                        yield facts


def equals_the_reference(kernel, reference, facts, make):
    for size in SIZES:
        for values in ("normal", "nan"):
            args = make(facts, size, Draw(f"{facts} {size}", values))
            found, expected = (to_device(args, torch.device("cpu")) for _ in range(2))
            found = [copied(one, on_offset if len(size) == 1 else torch.clone) for one in found]
            expected = [copied(one, torch.clone) for one in expected]
            for step in (1, 2):  # the second from states that the first left
                found[-12] = expected[-12] = torch.tensor(step)
                kernel(*found)
                reference(*expected)
            for got, want in zip(found, expected):
                if isinstance(got, list):
                    for one, other in zip(got, want):
                        if isinstance(one, torch.Tensor):
                            same(one, other)


def copied(value, copy):
    if isinstance(value, list):
        return [copied(one, copy) for one in value]
    return copy(value) if isinstance(value, torch.Tensor) and value.ndim else value


@for_each_level("update_32bit")
@pytest.mark.parametrize("name", rules.RULES)
def test_update_32bit_equals_the_reference(kernel, name):
    for facts in situations("update_32bit"):
        if facts.optimizer == name:
            equals_the_reference(kernel, optimizer.update_32bit, facts, samples_optimizer.make_32bit)


@for_each_level("update_8bit")
@pytest.mark.parametrize("name", rules.RULES)
def test_update_8bit_equals_the_reference(kernel, name):
    for facts in situations("update_8bit"):
        if facts.optimizer == name:
            equals_the_reference(kernel, optimizer.update_8bit, facts, samples_optimizer.make_8bit)


@for_each_level("update_8bit")
def test_update_8bit_takes_codebooks_in_turn(kernel):
    """The table of a codebook is kept: another one in the same place must not be taken for it."""
    facts = FACTS["update_8bit"](torch.device("cpu"), torch.float32, "adam", 256, False, False)
    make = functools.partial(samples_optimizer.make_8bit, facts, (20000,))
    for scale in (1.0, 0.5, 1.0):
        found, expected = list(make(Draw("a"))), list(make(Draw("a")))
        for args in (found, expected):
            args[5] *= scale
        kernel(*found)
        optimizer.update_8bit(*expected)
        for place in (1, 3, 4):
            same(found[place][0], expected[place][0])
