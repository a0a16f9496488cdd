import random

import pytest

from spikedistill.data.noise import SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.immunity import Score
from spikedistill.evaluate.scores import (
    clean_accuracy,
    comparable,
    fall,
    mean_accuracy,
    mean_corruption_error,
    relative_corruption_error,
)


def scores_of(network, clean, curves, kind="natural"):
    """Scores of a network: its clean accuracy, and name -> five accuracies."""
    return [Score(network, "clean", "clean", 0, clean)] + [
        Score(network, kind, name, severity, accuracy)
        for name, heights in curves.items()
        for severity, accuracy in zip(SEVERITIES, heights)
    ]


LINES = [
    *scores_of("a", 90.0, {"fog": [80.0, 70.0, 60.0, 50.0, 40.0]}),
    *scores_of("b", 80.0, {"fog": [76.0, 72.0, 68.0, 64.0, 60.0]}),
]
"""Two straight lines: errors of a are 20 30 40 50 60, of b 24 28 32 36 40; above the clean ones 10..50 and 4..20."""


def test_a_fall_is_what_lies_between_clean_and_the_mean():
    assert (clean_accuracy(LINES, "a"), mean_accuracy(LINES, "a", "fog"), fall(LINES, "a", "fog")) == (90, 60, 30)
    assert fall(LINES, "b", "fog") == 12


def test_errors_are_in_relation_to_the_baseline():
    assert mean_corruption_error(LINES, "a", "b") == pytest.approx(100 * 200 / 160)
    assert mean_corruption_error(LINES, "b", "b") == pytest.approx(100.0)


def test_relative_errors_leave_out_what_is_wrong_on_clean_images():
    assert relative_corruption_error(LINES, "a", "b") == pytest.approx(100 * 150 / 60)
    assert relative_corruption_error(LINES, "b", "a") == pytest.approx(100 * 60 / 150)
    assert relative_corruption_error(LINES, "b", "b") == pytest.approx(100.0)


@pytest.mark.parametrize("lead", [-30.0, 0.0, 1.87, 9.5])
def test_a_lead_everywhere_changes_errors_but_no_relative_error(lead):
    """A network that is so many points better at every severity loses just what the baseline loses."""
    ahead = scores_of("c", 80.0 + lead, {"fog": [76.0 + lead, 72.0 + lead, 68.0 + lead, 64.0 + lead, 60.0 + lead]})
    assert relative_corruption_error(LINES + ahead, "c", "b") == pytest.approx(100.0)
    assert mean_corruption_error(LINES + ahead, "c", "b") == pytest.approx(100 * (160 - 5 * lead) / 160)


def test_relative_errors_are_means_of_ratios_as_the_paper_writes_them():
    """Sum over severities of the error less the clean error, over the baseline's; then the mean over corruptions."""
    draw = random.Random(0)
    names = ["fog", "snow", "frost", "jpeg"]
    curves = {who: {name: [draw.uniform(10, 80) for _ in SEVERITIES] for name in names} for who in "ab"}
    scores = scores_of("a", 93.0, curves["a"]) + scores_of("b", 88.0, curves["b"])
    ratios = [
        sum((100 - height) - (100 - 93.0) for height in curves["a"][name])
        / sum((100 - height) - (100 - 88.0) for height in curves["b"][name])
        for name in names
    ]
    assert relative_corruption_error(scores, "a", "b") == pytest.approx(100 * sum(ratios) / 4)


@pytest.mark.parametrize("height", [80.0, 80.5, 90.0])
def test_what_costs_the_baseline_nothing_is_left_out(height):
    """Saturation of grey images, or a brightness that helps: the ratio would divide by zero, or turn its sign."""
    more = [
        *(Score("a", "natural", "saturate", severity, 50.0) for severity in SEVERITIES),
        *(Score("b", "natural", "saturate", severity, height) for severity in SEVERITIES),
    ]
    assert comparable(LINES + more, "a", "b", "natural") == ["fog"]
    assert relative_corruption_error(LINES + more, "a", "b") == pytest.approx(250.0)
    alone = [score for score in LINES + more if score.name != "fog"]
    with pytest.raises(ConfigError, match="No 'natural' that was measured for 'a' and 'b' costs 'b' accuracy"):
        relative_corruption_error(alone, "a", "b")


def test_equal_falls_are_equal_whatever_the_rounding():
    ours = scores_of("a", 10.3, {"fog": [0.2] * 5})
    theirs = scores_of("b", 10.2, {"fog": [0.1] * 5})
    # as float64, 10.3 - 0.2 and 10.2 - 0.1 differ
    assert fall(ours, "a", "fog") == fall(theirs, "b", "fog")


def test_only_perturbations_that_both_met_are_compared():
    more = [Score("a", "natural", "snow", severity, 10.0) for severity in SEVERITIES]
    assert relative_corruption_error(LINES + more, "a", "b") == pytest.approx(250.0)


def test_what_was_not_measured_is_refused():
    with pytest.raises(ConfigError, match="no 'noise' of 'a'"):
        mean_corruption_error(LINES, "a", "b", "noise")
    with pytest.raises(ConfigError, match="0 severities of 'fog' for 'c'"):
        mean_corruption_error(LINES, "a", "c")
    with pytest.raises(ConfigError, match="4 severities of 'fog' for 'b'"):
        relative_corruption_error(LINES[:-1], "a", "b")
    with pytest.raises(ConfigError, match="no clean accuracy of 'b'"):
        relative_corruption_error([score for score in LINES if score.kind != "clean" or score.network != "b"], "a", "b")


def test_an_attack_is_counted_from_the_images_that_were_attacked():
    scores = [Score("a", "clean", "clean", 0, 90.0), Score("a", "attacked", "attacked", 0, 84.0)]
    scores += [Score("a", "attack", "fgsm", severity, 80.0 - severity) for severity in SEVERITIES]
    scores += [Score("a", "natural", "fog", severity, 80.0 - severity) for severity in SEVERITIES]
    assert fall(scores, "a", "fgsm") == 7.0 and fall(scores, "a", "fog") == 13.0
