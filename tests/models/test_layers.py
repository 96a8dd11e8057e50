"""Cross layers, gates and heads are their formulas, said again in numpy."""

import numpy as np
import pytest
import torch

from prerank.models.layers import CrossExpert, CrossLayer, Gate, LowRankCrossLayer, TaskHeads, task_logits


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_cross_layer_is_equation_1_of_dcn_v2():
    layer, x0, x = CrossLayer(5), torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    w, b = numbers(layer.linear.weight), numbers(layer.linear.bias)
    expected = numbers(x0) * (numbers(x) @ w.T + b) + numbers(x)
    np.testing.assert_allclose(numbers(layer(x0, x)), expected, rtol=1e-5, atol=1e-6)


def test_a_low_rank_cross_layer_is_equation_2_of_dcn_v2():
    layer, x0, x = LowRankCrossLayer(6, 2), torch.randn(4, 6), torch.randn(4, 6)
    u, v, b = numbers(layer.widen.weight), numbers(layer.narrow.weight).T, numbers(layer.widen.bias)
    assert u.shape == v.shape == (6, 2)
    expected = numbers(x0) * (numbers(x) @ (u @ v.T).T + b) + numbers(x)
    np.testing.assert_allclose(numbers(layer(x0, x)), expected, rtol=1e-5, atol=1e-6)


def test_a_low_rank_layer_whose_rank_is_its_width_can_be_any_full_rank_layer():
    full, low = CrossLayer(4), LowRankCrossLayer(4, 4)
    with torch.no_grad():
        low.narrow.weight[:] = full.linear.weight
        low.widen.weight[:] = torch.eye(4)
        low.widen.bias[:] = full.linear.bias
    x0, x = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(low(x0, x), full(x0, x))


def test_a_cross_expert_stacks_full_rank_then_low_rank_over_the_same_x0():
    expert, x0 = CrossExpert(5, layers=2, rank=2), torch.randn(7, 5)
    assert [type(layer) for layer in expert.layers] == [CrossLayer, CrossLayer, LowRankCrossLayer, LowRankCrossLayer]
    x = x0
    for layer in expert.layers:
        x = layer(x0, x)
    assert torch.equal(expert(x0), x)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_cross_expert_without_biases_is_a_polynomial_of_degree_one_more_than_its_layers(layers):
    """Along a line through the origin: the (2 layers + 2)-nd difference vanishes, the one before it does not."""
    expert = CrossExpert(3, layers, 2).double()
    with torch.no_grad():
        for name, weight in expert.named_parameters():
            weight.mul_(0.0 if name.endswith("bias") else 1.0)
    at = torch.arange(2 * layers + 4, dtype=torch.float64)
    values = numbers(expert(at[:, None] * torch.tensor([[0.3, -0.7, 0.5]], dtype=torch.float64)))
    degree = 2 * layers + 1
    assert np.abs(np.diff(values, degree, axis=0)).min() > 1e-6
    np.testing.assert_allclose(np.diff(values, degree + 1, axis=0), 0, atol=1e-7)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_a_gate_sums_to_one_and_mixes_by_it(hidden):
    gate, x, experts = Gate(5, hidden, 3, 0.0), torch.randn(4, 2, 5), torch.randn(4, 2, 3, 6)
    weights = numbers(gate.weights(x))
    logits = np.exp(numbers(gate.mlp(x)))
    np.testing.assert_allclose(weights, logits / logits.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (weights > 0).all()
    np.testing.assert_allclose(
        numbers(gate(x, experts.unbind(-2))),
        np.einsum("bne,bnew->bnw", weights, numbers(experts)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_heads_give_every_vector_and_then_every_bias():
    heads, mixes = TaskHeads(5, 2, 3), [torch.randn(4, 5), torch.randn(4, 5)]
    out = heads(mixes)
    assert out.shape == (4, 2 * (3 + 1))
    for task, mix in enumerate(mixes):
        own = heads.heads[task](mix)
        torch.testing.assert_close(out[:, 3 * task : 3 * task + 3], own[:, :3])
        torch.testing.assert_close(out[:, 6 + task], own[:, 3])


def test_a_logit_a_task_is_a_scaled_dot_product_and_two_biases():
    user, item, dim = torch.randn(2, 3 * 5), torch.randn(2, 6, 3 * 5), 4
    u, v = numbers(user), numbers(item)
    logits = numbers(task_logits(user, item, num_tasks=3))
    for task in range(3):
        mine = slice(task * dim, task * dim + dim)
        dots = np.einsum("bd,bnd->bn", u[:, mine], v[..., mine]) / np.sqrt(dim)
        expected = dots + u[:, None, 3 * dim + task] + v[..., 3 * dim + task]
        np.testing.assert_allclose(logits[..., task], expected, rtol=1e-4, atol=1e-6)
