"""Pictures show what happened: their marks are counted against the spikes, potentials and counts they are made of."""

import re

import pytest
import torch

import spikedistill
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.activity import record_activity
from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.substeps import run_in_substeps
from spikedistill.teacher.zoo import vgg9

plot = spikedistill.plot


def student_of(timesteps, levels, **neuron):
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16)
    model = Neuron(initial=0.5, levels=levels, **neuron)
    made, _ = to_spiking(
        vgg9(classes=4, width=2), Conversion(timesteps=timesteps, neuron=model), calibration_images=images
    )
    return made.eval(), images


@pytest.fixture(scope="module")
def activity():
    return record_activity(*student_of(3, 1))


class TestLookInside:
    def test_spikes_and_answers_are_the_students(self, activity):
        student, images = student_of(3, 1)
        found = student.observe(images, spikes=student.layers())
        for layer, counts in found.spikes.items():
            assert torch.equal(activity.spikes[layer], counts.flatten(2).round())
        expected = torch.stack([found.logits[: t + 1].mean(0) for t in range(3)]).softmax(-1)
        assert torch.allclose(activity.probabilities, expected, atol=1e-6)

    def test_graded_spikes_become_binary_sub_steps(self):
        student, images = student_of(2, 3)
        activity = record_activity(student, images)
        trains = run_in_substeps(student, images, spikes=tuple(student.layers())).spikes
        for layer in student.layers():
            assert torch.equal(activity.spikes[layer], trains[layer].flatten(2))
            assert activity.spikes[layer].shape[0] == activity.potentials[layer].shape[0] == 6

    @pytest.mark.parametrize("timesteps, levels", [(3, 1), (2, 3)])
    def test_a_neuron_fires_where_its_potential_reaches_the_threshold(self, timesteps, levels):
        activity = record_activity(*student_of(timesteps, levels))
        for layer, trains in activity.spikes.items():
            clear = (activity.potentials[layer] - 1).abs() > 1e-4
            assert torch.equal((activity.potentials[layer] >= 1)[clear], (trains > 0)[clear])

    def test_rates_are_percent_of_neurons(self, activity):
        for layer, rates in activity.rates().items():
            expected = 100 * activity.spikes[layer].flatten(1).sum(1) / activity.spikes[layer][0].numel()
            assert rates == pytest.approx(expected.tolist())


class TestPictures:
    def test_a_raster_has_a_mark_for_each_spike_it_shows(self, activity):
        layer = next(iter(activity.spikes))
        figure = plot.raster(activity, 1, layers=[layer])
        (axis,) = [axis for axis in figure.axes if axis.collections]
        trains = activity.spikes[layer][:, 1]
        busy = trains.any(0).nonzero().flatten()
        assert len(axis.collections) == min(16, len(busy))
        drawn = sum(len(one.get_positions()) for one in axis.collections)
        if len(busy) <= 16:
            assert drawn == int(trains.sum())
        assert f"({int(trains.sum()):,})" in axis.get_yticklabels()[0].get_text()

    def test_membranes_are_the_potentials_and_rings_the_spikes(self, activity):
        layer = list(activity.spikes)[1]
        figure = plot.membrane(activity, 2, layer=layer, neurons=[0, 5])
        (axis,) = figure.axes
        lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 3]
        for line, neuron in zip(lines, (0, 5)):
            assert line.get_ydata().tolist() == pytest.approx(activity.potentials[layer][:, 2, neuron].tolist())
        rings = sum(len(one.get_offsets()) for one in axis.collections)
        assert rings == int(activity.spikes[layer][:, 2, [0, 5]].sum())

    def test_a_confusion_matrix_has_percent_of_rows(self):
        figure = plot.confusion(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
        shown = figure.axes[0].images[0].get_array()
        assert shown.tolist() == [[75.0, 25.0], [0.0, 0.0]]
        assert {text.get_text() for text in figure.axes[0].texts} == {"75", "25"}

    def test_a_map_of_rates_has_the_numbers(self):
        figure = plot.rates({"a": [1.0, 20.0], "b": [3.0, 4.0]})
        assert figure.axes[0].images[0].get_array().tolist() == [[1.0, 20.0], [3.0, 4.0]]

    @pytest.mark.parametrize("timesteps, levels", [(3, 1), (1, 3)])
    def test_every_picture_is_written_as_png_and_svg(self, timesteps, levels, tmp_path):
        activity = record_activity(*student_of(timesteps, levels))
        names = ["zero", "one", "two", "three"]
        pictures = {
            "raster": plot.raster(activity),
            "membrane": plot.membrane(activity),
            "answer": plot.answer(activity, names, label="two"),
            "rates": plot.rates(activity.rates(), levels=levels),
            "confusion": plot.confusion(torch.eye(4), names),
            "curves": plot.curves({"": {"x": [(1.0, 2.0), (2.0, 3.0)]}}, "x", "y"),
        }
        assert {*pictures, "save"} == {*plot.__all__}
        for name, figure in pictures.items():
            for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
                plot.save(tmp_path / f"{name}.{kind}", figure)
                assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(begins)

    def test_wrong_names_are_said(self, activity, tmp_path):
        for call, said in (
            (lambda: plot.raster(activity, 6), r"sample \(=6\) is not among the 6"),
            (lambda: plot.raster(activity, layers=["nix"]), "no layer 'nix'"),
            (lambda: plot.membrane(activity, neurons=[10**6]), r"neuron \(=1000000\) is not in"),
            (lambda: plot.confusion(torch.eye(3), ["a", "b"]), r"expected \[K, K\]"),
            (lambda: plot.save(tmp_path / "x.jpg", plot.raster(activity)), r"ends in \.png or \.svg"),
        ):
            with pytest.raises(ConfigError, match=said):
                call()
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError):
            plot.save(tmp_path / "file" / "x.png", plot.raster(activity))


def test_inline_pictures_have_ids_of_their_own_and_the_colour_of_the_page(activity):
    from spikedistill.deliver.figures import inline_svg

    texts = [inline_svg(plot.raster(activity), name) for name in ("first", "second")]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in texts]
    assert not ids[0] & ids[1]
    for text, found in zip(texts, ids):
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        assert used <= found and "#000000" not in text and "currentColor" in text
        assert "<text" in text and text.startswith("<svg") and "<metadata" not in text
