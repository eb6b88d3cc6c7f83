"""Parameters go through in few op calls."""

import torch


def test_ten_thousand_small_parameters_are_one_call(build, calls):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(10_000)]
    optimizer = build("SGD", params)
    for param in params:
        param.grad = torch.ones(8)

    optimizer.step()

    assert [(name, len(args[1])) for name, args in calls] == [("update_32bit", 10_000)]


def test_groups_of_equal_hyperparameters_share_a_call(build, randn, step, calls):
    params = [randn(70, 60, seed=i) for i in range(4)]
    optimizer = build("AdamW8bit", [{"params": params[:2]}, {"params": params[2:]}])

    step(optimizer, params)
    optimizer.param_groups[1]["lr"] = 0.5
    step(optimizer, params)

    assert [len(args[1]) for _, args in calls] == [4, 2, 2]


def test_kinds_of_states_and_dtypes_are_calls_of_their_own(build, randn, step, calls):
    params = [randn(70, 60), randn(3), randn(70, 60, dtype=torch.bfloat16), randn(3, dtype=torch.bfloat16), randn(9)]
    optimizer = build("AdamW8bit", params)

    step(optimizer, params)

    found = sorted((name, args[1][0].dtype == torch.float32, len(args[1])) for name, args in calls)
    assert found == [
        ("update_32bit", False, 1),
        ("update_32bit", True, 2),
        ("update_8bit", False, 1),
        ("update_8bit", True, 1),
    ]


def test_parameters_that_missed_a_step_have_their_own_count(build, randn, step, calls):
    params = [randn(5), randn(5, seed=1)]
    optimizer = build("AdamW", params)
    params[1].requires_grad_(False)
    step(optimizer, params[:1])
    params[1].requires_grad_(True)
    calls.clear()

    step(optimizer, params)

    assert sorted(float(args[5]) for _, args in calls) == [1.0, 2.0]


def test_op_is_called_through_torch_where_a_mode_observes(build, randn):
    param = randn(70, 60)
    optimizer = build("AdamW8bit", [param])
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    param.grad = torch.ones(70, 60)
    with Watch():
        optimizer.step()

    assert seen.count("halfbyte.update_8bit.default") == 1
