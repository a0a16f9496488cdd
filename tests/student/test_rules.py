import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from students import Sized, can_learn, convert, line
from torch import Tensor, nn

from spikedistill.errors import ConversionError

HERE = Path(__file__)


def place(marker: str) -> str:
    """A pattern for the line of this file that ends with a marker."""
    return re.escape(line(marker, HERE))


class Around(nn.Module):
    """A network with one part in its middle."""

    def __init__(self, part) -> None:
        super().__init__()
        self.conv, self.part, self.fc = nn.Conv2d(1, 4, 3, padding=1), part, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = self.part(x)  # the part
        return self.fc(x.flatten(1))


USES = {
    "scale": lambda x, scale: x * scale,
    "shift": lambda x, scale: x + scale,
    "shaped": lambda x, scale: x * scale.view(1, 4, 1, 1),
    "divided": lambda x, scale: x / (scale + 1).reshape(1, -1, 1, 1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_learned_scale_or_shift_is_no_gate(use):
    class Scaled(Sized):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))

        def forward(self, x):
            return self.fc(use(F.relu(self.conv(x)), self.scale).flatten(1))

    images, network = torch.rand(3, 1, 4, 4), Scaled()
    student, _ = convert(network, images, timesteps=64)
    torch.testing.assert_close(student(images).mean(0), network(images), rtol=0, atol=0.05)
    can_learn(student, images)


class TestOtherActivations:
    def test_relu6_and_leaky_relu_are_taken_and_the_slope_is_noted(self):
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 8), nn.LeakyReLU(0.125), nn.Linear(8, 3)
        )
        student, report = convert(network, torch.rand(2, 1, 4, 4))
        assert [(site.kind, site.note) for site in report.sites] == [
            ("ReLU6", ""),
            ("LeakyReLU", "negative slope 0.125 dropped"),
        ]
        assert "(negative slope 0.125 dropped)" in str(report)
        can_learn(student, torch.rand(2, 1, 4, 4))

    def test_functional_ones_are_taken_too(self):
        class Functional(Sized):
            def forward(self, x):
                return self.fc(F.leaky_relu(F.relu6(self.conv(x)), negative_slope=0.2).flatten(1))

        _, report = convert(Functional(), torch.rand(2, 1, 4, 4))
        assert [(site.kind, site.note) for site in report.sites] == [
            ("relu6", ""),
            ("leaky_relu", "negative slope 0.2 dropped"),
        ]

    @pytest.mark.parametrize("slope", [0.5, -0.5])
    def test_too_steep_a_slope_is_refused(self, slope):
        said = rf"'part' at {place('the part')} has a negative slope of {slope}.*Train the ANN with ReLU"
        with pytest.raises(ConversionError, match=said):
            convert(Around(nn.LeakyReLU(slope)), torch.rand(2, 1, 4, 4))


GATE = "leave it out with its product where it is a gate"


EXCHANGE, ATTENTION = "replace it by nn.ReLU", "use a convolutional network"


NORM, RECURRENT, OTHER = "use batch norm", "use a feed-forward network", "use convolutions, linear layers"


class TestRefusals:
    @pytest.mark.parametrize(
        ("part", "remedy"),
        [
            (nn.GELU(), EXCHANGE),
            (nn.SiLU(), EXCHANGE),
            (nn.PReLU(), EXCHANGE),
            (nn.Sigmoid(), GATE),
            (nn.Hardsigmoid(), GATE),
            (nn.Hardswish(), EXCHANGE),
            (nn.Softmax(1), ATTENTION),
            (nn.TransformerEncoderLayer(4, 1, batch_first=True), ATTENTION),
            (nn.LayerNorm(4), NORM),
            (nn.GroupNorm(2, 4), NORM),
            (nn.InstanceNorm2d(4), NORM),
            (nn.LSTM(4, 4), RECURRENT),
            (nn.GRU(4, 4), RECURRENT),
            (nn.CosineSimilarity(), OTHER),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of_a_layer_name_it_its_line_and_a_remedy(self, part, remedy):
        said = rf"'part' \({type(part).__name__}\) at {place('the part')} has no spiking equivalent: .*{remedy}"
        with pytest.raises(ConversionError, match=said):
            convert(Around(part), torch.rand(2, 1, 4, 4))

    @pytest.mark.parametrize(
        ("part", "name", "remedy"),
        [
            (F.gelu, "'gelu' (node gelu)", EXCHANGE),
            (lambda x: x * torch.sigmoid(x), "'sigmoid' (node sigmoid)", GATE),
            (lambda x: x.tanh(), "'tanh' (node tanh)", EXCHANGE),
            (lambda x: x.softmax(1), "'softmax' (node softmax)", ATTENTION),
            (lambda x: F.scaled_dot_product_attention(x, x, x), "'scaled_dot_product_attention'", ATTENTION),
            (lambda x: x @ x.transpose(2, 3), "'matmul' (node matmul)", ATTENTION),
            (lambda x: F.layer_norm(x, (4,)), "'layer_norm' (node layer_norm)", NORM),
            (lambda x: x * F.relu(x - 1), "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: x * x, "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: torch.mul(x, other=x), "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: x.mul_(x), "the product 'mul' of two signals (node mul_)", OTHER),
            (lambda x: x / (x + 1), "the product 'truediv' of two signals (node truediv)", OTHER),
            (lambda x: 1 / (x + 1), "'truediv'", OTHER),
            (lambda x: x // 2, "'floordiv'", OTHER),
            (lambda x: torch.exp(x), "'exp' (node exp)", OTHER),
            (lambda x: x.abs(), "'abs' (node abs_1)", OTHER),
        ],
        ids=lambda value: value if isinstance(value, str) and value[0] in "'t" else "",
    )
    def test_of_a_function_name_it_its_line_and_a_remedy(self, part, name, remedy):
        said = rf"{re.escape(name)}.* at {re.escape(str(HERE))}:\d+ has no spiking equivalent: .*{remedy}"
        with pytest.raises(ConversionError, match=said):
            convert(Around(part), torch.rand(2, 1, 4, 4))

    def test_of_multi_head_attention(self):
        class Attending(Around):
            def __init__(self) -> None:
                super().__init__(nn.MultiheadAttention(16, 1, batch_first=True))

            def forward(self, x):
                x = F.relu(self.conv(x)).flatten(2)
                x, _ = self.part(x, x, x)  # attended
                return self.fc(x.flatten(1))

        said = rf"'part' \(MultiheadAttention\) at {place('attended')} has no spiking .*{ATTENTION}"
        with pytest.raises(ConversionError, match=said):
            convert(Attending(), torch.rand(2, 1, 4, 4))

    def test_of_a_layer_that_multiplies_two_signals(self):
        class Squaring(Around):
            def __init__(self) -> None:
                super().__init__(nn.Bilinear(4, 4, 4))

            def forward(self, x):
                x = F.relu(self.conv(x))
                return self.fc(self.part(x, x).flatten(1))  # squared

        with pytest.raises(ConversionError, match=rf"'part' \(Bilinear\) at {place('squared')} has no spiking"):
            convert(Squaring(), torch.rand(2, 1, 4, 4))

    def test_in_a_bare_sequence_do_not_point_into_torch(self):
        with pytest.raises(ConversionError, match=r"'1' \(GELU\)") as caught:
            convert(nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4))
        assert "proxy.py" not in str(caught.value)

    def test_of_a_network_without_activations(self):
        with pytest.raises(
            ConversionError, match="no ReLU, ReLU6 or LeakyReLU, so nothing would spike: give a network"
        ):
            convert(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4))

    @pytest.mark.parametrize("options", [{}, {"inherit": False}], ids=["inherited", "fresh"])
    def test_of_a_network_with_two_inputs(self, options):
        class Two(Sized):
            def forward(self, x, y):
                return super().forward(x + y)

        with pytest.raises(
            ConversionError, match=r"takes 2 inputs and returns a tensor: expected one tensor in.*Wrap it"
        ):
            convert(Two(), torch.rand(2, 1, 4, 4), **options)

    @pytest.mark.parametrize("options", [{}, {"inherit": False}], ids=["inherited", "fresh"])
    def test_of_a_network_with_two_outputs(self, options):
        class Pair(Sized):
            def forward(self, x):
                logits = super().forward(x)
                return logits, logits

        with pytest.raises(ConversionError, match=r"takes 1 inputs and returns tuple: expected one tensor in.*Wrap it"):
            convert(Pair(), torch.rand(2, 1, 4, 4), **options)

    def test_of_images_that_the_network_does_not_take(self):
        said = r"does not accept the calibration images of shape \(2, 1, 9, 9\) \(mat1.*give images like those"
        with pytest.raises(ConversionError, match=said):
            convert(Sized(), torch.rand(2, 1, 9, 9))
