"""How immune finished networks are to noise: scores of each, kept as they come, a table and curves."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path

from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.figures import curves
from spikedistill.deliver.record import read_records, some_of
from spikedistill.deliver.tables import markdown
from spikedistill.errors import ConfigError, one_of
from spikedistill.evaluate.immunity import (
    EVENT_KINDS,
    KINDS,
    Score,
    area,
    immunity,
    mean_corruption_error,
    perturbations,
)
from spikedistill.files import fingerprint_of, write_csv, write_text
from spikedistill.train.run import Run


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
        attacked: how many of them are attacked.
        seed: of all that is drawn.
        baseline: the run that the others are compared to; by default the first.
        data_dir: another place of the data than the first run was trained with.
        resume: go on with what lies in ``out``.
        trust_code: execute the Python code that a run may name as its network.
        say: told what was measured.

    Returns:
        Columns and rows of a table, one row a network.

    Raises:
        ConfigError: if the baseline is none of the runs, or there is no such kind.
    """
    if attacked < 1:
        raise ConfigError(f"attacked (={attacked}) must be 1 image or more; to leave attacks away name other kinds.")
    records, data = read_records(paths, data_dir)
    kinds = kinds or (EVENT_KINDS if data.frames else KINDS)
    most = 1 + len(SEVERITIES) * len(perturbations(kinds))
    names = [record.name for record in records]
    baseline = names[0] if baseline is None else baseline
    one_of("run to compare with", baseline, names)
    pixels, labels = some_of(data, images)
    networks = {record.name: record.network(trust_code) for record in records}
    run = Run(out)
    weights = {name: fingerprint_of(network) for name, network in networks.items()}
    asked = {"runs": [str(path) for path in paths], "weights": weights, "kinds": list(kinds), "images": len(pixels)}
    run.start({"kind": "immunity", **asked, "attacked": attacked, "seed": seed}, resume)
    known = [Score(**line) for line in run.lines("scores")]

    def keep(score: Score) -> None:
        run.append("scores", asdict(score))
        known.append(score)
        place = f"{score.name} {score.severity}" if score.severity else "clean"
        say(f"{len(known)} of at most {most * len(names)}: {score.network}, {place}: {score.accuracy:.2f} %")

    places = {record.name: record.place() for record in records}
    for name, network in networks.items():
        places[name].prepare(network)
    scores = immunity(
        networks,
        pixels,
        labels,
        kinds=kinds,
        seed=seed,
        dtypes={name: place.dtype for name, place in places.items()},
        attacked=attacked,
        known=tuple(known),
        keep=keep,
    )
    columns, rows = summary(scores, names, kinds, baseline)
    write_csv(out / "scores.csv", [field.name for field in fields(Score)], map(astuple, scores))
    write_text(out / "immunity.md", markdown(columns, rows))
    for kind in kinds:
        curves(out / f"{kind}.png", panels(scores, names, kind), "severity", "accuracy (%)")
    run.write("results", {"baseline": baseline, "table": [columns, *rows]})
    return columns, rows


def summary(
    scores: Sequence[Score], names: Sequence[str], kinds: Sequence[str], baseline: str
) -> tuple[list[str], list[list[str]]]:
    """A row a network: accuracy clean and as a mean over each kind, and where it stands against the baseline."""
    columns = ["network", "clean", *kinds, f"mCE ({baseline} = 100)", f"better than {baseline}"]
    rows = []
    for name in names:
        clean = next(score.accuracy for score in scores if score.network == name and score.kind == "clean")
        found = [[s.accuracy for s in scores if s.network == name and s.kind == kind] for kind in kinds]
        means = [statistics.fmean(values) if values else None for values in found]
        error = mean_corruption_error(scores, name, baseline, "natural") if "natural" in kinds else None
        cells = [f"{value:.2f}" if value is not None else "" for value in (clean, *means, error)]
        rows.append([name, *cells, "" if name == baseline else _wins(scores, name, baseline, kinds)])
    return columns, rows


def _wins(scores: Sequence[Score], name: str, baseline: str, kinds: Sequence[str]) -> str:
    """Under how many perturbations of each kind the area under the curve is larger than the baseline's."""
    parts = []
    for kind in kinds:
        shared = [
            what for found, what in perturbations([kind]) if _has(scores, name, what) and _has(scores, baseline, what)
        ]
        won = sum(area(scores, name, what) > area(scores, baseline, what) for what in shared)
        parts += [f"{won} of {len(shared)} {kind}"] if shared else []
    return ", ".join(parts)


def _has(scores: Sequence[Score], network: str, name: str) -> bool:
    return any(score.network == network and score.name == name for score in scores)


def panels(scores: Sequence[Score], names: Sequence[str], kind: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For every perturbation of a kind the curve of each network over severity 0..5."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _, what in perturbations([kind]):
        for name in names:
            points = [(s.severity, s.accuracy) for s in scores if s.network == name and s.name in ("clean", what)]
            if len(points) > 1:
                drawn.setdefault(what, {})[name] = [(float(x), y) for x, y in sorted(points)]
    return drawn
