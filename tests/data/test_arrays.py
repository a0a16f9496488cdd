"""Arrays in .npz files that are not what was agreed upon: read where they can mean one thing, else refused."""

import tracemalloc

import numpy as np
import pytest
import torch

from spikedistill.data.images import load_images
from spikedistill.errors import DataError


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(folder, **changes):
    """A sound set of three classes with what is to be changed in it, written and read."""
    labels = {"train_labels": np.arange(12) % 3, "test_labels": np.arange(6) % 3}
    images = {"train_images": drawn(12, 8, 9, 3), "test_images": drawn(6, 8, 9, 3, seed=1)}
    np.savez(folder / "own.npz", **{**images, **labels, **changes})
    return load_images(str(folder / "own.npz"))


def both(make):
    """Images of both parts."""
    return {"train_images": make(12, 0), "test_images": make(6, 1)}


class TestOrderOfAxes:
    @pytest.mark.parametrize("size", [(3, 8, 9), (1, 8, 9), (3, 32, 32), (1, 28, 28), (2, 8, 9), (4, 8, 9)], ids=str)
    def test_channels_first_are_taken_as_such_and_said(self, tmp_path, size):
        stored = both(lambda count, seed: drawn(count, *size, seed=seed))
        found = read(tmp_path, **stored)
        np.testing.assert_array_equal(found.train_images, stored["train_images"])
        np.testing.assert_array_equal(found.test_images, stored["test_images"])
        assert any(f"[N, C, H, W], {size[0]} channels first" in note for note in found.notes)

    @pytest.mark.parametrize(
        "size", [(8, 9, 3), (8, 9, 1), (8, 9, 2), (8, 9, 4), (3, 4, 3), (12, 14, 5), (3, 3, 3)], ids=str
    )
    def test_channels_last_are_taken_as_such_without_a_word(self, tmp_path, size):
        stored = both(lambda count, seed: drawn(count, *size, seed=seed))
        found = read(tmp_path, **stored)
        np.testing.assert_array_equal(found.train_images, stored["train_images"].transpose(0, 3, 1, 2))
        assert found.notes == ()


class TestLabels:
    @pytest.mark.parametrize(
        "train, message",
        [
            (
                np.arange(12) % 3 + 1,
                r"run from 1 to 3 and have 3 values \(1, 2, 3\): expected all of 0 to 2\. Subtract 1\.",
            ),
            (
                np.array([0, 1, 2, 255] * 3),
                r"0, 1, 2, 255\): expected all of 0 to 3\. Remove the images labelled 255, or",
            ),
            (np.array([0, 1, 2, 255] * 3, np.uint8), r"labelled 255, or"),
            (np.array([0, 1, 2, -1] * 3), r"run from -1 to 2 .* Remove the images labelled -1, or"),
            (np.array([0, 1, 2, -100] * 3), r"Remove the images labelled -100, or"),
            (np.array([0, 1, 2, 2**40] * 3), r"run from 0 to 1099511627776 .*labelled 1099511627776, or"),
            (np.array([0, 1, 2, 2**62] * 3), r"labelled 4611686018427387904, or"),
            (np.array([0, 10, 20] * 4), r"number the classes anew \(np\.unique"),
            (np.array([0, 1, 2, 2**63] * 3, np.uint64), r"uint64 of shape \(12,\): expected whole numbers"),
            (np.arange(12.0) % 3, r"float64 of shape \(12,\).* Take labels\.astype\(int\)"),
            (np.array([0.5] * 12), r"float64 of shape \(12,\).* Give the number of the class"),
            (np.array([0, np.nan] * 6), "Give the number of the class"),
            (np.eye(3)[np.arange(12) % 3], r"\(12, 3\).*one-hot: take labels\.argmax\(1\)"),
            (np.eye(3, dtype=bool)[np.arange(12) % 3], "one-hot"),
            (np.ones((12, 3), int), "Give each image one class, these have several"),
            ((np.arange(12) % 3)[:, None], r"\(12, 1\).* Take labels\[:, 0\]"),
            (np.array(["cat", "dog", "cow"] * 4), r"Number them: class_names, labels = np\.unique"),
            (np.array([True, False] * 6), "bool of shape"),
        ],
        ids=str,
    )
    def test_that_cannot_be_meant_are_refused_with_the_remedy(self, tmp_path, train, message):
        with pytest.raises(DataError, match=message):
            read(tmp_path, train_labels=train, test_labels=train[:6])

    def test_of_one_huge_number_cost_no_memory(self, tmp_path):
        tracemalloc.start()
        with pytest.raises(DataError, match="labelled 10000000000, or"):
            read(tmp_path, train_labels=np.array([0, 1, 2, 10**10] * 3))
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()

    def test_of_test_images_alone_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="test images, but no training images, of the classes 3"):
            read(tmp_path, test_labels=np.array([0, 1, 2, 3, 0, 1]))
        names = np.array(["a", "b", "c", "d"])
        with pytest.raises(DataError, match="test images, but no training images, of the classes d"):
            read(tmp_path, test_labels=np.array([0, 1, 2, 3, 0, 1]), class_names=names)

    def test_without_test_images_are_said(self, tmp_path):
        notes = read(tmp_path, test_labels=np.array([0, 1] * 3)).notes
        assert notes == ("no test images of 2: the test accuracy says nothing about them",)

    def test_of_named_classes_without_images_are_said(self, tmp_path):
        found = read(tmp_path, class_names=np.array([b"cat", b"dog", b"cow", b"yak"]))
        assert found.class_names == ("cat", "dog", "cow", "yak")
        assert found.notes == ("no images at all of yak: 3 of 4 classes are there",)

    def test_with_one_name_for_several_are_said(self, tmp_path):
        assert read(tmp_path, class_names=np.array(["cat", "dog", "cat"])).notes == (
            "several classes have one name: cat",
        )

    @pytest.mark.parametrize("names", [np.array([["cat"], ["dog"], ["yak"]]), np.array("cat, dog, yak")])
    def test_with_names_that_are_no_list_are_refused(self, tmp_path, names):
        with pytest.raises(DataError, match=r"class_names has shape \(.*\), expected one name per class"):
            read(tmp_path, class_names=names)

    def test_of_one_class_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"training images of 1 class \(0\): give images of at least two classes"):
            read(tmp_path, train_labels=np.zeros(12, int), test_labels=np.zeros(6, int))


class TestPixels:
    @pytest.mark.parametrize(
        "images, message",
        [
            (drawn(12, 8, 9, 3) / 255, r"run from 0 to 1: take np\.round\(255 \* images\)\.astype\(np\.uint8\)"),
            (drawn(12, 8, 9, 3) * 1.0, r"run from 0 to 255: take np\.round\(images\)\.astype"),
            (drawn(12, 8, 9, 3).astype(int), r"int64 .* take np\.round\(images\)\.astype"),
            (drawn(12, 8, 9, 3) > 99, r"bool .* take np\.round\(255 \* images\)"),
            (drawn(12, 8, 9, 3) / 127.5 - 1, r"run from -1 to 1: bring them to 0 to 255 first"),
            (np.full((12, 8, 9, 3), np.nan), r"run from nan to nan: bring them"),
            (drawn(12, 8, 9, 3).astype(np.uint16) * 257, r"uint16 .*to 65535: bring them"),
            (drawn(12, 216), r"\(12, 216\).*Reshape each image to rows and columns"),
            (drawn(12, 8, 9, 3) // 255, "hold no byte above 1: expected 0 to 255. If they were 0 to 1, multiply"),
            (drawn(12, 8, 9, 3) * 0, "hold no byte above 0"),
            (np.array([{}] * 12, object), "without pickled objects"),
        ],
        ids=lambda value: getattr(value, "dtype", ""),
    )
    def test_that_are_not_bytes_of_the_whole_range_are_refused_with_the_remedy(self, tmp_path, images, message):
        with pytest.raises(DataError, match=message):
            read(tmp_path, train_images=images, test_images=images[:6])

    def test_of_a_small_range_are_said(self, tmp_path):
        stored = both(lambda count, seed: drawn(count, 8, 9, seed=seed) // 16)
        expected = [f"no pixel of the {part} part is brighter than 15 of 255" for part in ("training", "test")]
        assert [note.partition(":")[0] for note in read(tmp_path, **stored).notes] == expected

    @pytest.mark.parametrize("part, count", [("train", 12), ("test", 6)])
    def test_of_a_small_range_in_one_part_alone_are_refused_or_said(self, tmp_path, part, count):
        with pytest.raises(DataError, match=f"The {part}(ing)? images of .* hold no byte above 1"):
            read(tmp_path, **{f"{part}_images": drawn(count, 8, 9, 3) // 255})
        (note,) = read(tmp_path, **{f"{part}_images": drawn(count, 8, 9, 3) // 9}).notes
        assert note.startswith(f"no pixel of the {part}") and "brighter than 28 of 255" in note

    def test_of_event_frames_are_counts_and_may_be_small(self, tmp_path):
        stored = both(lambda count, seed: drawn(count, 4, 2, 8, 9, seed=seed) // 255)
        assert read(tmp_path, **stored).notes == ()

    def test_that_stand_in_both_parts_are_said(self, tmp_path):
        train, test = drawn(12, 8, 9, 3), drawn(6, 8, 9, 3, seed=1)
        test[:3] = train[[0, 4, 7]]
        (note,) = read(tmp_path, train_images=train, test_images=test, test_labels=np.array([0, 1, 2, 0, 1, 2])).notes
        assert note.startswith("3 of 6 test images are copies of training images, 1 of them under another class:")

    def test_arrays_that_are_not_read_are_said(self, tmp_path):
        (note,) = read(tmp_path, val_images=drawn(3, 8, 9, 3), val_labels=np.arange(3)).notes
        assert note == "the arrays val_images, val_labels are ignored"


def test_what_was_said_stands_in_the_facts(tmp_path):
    found = read(tmp_path, **both(lambda count, seed: drawn(count, 3, 8, 9, seed=seed)))
    facts = found.facts()
    assert facts["notes"] == list(found.notes) and len(found.notes) == 1
    assert (facts["name"], facts["train_images"], facts["test_images"], facts["shape"]) == ("own", 12, 6, [3, 8, 9])
    assert facts["class_names"] == ["0", "1", "2"] and facts["drawn"] is False
    assert torch.is_tensor(found.train_images)
