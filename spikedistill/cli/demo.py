"""``spikedistill demo``: what a student gains from its teacher, on the embedded digits."""

from pathlib import Path

from spikedistill.cli.show import Files, check_files, output
from spikedistill.deliver.report import report
from spikedistill.recipes.demo import demo as run_demo
from spikedistill.recipes.demo import figures, shown
from spikedistill.train.progress import Progress


def demo(out: Path = Path("runs/demo"), seeds: int = 5, csv: Path | None = None) -> None:
    """Show what a student gains from its teacher, on the embedded digits.

    100 digits, two time steps, five seeds. The student is converted and not trained, trained by cross-entropy only, and
    trained by KDSNN: about a minute and a half on two cores. A page with pictures shows what happened, OUT/report.html.
    'spikedistill compare OUT/students' shows more of these runs.

    Args:
        out: the folder for data, teacher and students; finished runs are kept, interrupted ones go on.
        seeds: how often the two students are trained.
        csv: a file to write: accuracy by method, seed and time step, with all digits.
    """
    files: Files = {"csv": csv}
    check_files(files, "method")
    paths = run_demo(out, seeds)
    output(shown(paths), files, figures(paths))
    page = report(paths, out / "report.html", images=500, progress=Progress.stderr("report"))
    print(f"pictures of all this: {page}, to be opened in a browser")
