import pytest
import torch
from features import draw_feature

from spikedistill.shapes import over_time, time_mean


def test_the_mean_over_time_is_the_mean():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = torch.randn(7, 50).to(dtype)
        expected = rows.double().mean(0).to(dtype)
        torch.testing.assert_close(time_mean(rows), expected)


def test_the_mean_over_three_steps_is_not_biased_in_bfloat16():
    """A third rounds to 0.3340 there, which is 0.2 percent too much of everything."""
    rows = torch.rand(3, 20_000).bfloat16()
    bias = float((time_mean(rows).double() / rows.double().mean(0)).mean() - 1)
    assert abs(bias) < 2e-4


class TestOverTime:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        "name", ["channels first", "channels last", "vectors", "cut out of a larger map", "time behind the batch"]
    )
    def test_is_the_mean_with_its_gradient_and_the_order_of_memory_stays(self, name, dtype):
        torch.manual_seed(0)
        feature = draw_feature(name, dtype).detach().requires_grad_()
        weight = torch.randn(feature.shape[1:]).to(dtype)
        mean = over_time(feature)
        assert mean.stride() == torch.empty_like(feature[0]).stride()
        torch.testing.assert_close(mean, feature.detach().double().mean(0).to(dtype))
        (found,) = torch.autograd.grad((mean * weight).sum(), feature)
        torch.testing.assert_close(found, (weight.double() / 3).to(dtype).expand_as(feature))

    def test_autocast_does_not_round_it(self):
        feature = torch.randn(3, 2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert over_time(feature).dtype == torch.float32

    def test_what_is_the_same_at_every_step_is_handed_on(self):
        feature = torch.randn(2, 4).expand(3, 2, 4)
        assert over_time(feature).data_ptr() == feature.data_ptr()
