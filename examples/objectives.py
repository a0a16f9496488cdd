"""Three objectives of one's own: what the contract of ``spikedistill.Objective`` takes, in some twenty lines each.

    spikedistill distill digits --method examples/objectives.py:PerStepMSE --weight-of-logits 0.5
    spikedistill distill digits --teacher runs/large-t8 --student resnet18 --student-width 8 \\
        --method examples/objectives.py:SpikeMatching
    spikedistill distill --data nmnist.npz --source mnist --paired --teacher runs/mnist-teacher --student vgg9 \\
        --student-width 16 --coding frames --timesteps 6 --method examples/objectives.py:TwoStreams

They show the contract and are no published methods.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F

from spikedistill import Direct, Needs, Objective, Switch
from spikedistill.objective.logits import cross_entropy_of_mean, cross_entropy_per_step, soft_target_divergence


@dataclass(frozen=True)
class PerStepMSE(Objective):
    """Cross-entropy, and the squared difference of every step's logits from the teacher's mean logits."""

    weight_of_logits: float = 0.1
    """Weight of the squared difference, 0 or more."""

    @property
    def needs(self):
        """The teacher's logits, and each of the student's steps on its own."""
        return Needs(teacher=True, every_step=True)

    def __call__(self, batch, modules):
        """Two terms, ``labels`` and ``logits``."""
        target = batch.require_teacher().logits.mean(0)
        distance = (batch.student.logits - target).square().mean()
        labels = cross_entropy_of_mean(batch.student.logits, batch.labels)
        return {"labels": labels, "logits": self.weight_of_logits * distance}


@dataclass(frozen=True)
class SpikeMatching(Objective):
    """Cross-entropy, and the distance of both networks' maps of spikes: firing rates averaged over channels."""

    layers: tuple[tuple[str, str], ...] = ()
    """(teacher's layer, student's layer) of neurons; by default the last three of each."""
    weight: float = 1.0
    """Weight of the distance, 0 or more."""

    @property
    def needs(self):
        """Spikes of both networks."""
        theirs, ours = zip(*self.layers) if self.layers else ((), ())
        return Needs(teacher=True, teacher_spikes=theirs, student_spikes=ours)

    def settled(self, teacher, student, inherits):
        """The last three layers of both networks, matched from the last backwards."""
        last = tuple(zip(teacher.layers()[:-4:-1], student.layers()[:-4:-1]))
        return replace(self, layers=self.layers or last)

    def __call__(self, batch, modules):
        """Two terms, ``labels`` and ``spikes``."""
        distance = 0.0
        for theirs, ours in self.layers:
            teacher, student = batch.require_teacher().spikes[theirs].float(), batch.student.spikes[ours].float()
            distance = distance + F.mse_loss(student.mean((0, 2)), teacher.mean((0, 2)))
        labels = Direct()(batch, modules)["labels"]
        return {"labels": labels, "spikes": self.weight * distance}


@dataclass(frozen=True)
class TwoStreams(Objective):
    """Cross-entropy at every step of both streams; the teacher speaks to the images, until a point of training."""

    until: float = 0.7
    """Part of training after which the teacher is silent, 0 to 1."""
    soft_weight: float = 0.1
    """Weight of the soft targets until then, 0 or more."""
    temperature: float = 2.0
    """Temperature of the soft targets."""

    @property
    def needs(self):
        """A teacher, and the student's answer to the second stream."""
        return Needs(teacher=True, source=True)

    def __call__(self, batch, modules):
        """Three terms, ``events``, ``images`` and ``soft``."""
        events, images = batch.student.logits, batch.require_source().logits
        soft = soft_target_divergence(images.mean(0), batch.require_teacher().logits.mean(0), self.temperature)
        return {
            "events": cross_entropy_per_step(events, batch.labels),
            "images": cross_entropy_per_step(images, batch.labels),
            "soft": Switch(at=self.until, before=self.soft_weight)(batch.progress) * soft,
        }
