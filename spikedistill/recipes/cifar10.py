"""CIFAR-10 on two cores: a ResNet-18 of half width, and its student with four time steps."""

from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training

DATA = Data(name="cifar10", validation=0.02, crop=4, border="mirror", flip=True, cutout=8)


def teacher() -> Teach:
    """ResNet-18 of width 32, 29 epochs: ``spikedistill teach cifar10``, 72 minutes, 93.26 percent."""
    training = Training(epochs=29, batch_size=128, lr=0.15, warmup=0.15, ema=0.999, compile=True)
    return Teach("resnet18", width=32, label_smoothing=0.1, data=DATA, training=training)


def student() -> Distill:
    """Its T=4 student, inherited, KDSNN: ``spikedistill distill cifar10``, 81 minutes, 91.60 percent."""
    training = Training(epochs=8, batch_size=128, weight_decay=1e-4, warmup=0.1)
    choice = StudentChoice(timesteps=4, per_channel=False)
    method = KDSNN(temperature=2.0, alpha=0.7)
    return Distill(TeacherChoice("runs/cifar10-teacher"), choice, method, DATA, training)
