"""Noise immunity of finished runs: scores that are saved as they are measured, a table and pictures."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

from torch import nn

from spikedistill.compute.place import Precision
from spikedistill.data.images import ImageSet
from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.figures import curves, heat_maps
from spikedistill.deliver.record import Record, RunDirectories, its_teacher, read_records, some_of
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
from spikedistill.shapes import steps_by_levels
from spikedistill.student.student import Student
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

DEFINITIONS = {"natural": 2, "hardware": 2, "attack": 2}
"""Version of each kind of perturbation. ``resume`` does not combine scores of different versions."""
ERRORS = """Accuracies in percent on {images} of {total} test images; ± is the binomial standard error. A mean over
perturbations has at most this error. Attacks are measured on fewer images, drawn from these.

"""
TITLES = {
    "noise": "noise on pixels",
    "natural": "natural corruptions",
    "hardware": "hardware faults",
    "attack": "attacks, worst gradient",
    "event": "faults of event cameras",
}
"""Names of the kinds of perturbation in pictures."""
MOST_PANELS = 8
"""With more perturbations a picture is one heat map of gains instead of a panel for each."""
GRADIENTS = """
Attacks: means over five severities. Worst: percentage of images that are classified correctly without an attack and
that no gradient fools. Gradients: the network's own, through other surrogates (named with alpha or width), and its
teacher's (a transfer attack).

"""


def measure_immunity(
    paths: RunDirectories,
    out: Path = Path("runs/immunity"),
    *,
    kinds: Sequence[str] = (),
    images: int | None = None,
    attacked: int = 500,
    seed: int = 0,
    baseline: str | None = None,
    data_dir: str | None = None,
    resume: bool = False,
    trust_code: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    precision: Precision | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Measure finished runs under noise, corruptions, faults and attacks.

    Args:
        paths: run directories of 'teach' and 'distill' on one data set.
        out: output folder for scores.csv, immunity.md and a picture for each kind.
        kinds: noise (7, on pixels), natural (14 corruptions), hardware (5 faults), attack (FGSM, PGD); for event frames
            event (5) and hardware (default: all of them).
        images: number of test images, evenly spaced (default: all).
        attacked: number of images that are attacked, drawn by the seed. Students are also attacked by their teacher's
            gradient if the teacher still exists.
        seed: seed of all random choices.
        baseline: name of the run that the others are compared to (default: the first).
        data_dir: folder of the data, if it is no longer the one of the first run.
        resume: go on with the scores in the output folder.
        trust_code: execute the Python code that a run may name as its network.
        progress: shows the work; silent by default.
        device: cpu, cuda ...; auto takes a GPU if there is one (default: where each run was trained).
        precision: number format of the large operations; auto takes what suits the device (default: that of each run).
            With another precision 'resume' starts again.

    Returns:
        Columns and rows of a table, one row per network: accuracies in percent with their standard errors.

    Raises:
        ConfigError: if the baseline is not one of the runs, or a kind or the device does not exist.
    """
    if attacked < 1:
        raise ConfigError(f"attacked (={attacked}) must be 1 image or more. To omit attacks, name the other kinds.")
    records, data = read_records(paths, data_dir)
    kinds = kinds or (EVENT_KINDS if data.frames else KINDS)
    measured = perturbations(kinds)
    names = [record.name for record in records]
    baseline = names[0] if baseline is None else baseline
    one_of("run to compare with", baseline, names)
    if not data.test_labelled:
        raise ConfigError(f"The test images of '{data.name}' have no labels, and immunity is measured in accuracy.")
    pixels, labels = some_of(data, images)
    places = {record.name: record.place(device, precision) for record in records}
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
    if precision is not None:
        asked["precision"] = precision
    run.start({"kind": "immunity", **asked, "attacked": attacked, "seed": seed}, resume)
    known = [Score(**line) for line in run.lines("scores")]

    for name, network in networks.items():
        places[name].prepare(network)
    progress = progress or Progress.silent()
    teachers = _teachers(records, data, trust_code, progress.say) if "attack" in kinds else {}
    for name, teacher in teachers.items():
        places[name].prepare(teacher)
    most = sum(_count(measured, network, teachers.get(name)) for name, network in networks.items())
    with progress.part("perturbations", most) as seen:
        seen(len(known))

        def keep(score: Score) -> None:
            run.append("scores", asdict(score))
            place = f"{score.name} {score.severity}" if score.severity else "clean"
            seen(1, f"{score.network}, {place}: {score.accuracy:.2f} %")

        scores = immunity(
            networks,
            pixels,
            labels,
            kinds=kinds,
            seed=seed,
            dtypes={name: place.dtype for name, place in places.items()},
            attacked=attacked,
            teachers=teachers,
            known=known,
            keep=keep,
        )
    columns, rows = with_steps(*with_errors(*summary(scores, names, kinds, baseline), scores), networks)
    lines = [(*astuple(score), f"{score.error:.4f}") for score in scores]
    write_csv(out / "scores.csv", [*(field.name for field in fields(Score)), "error"], lines)
    text = ERRORS.format(images=len(pixels), total=len(data.test_images)) + markdown(columns, rows)
    if "attack" in kinds:
        text += GRADIENTS + markdown(*attack_table(scores, names))
    write_text(out / "immunity.md", text)
    for kind in kinds:
        some = min(attacked, len(pixels)) if kind == "attack" else len(pixels)
        draw_kind(out / f"{kind}.png", scores, names, kind, baseline, "Immunity", f"{some} test images, seed {seed}")
    run.write("results", {"baseline": baseline, "table": [columns, *rows]})
    return columns, rows


def _teachers(
    records: Sequence[Record], data: ImageSet, trust_code: bool, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """By student its teacher, if that still exists."""
    found = {record.name: its_teacher(record, data, trust_code) for record in records if record.is_student}
    for name in (name for name, teacher in found.items() if teacher is None):
        say(f"{name}: its teacher does not exist any more, so it is attacked by its own gradients only")
    return {name: teacher for name, teacher in found.items() if teacher is not None}


def _count(measured: Sequence[tuple[str, str]], network: nn.Module, teacher: nn.Module | None) -> int:
    """The largest possible number of scores of a network."""
    attacks = sum(kind == "attack" for kind, _ in measured)
    each = len(measured) + attacks * len(gradients(network, teacher))
    return 1 + bool(attacks) + len(SEVERITIES) * each


def with_errors(
    columns: Sequence[str], rows: Sequence[Sequence[str]], scores: Sequence[Score]
) -> tuple[list[str], list[list[str]]]:
    """The table of ``summary`` with numbers of images, number formats, and the standard error of each accuracy."""
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


def with_steps(
    columns: Sequence[str], rows: Sequence[Sequence[str]], networks: Mapping[str, nn.Module]
) -> tuple[list[str], list[list[str]]]:
    """The table with a column T x D; it is empty for an ANN."""
    steps = {
        name: steps_by_levels(network.timesteps, network.conversion.neuron_model.levels)
        for name, network in networks.items()
        if isinstance(network, Student)
    }
    return [columns[0], "T x D", *columns[1:]], [[name, steps.get(name, ""), *cells] for name, *cells in rows]


def attack_table(scores: Sequence[Score], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One row per network and attack: accuracy on the attacked images, clean, worst, and for each gradient."""
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
    """One row per network: accuracy on clean images, mean over each kind, and the comparison with the baseline.

    The relative corruption error comes first, as only it removes the clean accuracy. It is given for perturbed inputs,
    which are the same for all networks. Faults and attacks differ from network to network.
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
    """The relative corruption error, with the number of its perturbations if it is not defined for some."""
    counted, all_of_them = comparable(scores, name, baseline, kind), shared(scores, name, baseline, kind)
    if not counted:
        return ""
    part = f" ({len(counted)} of {len(all_of_them)})" if len(counted) < len(all_of_them) else ""
    return f"{relative_corruption_error(scores, name, baseline, kind):.2f}{part}"


def _wins(scores: Sequence[Score], name: str, baseline: str, kinds: Sequence[str]) -> list[str]:
    """Under how many perturbations of each kind a network loses less than the baseline, and has the higher mean."""
    falls, means = [], []
    for kind in kinds:
        both = shared(scores, name, baseline, kind)
        less = sum(fall(scores, name, what) < fall(scores, baseline, what) for what in both)
        higher = sum(mean_accuracy(scores, name, what) > mean_accuracy(scores, baseline, what) for what in both)
        falls += [f"{less} of {len(both)} {kind}"] if both else []
        means += [f"{higher} of {len(both)} {kind}"] if both else []
    return [", ".join(falls), ", ".join(means)]


def draw_kind(
    path: Path, scores: Sequence[Score], names: Sequence[str], kind: str, baseline: str, title: str, note: str
) -> None:
    """Draw accuracy over severity, one panel per perturbation; for many a heat map of gains over the baseline.

    Args:
        path: the PNG file.
        scores: scores of all networks.
        names: the networks to show.
        kind: the kind of perturbation.
        baseline: the network that the others are compared to. A single network is compared to its clean accuracy.
        title: title of the picture.
        note: text below the picture: numbers of images and seeds.
    """
    drawn = panels(scores, names, kind)
    if len(drawn) <= MOST_PANELS:
        axes = "severity (0: clean)", "test accuracy (%)"
        curves(path, drawn, *axes, title=f"{title}: {TITLES[kind]}", note=note)
        return
    columns = [str(severity) for severity in SEVERITIES]
    title = f"{title}: {TITLES[kind]}, accuracy gained or lost"
    heat_maps(path, gains(drawn, names, baseline), columns, "severity", "points", title=title, note=note)


def gains(
    drawn: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], names: Sequence[str], baseline: str
) -> dict[str, dict[str, list[float]]]:
    """Points above the baseline, by network, perturbation and severity 1..5.

    Args:
        drawn: the result of ``panels``.
        names: the networks.
        baseline: one of them. A single network is compared to its clean accuracy.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for what, curves_of in drawn.items():
        theirs = dict(curves_of[baseline])
        for name in names:
            if name != baseline and name in curves_of:
                points = [height - theirs[x] for x, height in curves_of[name] if x]
                found.setdefault(f"{name}\nminus {baseline}", {})[what] = points
        if len(names) == 1:
            points = [height - theirs[0.0] for x, height in curves_of[baseline] if x]
            found.setdefault(f"{baseline}\nminus itself on clean images", {})[what] = points
    return found


def panels(scores: Sequence[Score], names: Sequence[str], kind: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For every perturbation of a kind the accuracy of each network over severity 0..5."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _, what in perturbations([kind]):
        for name in names:
            clean = "attacked" if kind == "attack" else "clean"
            points = [(s.severity, s.accuracy) for s in scores if s.network == name and s.name in (clean, what)]
            if len(points) > 1:
                drawn.setdefault(what, {})[name] = [(float(x), y) for x, y in sorted(points)]
    return drawn
