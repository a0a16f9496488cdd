import copy
import gc
import operator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from spikedistill.data.feed import MemoryFeed
from spikedistill.evaluate.firing import firing_rates
from spikedistill.neuron.dynamics import LIF, PLIF
from spikedistill.neuron.layer import Spiking
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice
from spikedistill.recipes.distill import Distill, build_student
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.student.recompute import FEWEST, Recompute, stages
from spikedistill.teacher.load import Architecture, Teacher
from spikedistill.teacher.zoo import ZOO
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

NETWORKS = {"resnet20": "layer2", "preact-resnet18": "layer2", "vgg9": "layer2"}
LABELS = torch.arange(4)


@pytest.fixture(params=["neurons", "stages"])
def pair(request):
    """The same student in training twice: one keeps its activations, one computes them again."""

    def make(network, timesteps=3, backend="reference", **options):
        if isinstance(network, str):
            network = ZOO[network](width=4)
        given = torch.rand(4, 3, 16, 16, dtype=next(network.parameters()).dtype)
        options = {"neuron": INHERITED_NEURON, **options}
        kept, _ = to_spiking(network, Conversion(timesteps=timesteps, **options), calibration_images=given)
        for layer in kept.train().neurons.values():
            layer.backend = backend
        again = copy.deepcopy(kept)
        again.recompute = request.param
        return given, kept, again

    return make


def learn(student, given, path=None):
    """One step's gradients; the answers and, where a path is given, the feature there."""
    answer = student.observe(given, () if path is None else (path,))
    logits, features = answer.logits, answer.features
    loss = F.cross_entropy(logits.float().mean(0), LABELS)
    for feature in features.values():
        loss = loss + feature.float().mean(0).square().mean()
    loss.backward()
    return [logits, *features.values()]


def alike(kept, again):
    """That gradients and running statistics are the same."""
    for (path, expected), (_, found) in zip(kept.named_parameters(), again.named_parameters()):
        assert found.grad is not None, path
        torch.testing.assert_close(found.grad, expected.grad, msg=path)
    for (path, expected), (_, found) in zip(kept.named_buffers(), again.named_buffers()):
        torch.testing.assert_close(found, expected, msg=path)


def bytes_kept(student, given):
    """What a forward pass leaves in memory for the backward pass."""
    student(given)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        answers = student(given)
    assert answers.grad_fn is not None
    return sum(event.self_cpu_memory_usage for event in watched.key_averages())


class Net(nn.Module):
    """Five neurons, two short skips, and one that may cross them all."""

    def __init__(self, dropout: float = 0.0, skips: bool = False, width: int = 4) -> None:
        super().__init__()
        self.skips = skips
        self.convs = nn.ModuleList(nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(6))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        first = F.relu(self.norms[0](self.convs[0](x)))
        x = self.dropout(F.relu(self.norms[1](self.convs[1](first))))
        y = self.norms[2](self.convs[2](x)) + first
        z = self.norms[3](self.convs[3](y))
        y = y + z
        x = F.relu(self.norms[4](self.convs[4](F.relu(y))))
        x = F.relu(self.norms[5](self.convs[5](x)))
        return self.head((x + first if self.skips else x).mean((2, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_features_gradients_and_running_statistics_are_the_same(name, pair):
    given, kept, again = pair(ZOO[name](width=4).double())
    for expected, found in zip(learn(kept, given, NETWORKS[name]), learn(again, given, NETWORKS[name])):
        torch.testing.assert_close(found, expected)
    alike(kept, again)
    norms = [layer for layer in again.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and all(int(norm.num_batches_tracked) == 1 for norm in norms)


@pytest.mark.parametrize("neuron", [LIF, PLIF], ids=["lif", "plif"])
@pytest.mark.parametrize("timesteps", [1, 5])
def test_any_neuron_and_any_number_of_steps(neuron, timesteps, pair):
    given, kept, again = pair(Net().double(), timesteps, neuron=neuron)
    learn(kept, given), learn(again, given)
    alike(kept, again)


def test_frames_have_no_part_without_time(pair):
    given, kept, again = pair(Net().double(), coding=FrameCoding())
    frames = torch.rand(3, *given.shape, dtype=given.dtype)
    learn(kept, frames), learn(again, frames)
    alike(kept, again)


@pytest.mark.parametrize("name", NETWORKS)
def test_far_less_is_kept(name, pair):
    given, kept, again = pair(name)
    most = {"neurons": 0.7, "stages": 0.35}[again.recompute]
    assert bytes_kept(again, given) < most * bytes_kept(kept, given)


@pytest.mark.parametrize("name, blocks", [("resnet20", 9), ("preact-resnet18", 8)])
def test_residual_networks_are_cut_at_the_ends_of_blocks(name, blocks, pair):
    _, student, _ = pair(name)
    parts = stages(student.core)
    assert len(parts) == blocks
    for part in parts[1:]:
        read = {source for node in part if node.op != "output" for source in node.all_input_nodes} - set(part)
        assert len([node for node in read if node.op != "placeholder"]) == 1
    assert [node for part in parts for node in part] == [
        node for node in student.core.graph.nodes if node.op != "placeholder"
    ]


def test_a_chain_is_cut_behind_its_pooling(pair):
    _, student, _ = pair("vgg9")
    parts = stages(student.core)
    layers = [
        sum(node.op == "call_module" and isinstance(student.core.get_submodule(node.target), Spiking) for node in part)
        for part in parts
    ]
    assert set(layers[:-1]) == {FEWEST}
    assert all(isinstance(student.core.get_submodule(part[0].target), nn.Conv2d | nn.Linear) for part in parts[1:])


def test_a_small_network_is_one_stage(pair):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    given, kept, again = pair(network)
    assert len(stages(again.core)) == 1
    learn(kept, given), learn(again, given)
    alike(kept, again)


def test_no_signal_crosses_a_cut_that_is_changed_in_place_behind_it(pair):
    _, student, _ = pair(Net())
    assert [part[0].name for part in stages(student.core)[1:]] == ["convs_3"]
    *_, addition = (node for node in student.core.graph.nodes if node.target is operator.add)
    student.core.add_module("drop", nn.Dropout(0.1, inplace=True))
    addition.op, addition.target, addition.args = "call_module", "drop", addition.args[:1]
    assert [part[0].name for part in stages(student.core)[1:]] == ["convs_4"]


def test_a_skip_may_cross_every_cut(pair):
    given, kept, again = pair(Net(skips=True).double())
    assert len(stages(again.core)) == 2
    learn(kept, given), learn(again, given)
    alike(kept, again)


def test_dropout_drops_the_same_twice(pair):
    given, kept, again = pair(Net(dropout=0.5).double())
    for student in (kept, again):
        torch.manual_seed(3)
        learn(student, given)
    alike(kept, again)


def test_firing_rates_are_counted_once(pair):
    given, kept, again = pair("resnet20")
    with firing_rates(kept) as expected, firing_rates(again) as found:
        learn(kept, given), learn(again, given)
    assert found == expected


def test_with_autocast_and_channels_last(pair):
    given, kept, again = pair("resnet20")
    given = given.to(memory_format=torch.channels_last)
    for student in (kept, again):
        student.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(given)
        assert logits.dtype == torch.bfloat16
        F.cross_entropy(logits.float().mean(0), LABELS).backward()
    alike(kept, again)


def test_with_fused_neurons(pair):
    given, kept, again = pair(Net(), backend="fused")
    learn(kept, given), learn(again, given)
    alike(kept, again)


def test_a_stream_of_steps_hands_gradients_to_the_past(pair):
    given, kept, again = pair(Net().double())
    for student in (kept, again):
        state, loss = None, torch.zeros(())
        for _ in range(3):
            logits, state = student.step(given, state)
            loss = loss + F.cross_entropy(logits, LABELS)
        loss.backward()
    alike(kept, again)


def test_evaluation_and_the_rate_based_gradient_do_not_depend_on_it(pair):
    given, kept, again = pair(Net())
    kept.gradient = again.gradient = "rate"
    learn(kept, given), learn(again, given)
    alike(kept, again)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(given), kept.eval()(given))


def test_a_student_with_it_is_copied_saved_and_trained_in_parallel(tmp_path, pair):
    given, kept, again = pair(Net())
    learn(again, given)
    again.zero_grad()
    twin = copy.deepcopy(again)
    assert list(again.state_dict()) == list(kept.state_dict())
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for network in (DistributedDataParallel(again), twin):
            F.cross_entropy(network(given).mean(0), LABELS).backward()
    finally:
        distributed.destroy_process_group()
    alike(twin, again)


def test_the_training_loop_reaches_the_same_weights(blobs, tmp_path, pair):
    config = Training(epochs=1, batch_size=32, lr=0.05, precision="bf16", device="cpu", ema=0.5)
    teacher = Teacher(Net(), (0.4,) * 3, (0.25,) * 3)
    feed = MemoryFeed(blobs, 32, validation=0.0)
    _, *students = pair(Net())
    for student in students:
        run = Run(tmp_path / student.recompute)
        run.path.mkdir()
        fit(student, KDSNN(pairs=(("norms.1", "norms.1"),)), feed, config, run, teacher=teacher)
    for expected, found in zip(*(student.state_dict().values() for student in students)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("asked", get_args(Recompute))
def test_a_recipe_asks_for_it(asked, blobs):
    recipe = Distill(student=StudentChoice(recompute=asked, calibration=8))
    teacher = Teacher(Net(), (0.4,) * 3, (0.25,) * 3)
    student, _, _ = build_student(recipe, teacher, Architecture("resnet20", 3, 3, 4), blobs)
    assert student.recompute == asked
