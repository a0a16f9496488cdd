"""CIFAR-10 on two cores: a ResNet-18 of half width, its student with four time steps, and two faster teachers."""

from spikedistill.objective.kdsnn import KDSNN, KDSNNResponse
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training

DATA = Data(name="cifar10", validation=0.02, crop=4, border="mirror", flip=True, cutout=8)


def teacher() -> Teach:
    """ResNet-18 of width 32, 29 epochs: ``spikedistill teach cifar10``, 72 minutes, 93.26 percent."""
    training = Training(epochs=29, batch_size=128, lr=0.15, warmup=0.15, ema=0.999, compile=True)
    return Teach("resnet18", width=32, label_smoothing=0.1, data=DATA, training=training)


def fast() -> Teach:
    """Airbench95 with ReLU, 18 epochs: ``spikedistill teach cifar10-fast``, 1.7 PFLOP, 37 minutes, 94.18 percent."""
    data = Data(name="cifar10", validation=0.02, crop=2, border="mirror", flip=True, cutout=8)
    training = _airbench(epochs=18, lr=1.3, decay=1.5e-3, warmup=0.23, last=0.07)
    return Teach("airbench95", label_smoothing=0.2, data=data, training=training)


def strong() -> Teach:
    """Airbench96 with ReLU, 37 epochs: ``spikedistill teach cifar10-strong``, 4.9 PFLOP, 127 minutes, 95.01 percent."""
    data = Data(name="cifar10", validation=0.02, crop=4, border="mirror", flip=True, cutout=12)
    training = _airbench(epochs=37, lr=1.2, decay=1.3e-3, warmup=0.1, last=0.0)
    return Teach("airbench96", label_smoothing=0.2, data=data, training=training)


def _airbench(epochs: int, lr: float, decay: float, warmup: float, last: float) -> Training:
    """The training of airbench (Jordan, arXiv 2404.00498).

    Its rates R of 10 and 9 are for a loss that is summed over the batch and are divided by 1024 (1 + 1 / 0.15). Here
    the loss is a mean, so they are R / 7.67. Its decays D of 0.0153 and 0.012 are D / R here.
    """
    return Training(
        epochs=epochs,
        batch_size=1024,
        lr=lr,
        norm_lr=64.0,
        momentum=0.85,
        weight_decay=decay,
        schedule="one-cycle",
        warmup=warmup,
        lr_first=0.2,
        lr_last=last,
        lookahead=5,
        compile=True,
    )


def student() -> Distill:
    """Its T=4 student, inherited, KDSNN: ``spikedistill distill cifar10``, 81 minutes, 91.60 percent."""
    training = Training(epochs=8, batch_size=128, weight_decay=1e-4, warmup=0.1)
    choice = StudentChoice(timesteps=4, per_channel=False)
    method = KDSNN(temperature=2.0, alpha=0.7)
    return Distill(TeacherChoice("runs/cifar10-teacher"), choice, method, DATA, training)


def strong_student() -> Distill:
    """Graded student (T=1, D=4) of cifar10-strong: ``spikedistill distill cifar10-strong``, 105 min, 94.68 percent."""
    return _graded(strong(), "runs/cifar10-strong-teacher", epochs=26)


def _graded(teacher: Teach, source: str, epochs: int) -> Distill:
    """The student that inherits a teacher's weights, is corrected layer by layer, and learns from logits alone.

    The teacher's logits for the batches of the first 12 epochs are kept, and repeat from then on.
    """
    choice = StudentChoice(timesteps=1, levels=4, correct="layers", learn_threshold=True)
    training = Training(
        epochs=epochs, batch_size=128, lr=0.04, weight_decay=5e-4, warmup=0.1, ema=0.998, views=12, compile=True
    )
    return Distill(TeacherChoice(source), choice, KDSNNResponse(temperature=4.0, alpha=0.9), teacher.data, training)
