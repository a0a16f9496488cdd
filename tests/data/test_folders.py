"""Folders of images: which are parts and which are classes, and pictures of every kind."""

import os
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import pil_to_tensor

from spikedistill.data.images import load_images
from spikedistill.errors import ConfigError, DataError


def write_image(path, colour=(10, 20, 30), size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_classes(folder, counts):
    for name, count in counts.items():
        for number in range(count):
            write_image(folder / name / f"{number}.png", (number, 0, 255))


class TestFolder:
    def test_train_and_test_folders_are_read_by_class_in_the_order_of_names(self, tmp_path):
        write_classes(tmp_path / "train", {"dog": 3, "cat": 2})
        write_classes(tmp_path / "test", {"dog": 1, "cat": 1})
        read = load_images(str(tmp_path))
        assert (read.name, read.class_names) == (tmp_path.name, ("cat", "dog"))
        assert read.train_labels.tolist() == [0, 0, 1, 1, 1]
        assert read.train_images[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 2]
        assert read.train_images[:, 2].eq(255).all()
        assert read.test_labels.tolist() == [0, 1]

    @pytest.mark.parametrize("name", ["val", "valid"])
    def test_a_validation_folder_stands_in_for_a_test_folder(self, tmp_path, name):
        write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
        write_classes(tmp_path / name, {"cat": 1, "dog": 3})
        assert len(load_images(str(tmp_path)).test_images) == 4

    def test_of_classes_alone_a_fifth_of_each_becomes_the_test_part(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 10})
        read = load_images(str(tmp_path))
        assert read.train_labels.bincount().tolist() == [4, 8]
        assert read.test_labels.bincount().tolist() == [1, 2]
        reds = torch.cat([read.train_images, read.test_images])[:, 0, 0, 0]
        assert sorted(reds.tolist()) == sorted([*range(5), *range(10)])

    def test_other_files_and_hidden_folders_are_passed_over_and_deeper_ones_read(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 5, ".cache": 5})
        write_image(tmp_path / "cat" / "more" / "deep.BMP")
        (tmp_path / "cat" / "notes.txt").write_text("not an image")
        read = load_images(str(tmp_path))
        assert read.class_names == ("cat", "dog")
        assert len(read.train_images) + len(read.test_images) == 11

    def test_hidden_folders_beside_the_classes_of_a_part_are_passed_over(self, tmp_path):
        for part in ("train", "test"):
            write_classes(tmp_path / part, {"cat": 2, "dog": 2, ".ipynb_checkpoints": 1})
        assert load_images(str(tmp_path)).class_names == ("cat", "dog")

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_pixels_of_more_than_8_bits_are_refused_rather_than_clipped(self, tmp_path, mode):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        Image.new(mode, (4, 4), 1000).save(tmp_path / "cat" / "deep.tiff")
        with pytest.raises(DataError, match=r"cat/deep\.tiff' cannot be read.*not of 8 bits"):
            load_images(str(tmp_path))

    def test_grey_images_become_three_equal_channels(self, tmp_path):
        write_classes(tmp_path / "train", {"cat": 1, "dog": 1})
        write_classes(tmp_path / "test", {"cat": 1, "dog": 1})
        Image.new("L", (4, 4), 77).save(tmp_path / "train" / "cat" / "0.png")
        assert load_images(str(tmp_path)).train_images[0].eq(77).all()

    def test_images_of_all_sizes_are_resized_where_a_size_is_given(self, tmp_path):
        for part in ("train", "test"):
            write_image(tmp_path / part / "cat" / "0.png", (1, 2, 3), (9, 5))
            write_image(tmp_path / part / "dog" / "0.png", (4, 5, 6), (2, 2))
        read = load_images(str(tmp_path), image_size=6)
        assert read.train_images.shape == (2, 3, 6, 6)
        torch.testing.assert_close(
            read.train_images[:, :, 3, 3], torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
        )

    def test_sizes_are_those_of_torchvisions_resize_and_centre_crop(self, tmp_path):
        usual = Compose([Resize(16), CenterCrop(16)])
        images = []
        for number, size in enumerate([(40, 20), (20, 40), (24, 24), (10, 8)]):
            pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
            images.append(Image.fromarray(pixels).resize((size[1], size[0])))
            for part in ("train", "test"):
                file = tmp_path / part / "ab"[number % 2] / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                images[-1].save(file)
        found = load_images(str(tmp_path), image_size=16).train_images
        expected = torch.stack([pil_to_tensor(usual(images[number])) for number in (0, 2, 1, 3)])
        assert (found.int() - expected.int()).abs().max() <= 1

    @pytest.mark.parametrize("size", [0, -3])
    def test_a_size_that_no_image_has_is_refused(self, tmp_path, size):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        with pytest.raises(ConfigError, match=rf"image_size \(={size}\)"):
            load_images(str(tmp_path), image_size=size)

    def test_images_of_different_sizes_are_refused_with_the_remedy(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        write_image(tmp_path / "dog" / "4.png", size=(3, 4))
        with pytest.raises(DataError, match=r"dog/4\.png' has shape \(4, 3, 3\).*give --image-size"):
            load_images(str(tmp_path))

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no images: expected .*CLASS/image\.png"):
            load_images(str(tmp_path))

    def test_a_train_folder_without_a_test_folder_is_refused(self, tmp_path):
        write_classes(tmp_path / "train", {"cat": 2})
        with pytest.raises(DataError, match="'train' but no 'test' or 'val'"):
            load_images(str(tmp_path))

    def test_a_test_class_that_was_never_trained_is_refused(self, tmp_path):
        write_classes(tmp_path / "train", {"cat": 2})
        write_classes(tmp_path / "test", {"cat": 2, "yak": 1})
        with pytest.raises(DataError, match="classes that 'train' does not have: yak"):
            load_images(str(tmp_path))

    def test_a_class_too_small_to_be_split_is_refused(self, tmp_path):
        write_classes(tmp_path, {"cat": 9, "dog": 1})
        with pytest.raises(DataError, match="Give more images"):
            load_images(str(tmp_path))

    def test_a_truncated_image_is_named(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        broken = tmp_path / "dog" / "3.png"
        broken.write_bytes(broken.read_bytes()[:45])
        with pytest.raises(DataError, match=r"dog/3\.png' cannot be read .*replace, convert or delete it"):
            load_images(str(tmp_path))

    def test_a_png_with_a_wrong_chunk_is_named(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        broken = tmp_path / "dog" / "3.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(broken)
        whole = broken.read_bytes()
        start = whole.index(b"IDAT") - 4
        length = struct.pack(">I", struct.unpack(">I", whole[start : start + 4])[0] - 20)
        broken.write_bytes(whole[:start] + length + whole[start + 4 :])
        with pytest.raises(DataError, match=r"dog/3\.png' cannot be read"):
            load_images(str(tmp_path))

    def test_a_broken_header_is_named(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 5})
        (tmp_path / "dog" / "9.ppm").write_bytes(b"P6\n4 four 255\n" + bytes(48))
        with pytest.raises(DataError, match=r"dog/9\.ppm' cannot be read"):
            load_images(str(tmp_path))

    def test_a_class_of_one_image_without_a_test_part_is_refused_in_these_words(self, tmp_path):
        write_classes(tmp_path, {"cat": 5, "dog": 1})
        with pytest.raises(DataError, match=r"has no test part, and none could be drawn: .* two images of every class"):
            load_images(str(tmp_path))

    def test_a_path_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(DataError, match=re.escape(f"'{tmp_path / 'absent'}' does not exist")):
            load_images(str(tmp_path / "absent"))

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "set.csv").write_text("1,2,3")
        with pytest.raises(DataError, match=r"is neither a folder nor a \.npz file"):
            load_images(str(tmp_path / "set.csv"))


def write_parts(folder, train="train", test="test", counts=(("cat", 3), ("dog", 2))):
    """Both parts, of images that are all unlike."""
    for part, blue in ((train, 0), (test, 9)):
        for red, (name, count) in enumerate(counts):
            for number in range(count):
                write_image(folder / part / name / f"{number}.png", (red, number, blue))


def blues(images):
    """The blue of each image: 0 in a training part of ``write_parts``, 9 in a test part."""
    return set(images[:, 2].unique().tolist())


def is_read_as_parts(folder):
    read = load_images(str(folder))
    assert read.class_names == ("cat", "dog") and not read.drawn
    assert (blues(read.train_images), blues(read.test_images)) == ({0}, {9})
    assert (len(read.train_images), len(read.test_images)) == (5, 5)
    return read


class TestParts:
    """Which folders are parts."""

    SPELLINGS = (
        *(
            ("Training", "Testing"),
            ("Train", "Test"),
            ("TRAIN", "TEST"),
            ("training_set", "test_set"),
            ("trainset", "testset"),
        ),
        *(
            ("train_images", "test_images"),
            ("images_train", "images_val"),
            ("train-10", "test-10"),
            ("train2017", "val2017"),
        ),
        *(("seg_train", "seg_test"), ("intel-train", "intel-test"), ("TrainData", "TestData"), ("trainval", "test")),
        *(("train", "validation"), ("Train", "Valid"), ("train", "dev"), ("train", "val"), ("train", "eval")),
        *(("1_train", "2_test"), ("Training Images", "Validation Images"), ("training", "test_set")),
    )

    @pytest.mark.parametrize("train, test", SPELLINGS)
    def test_go_by_their_usual_spellings(self, tmp_path, train, test):
        write_parts(tmp_path, train, test)
        assert is_read_as_parts(tmp_path).notes == ()

    @pytest.mark.parametrize(
        "train, test",
        [("seg_train/seg_train", "seg_test/seg_test"), ("a/b/train", "a/b/test"), ("data/Train/Train", "data/Test")],
    )
    def test_may_lie_in_folders_of_their_own(self, tmp_path, train, test):
        write_parts(tmp_path, train, test)
        is_read_as_parts(tmp_path)

    def test_of_the_test_kind_come_before_those_of_validation(self, tmp_path):
        write_parts(tmp_path)
        write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
        assert is_read_as_parts(tmp_path).notes == ("the folders val are ignored",)

    def test_beside_other_folders_and_files_are_read_and_these_are_said(self, tmp_path):
        write_parts(tmp_path, "seg_train/seg_train", "seg_test/seg_test")
        write_image(tmp_path / "seg_pred" / "seg_pred" / "0.jpg")
        write_image(tmp_path / "seg_test" / "preview.png")
        write_image(tmp_path / "logo.PNG")
        (tmp_path / "seg_train" / "seg_train" / "cat" / "notes.txt").write_text("no image")
        (tmp_path / "seg_train" / "seg_train" / "LICENSE").write_text("no image")
        (tmp_path / "seg_test" / "preview.png").unlink()
        first, second = is_read_as_parts(tmp_path).notes
        assert first == "the folders seg_pred are ignored"
        assert second == "files that are not images of a class are ignored (1 .png, 1 .txt, 1 without suffix)"

    def test_that_are_a_class_among_others_are_a_class(self, tmp_path):
        write_classes(tmp_path, {"bus": 5, "bullet_train": 5, "train": 5, "trainer": 5})
        read = load_images(str(tmp_path))
        assert read.class_names == ("bullet_train", "bus", "train", "trainer")
        assert "'train' is read as a class, not as a part" in read.notes

    def test_hold_no_hidden_files_and_folders(self, tmp_path):
        write_parts(tmp_path)
        for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN"):
            write_classes(tmp_path / "train" / "cat" / hidden, {"cat": 1})
            write_classes(tmp_path / hidden, {"cat": 1, "dog": 1})
            write_image(tmp_path / "test" / hidden / "0.png")
        (tmp_path / "train" / "dog" / "._0.jpg").write_bytes(b"no image")
        (tmp_path / "train" / "dog" / "Thumbs.db").write_bytes(b"no image")
        assert is_read_as_parts(tmp_path).notes == ()

    @pytest.mark.parametrize(
        "folders, message",
        [
            (["train/cat", "train/dog"], r"has a folder 'train' but no 'test' or 'val' beside it"),
            (["Training/cat", "Training/dog"], r"has a folder 'Training' but no 'test' or 'val'"),
            (["all/train/cat", "all/train/dog"], r"has a folder 'train' but no"),
            (["test/cat", "test/dog"], r"has a folder 'test' but no 'train' beside it"),
            (
                ["train/cat", "Training/cat", "test/cat"],
                r"holds 'Training' \(1 folders\), 'test' .* not one training and one",
            ),
            (["train/cat", "test/cat", "Testing/cat"], r"not one training and one test part"),
            (["train/cat", "val/cat", "valid/cat"], r"not one training and one test part"),
            (["train/cat", "tets/cat"], r"'tets' \(1 folders\), 'train' \(1 folders\)\. These are not one"),
            (["a_train/cat", "b_test/cat"], r"not one training and one test part"),
            (["a_train/cat", "a_test/cat", "b_train/cat", "b_test/cat"], r"not one training and one test part"),
            (["test/cat", "val/cat"], r"not one training and one test part"),
            (
                ["train", "test", "cat"],
                r"'test' \(2 images\), 'train' \(2 images\)\. These are names of parts, without a folder",
            ),
            (["train", "Train", "test"], r"These are names of parts, without a folder"),
            (["train/cat", "train/dog", "test"], r"'test' \(2 images\), 'train' \(2 folders\)"),
            (["trn/cat", "trn/dog", "tst/cat", "tst/dog"], r"2 of them hold the same folders \(cat, dog\)"),
            (["fold 1/cat", "fold 1/dog", "fold 2/cat", "fold 2/dog"], r"hold the same folders \(cat, dog\)"),
            (["train/cat", "test/cat", "cat"], r"has cat beside train and test: put these classes into the parts"),
            (
                ["train/cat", "train/dog", "test/Cat", "test/dog"],
                r"has classes that 'train' does not have: Cat\. .* are cat, dog",
            ),
            (["cat"], r"training images of 1 class \(cat\): give images of at least two"),
            (["train/cat", "test/cat"], r"training images of 1 class"),
        ],
        ids=str,
    )
    def test_that_cannot_be_meant_are_refused_with_what_was_found(self, tmp_path, folders, message):
        for folder in folders:
            for number in range(2):
                write_image(tmp_path / folder / f"{number}.png", (number, len(folder), 0))
        with pytest.raises(DataError, match=message):
            load_images(str(tmp_path))

    @pytest.mark.parametrize("where", ["train/yak", "test/yak", "train/cat/.hidden"])
    def test_with_a_class_folder_without_images_are_refused(self, tmp_path, where):
        write_parts(tmp_path)
        (tmp_path / where).mkdir()
        if where.endswith("hidden"):
            for file in (tmp_path / "train" / "cat").glob("*.png"):
                file.rename(file.parent / ".hidden" / file.name)
        with pytest.raises(DataError, match=r"The class folder '.*' holds no images: expected .* or delete it|yak"):
            load_images(str(tmp_path))

    def test_with_a_class_of_other_files_say_which(self, tmp_path):
        write_parts(tmp_path)
        (tmp_path / "train" / "yak").mkdir()
        (tmp_path / "train" / "yak" / "0.heic").write_bytes(b"?")
        with pytest.raises(DataError, match=r"train/yak' holds no images, but 1 \.heic: expected \.png"):
            load_images(str(tmp_path))

    def test_without_a_class_of_the_other_say_so(self, tmp_path):
        write_parts(tmp_path)
        write_image(tmp_path / "train" / "yak" / "0.png", (7, 7, 7))
        assert load_images(str(tmp_path)).notes == ("no test images of yak: the test accuracy says nothing about them",)

    def test_that_share_images_say_how_many(self, tmp_path):
        write_parts(tmp_path)
        write_image(tmp_path / "test" / "cat" / "copy.png", (0, 1, 0))
        write_image(tmp_path / "test" / "dog" / "false.png", (0, 0, 0))
        (note,) = load_images(str(tmp_path)).notes
        assert note.startswith("2 of 7 test images are copies of training images, 1 of them under another class")

    def test_that_are_drawn_are_said(self, tmp_path):
        write_classes(tmp_path, {"cat": 10, "dog": 10})
        read = load_images(str(tmp_path))
        assert read.drawn and any("no test part: 4 of its images, a fifth of each class" in note for note in read.notes)

    def test_of_classes_that_are_numbers_say_their_order(self, tmp_path):
        write_parts(tmp_path, counts=[(str(number), 1) for number in (0, 1, 2, 10)])
        assert load_images(str(tmp_path)).notes == ("classes are in the order of their names as text: 0, 1, 10, 2",)


class TestLinks:
    def test_to_folders_inside_a_class_are_followed_and_said(self, tmp_path):
        write_parts(tmp_path / "set")
        for number in range(3):
            write_image(tmp_path / "elsewhere" / "deep" / f"{number}.png", (9, number, 0))
        (tmp_path / "set" / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "set" / "train" / "dog" / "one.png").symlink_to(tmp_path / "elsewhere" / "deep" / "0.png")
        read = load_images(str(tmp_path / "set"))
        assert read.train_labels.bincount().tolist() == [6, 3]
        assert read.notes == ("1 linked folders were followed",)

    def test_to_a_class_and_to_a_part_are_followed(self, tmp_path):
        write_parts(tmp_path / "a")
        for part in ("train", "test"):
            (tmp_path / "b" / part).mkdir(parents=True)
            (tmp_path / "b" / part / "cat").symlink_to(tmp_path / "a" / part / "cat")
            (tmp_path / "b" / part / "dog").symlink_to(tmp_path / "a" / part / "dog")
        (tmp_path / "c").mkdir()
        for part in ("train", "test"):
            (tmp_path / "c" / part).symlink_to(tmp_path / "a" / part)
        is_read_as_parts(tmp_path / "b")
        is_read_as_parts(tmp_path / "c")

    @pytest.mark.parametrize("target", [".", "..", "../.."])
    def test_that_lead_back_are_refused(self, tmp_path, target):
        write_parts(tmp_path)
        (tmp_path / "train" / "cat" / "again").symlink_to(target)
        with pytest.raises(DataError, match=r"train/cat/again.*' leads back to a folder that it lies in: delete it"):
            load_images(str(tmp_path))

    @pytest.mark.parametrize("where", ["train/cat/more", "train/cat/9.png", "train/yak", "extra"])
    def test_to_nothing_are_refused(self, tmp_path, where):
        write_parts(tmp_path)
        (tmp_path / where).symlink_to(tmp_path / "gone")
        with pytest.raises(DataError, match=rf"{re.escape(where)}' is a link to '.*gone', which does not exist"):
            load_images(str(tmp_path))

    def test_of_a_wrapper_to_itself_are_refused(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        os.symlink(tmp_path / "a", tmp_path / "a" / "b" / "c")
        with pytest.raises(DataError, match="leads back to a folder that it lies in"):
            load_images(str(tmp_path))


class TestPictures:
    """What a single file may be."""

    def read(self, folder, image, name="own.png", **options):
        """The pixels [H, W, 3] that an image is read as, with what was said."""
        write_parts(folder)
        for file in (folder / "train" / "cat").glob("*.png"):
            file.unlink()
        image.save(folder / "train" / "cat" / name, **options)
        read = load_images(str(folder), image_size=None if image.size == (4, 4) else 4)
        return read.train_images[0].permute(1, 2, 0).numpy(), read.notes

    @pytest.mark.parametrize("tag, quarter", [(3, 2), (6, 3), (8, 1)])
    def test_is_turned_as_its_exif_says(self, tmp_path, tag, quarter):
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[0, 1] = 255
        exif = Image.Exif()
        exif[0x0112] = tag
        found, notes = self.read(tmp_path, Image.fromarray(pixels), exif=exif)
        np.testing.assert_array_equal(found, np.rot90(pixels, quarter))
        assert notes == ("1 images were turned as their EXIF says",)

    def test_of_usual_orientation_is_left_alone(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 1
        found, notes = self.read(tmp_path, Image.new("RGB", (4, 4), (1, 2, 3)), exif=exif)
        assert (found == (1, 2, 3)).all() and notes == ()

    def half(self, mode):
        """A black image whose upper half is transparent."""
        alpha = np.repeat(np.array([0, 0, 255, 255], np.uint8)[:, None], 4, axis=1)
        whole = Image.fromarray(np.dstack([np.zeros((4, 4, 3), np.uint8), alpha]), "RGBA") if mode != "LA" else None
        if mode == "LA":
            return Image.merge("LA", [Image.new("L", (4, 4)), Image.fromarray(alpha)])
        if mode == "P":
            image = Image.fromarray((alpha // 255), "P")
            image.putpalette([9, 9, 9, 0, 0, 0])
            image.info["transparency"] = 0
            return image
        if mode in ("L", "RGB"):
            image = Image.fromarray(np.where(alpha, 0, 9).astype(np.uint8)).convert(mode)
            image.info["transparency"] = 9 if mode == "L" else (9, 9, 9)
            return image
        return whole

    @pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
    def test_that_is_transparent_becomes_white_there(self, tmp_path, mode):
        image = self.half(mode)
        transparency = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        found, notes = self.read(tmp_path, image, **transparency)
        assert (found[:2] == 255).all() and (found[2:] == 0).all()
        assert notes == ("1 images have transparent parts, which became white",)

    def test_that_is_half_transparent_is_mixed_with_white(self, tmp_path):
        found, _ = self.read(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
        assert (abs(found.astype(int) - 127) <= 1).all()

    def test_that_is_opaque_keeps_its_colours_without_a_word(self, tmp_path):
        found, notes = self.read(tmp_path, Image.new("RGBA", (4, 4), (5, 6, 7, 255)))
        assert (found == (5, 6, 7)).all() and notes == ()

    @pytest.mark.parametrize(
        "mode, name, colour, expected",
        [
            ("CMYK", "own.jpg", (0, 0, 0, 0), 255),
            ("CMYK", "own.tiff", (0, 255, 255, 0), (255, 0, 0)),
            ("1", "own.png", 1, 255),
            ("P", "own.GIF", 0, 0),
            ("RGB", "own.JPEG", (90, 90, 90), 90),
            ("RGB", "own.Jfif", (90, 90, 90), 90),
            ("RGB", "own.TGA", (1, 2, 3), (1, 2, 3)),
            ("L", "own.pgm", 77, 77),
        ],
    )
    def test_of_any_usual_kind_is_read_by_its_colours(self, tmp_path, mode, name, colour, expected):
        kind = {"format": "JPEG"} if name.endswith("Jfif") else {}
        found, _ = self.read(tmp_path, Image.new(mode, (4, 4), colour), name, **kind)
        assert (abs(found.astype(int) - expected) <= 2).all()

    @pytest.mark.parametrize("name", ["own.gif", "own.webp", "own.png", "own.tiff"])
    def test_of_several_frames_is_refused(self, tmp_path, name):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
        with pytest.raises(DataError, match=rf"cat/{name}' cannot be read \(it holds 3 images, expected one"):
            self.read(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])

    @pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(60)])
    def test_that_is_none_is_named(self, tmp_path, content):
        write_parts(tmp_path)
        (tmp_path / "train" / "dog" / "bad.jpg").write_bytes(content)
        with pytest.raises(
            DataError, match=r"train/dog/bad\.jpg' cannot be read \(.+\): replace, convert or delete it"
        ):
            load_images(str(tmp_path))

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    @pytest.mark.parametrize("name", ["own.png", "own.jpg", "own.bmp", "own.webp"])
    def test_that_is_cut_short_is_named(self, tmp_path, name, share):
        write_parts(tmp_path)
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = tmp_path / "train" / "dog" / name
        Image.fromarray(pixels).save(file)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=rf"train/dog/{re.escape(name)}' cannot be read"):
            load_images(str(tmp_path), image_size=4)

    def test_of_another_size_in_the_other_part_is_refused(self, tmp_path):
        write_parts(tmp_path)
        for name, count in (("cat", 3), ("dog", 2)):
            for number in range(count):
                write_image(tmp_path / "test" / name / f"{number}.png", (1, number, 9), (5, 4))
        with pytest.raises(
            DataError, match=r"training images of shape \(3, 4, 4\) and test images of shape \(3, 4, 5\)"
        ):
            load_images(str(tmp_path))


class TestWhatLiesBesideTheClasses:
    @pytest.mark.parametrize("train, test", [("seg_train", "seg_test"), ("train", "test"), ("x_Training", "x_Test")])
    def test_single_images_in_the_parts_make_them_no_classes(self, tmp_path, train, test):
        write_classes(tmp_path / train, {"cat": 2, "dog": 2, "yak": 2})
        for name in ("cat", "dog", "yak"):
            write_image(tmp_path / test / name / "0.png", (99, 0, 0))
        write_image(tmp_path / train / "montage.png")
        write_image(tmp_path / test / "montage.png")
        found = load_images(str(tmp_path))
        assert (found.class_names, len(found.train_images), len(found.test_images)) == (("cat", "dog", "yak"), 6, 3)
        assert found.notes == ("files that are not images of a class are ignored (2 .png)",)

    @pytest.mark.parametrize(
        "inside, beside",
        [
            (("data/train/cat", "data/train/dog", "data/test/cat", "data/test/dog"), "samples"),
            (("images/train/cat", "images/val/cat"), "labels/train/cat"),
            (("cat/train", "cat/val", "cat/test", "dog/train"), "dog/test"),
            (("birds/seg_train/owl", "birds/seg_test/owl"), "pictures"),
        ],
        ids=["wrapped", "images and labels", "parts in classes", "spelled"],
    )
    def test_parts_that_lie_deeper_are_refused(self, tmp_path, inside, beside):
        write_classes(tmp_path, dict.fromkeys((*inside, beside), 3))
        with pytest.raises(DataError, match=r"holds a training and a test part: give '.*', or move the parts above"):
            load_images(str(tmp_path))

    def test_a_class_named_as_a_part_may_hold_images_and_folders(self, tmp_path):
        write_classes(tmp_path, {"train": 5, "train/steam": 5, "train/diesel": 5, "bus": 5})
        assert load_images(str(tmp_path)).class_names == ("bus", "train")

    @pytest.mark.parametrize(
        "folders, deep",
        [
            ({"learn/cat": 5, "learn/dog": 5, "learn/yak": 5, "check/cat": 5, "check/dog": 5}, "check, learn"),
            ({"labelled/cat": 5, "labelled/dog": 5, "others": 5}, "labelled"),
        ],
    )
    def test_classes_whose_images_lie_deeper_are_said(self, tmp_path, folders, deep):
        write_classes(tmp_path, folders)
        first = load_images(str(tmp_path)).notes[0]
        assert first.startswith(f"the images of {deep} lie in folders below (cat, dog") and "one class?" in first
