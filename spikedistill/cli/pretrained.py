"""``spikedistill pretrained``: the trained students that come with the package."""

from spikedistill.cli.show import show_table
from spikedistill.deliver.pretrained import PRETRAINED, read_card
from spikedistill.deliver.tables import Table
from spikedistill.shapes import steps_by_levels

COLUMNS = ("name", "data", "accuracy (%)", "teacher (%)", "T x D", "network", "parameters", "MB", "licence")
NOTE = (
    "Use one by spikedistill.pretrained(NAME), 'spikedistill evaluate NAME' or 'spikedistill distill --start NAME'."
    " Accuracies are on the test set. T x D: time steps and levels."
)


def pretrained() -> None:
    """List the trained students that come with the package."""
    show_table(Table(COLUMNS, [_row(name) for name in PRETRAINED], notes=[NOTE]))


def _row(name: str) -> list[str]:
    card = read_card(name)
    accuracies = [f"{card['accuracy']:.2f}", f"{card['teacher']['accuracy']:.2f}"]
    steps, size = steps_by_levels(card["timesteps"], card["levels"]), f"{card['bytes'] / 1e6:.2f}"
    return [name, card["data"], *accuracies, steps, card["network"], f"{card['parameters']:,}", size, card["licence"]]
