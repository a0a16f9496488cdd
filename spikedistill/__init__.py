"""Deep spiking neural networks from trained artificial networks, by knowledge distillation.

A trained teacher becomes a spiking student, is taught by an objective, is trained, measured and delivered.
"""

from spikedistill.answer import Answer, Learner
from spikedistill.compute.place import Place, choose_place
from spikedistill.compute.winograd import use_winograd
from spikedistill.data.augment import Augment
from spikedistill.data.events import Recording, read_nmnist, to_frames
from spikedistill.data.feed import Feed, Inputs, MemoryFeed, PairFeed
from spikedistill.data.images import ImageSet, load_images, split
from spikedistill.deliver.record import Record
from spikedistill.errors import (
    ConfigError,
    ConversionError,
    DataError,
    RunError,
    ShapeError,
    SpikeDistillError,
    WeightsError,
)
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.evaluate.activity import firing_rates, operations
from spikedistill.evaluate.agreement import agreement, divergence
from spikedistill.evaluate.early_exit import EarlyExit, early_exit
from spikedistill.evaluate.immunity import immunity
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import ATan, Rectangle, Sigmoid, Triangle
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.schedule import Constant, Ramp, Schedule, Switch
from spikedistill.objective.terms import Batch, Needs, Objective, Sum
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.student.build import Student, to_spiking
from spikedistill.student.coding import DirectCoding, Frames, Latency, Rate
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.student.report import Report
from spikedistill.student.save import load_student, save_student
from spikedistill.teacher.load import Architecture, Teacher, load_teacher
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

__all__ = [
    "IF",
    "KDSNN",
    "LIF",
    "PLIF",
    "QCFS",
    "TET",
    "ATan",
    "Answer",
    "Architecture",
    "Augment",
    "Batch",
    "ConfigError",
    "Constant",
    "Conversion",
    "ConversionError",
    "Data",
    "DataError",
    "Direct",
    "DirectCoding",
    "Distill",
    "EarlyExit",
    "Feed",
    "Frames",
    "ImageSet",
    "Inputs",
    "KDSNNFeature",
    "KDSNNResponse",
    "Latency",
    "Learner",
    "MemoryFeed",
    "Needs",
    "Neuron",
    "Objective",
    "PairFeed",
    "Place",
    "Ramp",
    "Rate",
    "Record",
    "Recording",
    "Rectangle",
    "Report",
    "Reset",
    "Run",
    "RunError",
    "Schedule",
    "ShapeError",
    "Sigmoid",
    "SpikeDistillError",
    "Spiking",
    "Student",
    "StudentChoice",
    "Sum",
    "Switch",
    "Teach",
    "Teacher",
    "TeacherChoice",
    "Training",
    "Triangle",
    "WeightsError",
    "accuracy_by_step",
    "agreement",
    "choose_place",
    "distill",
    "divergence",
    "early_exit",
    "firing_rates",
    "fit",
    "fold",
    "immunity",
    "load_images",
    "load_student",
    "load_teacher",
    "operations",
    "predict",
    "read_nmnist",
    "save_student",
    "split",
    "teach",
    "to_frames",
    "to_spiking",
    "use_winograd",
]
