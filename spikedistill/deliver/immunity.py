"""How immune finished networks are to noise: scores of each, kept as they come, a table and curves."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

from torch import nn

from spikedistill.data.images import ImageSet
from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.figures import curves
from spikedistill.deliver.record import Record, its_teacher, read_records, some_of
from spikedistill.deliver.tables import markdown
from spikedistill.errors import ConfigError, one_of
from spikedistill.evaluate.accuracy import standard_error
from spikedistill.evaluate.attacks import ATTACKS, gradients
from spikedistill.evaluate.immunity import (
    EVENT_KINDS,
    KINDS,
    Score,
    immunity,
    perturbations,
)
from spikedistill.evaluate.scores import (
    clean_accuracy,
    comparable,
    fall,
    mean_accuracy,
    mean_corruption_error,
    relative_corruption_error,
    shared,
)
from spikedistill.files import fingerprint_of, write_csv, write_text
from spikedistill.train.run import Run

DEFINITIONS = {"natural": 2, "hardware": 2, "attack": 2}
"""Which edition of a kind of perturbation is measured: scores of different ones are not put together by ``resume``."""
ERRORS = """Accuracies in percent on {images} of {total} test images; ± is their standard error (binomial), of a mean
over perturbations at most that. Attacks are measured on fewer images, drawn from these.

"""
GRADIENTS = """
Attacks: means over five severities. Worst: images that are answered rightly without an attack, and that no gradient
fools: a network's own, that through other surrogates (named with alpha or width), or its teacher's (a transfer).

"""


def measure_immunity(
    paths: Sequence[Path],
    out: Path,
    *,
    kinds: Sequence[str] | None = None,
    images: int | None = None,
    attacked: int = 500,
    seed: int = 0,
    baseline: str | None = None,
    data_dir: str | None = None,
    resume: bool = False,
    trust_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[str], list[list[str]]]:
    """Measure finished runs under noise, corruptions, faults and attacks.

    Args:
        paths: run directories of ``teach`` and ``distill`` on one data set.
        out: where scores.csv, immunity.md and a picture for each kind go.
        kinds: which kinds of perturbation; by default all that there are for such images.
        images: how many test images, evenly spaced; all by default.
        attacked: how many of them are attacked, drawn by the seed; by the gradient of its teacher too where a student's
            teacher is still there.
        seed: of all that is drawn.
        baseline: the run that the others are compared to; by default the first.
        data_dir: another place of the data than the first run was trained with.
        resume: go on with what lies in ``out``.
        trust_code: execute the Python code that a run may name as its network.
        say: told what was measured.

    Returns:
        Columns and rows of a table, one row a network: accuracies in percent with their standard error.

    Raises:
        ConfigError: if the baseline is none of the runs, or there is no such kind.
    """
    if attacked < 1:
        raise ConfigError(f"attacked (={attacked}) must be 1 image or more; to leave attacks away name other kinds.")
    records, data = read_records(paths, data_dir)
    kinds = kinds or (EVENT_KINDS if data.frames else KINDS)
    measured = perturbations(kinds)
    names = [record.name for record in records]
    baseline = names[0] if baseline is None else baseline
    one_of("run to compare with", baseline, names)
    pixels, labels = some_of(data, images)
    networks = {record.name: record.network(trust_code) for record in records}
    run = Run(out)
    weights = {name: fingerprint_of(network) for name, network in networks.items()}
    asked: dict[str, Any] = {
        "runs": [str(path) for path in paths],
        "weights": weights,
        "kinds": list(kinds),
        "images": len(pixels),
    }
    if changed := {kind: DEFINITIONS[kind] for kind in kinds if kind in DEFINITIONS}:
        asked["definitions"] = changed
    run.start({"kind": "immunity", **asked, "attacked": attacked, "seed": seed}, resume)
    known = [Score(**line) for line in run.lines("scores")]

    def keep(score: Score) -> None:
        run.append("scores", asdict(score))
        known.append(score)
        place = f"{score.name} {score.severity}" if score.severity else "clean"
        say(f"{len(known)} of at most {most}: {score.network}, {place}: {score.accuracy:.2f} %")

    places = {record.name: record.place() for record in records}
    for name, network in networks.items():
        places[name].prepare(network)
    teachers = _teachers(records, data, trust_code, say) if "attack" in kinds else {}
    for name, teacher in teachers.items():
        places[name].prepare(teacher)
    most = sum(_count(measured, network, teachers.get(name)) for name, network in networks.items())
    scores = immunity(
        networks,
        pixels,
        labels,
        kinds=kinds,
        seed=seed,
        dtypes={name: place.dtype for name, place in places.items()},
        attacked=attacked,
        teachers=teachers,
        known=tuple(known),
        keep=keep,
    )
    columns, rows = with_errors(*summary(scores, names, kinds, baseline), scores)
    lines = [(*astuple(score), f"{score.error:.4f}") for score in scores]
    write_csv(out / "scores.csv", [*(field.name for field in fields(Score)), "error"], lines)
    text = ERRORS.format(images=len(pixels), total=len(data.test_images)) + markdown(columns, rows)
    if "attack" in kinds:
        text += GRADIENTS + markdown(*attack_table(scores, names))
    write_text(out / "immunity.md", text)
    for kind in kinds:
        curves(out / f"{kind}.png", panels(scores, names, kind), "severity", "accuracy (%)")
    run.write("results", {"baseline": baseline, "table": [columns, *rows]})
    return columns, rows


def _teachers(
    records: Sequence[Record], data: ImageSet, trust_code: bool, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """By student its teacher, where that is still there."""
    found = {record.name: its_teacher(record, data, trust_code) for record in records if record.is_student}
    for name in (name for name, teacher in found.items() if teacher is None):
        say(f"{name}: its teacher is not there, so it is attacked by its own gradients alone")
    return {name: teacher for name, teacher in found.items() if teacher is not None}


def _count(measured: Sequence[tuple[str, str]], network: nn.Module, teacher: nn.Module | None) -> int:
    """How many scores of a network there are at most."""
    attacks = sum(kind == "attack" for kind, _ in measured)
    each = len(measured) + attacks * len(gradients(network, teacher))
    return 1 + bool(attacks) + len(SEVERITIES) * each


def with_errors(
    columns: Sequence[str], rows: Sequence[Sequence[str]], scores: Sequence[Score]
) -> tuple[list[str], list[list[str]]]:
    """A table of ``summary`` with number of images and number format, and the standard error of each accuracy."""
    told = []
    for name, *cells in rows:
        mine = [score for score in scores if score.network == name]
        clean = next(score for score in mine if score.kind == "clean")
        counts = {score.kind: score.images for score in mine}
        shown = [
            f"{cell} ± {standard_error(float(cell), counts[column]):.2f}" if cell and counts.get(column) else cell
            for column, cell in zip(columns[1:], cells)
        ]
        told.append([name, str(clean.images or ""), clean.format, *shown])
    return [columns[0], "images", "format", *columns[1:]], told


def attack_table(scores: Sequence[Score], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A row a network and attack: accuracy on the attacked images, clean, at worst, and by each gradient."""
    by = dict.fromkeys(score.name.partition(" by ")[2] for score in scores if score.kind == "gradient")
    rows = []
    for name in names:
        for what in ATTACKS:
            mine = [score for score in scores if score.network == name and score.images]
            clean = [score for score in mine if score.kind == "attacked"]
            found = [[s for s in mine if s.name == title] for title in (what, *(f"{what} by {one}" for one in by))]
            cells = ["" if not group else _with_error(group) for group in (clean, *found)]
            rows.append([name, clean[0].format, str(clean[0].images), what, *cells])
    return ["network", "format", "images", "attack", "clean", "worst", *by], rows


def _with_error(scores: Sequence[Score]) -> str:
    mean = statistics.fmean(score.accuracy for score in scores)
    return f"{mean:.2f} ± {standard_error(mean, scores[0].images):.2f}"


def summary(
    scores: Sequence[Score], names: Sequence[str], kinds: Sequence[str], baseline: str
) -> tuple[list[str], list[list[str]]]:
    """A row a network: accuracy clean and as a mean over each kind, and where it stands against the baseline.

    The relative corruption error comes first, as it alone leaves out what either network has on clean images. It is
    given for disturbed inputs, which are the same for all networks; faults and attacks are others for each.
    """
    disturbed = [kind for kind in kinds if kind in ("noise", "natural", "event")]
    columns = ["network", "clean", *kinds, *(f"relative mCE, {kind} ({baseline} = 100)" for kind in disturbed)]
    columns += [f"mCE ({baseline} = 100)", f"falls less than {baseline}", f"higher mean than {baseline}"]
    rows = []
    for name in names:
        found = [[s.accuracy for s in scores if s.network == name and s.kind == kind] for kind in kinds]
        means = [f"{statistics.fmean(values):.2f}" if values else "" for values in found]
        relative = [_relative(scores, name, baseline, kind) for kind in disturbed]
        error = f"{mean_corruption_error(scores, name, baseline, 'natural'):.2f}" if "natural" in kinds else ""
        wins = ["", ""] if name == baseline else _wins(scores, name, baseline, kinds)
        rows.append([name, f"{clean_accuracy(scores, name):.2f}", *means, *relative, error, *wins])
    return columns, rows


def _relative(scores: Sequence[Score], name: str, baseline: str, kind: str) -> str:
    """The relative corruption error, and of how many perturbations it is, where some have none."""
    counted, all_of_them = comparable(scores, name, baseline, kind), shared(scores, name, baseline, kind)
    if not counted:
        return ""
    part = f" ({len(counted)} of {len(all_of_them)})" if len(counted) < len(all_of_them) else ""
    return f"{relative_corruption_error(scores, name, baseline, kind):.2f}{part}"


def _wins(scores: Sequence[Score], name: str, baseline: str, kinds: Sequence[str]) -> list[str]:
    """Under how many perturbations of each kind it loses less than the baseline does, and has the higher mean."""
    falls, means = [], []
    for kind in kinds:
        both = shared(scores, name, baseline, kind)
        less = sum(fall(scores, name, what) < fall(scores, baseline, what) for what in both)
        higher = sum(mean_accuracy(scores, name, what) > mean_accuracy(scores, baseline, what) for what in both)
        falls += [f"{less} of {len(both)} {kind}"] if both else []
        means += [f"{higher} of {len(both)} {kind}"] if both else []
    return [", ".join(falls), ", ".join(means)]


def panels(scores: Sequence[Score], names: Sequence[str], kind: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For every perturbation of a kind the curve of each network over severity 0..5."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _, what in perturbations([kind]):
        for name in names:
            clean = "attacked" if kind == "attack" else "clean"
            points = [(s.severity, s.accuracy) for s in scores if s.network == name and s.name in (clean, what)]
            if len(points) > 1:
                drawn.setdefault(what, {})[name] = [(float(x), y) for x, y in sorted(points)]
    return drawn
