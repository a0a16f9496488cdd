"""The trained students that come with the package: add one from a run, or measure all again.

    python benchmarks/pretrained.py                            # every card measured again on its test set
    python benchmarks/pretrained.py --add RUN NAME --licence LICENCE [--network resnet20-a] [--command TEXT]

``--add`` writes NAME.safetensors (weights rounded to float16, at most 2 MB) and NAME.json into spikedistill/pretrained.
The accuracy on the card is measured on that file, on the whole test set, in float32. A run whose network is Python code
needs ``--network``, a network of the zoo with the same modules. A run that started from other runs (``--start``) needs
their minutes too (``--minutes``).
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from spikedistill.compute.place import choose_place
from spikedistill.data.images import ImageSet, load_images
from spikedistill.deliver.pretrained import PRETRAINED, pretrained, read_card, sample_logits
from spikedistill.deliver.record import Record
from spikedistill.evaluate.accuracy import predict
from spikedistill.evaluate.measure import measure_student
from spikedistill.files import PRETRAINED_DIR as FOLDER
from spikedistill.files import read_facts, weights_file, write_text
from spikedistill.student.save import load_student, save_student
from spikedistill.student.student import Student
from spikedistill.teacher.load import Architecture
from spikedistill.train.run import Run

LARGEST = 2_000_000
"""Bytes of a file at most."""
ROUNDED = 0.3
"""Points of accuracy by which another processor may differ from a card, by the rounding of sums."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("RUN", "NAME"), help="make an entry from a finished run")
    parser.add_argument("--licence", help="of the weights, for instance that of the teacher's checkpoint")
    parser.add_argument("--network", help="the zoo's name of the run's network, where the run names code")
    parser.add_argument("--command", help="what makes the run (default: its first line, from its recipe)")
    parser.add_argument("--minutes", type=float, help="of training (default: those of the run)")
    parser.add_argument("--teacher-accuracy", type=float, help="on the test set (default: that in the run's results)")
    parser.add_argument("--data-dir", help="folder of the data (default: $SPIKEDISTILL_DATA, else ./data)")
    given = parser.parse_args()
    if given.add and not given.licence:
        parser.error("--add needs --licence")
    sys.exit(add(Path(given.add[0]), given.add[1], given) if given.add else check_all(given.data_dir))


def add(run: Path, name: str, given: argparse.Namespace) -> int:
    """Write the file and the card of a finished run."""
    record, facts = Record.read(run), read_facts(weights_file(run))
    images = record.images(given.data_dir)
    architecture = _architecture(facts, images, given.network)
    original = load_student(run, network=architecture.build())
    file = FOLDER / f"{name}.safetensors"
    kept = {"recipe": _without_paths(facts["recipe"]), "class_names": list(images.class_names), "data": images.name}
    save_student(file, original, architecture=architecture, facts=kept, stored=torch.float16)
    results = _measured(load_student(file), images)
    save_student(file, original, architecture=architecture, facts={**kept, "results": results}, stored=torch.float16)
    size = file.stat().st_size
    if size > LARGEST:
        file.unlink()
        print(f"{name} has {size:,} bytes, more than {LARGEST:,}: it is not added")
        return 1
    _compare(original, load_student(file), images)
    card = _card(record, architecture, load_student(file), images, results, given)
    card |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": size}
    write_text(FOLDER / f"{name}.json", _one_field_a_line(card))
    file.chmod(0o644)
    print(f"{name}: {card['accuracy']:.2f} %, {size / 1e6:.2f} MB")
    return 0


def _one_field_a_line(card: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(field)}: {json.dumps(value)}" for field, value in card.items()) + "\n}\n"


def _architecture(facts: dict[str, Any], images: ImageSet, network: str | None) -> Architecture:
    if network is not None:
        return Architecture(network, images.classes, images.channels)
    if "name" not in facts["network"] or ".py:" in facts["network"]["name"]:
        sys.exit(f"the network of this run is code ({facts['network']}): name that of the zoo by --network")
    return Architecture(**facts["network"])


def _network_of(run: str) -> str:
    """The network of a run of 'teach'."""
    return str(read_facts(weights_file(run))["architecture"]["name"])


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without folders of this machine."""
    parts = {name: dict(part) if isinstance(part, dict) else part for name, part in recipe.items()}
    parts["data"]["data_dir"] = parts["training"]["cache_dir"] = parts["student"]["start"] = None
    parts["teacher"]["source"] = Path(parts["teacher"]["source"]).name
    return parts


def _measured(student: Student, images: ImageSet) -> dict[str, Any]:
    """What is measured on the test set, on the CPU in float32."""
    place = choose_place("cpu", "fp32")
    return measure_student(student, None, images, place)


def _compare(original: Student, stored: Student, images: ImageSet) -> None:
    """Say how often rounding changes the class, on training images."""
    some = images.train_images[:1000]
    same = [predict(student, some).mean(0).argmax(-1) for student in (original, stored)]
    print(f"class as before rounding: {100 * float((same[0] == same[1]).float().mean()):.2f} % of {len(some)} images")


def _card(
    record: Record,
    architecture: Architecture,
    student: Student,
    images: ImageSet,
    results: dict[str, Any],
    given: argparse.Namespace,
) -> dict[str, Any]:
    run, shape = Run(record.path), tuple(images.train_images.shape[1:])
    machine, found = run.read("environment"), record.results()
    teacher = given.teacher_accuracy if given.teacher_accuracy is not None else found.get("teacher_accuracy")
    if teacher is None:
        sys.exit("the run does not say how accurate its teacher is: give --teacher-accuracy")
    minutes = sum(line["seconds"] for line in run.lines("timing")) / 60 if given.minutes is None else given.minutes
    choice = record.recipe["teacher"]
    return {
        "data": images.name,
        "class_names": list(images.class_names),
        "accuracy": results["test_accuracy"],
        "images": len(images.test_images),
        "firing_rate": results["firing_rate"],
        "timesteps": student.timesteps,
        "levels": student.conversion.neuron.levels,
        "network": architecture.name,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "teacher": {"network": choice.get("network") or _network_of(choice["source"]), "accuracy": teacher},
        "licence": given.licence,
        "command": given.command or _command(record),
        "seed": record.training.seed,
        "date": machine.get("date", ""),
        "machine": f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}",
        "minutes": round(minutes, 1),
        "shape": list(shape),
        "sample_logits": [[round(value, 4) for value in row] for row in sample_logits(student, shape).tolist()],
    }


def _command(record: Record) -> str:
    """The command of a run with the choices that are not defaults."""
    from spikedistill.recipes.distill import Distill

    usual, words = Distill().written(), ["spikedistill distill"]
    names = {"teacher": {"source": "teacher", "network": "teacher-network", "width": "teacher-width"}}
    names |= {"data": {"name": "data"}, "student": {"network": "student", "width": "student-width"}}
    for part in ("data", "teacher", "student", "method", "training"):
        chosen = record.recipe[part]
        for field, value in chosen.items():
            unlike = value != usual[part].get(field) and value is not None and field not in ("data_dir", "sha256")
            if unlike and (part, field) != ("method", "name"):
                option = names.get(part, {}).get(field, field.replace("_", "-"))
                words.append(f"--{option} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join([*words, f"--method {record.recipe['method']['name']}"])


def check_all(data_dir: str | None) -> int:
    """Measure every shipped student; 1 if one is not as its card says."""
    wrong = 0
    for name in PRETRAINED:
        card = read_card(name)
        found = _measured(pretrained(name), load_images(card["data"], data_dir))["test_accuracy"]
        differs = abs(found - card["accuracy"]) > ROUNDED
        wrong += differs
        print(f"{name}: {found:.2f} %, its card {card['accuracy']:.2f} %{': DIFFERS' if differs else ''}")
    return int(wrong > 0)


if __name__ == "__main__":
    main()
