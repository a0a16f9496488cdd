"""Images without labels: folders, files and named sets, and the feed of a training without labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill.data.feed import MemoryFeed, PairFeed
from spikedistill.data.images import ImageSet, load_images, split
from spikedistill.data.parts import UNKNOWN
from spikedistill.errors import ConfigError, DataError


def write(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (number, 0, 0)).save(path)


def reds(images):
    return sorted(images[:, 0, 0, 0].tolist())


def labels_of(read):
    return set(read.train_labels.tolist()), set(read.test_labels.tolist())


class TestFolder:
    def test_of_images_alone_has_no_labels_and_a_fifth_becomes_the_test_part(self, tmp_path):
        for number in range(20):
            write(tmp_path / f"{number}.png", number)
        (tmp_path / "notes.txt").write_text("no image")
        read = load_images(str(tmp_path))
        assert labels_of(read) == ({UNKNOWN}, {UNKNOWN}) and read.class_names == () and read.drawn
        assert not read.labelled and not read.test_labelled
        assert len(read.test_images) == 4 and reds(torch.cat([read.train_images, read.test_images])) == [*range(20)]
        assert any("without classes" in note for note in read.notes) and "4 of its images, a fifth," in read.notes[-1]
        assert torch.equal(load_images(str(tmp_path)).test_images, read.test_images)

    @pytest.mark.parametrize("train, test, others", [("train", "test", ["val"]), ("Training", "val", [])])
    def test_of_two_parts_of_images_is_read_as_these_parts(self, tmp_path, train, test, others):
        for start, part in enumerate([train, test, *others]):
            for number in range(3):
                write(tmp_path / part / f"{number}.jpg", 50 * start)
        read = load_images(str(tmp_path))
        assert labels_of(read) == ({UNKNOWN}, {UNKNOWN}) and not read.drawn
        assert (len(read.train_images), len(read.test_images)) == (3, 3)
        assert max(reds(read.train_images)) < 25 < min(reds(read.test_images)) <= max(reds(read.test_images)) < 75
        assert any("the folders val are ignored" in note for note in read.notes) == bool(others)

    def test_of_classes_of_one_image_each_is_read_without_them(self, tmp_path):
        for number in range(10):
            write(tmp_path / f"class{number}" / "deep" / "0.png", number)
        with pytest.raises(DataError):
            load_images(str(tmp_path))
        read = load_images(str(tmp_path), labelled=False)
        assert labels_of(read) == ({UNKNOWN}, {UNKNOWN}) and read.class_names == ()
        assert reds(torch.cat([read.train_images, read.test_images])) == [*range(10)]

    def test_of_classes_in_two_parts_keeps_the_labels_of_its_test_part(self, tmp_path):
        for part in ("train", "test"):
            for name in ("cat", "dog"):
                write(tmp_path / part / name / "0.png", 1)
        read = load_images(str(tmp_path), labelled=False)
        assert labels_of(read) == ({UNKNOWN}, {0, 1}) and read.class_names == ("cat", "dog")
        assert not read.labelled and read.test_labelled and not read.facts()["labelled"]


def test_a_named_set_forgets_the_labels_of_its_training_part_only():
    whole, read = load_images("digits"), load_images("digits", labelled=False)
    assert torch.equal(read.train_images, whole.train_images) and (read.train_labels == UNKNOWN).all()
    assert torch.equal(read.test_labels, whole.test_labels) and read.class_names == whole.class_names


@pytest.mark.parametrize("missing", [("train", "test"), ("test",)])
def test_a_file_without_any_labels_has_none_and_half_of_them_are_refused(tmp_path, missing):
    arrays = {f"{part}_images": np.full((4, 5, 5), 200, np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(4) for part in ("train", "test") if part not in missing}
    np.savez(tmp_path / "set.npz", **arrays)
    if len(missing) == 2:
        assert labels_of(load_images(str(tmp_path / "set.npz"))) == ({UNKNOWN}, {UNKNOWN})
    else:
        with pytest.raises(DataError, match="test_labels"):
            load_images(str(tmp_path / "set.npz"))


class TestClasses:
    """The classes of images without labels are those of the teacher."""

    @pytest.mark.parametrize(
        "names, kept",
        [
            (("red", "green", "blue"), True),
            (("0", "1", "2"), True),
            (("green", "red", "blue"), False),
            (("red", "green"), False),
        ],
    )
    def test_keep_the_test_labels_if_they_can_be_the_same(self, names, kept, blobs):
        made = blobs.without_labels().with_classes(names)
        assert made.test_labelled == kept and made.class_names == (blobs.class_names if kept else names)
        assert not made.labelled and torch.equal(made.train_images, blobs.train_images)

    def test_some_unknown_labels_among_others_are_refused(self, blobs):
        labels = blobs.train_labels.clone()
        labels[3] = UNKNOWN
        with pytest.raises(DataError, match="run from -1 to 2"):
            ImageSet("own", blobs.train_images, labels, blobs.test_images, blobs.test_labels, blobs.class_names)


class TestFeed:
    def test_yields_the_same_images_and_no_labels(self, blobs):
        feed = MemoryFeed(blobs.without_labels(), batch_size=16, validation=0.25)
        batches = list(feed.batches(1))
        assert all(inputs.labels is None and inputs.student.shape == (16, 3, 8, 8) for inputs in batches)
        held, labels = feed.held()
        seen = torch.cat([inputs.samples for inputs in batches]).tolist()
        assert len(held) == 24 and (labels == UNKNOWN).all() and len(set(seen)) == len(seen) == 64
        assert batches[0].to(torch.device("cpu"), torch.channels_last).labels is None

    def test_holds_out_images_that_no_label_chose(self, blobs):
        turned = ImageSet(
            "own",
            blobs.train_images,
            blobs.train_labels.flip(0),
            *(blobs.test_images, blobs.test_labels),
            ("a", "b", "c"),
        )
        parts = [split(one.without_labels().train_labels, 0.25, 0) for one in (blobs, turned)]
        assert torch.equal(parts[0][1], parts[1][1])

    def test_of_few_images_is_refused_with_a_size_that_works(self, blobs):
        with pytest.raises(ConfigError, match="give --batch-size 16, and more --epochs"):
            MemoryFeed(blobs.without_labels(), batch_size=128)
        assert MemoryFeed(blobs.without_labels(), batch_size=16).steps >= 4

    def test_cannot_be_paired(self, blobs):
        frames = torch.zeros(6, 2, 2, 4, 4, dtype=torch.uint8)
        labels = torch.arange(6) % 3
        events = ImageSet("events", frames, labels, frames, labels, blobs.class_names)
        with pytest.raises(DataError, match="cannot be paired without labels"):
            PairFeed(MemoryFeed(events, batch_size=2, validation=0.0), blobs.without_labels())
