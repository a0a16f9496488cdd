"""Ready recipes: one Python function for each, under the name that the command line uses."""

from collections.abc import Callable

from spikedistill.recipes import cifar10, digits, mnist
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach

TEACHERS: dict[str, Callable[[], Teach]] = {
    "cifar10": cifar10.teacher,
    "cifar10-fast": cifar10.fast,
    "cifar10-strong": cifar10.strong,
    "digits": digits.teacher,
    "mnist": mnist.teacher,
}
STUDENTS: dict[str, Callable[[], Distill]] = {
    "cifar10": cifar10.student,
    "cifar10-strong": cifar10.strong_student,
    "digits": digits.student,
    "mnist": mnist.student,
}
