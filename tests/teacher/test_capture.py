import pytest
import torch
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.teacher.capture import capture_features


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_what_is_seen_equals_the_direct_computation(network):
    x = torch.randn(5, 3)
    with capture_features(network, ["0", "1.0"]) as seen:
        logits = network(x)
    hidden = x @ network[0].weight.T + network[0].bias
    assert list(seen) == ["0", "1.0"]
    torch.testing.assert_close(seen["0"], hidden)
    torch.testing.assert_close(seen["1.0"], hidden.clamp_min(0))
    torch.testing.assert_close(logits, network(x), rtol=0, atol=0)


def test_what_is_seen_stays_when_the_next_layer_works_in_place():
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), torch.randn(5, 3)
    with capture_features(network, ["0"]) as seen:
        network(x)
    torch.testing.assert_close(seen["0"], network[0](x))


def test_a_gradient_flows_through_what_is_seen(network):
    with capture_features(network, ["0"]) as seen:
        network(torch.ones(1, 3))
    seen["0"].sum().backward()
    torch.testing.assert_close(network[0].weight.grad, torch.ones(4, 3))


def test_a_module_called_twice_leaves_its_last_output():
    twice = nn.Linear(2, 2)
    network = nn.Sequential(twice, twice)
    with capture_features(network, ["0"]) as seen:
        logits = network(torch.randn(1, 2))
    torch.testing.assert_close(seen["0"], logits)


def test_nothing_listens_once_the_context_is_closed(network):
    with capture_features(network, ["0", "1"]) as seen:
        network(torch.zeros(1, 3))
        assert hooks(network) == 2
    before = seen["0"]
    network(torch.ones(1, 3))
    assert seen["0"] is before
    assert hooks(network) == 0


def test_nothing_listens_after_an_error_inside_the_context(network):
    with pytest.raises(ValueError, match="inside"), capture_features(network, ["0", "1"]):
        raise ValueError("inside")
    assert hooks(network) == 0


def test_an_unknown_path_is_told_the_nearest_and_leaves_no_listener(network):
    with (
        pytest.raises(ConfigError, match=r"no module in Sequential '1\.5'\. Did you mean '1\.[01]'"),
        capture_features(network, ["0", "1.5"]),
    ):
        pass
    assert hooks(network) == 0


def test_a_module_that_returns_no_tensor_is_refused_and_leaves_no_listener():
    network = nn.Sequential(Pair())
    with (
        pytest.raises(ConfigError, match="'0' returns tuple: tap one that returns a tensor"),
        capture_features(network, ["0"]),
    ):
        network(torch.zeros(1))
    assert hooks(network) == 0
