"""``spikedistill teach``: train a teacher."""

from collections.abc import Sequence
from pathlib import Path

from spikedistill.cli.parse import Where, find_recipe, parse_recipe
from spikedistill.recipes import TEACHERS
from spikedistill.recipes.config import check_code
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Training

ABOUT = """Train a teacher, an ordinary network (ANN), and test it once.

RECIPE, if given, comes first. Options change it. See 'spikedistill recipes'.
--help lists what most people need, --help-all every option."""
EXAMPLES = """examples:
  spikedistill teach digits
  spikedistill teach cifar10 --epochs 60 --out runs/my-teacher
  spikedistill teach --data photos --image-size 64 --network vgg11"""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, say where the teacher is."""
    name, base, rest = find_recipe(arguments, TEACHERS, Teach)
    groups = {"data": [base.data], "training": [base.training], "network": [base], "run": [Where()]}
    data, training, recipe, where = parse_recipe("teach", ABOUT, groups, rest, EXAMPLES)
    recipe = Teach(recipe.network, recipe.width, recipe.label_smoothing, data, training)
    if where.config is not None:
        check_code(where.config, recipe, base, where.trust_code)
    seed = "" if training.seed == Training().seed else f"-s{training.seed}"
    out = where.out or Path("runs") / f"{name or Path(data.name).stem}-teacher{seed}"
    results = teach(recipe, out, where.resume, Progress.stderr("teacher"))
    print(f"test accuracy {results['test_accuracy']:.2f} %; the teacher is in {out}")
