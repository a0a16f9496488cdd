"""MNIST: a small VGG and its student with four time steps."""

from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training

DATA = Data(name="mnist", validation=0.05, crop=2)


def teacher() -> Teach:
    """VGG-9 of width 16: ``spikedistill teach mnist``."""
    return Teach("vgg9", width=16, data=DATA, training=Training(epochs=10, batch_size=128))


def student() -> Distill:
    """Its T=4 student, inherited, KDSNN: ``spikedistill distill mnist``."""
    training = Training(epochs=3, batch_size=128, weight_decay=1e-4)
    return Distill(TeacherChoice("runs/mnist-teacher"), StudentChoice(timesteps=4), data=DATA, training=training)
