import math

import pytest

from spikedistill.data.augment import Augment
from spikedistill.data.feed import MemoryFeed, PairFeed
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError
from spikedistill.recipes.choices import StudentChoice
from spikedistill.train.recipe import Data, Training, check


def test_what_is_given_by_default_has_no_fault():
    check(Data(), Training(), StudentChoice())


@pytest.mark.parametrize(
    "part, fault",
    [
        (Training(epochs=0), "epochs (=0) must be 1 or more"),
        (Training(batch_size=1), "batch_size (=1) must be 2 or more"),
        (Training(lr=-1.0), "lr (=-1.0) must be 0 or more"),
        (Training(lr=math.nan), "lr (=nan) must be 0 or more"),
        (Training(weight_decay=-0.5), "weight_decay (=-0.5) must be 0 or more"),
        (Training(clip=-1.0), "clip (=-1.0) must be 0 or more"),
        (Training(checkpoint_minutes=-2.0), "checkpoint_minutes (=-2.0) must be 0 or more"),
        (Training(views=-1), "views (=-1) must be 0 or more"),
        (Training(epochs=3, views=3), "views (=3) repeat only in more epochs (=3): lower views, or give 0"),
        (Training(cache_dir="x"), "cache_dir (='x') is for repeated views: give views, 1 or more"),
        (Training(momentum=1.0), "momentum (=1.0) must be 0 or more and below 1"),
        (Training(warmup=1.5), "warmup (=1.5) must be 0 or more and below 1"),
        (Training(ema=-0.1), "ema (=-0.1) must be 0 or more and below 1"),
        (Training(ema=math.nan), "ema (=nan) must be 0 or more and below 1"),
        (Training(muon_lr=-1.0), "muon_lr (=-1.0) must be 0 or more"),
        (Training(norm_lr=math.nan), "norm_lr (=nan) must be 0 or more"),
        (Training(lookahead=-5), "lookahead (=-5) must be 0 or more"),
        (Training(lr_first=1.5), "lr_first (=1.5), a fraction of the peak, must be 0 to 1"),
        (Training(lr_last=math.nan), "lr_last (=nan), a fraction of the peak, must be 0 to 1"),
        (Training(ema=0.9, lookahead=5), "ema (=0.9) and lookahead (=5) both average weights: give one of them"),
        (Data(validation=1.0), "validation (=1.0) must be 0 or more and below 1"),
        (Data(validation=-0.1), "validation (=-0.1) must be 0 or more and below 1"),
        (Data(crop=-1), "crop (=-1)"),
        (Data(cutout=-3), "cutout (=-3)"),
        (Data(noise=1.5), "noise (=1.5)"),
        (Data(image_size=0), "image_size (=0)"),
        (Data(paired=True), "paired needs a source"),
        (StudentChoice(timesteps=0), "timesteps (=0) must be 1 or more"),
        (StudentChoice(calibration=0), "calibration (=0) must be 1 image or more"),
        (StudentChoice(percentile=0.0), "percentile (=0.0) must be above 0"),
        (StudentChoice(percentile=100.5), "percentile (=100.5) must be above 0 and at most 100"),
        (StudentChoice(leak=0.5), "leak (=0.5) is for lif and plif, but the neuron is 'if'"),
        (StudentChoice("vgg9", inherit=True), "the student is 'vgg9', not 'same'"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_single_fault_is_named_with_its_value(part, fault):
    assert len(part.problems()) == 1
    with pytest.raises(ConfigError) as caught:
        check(Data(), part, Training())
    assert fault in str(caught.value)


def test_the_edges_of_the_ranges_are_allowed():
    check(
        Training(1, 2, lr=0.0, momentum=0.0, weight_decay=0.0, warmup=0.0, clip=0.0, ema=0.0, checkpoint_minutes=0.0),
        Training(momentum=0.999, warmup=0.999, ema=0.9999),
        Training(lr_first=1.0, lr_last=1.0, norm_lr=0.0, muon_lr=0.0, lookahead=1),
        Training(epochs=3, views=2),
        Training(epochs=3, views=3, cache_dir="x"),
        Data(validation=0.0, crop=0, cutout=0),
        StudentChoice(timesteps=1, calibration=1, percentile=100.0),
        StudentChoice(neuron="lif", leak=0.9),
        StudentChoice("same", inherit=True),
    )


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        check(StudentChoice(timesteps=0), Data(validation=2.0, crop=-1), Training(epochs=0, lr=-1.0, momentum=1.0))
    for name in ("timesteps", "validation", "crop", "epochs", "lr", "momentum"):
        assert f"{name} (=" in str(caught.value)


def test_the_fields_of_data_describe_its_augmentation():
    assert Data(crop=2, flip=True, cutout=3, policy="trivial", noise=0.1).augment() == Augment(
        2, True, 3, "trivial", noise=0.1
    )
    assert Data().augment() == Augment()


def test_the_fields_of_data_and_training_describe_the_feed(blobs):
    feed = Data(crop=2, validation=0.25).feed(blobs, Training(batch_size=8, seed=3, views=2))
    assert feed == MemoryFeed(blobs, 8, 3, Augment(crop=2), 0.25, 2)


def test_with_a_source_the_feed_is_of_pairs(blobs, write_blobs, tmp_path):
    write_blobs(tmp_path, 90, 9)
    train, test = (part[:, None, :2].repeat(1, 4, 1, 1, 1) for part in (blobs.train_images, blobs.test_images))
    frames = ImageSet("frames", train, blobs.train_labels, test, blobs.test_labels, blobs.class_names)
    data = Data(source=str(tmp_path / "blobs.npz"))
    replacing = data.feed(frames, Training(batch_size=8, epochs=5), data.load_source(), 3.0)
    assert (replacing.replacement, replacing.epochs) == (3.0, 5)
    feed = data.feed(frames, Training(batch_size=8), data.load_source())
    assert isinstance(feed, PairFeed) and feed.events == MemoryFeed(frames, 8)
    assert not feed.paired and len(feed.images.train_images) == 90
