import pytest
from torch import nn

from stacklm.config.model import Dense, Stack, Stacked
from stacklm.model.build import build
from stacklm.model.roles import roles

STACKED = Stacked(width=16, heads=2, stacks=(Stack(4, 4, 24), Stack(4, 8, 32)))


def test_a_packed_model_is_grouped_by_what_its_parameters_do():
    found = roles(build(STACKED, 30, 8))
    assert found["embedding.weight"] == "embedding"
    assert found["head.weight"] == "head"
    assert found["head.bias"] == "vector"
    assert found["stacks.1.layers.attention.query.weight"] == "matrix"
    assert found["stacks.1.layers.attention.query.bias"] == "vector"
    assert found["stacks.1.layers.feed_forward.norm.weight"] == "vector"
    assert found["stacks.0.mix.expand.weight"] == "matrix"
    assert found["stacks.1.norm.weight"] == "vector"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_every_parameter_of_a_dense_model_has_a_role(activation, tied):
    model = build(Dense(width=16, heads=2, layers=2, hidden=32, activation=activation, tied=tied), 30, 8)
    found = roles(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert ("head.weight" in found) is not tied
    for name, parameter in model.named_parameters():
        assert (found[name] == "vector") is (parameter.ndim == 1), name


def test_packed_vectors_and_matrices_have_one_dimension_more():
    model = build(STACKED, 30, 8)
    found = roles(model)
    packed = {name: parameter.ndim for name, parameter in model.named_parameters() if ".layers." in name}
    assert packed and all(ndim == {"vector": 2, "matrix": 3}[found[name]] for name, ndim in packed.items())


def test_an_unknown_module_is_named():
    model = nn.Sequential(nn.Conv1d(2, 2, 3))
    with pytest.raises(KeyError, match=r"0\.weight: no role is written down for `weight` of Conv1d"):
        roles(model)
