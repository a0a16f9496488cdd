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
    said = f"wrote {done.path} ({size:.2f} MB, {takes}): logits match on {equal} of {done.images} test images (largest"
    said += f" difference {done.difference:.1e}), the predicted class on {100 * done.same_class:.1f} %"
    if many := done.on_threshold:
        said += f"; on {many} image{'s' * (many > 1)} a potential equals a threshold within rounding"
    return said
