"""The embedded example: digits of 8 x 8 pixels, no download."""

from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training

DATA = Data(name="digits", validation=0.1, crop=1)


def teacher() -> Teach:
    """A small ResNet-18: ``spikedistill teach digits``, ten seconds on two cores, 99 percent."""
    return Teach("resnet18", width=16, data=DATA, training=Training(epochs=15, batch_size=64))


def student() -> Distill:
    """Its T=4 student, inherited, KDSNN: ``spikedistill distill digits``, twenty seconds on two cores, 96 percent."""
    training = Training(epochs=8, batch_size=64, weight_decay=1e-4)
    return Distill(TeacherChoice("runs/digits-teacher"), StudentChoice(timesteps=4), data=DATA, training=training)
