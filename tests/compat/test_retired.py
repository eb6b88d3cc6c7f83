"""The products and changes that bitsandbytes has deprecated, against torch: its own run on GPUs alone."""

import pytest
import torch

from halfbyte.compat.bitsandbytes import functional as F
from halfbyte.compat.bitsandbytes.autograd._functions import GlobalOutlierPooler


def int8(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact(left, right):
    return (left.long() @ right.long()).int()


@pytest.fixture
def deprecated():
    with pytest.warns(FutureWarning, match="bitsandbytes deprecates"):
        yield


@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dims", [(2, 2), (3, 2), (3, 3)])
def test_igemm_is_the_exact_product(dims, turned):
    left, right = int8(*(2, 5, 17)[3 - dims[0] :]), int8(*(2, 17, 3)[3 - dims[1] :], seed=1)
    given = [x.mT.contiguous() if turn else x for x, turn in zip((left, right), turned)]

    y = F.igemm(*given, transposed_A=turned[0], transposed_B=turned[1])

    assert y.dtype == torch.int32
    assert torch.equal(y, exact(left, right))


@pytest.mark.usefixtures("deprecated")
def test_igemm_takes_views_and_an_out():
    left, right, out = int8(17, 5).t(), int8(3, 17, seed=1).t(), torch.zeros(5, 3, dtype=torch.int32)

    assert F.igemm(left, right, out) is out
    assert torch.equal(out, exact(left, right))


@pytest.mark.usefixtures("deprecated")
def test_igemm_contracts_batch_and_rows_for_an_out_of_two_dimensions():
    x, grad, out = int8(2, 7, 5), int8(2, 7, 3, seed=1), torch.zeros(5, 3, dtype=torch.int32)

    F.igemm(x, grad, out)

    assert torch.equal(out, sum(exact(one.t(), other) for one, other in zip(x, grad)))


@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_batched_igemm_is_the_exact_product(turned):
    left, right = int8(4, 5, 17), int8(4, 17, 3, seed=1)
    given = [x.mT.contiguous() if turn else x for x, turn in zip((left, right), turned)]

    assert torch.equal(F.batched_igemm(*given, None, *turned), exact(left, right))
    assert F.batched_igemm(left[:0], right[:0]).shape == (0, 5, 3)


@pytest.mark.usefixtures("deprecated")
def test_batched_igemm_refuses_matrices():
    with pytest.raises(ValueError, match=r"needs 3 dimensions; got \(5, 17\)"):
        F.batched_igemm(int8(5, 17), int8(17, 3))


@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize(
    ("shapes", "error", "said"),
    [
        (((5, 17), (16, 3)), ValueError, r"got \(5, 17\) and \(16, 3\)"),
        (((2, 5, 17), (3, 17, 3)), ValueError, "must fit"),
        (((17,), (17, 3)), ValueError, "dimensions"),
        (((5, 17), (2, 17, 3)), ValueError, "dimensions"),
    ],
)
def test_factors_that_do_not_fit_are_refused(shapes, error, said):
    left, right = (int8(*shape) for shape in shapes)
    for function in (F.igemm, lambda *factors: F.check_matmul(*factors, None, False, False)):
        with pytest.raises(error, match=said):
            function(left, right)


@pytest.mark.usefixtures("deprecated")
def test_check_matmul_gives_the_shape_and_asks_for_the_element_type():
    assert F.check_matmul(int8(2, 17, 5), int8(3, 17), None, True, True) == (2, 5, 3)
    assert F.check_matmul(torch.ones(2, 4), torch.ones(4, 3), None, False, False, torch.float32) == (2, 3)
    with pytest.raises(TypeError, match=r"must be torch\.int8; got torch\.float32"):
        F.check_matmul(torch.ones(2, 4), int8(4, 3), None, False, False)
    with pytest.raises(ValueError, match=r"out must be \(2, 3\); got \(3, 2\)"):
        F.check_matmul(int8(2, 4), int8(4, 3), torch.empty(3, 2), False, False)


def test_elementwise_func_fills_numbers_and_multiplies():
    x = torch.empty(2, 3)
    F.elementwise_func("fill", x, None, 2.5)
    assert torch.equal(x, torch.full((2, 3), 2.5))
    F.elementwise_func("arange", x, None, 0)
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3))
    F.elementwise_func("_mul", x, x.clone(), 0)
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3) ** 2)
    codes = torch.zeros(4, dtype=torch.uint8)
    F.elementwise_func("fill", codes, None, 7)
    assert codes.tolist() == [7] * 4


def test_elementwise_func_says_what_it_has_for_the_element_type():
    with pytest.raises(NotImplementedError, match=r"fill for torch\.uint8: 'arange'"):
        F.elementwise_func("arange", torch.zeros(4, dtype=torch.uint8), None, 0)
    with pytest.raises(NotImplementedError, match=r"nothing for torch\.int32: 'fill'"):
        F.elementwise_func("fill", torch.zeros(4, dtype=torch.int32), None, 0)


@pytest.mark.parametrize("multiple", [False, True])
def test_pooler_keeps_the_columns_of_the_first_width(multiple, monkeypatch):
    monkeypatch.setattr(GlobalOutlierPooler, "_instance", None)
    pooler = GlobalOutlierPooler.get_instance()

    pooler.add_outliers(torch.tensor([5, 2]), 64)
    pooler.add_outliers(torch.tensor([2, 9]), 64 if multiple else 256)

    assert GlobalOutlierPooler.get_instance() is pooler
    assert pooler.get_current_outlier_idx().tolist() == ([2, 5, 9] if multiple else [2, 5])
    assert pooler.get_current_outlier_idx().dtype == torch.int64
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
