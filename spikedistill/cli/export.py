"""``spikedistill export``: a finished student as files for other programs."""

from collections.abc import Sequence

from spikedistill.cli.options import ask
from spikedistill.deliver.export import Exported, export
from spikedistill.train.progress import Progress


def main(arguments: Sequence[str]) -> None:
    """Write the files; print what each is and what its check found."""
    done, _ = ask("export", export, arguments, {"progress": Progress.stderr("export")})
    print("\n".join(map(line, done)))


def line(done: Exported) -> str:
    """A file and its check in one sentence."""
    size, takes = done.path.stat().st_size / 1e6, "one time step" if done.form == "step" else "all time steps"
    equal = done.images - done.on_threshold
    said = f"wrote {done.path} ({size:.2f} MB, {takes}): the student's logits on {equal} of {done.images} test images"
    said += f" (largest difference {done.difference:.1e}), its class on {100 * done.same_class:.1f} %"
    if done.on_threshold:
        said += f"; on {done.on_threshold} images a potential lies on a threshold within rounding"
    return said
