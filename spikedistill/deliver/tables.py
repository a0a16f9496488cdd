"""Tables of finished runs, and of anything else as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikedistill.deliver.record import Record
from spikedistill.errors import RunError
from spikedistill.train.run import Run


def compare(paths: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows that set finished runs side by side; no code that they name is executed.

    The last column is the teacher's accuracy on training images that were held out, with their number; a question mark
    says that the run warned of the teacher (``results.json``, teacher).

    Raises:
        RunError: if a directory holds no finished run.
    """
    found = [(record, record.results()) for record in map(Record.read, paths)]
    most = max(len(results.get("accuracy_by_step", [])) for _, results in found)
    steps = [f"t={t + 1}" for t in range(most)]
    columns = ["run", "network", "weights", "method", "accuracy", *steps, "firing rate", "agreement", "teacher"]
    try:
        return columns, [_row(record, results, most) for record, results in found]
    except (KeyError, TypeError) as error:
        named = ", ".join(str(path) for path in paths)
        raise RunError(f"A file of {named} lacks {error}: give directories of finished runs.") from error


def _row(record: Record, results: Mapping[str, Any], most: int) -> list[str]:
    if record.is_student:
        conversion = Run(record.path).read("conversion")
        network, method = f"{conversion['network']} T={conversion['timesteps']}", record.recipe["method"]["name"]
        weights = "inherited" if conversion["inherited"] else "fresh"
    else:
        network, weights, method = record.recipe["network"], "", "teacher (ANN)"
    steps = [f"{value:.2f}" for value in results.get("accuracy_by_step", [])]
    steps += [""] * (most - len(steps))
    rates = [f"{results[name]:.2f} %" if name in results else "" for name in ("firing_rate", "agreement")]
    accuracy, teacher = f"{results['test_accuracy']:.2f} %", _teacher(results.get("teacher", {}))
    return [record.path.name, network, weights, method, accuracy, *steps, *rates, teacher]


def _teacher(found: Mapping[str, Any]) -> str:
    """What a run found of its teacher, if anything."""
    if not found:
        return ""
    return f"{found['accuracy']:.2f} % ({found['images']}){' ?' if found['doubts'] else ''}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
