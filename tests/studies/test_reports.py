"""What a report says is computed from the rows of the study's CSV file: closed forms, and the published files."""

import dataclasses
import re
from pathlib import Path

import pytest

from spikedistill.evaluate.energy import micro
from spikedistill.evaluate.immunity import perturbations
from spikedistill.studies.reports import (
    NOISE_KINDS,
    Row,
    read_rows,
    report_front,
    report_noise,
    report_pairs,
    report_samples,
    report_timesteps,
)

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MADE_BEFORE = " †"
"""Marks rows that were measured with a definition that was corrected since."""


def row(method, value, seed=0, setting="", student="vgg9", timesteps=4):
    return Row("study", "resnet18", student, method, setting, seed, timesteps, "accuracy", value)


def cells(report, first):
    (line,) = [line for line in report.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    "name, report",
    [
        ("kdsnn-pairs", report_pairs),
        ("kdsnn-mnist", report_pairs),
        ("kdsnn-timesteps", report_timesteps),
        ("kdsnn-noise", report_noise),
    ],
)
def test_published_reports_are_what_their_csv_says(name, report):
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert report(read_rows(RESULTS / f"{name}.csv")) in page.replace(MADE_BEFORE, "")


def test_what_is_said_of_the_corruptions_that_stand_is_computed_from_the_others():
    page = (RESULTS / "kdsnn-noise.md").read_text(encoding="utf-8")
    marked = [line.split(MADE_BEFORE)[0].strip("| ") for line in page.splitlines() if f"{MADE_BEFORE} |" in line]
    stand = ("defocus-blur", "brightness", "contrast", "jpeg")
    assert marked == ["all natural", *(name for kind, name in perturbations(["natural"]) if name not in stand)]
    rows = read_rows(RESULTS / "kdsnn-noise.csv")
    report = report_noise([found for found in rows if found.setting.split(":")[0] not in marked])
    said = dict(zip(cells(report, "network"), cells(report, "kdsnn")))
    more, further = cells(report, "all natural")[-2:]
    told = " ".join(page.split())
    for expected in (
        f"relative mCE of {said['relative mCE, natural (direct = 100)']} and an mCE of {said['mCE (direct = 100)']},",
        f"falls less under {said['falls less than direct'].split(', ')[1]}",
        f"higher mean under {said['higher mean than direct'].split(', ')[1]}",
        f"gains {more} points and falls {further} points further",
    ):
        assert expected.removesuffix(" natural") in told, expected


def test_published_energies_are_those_of_their_csv():
    page = (RESULTS / "kdsnn-energy.md").read_text(encoding="utf-8")
    for found in read_rows(RESULTS / "kdsnn-energy.csv"):
        shown = {"accuracy": f"{found.value:.2f} %", "spikes": f"{found.value:.0f}"}
        expected = shown.get(found.metric, micro(found.value))
        assert found.metric == "synops" or f"| {expected}" in page, found


def test_the_page_of_results_joins_the_reports():
    page = (RESULTS.parent / "results.md").read_text(encoding="utf-8")
    reports = [file for file in RESULTS.glob("*.md") if "`spikedistill reproduce" in file.read_text(encoding="utf-8")]
    assert len(reports) > 5
    for file in reports:
        assert file.read_text(encoding="utf-8").replace("](", "](results/") in page, file


def test_gains_have_the_p_of_a_paired_test():
    """Gains of 1, 2 and 3 points: mean 2, deviation 1, t = 2 sqrt(3) with two degrees, p = 1 - t / sqrt(2 + t^2)."""
    direct = [row("direct", value, seed) for seed, value in enumerate((60.0, 70.0, 80.0))]
    taught = [row("kdsnn", value, seed) for seed, value in enumerate((61.0, 72.0, 83.0))]
    report = report_pairs([row("teacher", 90.0, student="resnet18"), *direct, *taught])
    assert cells(report, "resnet18 -> vgg9")[1:] == [
        *("90.00", "70.00 ± 10.00", "72.00 ± 11.00", "+2.00 ± 1.00 (p = 0.074)")
    ]
    assert "0 of 1 (none). Not significant: kdsnn of resnet18 -> vgg9." in report


def test_one_seed_is_not_tested():
    report = report_pairs([row("teacher", 90.0, student="resnet18"), row("direct", 60.0), row("kdsnn", 61.5)])
    assert cells(report, "resnet18 -> vgg9")[1:] == ["90.00", "60.00", "61.50", "+1.50"]
    assert "other teachers" not in report and "assistant" not in report
    assert "ignificant" not in report


def test_conversion_catches_up_where_it_is_as_good():
    steps = [row("kdsnn", 70.0, timesteps=2), row("kdsnn", 80.0, timesteps=4)]
    steps += [row("conversion-max", 10.0 * T, timesteps=T) for T in (1, 2, 4, 7)]
    report = report_timesteps([row("teacher", 90.0, student="resnet18"), *steps])
    assert "- conversion-max reaches the T=2 student (70.00 %): first at T=7.\n" in report
    assert "- conversion-max reaches the T=4 student (80.00 %): not up to T=7.\n" in report
    assert cells(report, "kdsnn") == ["kdsnn", "", "70.00", "80.00", ""]
    assert "\n\nAccuracy of the teacher: resnet18 90.00 %.\n\n- conversion" in report


def noisy(method, clean, slope, seed):
    """A student that loses so many points a severity under each perturbation."""
    names = [name for _, name in perturbations(NOISE_KINDS)]
    disturbed = [row(method, clean - slope * s, seed, f"{name}:{s}") for name in names for s in range(1, 6)]
    return [row(method, clean, seed, "clean"), *disturbed]


def test_noise_says_first_what_it_costs():
    """Direct falls by 3 x 2 = 6 points on average, KDSNN, ten points ahead, by 3 x 3 = 9: it wins all but this."""
    rows = [line for seed in range(3) for line in noisy("direct", 70.0 + seed, 2.0, seed)]
    rows += [
        line for seed, lead in enumerate((9.0, 10.0, 11.0)) for line in noisy("kdsnn", 70.0 + seed + lead, 3.0, seed)
    ]
    report = report_noise(rows)
    columns, kdsnn = cells(report, "network"), cells(report, "kdsnn")
    said = dict(zip(columns, kdsnn))
    assert said["relative mCE, noise (direct = 100)"] == said["relative mCE, natural (direct = 100)"] == "150.00"
    assert columns.index("relative mCE, natural (direct = 100)") < columns.index("mCE (direct = 100)")
    assert said["mCE (direct = 100)"] == f"{100 * (19 + 9) / (29 + 6):.2f}"
    assert said["falls less than direct"] == "0 of 7 noise, 0 of 14 natural"
    assert said["higher mean than direct"] == "7 of 7 noise, 14 of 14 natural"
    assert cells(report, "clean")[-2:] == ["+10.00 ± 1.00 (p = 0.003)", ""]
    for title in ("all noise", "all natural", "fog"):
        assert cells(report, title)[-2:] == ["+7.00 ± 1.00 (p = 0.007)", "+3.00 ± 0.00"]


def test_noise_is_reported_without_kdsnn_too():
    report = report_noise(noisy("direct", 70.0, 2.0, 0))
    assert cells(report, "fog")[1:] == ["64.00", "", ""]


ROOT = RESULTS.parents[1]
PAGE = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())


def test_the_page_has_the_figures_of_the_pairs():
    report = report_pairs(read_rows(RESULTS / "kdsnn-pairs.csv"))
    for pair, named in (("resnet18", "ResNet-18"), ("vgg9", "VGG-9"), ("wrn16-2", "WRN-16-2")):
        _, _, *accuracies, _, _, gain = cells(report, f"resnet18 -> {pair}")
        gain, p = gain.strip("+)").split(" (p = ")
        (line,) = re.findall(
            rf"\| {named}, width 8, \w+ \| ([^|]* \| [^|]* \| [^|]* \| [^|]* \| [^|]* \| [^|]*) \|", PAGE
        )
        assert line.replace("*", "").split(" | ") == [*accuracies, gain, p]
    p = [
        found
        for pair in ("resnet18", "vgg9", "wrn16-2")
        for found in re.findall(r"p = ([\d.]+)", " ".join(cells(report, f"resnet18 -> {pair}")))
    ]
    assert f"VGG-9 (p = {p[3]}, {p[4]}), and all three for WRN-16-2 (p = {', '.join(p[6:])})" in PAGE
    assert f"of ResNet-18 (p = {', '.join(p[:3])}) and both together for VGG-9 (p = {p[5]})" in PAGE
    assert sum(float(found) >= 0.05 for found in p) == 5 and "5 of the 9 gains are not significant at 5 %" in PAGE
    assert "all these tests: 0." in report and "Holm's correction for nine tests none is" in PAGE


def test_the_page_has_the_figures_of_mnist_and_time_steps():
    *_, direct, kdsnn, gain = cells(report_pairs(read_rows(RESULTS / "kdsnn-mnist.csv")), "vgg9 -> vgg9")
    assert f"{kdsnn} % with KDSNN, {direct} % by cross-entropy only" in PAGE and gain[gain.index("(") :] in PAGE
    report = report_timesteps(read_rows(RESULTS / "kdsnn-timesteps.csv"))
    kdsnn, percentile, qcfs = (
        cells(report, f"{name}")[1:] for name in ("kdsnn", "conversion-percentile", "conversion-qcfs")
    )
    for name, values in (("student", kdsnn), ("conversion", percentile), ("QCFS", qcfs)):
        (line,) = re.findall(rf"\| (?:KDSNN )?{name}[^|]*\|((?: [\d.]* ?\|){{7}})", PAGE)
        assert [cell.strip() for cell in line.split("|")[:-1]] == [*values[:6], values[-1]]


def test_the_page_leads_with_what_noise_costs():
    report = report_noise(read_rows(RESULTS / "kdsnn-noise.csv"))
    said = dict(zip(cells(report, "network"), cells(report, "kdsnn")))
    relative = [float(said[f"relative mCE, {kind} (direct = 100)"]) for kind in NOISE_KINDS]
    assert [f"{value:.1f}" for value in relative] == ["105.9", "101.7"]
    assert "error is 105.9 under noises and 101.7 under corruptions**" in PAGE
    assert "relative corruption error 105.9 " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert said["falls less than direct"] == "0 of 7 noise, 4 of 14 natural"
    assert "falls less under 0 of 7 noises and 4 of 14 corruptions" in PAGE
    assert said["higher mean than direct"] == "3 of 7 noise, 11 of 14 natural"
    assert "the higher one under 3 noises and 11 corruptions" in PAGE
    for title, column in (
        ("clean", -2),
        ("all noise", -2),
        ("all natural †", -2),
        ("all noise", -1),
        ("all natural †", -1),
    ):
        gain, p = cells(report, title.removesuffix(MADE_BEFORE))[column].strip("+)").split(" (p = ")
        assert gain in PAGE and p in PAGE, (title, gain, p)
    paragraph = PAGE[PAGE.index("## Noise") :]
    assert paragraph.index("relative corruption error") < paragraph.index("higher on clean images")


def test_every_figure_of_the_benchmarks_has_a_record():
    records = (ROOT / "LOG.md").read_text(encoding="utf-8") + (RESULTS.parent / "results.md").read_text(
        encoding="utf-8"
    )
    told = re.findall(r"(?<![\d.])\d+\.\d\d+(?![\d.])", PAGE)
    assert [found for found in told if found not in records] == [] and len(told) > 100


def front(method, setting, accuracies, spikes):
    """Rows of a method at a setting, with one accuracy and count of spikes for each seed."""
    rows = [row(method, value, seed, setting) for seed, value in enumerate(accuracies)]
    return rows + [dataclasses.replace(one, metric="spikes", value=count) for one, count in zip(rows, spikes)]


class TestFront:
    DEFAULT_CONVERSION = front("homogeneous", "4", (90.0, 91.0), (1000.0, 2000.0))

    def test_spikes_and_gains_are_beside_those_of_the_first_row_seed_by_seed(self):
        other = front("budget", "500", (91.0, 92.5), (500.0, 500.0))
        report = report_front([row("teacher", 95.0), *self.DEFAULT_CONVERSION, *other])
        assert cells(report, "homogeneous")[1:] == ["4", "90.50 ± 0.71", "1500", "", "0.00 ± 0.00"]
        gain = "+1.25 ± 0.35 (p = 0.126)"
        assert cells(report, "budget")[1:] == ["500", "91.75 ± 1.06", "500", gain, "62.50 ± 17.68"]
        assert f"no loss of mean accuracy: budget 500, 62.5 % fewer, {gain} points." in report
        assert "|\n\nAccuracy of the teacher: resnet18 95.00 %.\n\nFewest" in report

    def test_what_loses_accuracy_is_not_the_best_however_few_its_spikes(self):
        silent = front("budget", "1", (10.0, 10.0), (1.0, 1.0))
        fewer = front("budget", "900", (90.0, 91.0), (900.0, 1800.0))
        assert "budget 900, 10.0 % fewer" in report_front([*self.DEFAULT_CONVERSION, *silent, *fewer])
        assert "Every setting loses accuracy" in report_front([*self.DEFAULT_CONVERSION, *silent])


@pytest.fixture
def samples():
    """Rows of direct training and of Cross KD, with two seeds and early exit."""
    both = {"direct": (60.0, 62.0, 5.0, 59.0), "cross-kd": (63.0, 66.0, 4.0, 62.5)}
    rows = [row("teacher", 95.0, student="resnet18")]
    for method, (first, second, steps, early) in both.items():
        rows += [row(method, first, 0), row(method, second, 1)]
        rows.append(dataclasses.replace(row(method, steps), metric="early_exit_steps"))
        rows.append(dataclasses.replace(row(method, early), metric="early_exit_accuracy"))
    return rows


def test_a_gain_is_beside_its_error_over_seeds_and_samples(samples):
    report = report_samples([*samples, dataclasses.replace(row("cross-kd", 0.7, -1), metric="gain_error")])
    assert cells(report, "cross-kd")[1:] == ["+3.50 ± 0.70", "5.0", "4.00", "62.50"]
    assert cells(report, "direct")[1:] == ["", "", "5.00", "59.00"]
    assert cells(report, "resnet18 -> vgg9")[1:4] == ["95.00", "61.00 ± 1.41", "64.50 ± 2.12"]


def test_one_seed_has_no_error(samples):
    report = report_samples([found for found in samples if found.seed == 0])
    assert cells(report, "cross-kd")[1:] == ["", "", "4.00", "62.50"]


def test_stages_are_compared_with_one_stage():
    one = [row("distilling-spikes", value, seed) for seed, value in enumerate((70.0, 70.0))]
    two = [row("distilling-spikes-stages", value, seed) for seed, value in enumerate((71.0, 72.0))]
    assistant, snn = (dataclasses.replace(row("teacher", 80.125), teacher=name) for name in ("assistant", "snn"))
    report = report_pairs([row("teacher", 90.0, student="resnet18"), assistant, snn, *one, *two])
    assert "|\n\nAccuracy of the other teachers: assistant 80.12 %, snn 80.12 %.\n\n" in report
    assert "The students of distilling-spikes-stages were taught by the assistant.\n" in report
    assert "Two stages gain more than one in 1 of 1 pairs (resnet18 -> vgg9: +1.50 ± 0.71 (p = 0.205))." in report
