import numpy as np
from PIL import Image

from spikedistill.deliver import figures
from spikedistill.deliver.figures import curves


def test_a_label_has_one_colour_in_every_panel_and_the_legend_knows_all(tmp_path, monkeypatch):
    kept = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda path, figure, axes: kept.append(figure) or save(path, figure, axes))
    points = [(0.0, 1.0), (1.0, 2.0)]
    curves(tmp_path / "p.png", {"a": {"snn": points}, "b": {"ann": points, "snn": points}}, "x", "y")
    (figure,) = kept
    drawn = [(line.get_label(), line.get_color()) for axis in figure.axes for line in axis.get_lines()]
    assert len(drawn) == 3 and len(set(drawn)) == 2 and len({colour for _, colour in drawn}) == 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"ann", "snn"}


def test_a_legend_of_long_names_stays_inside_the_picture(tmp_path):
    names = ("kdsnn", "conversion-max", "conversion-percentile", "conversion-qcfs", "teacher (ANN)")
    curves(tmp_path / "p.png", {"": {name: [(1.0, 1.0), (2.0, 2.0)] for name in names}}, "x", "y")
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert (pixels[:, [0, -1]] == 255).all() and (pixels != 255).any()
