"""torch.ops.bitsandbytes.*: the schemas of the real ones, opcheck, and refusal where they are taken."""

import pytest
import torch

from halfbyte.compat.bitsandbytes import functional as F
from halfbyte.compat.bitsandbytes import ops


@pytest.fixture(scope="module", autouse=True)
def defined():
    if not ops._libraries and any(
        name.startswith("bitsandbytes::") for name in torch._C._dispatch_get_all_op_names()
    ):  # pragma: no cover
        pytest.skip("something in this process has imported the real bitsandbytes")
    ops.define()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def packed(nested=False, quant_type="nf4"):
    return F.quantize_4bit(randn(48, 64), quant_type=quant_type, compress_statistics=nested)


def cases():
    codes, plain = packed()
    _, state = packed(nested=True)
    signed, unsigned = F.create_dynamic_map(), F.create_dynamic_map(False)
    x, bytes_ = randn(3, 64), torch.arange(256, dtype=torch.uint8)
    weight = (codes, [48, 64])
    nested = (state.state2.absmax, 64, "nf4", randn(48), state.absmax, state.state2.code, state.offset)
    rows, row_stats, _ = F.int8_vectorwise_quant(x)
    cb, scb, _ = F.int8_vectorwise_quant(randn(24, 64, seed=1))
    update32 = (0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.01, 1, 1e-3, 1.0)
    update8 = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-3, signed, unsigned, torch.zeros(2), torch.zeros(2), 0.0, 1.0)
    states = [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]
    yield "quantize_4bit.default", (randn(7, 33), 64, "nf4", torch.uint8)
    yield "dequantize_4bit.default", (codes, plain.absmax, 64, "nf4", [48, 64], torch.float16)
    yield "dequantize_4bit.out", (codes, plain.absmax, 64, "nf4", [48, 64], torch.float16, torch.empty(48, 64).half())
    yield "gemm_4bit.default", (x, *weight, plain.absmax, 64, "nf4")
    yield "gemm_4bit.default", (x, *weight, *nested)
    yield "gemm_4bit.default", (randn(2, 3, 64).requires_grad_(), *weight, *nested)
    yield "gemv_4bit.default", (randn(1, 1, 64), *weight, plain.absmax, plain.code, 64)
    yield "gemv_4bit.out", (randn(1, 1, 64), *weight, plain.absmax, plain.code.clone(), 64, torch.empty(1, 1, 48))
    yield "quantize_blockwise.default", (randn(5, 77), signed, 64)
    yield "dequantize_blockwise.default", (bytes_, torch.ones(4), signed, 64, torch.bfloat16)
    yield "dequantize_blockwise.out", (bytes_, torch.ones(4), signed, 64, torch.float32, torch.empty(256))
    yield "int8_vectorwise_quant.default", (x,)
    yield "int8_vectorwise_quant.default", (x, 1.5)
    yield "int8_vectorwise_dequant.default", (rows, row_stats)
    yield "int8_double_quant.default", (x,)
    yield "int8_double_quant.default", (x, 1.5)
    yield "int8_linear_matmul.default", (int8(2, 3, 64), int8(24, 64))
    yield "int8_linear_matmul.out", (int8(3, 64), int8(24, 64), torch.empty(3, 24, dtype=torch.int32))
    yield "int8_mm_dequant.default", (F.int8_linear_matmul(rows, cb), row_stats, scb)
    yield "int8_scaled_mm.default", (rows, cb, row_stats, scb, randn(24), torch.float32)
    yield "int8_mixed_scaled_mm.default", (x, rows, cb, row_stats, scb)
    yield "int8_mixed_scaled_mm.default", (x, rows, cb, row_stats, scb, torch.tensor([1, 5]), randn(24))
    tensors = [randn(300, seed=seed) for seed in range(2)]
    yield "optimizer_update_32bit.default", ("adam", *tensors, torch.zeros(300), torch.zeros(300), None, *update32)
    yield "optimizer_update_8bit_blockwise.default", ("adam", *tensors, *states, *update8)


CASES = list(cases())


def op(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, packet), overload)


def test_schemas_are_those_of_bitsandbytes(oracle):
    def plain(schema):
        return schema.replace("$0! -> ", "a0!")

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")]
    ours = sorted(str(torch._C._get_schema(*name.partition(".")[::2])) for name in names)

    assert [plain(one) for one in ours] == [plain(one) for one in oracle.schemas()]
    assert len(ours) == 19


@pytest.mark.parametrize(("name", "args"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_opcheck(name, args):
    torch.library.opcheck(op(name), args)


def test_every_op_is_among_the_cases():
    assert {name for name, _ in CASES} == {
        f"{schema.partition('(')[0]}.default".replace(".out.default", ".out") for schema, _, _ in ops._SHIMS
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_products_are_those_of_the_functions(nested, quant_type):
    codes, state = packed(nested, quant_type)
    x, bias = randn(3, 64).requires_grad_(), randn(48).requires_grad_()
    more = (state.absmax, state.state2.code, state.offset.half()) if nested else ()
    absmax = state.state2.absmax if nested else state.absmax

    y = torch.ops.bitsandbytes.gemm_4bit(x, codes, [48, 64], absmax, 64, quant_type, bias, *more)
    y.sum().backward()

    whole = F.dequantize_4bit(codes, state)
    torch.testing.assert_close(y, x @ whole.t() + bias, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 64), rtol=1e-2, atol=2e-2)
    assert torch.equal(bias.grad, torch.full((48,), 3.0))
    if not nested:
        found = torch.ops.bitsandbytes.gemv_4bit(x[:1].detach(), codes, [48, 64], absmax, state.code.clone(), 64)
        torch.testing.assert_close(found + bias, y[:1], rtol=1e-4, atol=1e-4)


def test_gemv_refuses_another_table():
    codes, state = packed()

    with pytest.raises(ValueError, match="the table of nf4 or fp4"):
        torch.ops.bitsandbytes.gemv_4bit(
            randn(1, 64), codes, [48, 64], state.absmax, F.get_4bit_type("int4", "cpu"), 64
        )


def test_outliers_are_multiplied_as_floats():
    x, weight = randn(4, 64), randn(24, 64, seed=1)
    x[:, 3] = 50.0
    rows, row_stats, columns = F.int8_vectorwise_quant(x, threshold=6.0)
    cb, scb, _ = F.int8_vectorwise_quant(weight)

    y, outliers = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, rows, cb, row_stats, scb, columns)

    assert torch.equal(outliers, x[:, columns])
    torch.testing.assert_close(y, x @ weight.t(), rtol=2e-2, atol=1.0)


def test_defining_again_does_nothing():
    ops.define()

    assert len(ops._libraries) == 1


def test_ops_that_are_taken_are_an_error(python):
    done = python(
        """
        import torch
        library = torch.library.Library("bitsandbytes", "FRAGMENT")
        library.define("quantize_4bit(Tensor A) -> Tensor")
        try:
            import halfbyte.compat.bitsandbytes
        except ImportError as error:
            print(error)
        """
    )

    assert done.stdout.startswith("torch.ops.bitsandbytes is taken already (bitsandbytes::quantize_4bit and 0 more)")


def test_ops_exist_only_when_defined(python):
    done = python(
        """
        import torch, halfbyte
        import halfbyte.compat
        print([n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bitsandbytes::")])
        import halfbyte.compat.bitsandbytes
        print(len([n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bitsandbytes::")]))
        """
    )

    assert done.stdout.split() == ["[]", "19"]


def test_importing_the_surface_is_modest(python):
    done = python(
        """
        import sys
        import halfbyte.compat.bitsandbytes.surface
        import torch
        print([name for name in ("transformers", "peft", "bitsandbytes", "scipy") if name in sys.modules])
        print(torch.cuda.is_initialized())
        """
    )

    assert done.stdout.splitlines() == ["[]", "False"]
    assert done.stderr == ""
