"""Every class against bitsandbytes': names, order and defaults of the arguments."""

import inspect

import pytest

from halfbyte import nn, optim

EMBEDDINGS = ["nn.Embedding", "nn.StableEmbedding"]
CLASSES = [
    name
    for name in optim.__all__
    if inspect.isclass(getattr(optim, name)) and name not in ("Optimizer", "GradientRelease")
]
OWN = {"fused_clip", "stochastic_rounding", "capturable", "paged_budget", "paged_memory"}


@pytest.fixture(scope="module")
def theirs(oracle):
    return oracle.signatures()


def named(name):
    return getattr(nn, name.removeprefix("nn.")) if name.startswith("nn.") else getattr(optim, name)


def test_signatures_cover_every_class_of_bitsandbytes(theirs):
    assert set(theirs) - {*CLASSES, *EMBEDDINGS} == set()


@pytest.mark.parametrize("name", CLASSES + EMBEDDINGS)
def test_signature_is_that_of_bitsandbytes(theirs, name):
    ours = list(inspect.signature(named(name).__init__).parameters.values())[1:]

    positional = [one for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD]
    found = [(one.name, None if one.default is one.empty else one.default) for one in positional]
    assert found == theirs[name]


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("GlobalOptimManager", "PytorchLARS")])
def test_own_options_are_keywords_of_every_class(build, randn, name):
    options = {"fused_clip": 1.0, "stochastic_rounding": True, "capturable": "Paged" not in name}
    options |= {"paged_budget": 10**6, "paged_memory": "managed"}
    optimizer = build(name, [randn(3)], **options)

    assert {option: getattr(optimizer, option) for option in OWN} == options
    with pytest.raises(TypeError, match="colour"):
        build(name, [randn(3)], colour="red")


@pytest.mark.parametrize("name", CLASSES)
def test_class_is_documented(name):
    assert (getattr(optim, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", [name for name in CLASSES if "bit" in name])
def test_optim_bits_are_those_of_the_class_name(build, randn, name):
    optimizer = build(name, [randn(3)])

    assert optimizer.optim_bits == optimizer.args.optim_bits == (8 if "8bit" in name else 32)
    assert optimizer.is_paged == ("Paged" in name)
