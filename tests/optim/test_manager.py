"""GlobalOptimManager: hyperparameters of single parameters, and the embeddings that use it."""

import gc
import weakref

import pytest
import torch

from halfbyte import InputError, nn, optim


@pytest.fixture
def manager():
    return optim.GlobalOptimManager.get_instance()


def test_manager_is_one_per_process(manager):
    assert optim.GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


@pytest.mark.parametrize("before", [True, False])
def test_override_counts_whether_set_before_or_after_the_optimizer_exists(build, randn, step, manager, before):
    one, other = randn(70, 60), randn(70, 60)
    if before:
        manager.override_config(one, "optim_bits", 32)
    optimizer = build("AdamW8bit", [one, other])
    if not before:
        manager.override_config(one, "optim_bits", 32)

    step(optimizer, [one, other])

    assert [optimizer.state[param]["state1"].dtype for param in (one, other)] == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("lr", 0.5, "AdamW"),
        ("betas", (0.1, 0.2), "AdamW"),
        ("eps", 0.1, "AdamW"),
        ("weight_decay", 0.9, "AdamW"),
        ("alpha", 1.0, "AdEMAMix"),
        ("t_alpha", 100, "AdEMAMix"),
        ("t_beta3", 100, "AdEMAMix"),
        ("max_unorm", 0.01, "AdamW"),
        ("skip_zeros", True, "AdamW"),
    ],
)
def test_override_changes_its_parameter_only(build, randn, manager, key, value, name):
    def train(override):
        params = [randn(6), randn(6, seed=1)]
        if override:
            manager.override_config(params[0], key, value)
        optimizer = build(name, params)
        for number in range(3):
            for param in params:
                param.grad = torch.arange(6.0) + number
                param.grad[0] = 0.1 if number == 0 else 0.0
            optimizer.step()
        return params

    plain, overridden = train(False), train(True)

    assert not torch.equal(plain[0], overridden[0])
    assert torch.equal(plain[1], overridden[1])


def test_override_of_min_8bit_size_decides_the_state(build, randn, step, manager):
    param = randn(100)
    manager.override_config([param], key_value_dict={"min_8bit_size": 50})
    optimizer = build("AdamW8bit", [param])

    step(optimizer, [param])

    assert optimizer.state[param]["state1"].dtype is torch.uint8


def test_scheduled_learning_rate_reaches_parameters_with_other_overrides(build, randn, manager):
    param = randn(4)
    manager.override_config(param, "weight_decay", 0.0)
    optimizer = build("AdamW", [param])
    optimizer.param_groups[0]["lr"] = 0.0
    before = param.detach().clone()

    param.grad = torch.ones(4)
    optimizer.step()

    assert torch.equal(param, before)


def test_module_override_holds_for_the_parameter_the_module_has_at_the_step(build, randn, step, manager):
    module = torch.nn.Linear(60, 70, bias=False)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = randn(70, 60)
    optimizer = build("AdamW8bit", module.parameters())

    step(optimizer, [module.weight])

    assert optimizer.state[module.weight]["state1"].dtype is torch.float32


def test_registered_place_serves_a_replaced_parameter(build, randn, step, manager):
    old = [randn(3), randn(70, 60)]
    manager.register_parameters(old)
    manager.override_config(old[1], "optim_bits", 32)
    new = [torch.nn.Parameter(param.detach().clone()) for param in old]
    alive = build("AdamW8bit", new)
    step(alive, new)
    assert alive.state[new[1]]["state1"].dtype is torch.uint8  # the old one exists: the new one is another's

    del old
    gc.collect()
    optimizer = build("AdamW8bit", new)
    step(optimizer, new)

    assert optimizer.state[new[1]]["state1"].dtype is torch.float32


def test_overrides_do_not_keep_parameters_or_modules_alive(build, manager):
    module = torch.nn.Linear(3, 3)
    manager.register_parameters(module.parameters())
    manager.override_config(module.weight, "lr", 0.1)
    manager.register_module_override(module, "bias", {"lr": 0.1})
    references = [weakref.ref(module), weakref.ref(module.weight)]

    del module
    gc.collect()

    assert [reference() for reference in references] == [None, None]
    assert not manager.overrides().by_id


@pytest.mark.parametrize(
    "call",
    [
        lambda manager, param: manager.override_config(param, "colour", 1),
        lambda manager, param: manager.override_config(param, key_value_dict={"colour": 1}),
        lambda manager, param: manager.register_module_override(torch.nn.Linear(1, 1), "weight", {"colour": 1}),
    ],
)
def test_unknown_key_is_refused(randn, manager, call):
    with pytest.raises(InputError, match=r"overrides are among alpha, betas.*; got colour"):
        call(manager, randn(3))


def test_override_without_a_key_is_refused(randn, manager):
    with pytest.raises(InputError, match="either key and value, or key_value_dict"):
        manager.override_config(randn(3))


@pytest.mark.parametrize("name", ["Lion", "AdEMAMix", "Adagrad"])
def test_trust_factor_by_override_is_refused_where_it_has_no_meaning(build, randn, manager, name):
    param = randn(3)
    manager.override_config(param, "max_unorm", 1.0)
    optimizer = build(name, [param])
    param.grad = torch.ones(3)

    with pytest.raises(InputError, match="max_unorm has a meaning for adam, momentum, rmsprop only"):
        optimizer.step()


# -- embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Embedding, nn.StableEmbedding])
def test_embedding_has_32bit_states(build, step, cls):
    model = torch.nn.Sequential(cls(100, 64), torch.nn.Linear(64, 100))
    optimizer = build("AdamW8bit", model.parameters())

    step(optimizer, list(model.parameters()))

    assert optimizer.state[model[0].weight]["state1"].dtype is torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype is torch.uint8


def test_embedding_starts_xavier_uniform_with_a_zero_padding_row():
    embedding = nn.Embedding(1000, 24, padding_idx=3)

    bound = (6 / 1024) ** 0.5
    assert embedding.weight.abs().max() <= bound
    assert embedding.weight.abs().max() > 0.99 * bound
    assert torch.equal(embedding.weight[3], torch.zeros(24))


def test_stable_embedding_normalizes_in_the_default_dtype():
    embedding = nn.StableEmbedding(50, 16, dtype=torch.bfloat16)
    tokens = torch.tensor([[1, 2], [3, 4]])

    found = embedding(tokens)

    rows = embedding.weight[tokens].float()
    expected = torch.nn.functional.layer_norm(rows, (16,)).to(torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)
    assert list(embedding.state_dict()) == ["weight", "norm.weight", "norm.bias"]
