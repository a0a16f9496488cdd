"""``spikedistill recipes``: the ready recipes."""

import re

from spikedistill.recipes import STUDENTS, TEACHERS


def recipes() -> None:
    """List the ready recipes, with the commands that run them."""
    for command, known in (("teach", TEACHERS), ("distill", STUDENTS)):
        for name, make in known.items():
            about = re.sub(r":? ``[^`]*``(,?)", r":\1", (make.__doc__ or "").splitlines()[0])
            print(f"spikedistill {command} {name}\n    {about.replace(':,', ':').replace(':.', '.')}")
