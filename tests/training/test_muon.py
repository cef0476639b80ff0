"""Muon: its updates are orthogonal, whatever the shape, and many are stepped as each alone is."""

import pytest

torch = pytest.importorskip("torch", reason="training needs the train extra")

from training.muon import Muon, orthogonalize  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 16)])
def test_singular_values_are_pulled_towards_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 3  # they were not before


def test_directions_stay():
    """What is orthogonalized keeps its singular vectors: of a scaled rotation, the rotation."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    result = orthogonalize(0.01 * rotation[None])[0]
    size = result.norm() / rotation.norm()
    torch.testing.assert_close(result, size * rotation, atol=1e-4, rtol=1e-3)


def test_a_step_is_nesterov_momentum_made_orthogonal():
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = Muon([parameter], lr=0.1, momentum=0.5)
    torch.manual_seed(0)
    average, expected = torch.zeros(8, 4), torch.zeros(8, 4)
    for _ in range(3):
        gradient = torch.randn(8, 4)
        parameter.grad = gradient.clone()
        optimizer.step()
        average = 0.5 * average + 0.5 * gradient
        ahead = 0.5 * average + 0.5 * gradient
        expected = expected - 0.1 * 2**0.5 * orthogonalize(ahead[None])[0]
    torch.testing.assert_close(parameter.detach(), expected)


def test_parameters_of_one_shape_are_stepped_as_if_alone():
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    together = [torch.nn.Parameter(p.clone()) for p in start]
    alone = [torch.nn.Parameter(p.clone()) for p in start]
    for parameters in (together, alone):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    Muon(together, weight_decay=0.1).step()
    for parameter in alone:
        Muon([parameter], weight_decay=0.1).step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
