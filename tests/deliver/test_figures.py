import numpy as np
import pytest
from PIL import Image

from spikedistill.deliver import figures
from spikedistill.deliver.figures import bars, curves, heat_maps

POINTS = [(0.0, 80.0), (1.0, 20.0)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda path, figure: kept.append(figure) or save(path, figure))
    return kept


def words(figure):
    """Every text of a figure."""
    return {text.get_text() for text in figure.findobj(match=lambda part: hasattr(part, "get_text"))}


def test_a_label_has_one_look_in_every_panel_and_the_legend_knows_all(tmp_path, drawn):
    curves(tmp_path / "p.png", {"a": {"snn": POINTS}, "b": {"ann": POINTS, "snn": POINTS}}, "x", "y (%)")
    (figure,) = drawn
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    looks = {(line.get_label(), line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(lines) == 3 and len(looks) == 2
    for part in (1, 2, 3):  # told apart by colour, by marker, and by line style alone
        assert len({look[part] for look in looks}) == 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"ann", "snn"}


def test_labels_are_told_apart_without_colours_and_every_colour_is_of_the_palette():
    looks = [figures.look_of(number) for number in range(30)]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 30
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {look["color"] for look in looks} <= okabe_ito


@pytest.mark.parametrize("draw", ["curves", "bars"])
@pytest.mark.parametrize("around", [50.0, 99.45])
def test_an_axis_never_spans_a_tenth_of_a_point_and_a_percentage_ends_at_100(tmp_path, drawn, draw, around):
    if draw == "curves":
        curves(tmp_path / "p.png", {"": {"a": [(0.0, around), (1.0, around + 0.1)]}}, "x", "test accuracy (%)")
    else:
        groups = {"vgg9": {"direct": (around, 0.02), "kdsnn": (around + 0.1, 0.02)}}
        bars(tmp_path / "p.png", {"": groups}, "test accuracy (%)")
    low, high = drawn[0].axes[0].get_ylim()
    assert 2 <= high - low < 2.1 and low < around < around + 0.1 < high < 100.1


@pytest.mark.parametrize("last", [1, 2, 3, 40])
def test_epochs_and_steps_are_whole_numbers_even_where_there_is_one(tmp_path, drawn, last):
    curves(tmp_path / "p.png", {"": {"a": [(float(x), 50.0) for x in range(1, last + 1)]}}, "epoch", "accuracy (%)")
    axis = drawn[0].axes[0]
    low, high = axis.get_xlim()
    shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert shown and all(float(tick).is_integer() for tick in shown)


def test_titles_axes_and_notes_stand_on_every_picture(tmp_path, drawn):
    curves(
        tmp_path / "a.png", {"fog": {"a": POINTS}}, "severity", "test accuracy (%)", title="Noise", note="n = 3 seeds"
    )
    bars(
        tmp_path / "b.png", {"memory": {"vgg9": {"a": (1.0, 0.0), "b": (3.5, 0.0)}}}, "µJ", title="Energy", note="n = 1"
    )
    heat_maps(
        tmp_path / "c.png", {"b - a": {"fog": [0.04, -2.0]}}, ["1", "2"], "severity", "points", title="T", note="n"
    )
    for figure, expected in zip(
        drawn,
        (
            {"Noise", "n = 3 seeds", "fog", "severity", "test accuracy (%)", "a"},
            {"Energy", "n = 1", "memory", "vgg9", "µJ", "1", "3.5"},
            {"T\nn", "b - a", "fog", "severity", "points", "+0.0", "-2.0"},
        ),
    ):
        assert expected <= words(figure)


def test_maps_of_gains_have_one_scale_around_zero(tmp_path, drawn):
    heat_maps(
        tmp_path / "p.png", {"b": {"fog": [1.0, -4.0]}, "c": {"fog": [2.0, 0.0]}}, ["1", "2"], "severity", "points"
    )
    images = [axis.images[0] for axis in drawn[0].axes if axis.images]
    assert [image.get_clim() for image in images] == [(-4.0, 4.0)] * 2


def test_bars_begin_at_zero_and_are_hatched(tmp_path, drawn):
    bars(tmp_path / "p.png", {"": {"g": {"a": (1.0, 0.0), "b": (10.0, 0.0)}}}, "µJ")
    (axis,) = drawn[0].axes
    assert axis.get_ylim()[0] == 0 and len({bar.get_hatch() for bar in axis.patches}) == 2


def test_a_legend_of_long_names_stays_inside_the_picture(tmp_path):
    names = ("kdsnn", "conversion-max", "conversion-percentile", "conversion-qcfs", "teacher (ANN)")
    lines = {name: [(1.0, 1.0), (2.0, 2.0)] for name in names}
    curves(tmp_path / "p.png", {"": lines}, "x", "y", note="10000 test images, mean of n = 3 seeds (0, 1, 2)")
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert (pixels[:, [0, -1]] == 255).all() and (pixels != 255).any()
