"""CIFAR-10 on two cores: a ResNet-18 of half width, and its student of four time steps."""

from spikedistill.recipes.distill import Distill, Method, StudentChoice, TeacherChoice
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training

DATA = Data(data="cifar10", validation=0.04, crop=4, flip=True)


def teacher() -> Teach:
    """ResNet-18 of width 32, 22 epochs: ``spikedistill teach cifar10``; LOG.md has time and accuracy."""
    training = Training(epochs=22, batch_size=128, lr=0.15, warmup=0.15)
    return Teach("resnet18", width=32, data=DATA, training=training)


def student() -> Distill:
    """Its T=4 student, inherited, KDSNN: ``spikedistill distill cifar10``; LOG.md has time and accuracy."""
    training = Training(epochs=8, batch_size=128, lr=0.03, weight_decay=1e-4, warmup=0.1)
    what = Method("kdsnn", temperature=2.0, alpha=0.7)
    return Distill(TeacherChoice("runs/cifar10-teacher"), StudentChoice(timesteps=4), what, DATA, training)
