"""Optimizers on a GPU: captured in a graph, and side by side with bitsandbytes' kernels."""

import pytest
import torch

from halfbyte import optim

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm device"),
    pytest.mark.filterwarnings("ignore:update_:halfbyte.HalfbytePerformanceWarning"),
]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "AdamW32bit"])
def test_captured_step_is_replayed_with_new_gradients_and_learning_rates(build, name):
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    values = [randn(300, 70), randn(33)]
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in values] for _ in range(2))
    rate = torch.tensor(0.01, device="cuda")
    captured, eager = build(name, ours, lr=rate, capturable=True), build(name, theirs, lr=0.01)
    grads = [torch.zeros_like(one) for one in values]
    for param, grad in zip(ours, grads, strict=True):
        param.grad = grad

    def advance(step, lr):
        rate.fill_(lr)
        eager.param_groups[0]["lr"] = rate.item()
        for grad, param in zip(grads, theirs, strict=True):
            grad.copy_(randn(*grad.shape))
            param.grad = grad.clone()
        step()
        eager.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch asks for a few steps before a capture
        for _ in range(2):
            advance(captured.step, 0.01)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.02, 0.005, 0.001):
        advance(graph.replay, lr)

    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert float(captured.state[ours[0]]["step"]) == 5


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_capture_without_capturable_is_refused(build):
    param = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = build("AdamW8bit", [param])
    optimizer.step()
    graph = torch.cuda.CUDAGraph()

    with pytest.raises(ValueError, match=r"needs AdamW8bit\(..., capturable=True\)"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("same", [True, False])
def test_ten_thousand_parameters_step_alike_whether_gradients_are_kept_or_new(build, same):
    ours, theirs = ([torch.nn.Parameter(torch.ones(64 + i % 7, device="cuda")) for i in range(10_000)] for _ in "ab")
    optimizer, reference = build("AdamW8bit", ours), torch.optim.AdamW(theirs, lr=0.01, foreach=True)
    for step in range(3):
        for one, other in zip(ours, theirs, strict=True):
            other.grad = torch.full_like(other, 1.0 + step)
            if one.grad is None or not same:
                one.grad = other.grad.clone()
            else:
                one.grad.copy_(other.grad)
        optimizer.step()
        reference.step()

    torch.testing.assert_close(torch.cat([*ours]), torch.cat([*theirs]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AdamW8bit", {"lr": 0.02, "weight_decay": 0.1}),
        ("AdEMAMix8bit", {"lr": 0.01, "alpha": 2.0}),
        ("Lion8bit", {"lr": 0.005}),
        ("SGD8bit", {"lr": 0.02, "momentum": 0.9}),
        ("AdamW32bit", {"lr": 0.02, "weight_decay": 0.1}),
    ],
)
def test_200_steps_follow_bitsandbytes_within_quantization_noise(gpu_oracle, name, arguments):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 64, generator=generator)
    targets = inputs @ torch.randn(64, 64, generator=generator) + 0.5 * torch.randn(128, 64, generator=generator)
    start = torch.zeros(64, 64)
    theirs = torch.tensor(gpu_oracle.losses(name, arguments, start, inputs, targets, 200, "cuda"))

    weight = torch.nn.Parameter(start.cuda())
    optimizer = getattr(optim, name)([weight], **arguments)
    ours = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (inputs.cuda() @ weight - targets.cuda()).square().mean()
        loss.backward()
        optimizer.step()
        ours.append(loss.item())

    assert theirs[-1] < 0.3 * theirs[0]
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-2, atol=0)
