import pytest
import torch
from torch import nn

from spikedistill.student.ridge import at, inputs_at, ridge, rows_of, sample

LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "pointwise": (nn.Conv2d(6, 4, 1), (6, 5, 7)),
    "padded": (nn.Conv2d(6, 4, 3, padding=1, bias=False), (6, 5, 7)),
    "unequal": (nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0)), (6, 8, 7)),
    "dilated": (nn.Conv2d(6, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (6, 8, 7)),
    "same": (nn.Conv2d(6, 4, 3, padding="same"), (6, 8, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, stride=2, groups=2), (6, 8, 7)),
    "depthwise": (nn.Conv2d(6, 6, 5, padding=2, groups=6), (6, 8, 7)),
    "one axis": (nn.Conv1d(6, 4, 3, stride=2, padding=1), (6, 9)),
    "three axes": (nn.Conv3d(6, 4, 3, padding=1), (6, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_times_weights_are_the_output_of_the_layer(name):
    layer, shape = LAYERS[name]
    x = torch.randn(3, *shape)
    with torch.no_grad():
        output = layer(x)
        places = sample(output.shape, 12, torch.Generator().manual_seed(0))
        found = (inputs_at(layer, x, places).transpose(0, 1) @ rows_of(layer)).transpose(0, 1).flatten(1)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(found + bias, at(output, places))


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 5), (3, 2, 4, 5)])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_places_are_of_every_image_and_all_different(shape, count):
    places = sample(torch.Size(shape), count, torch.Generator().manual_seed(0))
    images, *axes = places
    each = min(-(-count // 3), torch.Size(shape[2:]).numel())
    assert images.bincount().tolist() == [each] * 3
    assert len(set(zip(*(axis.tolist() for axis in places)))) == 3 * each
    assert all(int(axis.min()) >= 0 and int(axis.max()) < size for axis, size in zip(axes, shape[2:]))


def rows(count=400, groups=2, inputs=5, outputs=3):
    return torch.randn(count, groups, inputs), torch.randn(groups, inputs, outputs), torch.arange(count) // 10


class TestRidge:
    def test_finds_what_is_linear(self):
        x, weights, images = rows()
        wanted = torch.einsum("ngp,gpo->ngo", x, weights) + torch.randn(2, 3)
        torch.testing.assert_close(ridge(x, wanted, images), weights, rtol=5e-3, atol=5e-3)

    def test_is_the_closed_form_for_one_of_its_strengths(self):
        x, weights, images = rows(outputs=1)
        wanted = torch.einsum("ngp,gpo->ngo", x, weights) + torch.randn(400, 2, 1) + 3
        found = ridge(x, wanted, images)
        centred, aim = (one.double() - one.double().mean(0) for one in (x, wanted))
        left = []
        for group in range(2):
            a, b = centred[:, group], aim[:, group]
            pull = a.T @ (b - a @ found[group].double())  # the gradient of the squares: strength x |x|^2 x weight
            left.append(pull[:, 0] / (a.square().sum(0) * found[group, :, 0].double()))
        strengths = torch.stack(left)
        assert float(strengths.max() / strengths.min()) < 1.01
        assert 9e-4 < float(strengths.mean()) < 3.1

    def test_leaves_noise_alone(self):
        x, _, images = rows(count=40, inputs=20)
        held = torch.randn(40, 2, 3)
        assert not ridge(x, held * 0, images).any()
        assert (
            ridge(x, held, images).square().sum()
            < 0.05 * torch.linalg.lstsq(x[:, 0] - x[:, 0].mean(0), held[:, 0]).solution.square().sum()
        )

    def test_a_shift_is_no_weight(self):
        x, _, images = rows()
        x = x + 4
        assert ridge(x, torch.full((400, 2, 3), 7.0), images).abs().max() < 1e-4
        assert ridge(x, torch.full((400, 2, 3), 7.0), images, shifts=False).abs().max() > 0.1

    def test_inputs_that_are_always_silent_keep_their_weights(self):
        x, weights, images = rows()
        x[:, 1, 2] = 0.0
        found = ridge(x, torch.einsum("ngp,gpo->ngo", x, weights), images)
        assert not found[1, 2].any() and torch.isfinite(found).all()

    def test_one_image_cannot_judge_itself(self):
        x, weights, _ = rows()
        assert not ridge(x, torch.einsum("ngp,gpo->ngo", x, weights), torch.zeros(400, dtype=torch.long)).any()

    def test_more_inputs_than_rows(self):
        x, weights, images = rows(count=60, inputs=100)
        wanted = torch.einsum("ngp,gpo->ngo", x, weights)
        found = ridge(x, wanted, images)
        assert torch.isfinite(found).all()
        more = torch.randn(200, 2, 100)
        truth, said = (torch.einsum("ngp,gpo->ngo", more, one) for one in (weights, found))
        assert (truth - said).square().mean() < truth.square().mean()
