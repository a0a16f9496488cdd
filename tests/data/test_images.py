import io
import itertools
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets

from spikedistill.data.images import ImageSet, evenly, load_images, split
from spikedistill.errors import ConfigError, DataError


def drawn(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def arrays(**changes):
    """A sound set of ten training and four test images, and what is to be changed in it (None: left out)."""
    sound = {
        "train_images": drawn(10, 4, 5),
        "train_labels": np.arange(10) % 2,
        "test_images": drawn(4, 4, 5, seed=1),
        "test_labels": np.arange(4) % 2,
    }
    return {name: value for name, value in {**sound, **changes}.items() if value is not None}


def write_npz(path, **changes):
    np.savez(path, **arrays(**changes))
    return str(path)


def write_idx(directory, train, test, labels):
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for stem, pixels in (("train", train), ("t10k", test)):
        count, height, width = pixels.shape
        header = struct.pack(">IIII", 2051, count, height, width)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        numbers = np.resize(labels, count).astype(np.uint8)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + numbers.tobytes())
    return raw


def sheets(images, rows, columns):
    """Tiles laid row by row on lossless WebP sheets, one after another, and where each begins and ends."""
    count, height, width, channels = images.shape
    stored, ends = b"", [0]
    for first in range(0, count, rows * columns):
        canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
        for place, tile in enumerate(images[first : first + rows * columns]):
            top, left = height * (place // columns), width * (place % columns)
            canvas[top : top + height, left : left + width] = tile if channels == 3 else np.repeat(tile, 3, axis=2)
        file = io.BytesIO()
        Image.fromarray(canvas).save(file, "WEBP", lossless=True, exact=True)
        stored += file.getvalue()
        ends.append(len(stored))
    return np.frombuffer(stored, np.uint8), np.array(ends)


def write_pack(path, channels, names, rows=2, columns=3):
    train, test = drawn(11, 4, 5, channels), drawn(3, 4, 5, channels, seed=1)
    parts = {"train": sheets(train, rows, columns), "test": sheets(test, rows, columns)}
    np.savez(
        path,
        tile_hwc=np.array([4, 5, channels]),
        grid_rc=np.array([rows, columns]),
        class_names=np.array(names),
        train_labels=np.arange(11) % 2,
        test_labels=np.arange(3) % 2,
        **{f"{part}_sheets": stored for part, (stored, _) in parts.items()},
        **{f"{part}_offsets": ends for part, (_, ends) in parts.items()},
    )
    return train, test


@pytest.fixture
def offline(monkeypatch):
    def refuse(self):
        raise URLError("no route to host")

    for source in (datasets.MNIST, datasets.FashionMNIST, datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(source, "download", refuse)


class TestDigits:
    def test_four_fifths_train_and_a_fifth_tests(self):
        digits = load_images("digits")
        assert digits.train_images.shape == (1437, 1, 8, 8)
        assert digits.test_images.shape == (360, 1, 8, 8)
        assert (digits.classes, digits.channels, digits.class_names) == (10, 1, tuple("0123456789"))

    def test_they_are_scikit_learns_images_spread_over_the_whole_range_of_bytes(self):
        digits, source = load_images("digits"), load_digits()
        ours = np.concatenate([digits.train_images.numpy(), digits.test_images.numpy()]).reshape(1797, 64)
        labels = np.concatenate([digits.train_labels.numpy(), digits.test_labels.numpy()])
        theirs = np.rint(source.data * 255 / 16)
        both = [np.column_stack([rows, numbers]) for rows, numbers in ((ours, labels), (theirs, source.target))]
        first, second = (rows[np.lexsort(rows.T)] for rows in both)
        np.testing.assert_array_equal(first, second)

    def test_a_folder_of_that_name_is_pointed_to(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_images("digits").notes == ()
        (tmp_path / "digits").mkdir()
        assert load_images("digits").notes == ("the set of that name is read; the folder 'digits' here is ./digits",)

    def test_every_reading_gives_the_same_parts(self):
        torch.testing.assert_close(load_images("digits").test_images, load_images("digits").test_images)


class TestNpz:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_with_channels_last_come_out_channels_first(self, tmp_path, channels):
        train = drawn(10, 4, 5, channels)
        read = load_images(write_npz(tmp_path / "own.npz", train_images=train, test_images=train[:4]))
        assert read.train_images.shape == (10, channels, 4, 5)
        for row, channel in ((0, 0), (7, channels - 1)):
            np.testing.assert_array_equal(read.train_images[row, channel], train[row, :, :, channel])

    def test_images_without_channels_get_one(self, tmp_path):
        read = load_images(write_npz(tmp_path / "own.npz"))
        np.testing.assert_array_equal(read.train_images[:, 0], drawn(10, 4, 5))
        np.testing.assert_array_equal(read.test_images[:, 0], drawn(4, 4, 5, seed=1))
        assert read.train_labels.tolist() == [0, 1] * 5
        assert (read.name, read.channels, read.class_names) == ("own", 1, ("0", "1"))

    def test_class_names_are_taken_where_given(self, tmp_path):
        read = load_images(write_npz(tmp_path / "own.npz", class_names=np.array(["cat", "dog", "cow"])))
        assert (read.class_names, read.classes) == (("cat", "dog", "cow"), 3)

    def test_event_frames_come_out_as_they_are(self, tmp_path):
        train, test = drawn(10, 6, 2, 4, 5), drawn(4, 6, 2, 4, 5, seed=1)
        read = load_images(write_npz(tmp_path / "own.npz", train_images=train, test_images=test))
        assert (read.frames, read.channels, read.classes) == (6, 2, 2)
        np.testing.assert_array_equal(read.train_images, train)
        np.testing.assert_array_equal(read.test_images, test)

    def test_images_have_no_frames(self, tmp_path):
        assert load_images(write_npz(tmp_path / "own.npz")).frames == 0

    def test_a_home_directory_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_npz(tmp_path / "own.npz")
        assert load_images("~/own.npz").name == "own"

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"train_labels": np.arange(9) % 2}, "10 images and 9 labels"),
            ({"test_labels": np.array([0, 1, -1, 0])}, "run from -1 to 1"),
            ({"class_names": np.array(["cat"])}, "run from 0 to 1 for 1 classes: expected 0 to 0"),
            ({"train_images": drawn(10, 4, 5) / 255.0}, r"float64 of shape \(10, 4, 5\): expected bytes"),
            (
                {"train_images": drawn(10, 6, 3, 4, 5), "test_images": drawn(4, 6, 3, 4, 5)},
                r"event frames \[N, T, 2, H, W\]",
            ),
            ({"train_images": drawn(10, 6, 2, 4, 5)}, r"\(6, 2, 4, 5\) and test images of shape \(1, 4, 5\)"),
            (
                {"train_images": drawn(10, 6, 2, 4, 5), "test_images": drawn(4, 5, 2, 4, 5)},
                r"shape \(5, 2, 4, 5\) \(time",
            ),
            ({"train_images": drawn(10, 2, 6, 2, 4, 5)}, r"expected bytes .* or event frames \[N, T, 2, H, W\]"),
            ({"train_images": drawn(10, 20)}, r"shape \(10, 20\): expected bytes .* \[N, H, W\]"),
            ({"test_images": drawn(4, 5, 5)}, r"\(1, 4, 5\) and test images of shape \(1, 5, 5\)"),
            ({"test_images": None}, "test_images"),
            ({"train_labels": np.array([{}] * 10, dtype=object)}, "without pickled objects"),
            ({"train_images": np.array([{}] * 10, dtype=object)}, "without pickled objects"),
            ({"train_images": drawn(0, 4, 5), "train_labels": np.arange(0)}, "training part .* holds no images"),
            ({"test_images": drawn(0, 4, 5), "test_labels": np.arange(0)}, "test part .* holds no images"),
            ({"train_labels": np.arange(10)[:, None] % 2}, r"\(10, 1\)"),
            ({"train_labels": np.linspace(0, 1, 10)}, "float64"),
        ],
    )
    def test_what_cannot_be_a_set_is_refused(self, tmp_path, changes, message):
        with pytest.raises(DataError, match=message):
            load_images(write_npz(tmp_path / "own.npz", **changes))

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
    def test_a_truncated_file_is_refused(self, tmp_path, share):
        path = tmp_path / "own.npz"
        write_npz(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"own\.npz' cannot be read"):
            load_images(str(path))

    def test_damaged_contents_are_refused(self, tmp_path):
        path = tmp_path / "own.npz"
        write_npz(path)
        whole = path.read_bytes()
        pixels = drawn(10, 4, 5).tobytes()
        assert pixels in whole
        path.write_bytes(whole.replace(pixels, pixels[::-1]))
        with pytest.raises(DataError, match=r"own\.npz' cannot be read"):
            load_images(str(path))

    def test_a_single_array_under_that_ending_is_refused(self, tmp_path):
        with (tmp_path / "own.npz").open("wb") as file:
            np.save(file, drawn(10, 4, 5))
        with pytest.raises(DataError, match=r"expected a \.npz with train_images"):
            load_images(str(tmp_path / "own.npz"))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"absent\.npz' does not exist"):
            load_images(str(tmp_path / "absent.npz"))


class TestPack:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_tiles_come_back_byte_for_byte_in_order(self, tmp_path, channels):
        train, test = write_pack(tmp_path / "own.npz", channels, ["cat", "dog"])
        read = load_images(str(tmp_path / "own.npz"))
        np.testing.assert_array_equal(read.train_images, train.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(read.test_images, test.transpose(0, 3, 1, 2))
        assert read.train_labels.tolist() == [number % 2 for number in range(11)]
        assert read.class_names == ("cat", "dog")

    @pytest.mark.parametrize("name, pack", [("cifar10", "cifar10_webp.npz"), ("cifar100", "cifar100_webp.npz")])
    def test_a_named_set_is_found_as_a_pack(self, tmp_path, name, pack):
        train, _ = write_pack(tmp_path / pack, 3, ["cat", "dog"])
        read = load_images(name, tmp_path)
        assert read.name == name
        np.testing.assert_array_equal(read.train_images, train.transpose(0, 3, 1, 2))

    def test_a_sheet_cut_short_is_refused(self, tmp_path):
        write_pack(tmp_path / "own.npz", 3, ["cat", "dog"])
        with np.load(tmp_path / "own.npz") as pack:
            contents = dict(pack)
        contents["train_offsets"] = contents["train_offsets"] // 2
        np.savez(tmp_path / "own.npz", **contents)
        with pytest.raises(DataError, match="cannot be read"):
            load_images(str(tmp_path / "own.npz"))


class TestNamed:
    def test_torchvisions_files_are_read(self, tmp_path):
        train, test = drawn(10, 4, 5), drawn(4, 4, 5, seed=1)
        write_idx(tmp_path, train, test, np.arange(10))
        read = load_images("mnist", tmp_path)
        np.testing.assert_array_equal(read.train_images[:, 0], train)
        np.testing.assert_array_equal(read.test_images[:, 0], test)
        assert read.train_labels.tolist() == list(range(10))
        assert (read.name, read.classes, read.class_names[3]) == ("mnist", 10, "3 - three")

    def test_a_npz_under_the_sets_name_comes_before_torchvisions_files(self, tmp_path):
        write_idx(tmp_path, drawn(10, 4, 5), drawn(4, 4, 5), np.arange(10))
        write_npz(tmp_path / "mnist.npz", train_images=drawn(10, 4, 5, seed=7))
        np.testing.assert_array_equal(load_images("mnist", tmp_path).train_images[:, 0], drawn(10, 4, 5, seed=7))

    def test_what_is_not_there_is_downloaded(self, tmp_path, monkeypatch):
        def download(self):
            write_idx(tmp_path, drawn(10, 4, 5), drawn(4, 4, 5), np.arange(10))

        monkeypatch.setattr(datasets.MNIST, "download", download)
        np.testing.assert_array_equal(load_images("mnist", tmp_path).train_images[:, 0], drawn(10, 4, 5))

    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
    def test_without_files_and_without_network_the_message_says_where_to_put_them(self, tmp_path, offline, name):
        said = rf"'{name}' cannot be read from '.*found.*no route to host.*put '{name}\.npz'.*--data-dir"
        with pytest.raises(DataError, match=said):
            load_images(name, tmp_path)

    @pytest.mark.parametrize("kept", [0, 3, 10, 60])
    def test_truncated_idx_files_are_refused(self, tmp_path, offline, kept):
        file = write_idx(tmp_path, drawn(10, 4, 5), drawn(4, 4, 5), np.arange(10)) / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(DataError, match="'mnist'"):
            load_images("mnist", tmp_path)

    def test_the_directory_comes_from_the_argument_then_the_environment_then_the_working_directory(
        self, tmp_path, monkeypatch
    ):
        for seed, place in enumerate(("given", "environment", "data")):
            (tmp_path / place).mkdir()
            write_npz(tmp_path / place / "cifar10.npz", train_images=drawn(10, 4, 5, seed=seed))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SPIKEDISTILL_DATA", str(tmp_path / "environment"))
        firsts = [load_images("cifar10", tmp_path / "given"), load_images("cifar10")]
        monkeypatch.delenv("SPIKEDISTILL_DATA")
        firsts.append(load_images("cifar10"))
        for seed, read in enumerate(firsts):
            np.testing.assert_array_equal(read.train_images[:, 0], drawn(10, 4, 5, seed=seed))

    def test_an_unknown_name_is_told_the_nearest(self):
        with pytest.raises(DataError, match=r"no data set 'cifar01'\. Did you mean 'cifar10'\?"):
            load_images("cifar01")


@given(total=st.integers(1, 5000), count=st.integers(1, 6000))
def test_evenly_gives_so_many_different_places_from_the_first_to_the_last(total, count):
    places = evenly(total, count).tolist()
    assert len(set(places)) == len(places) == min(total, count) and places == sorted(places)
    assert places[0] == 0 and (count == 1 or places[-1] == total - 1)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


class TestStatistics:
    def test_are_numpys_mean_and_deviation_of_each_channel(self):
        pixels = torch.from_numpy(drawn(50, 3, 4, 5))
        labels = torch.zeros(50, dtype=torch.int64)
        mean, deviation = ImageSet("own", pixels, labels, pixels, labels, ("one",)).statistics()
        scaled = pixels.numpy() / 255
        assert mean == pytest.approx(scaled.mean((0, 2, 3)), rel=1e-5)
        assert deviation == pytest.approx(scaled.std((0, 2, 3), ddof=1), rel=1e-5)

    def test_come_from_training_images_alone(self):
        pixels, labels = torch.from_numpy(drawn(50, 3, 4, 5)), torch.zeros(50, dtype=torch.int64)
        found = [
            ImageSet("own", pixels, labels, test, labels, ("one",)).statistics() for test in (pixels, pixels ^ 255)
        ]
        assert found[0] == found[1]

    @pytest.mark.parametrize("shape", [(50, 6, 2, 4, 5), (1, 1, 2, 1, 1)])
    def test_of_event_frames_leave_counts_as_they_are(self, shape):
        counts = torch.from_numpy(drawn(*shape))
        labels = torch.zeros(len(counts), dtype=torch.int64)
        statistics = ImageSet("own", counts, labels, counts, labels, ("one",)).statistics()
        assert statistics == ((0.0, 0.0), (1.0, 1.0))

    def test_come_from_evenly_spaced_images_of_a_large_set(self):
        pixels = (torch.arange(20_001) % 256).to(torch.uint8).view(-1, 1, 1, 1)
        labels = torch.zeros(20_001, dtype=torch.int64)
        mean, _ = ImageSet("own", pixels, labels, pixels, labels, ("one",)).statistics()
        assert mean == pytest.approx([pixels[::3].float().mean().item() / 255], rel=1e-5)

    def test_of_a_channel_without_variation_allow_a_division(self):
        pixels, labels = torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        mean, deviation = ImageSet("own", pixels, labels, pixels, labels, ("one",)).statistics()
        assert mean == pytest.approx([0.2])
        assert deviation == pytest.approx([1e-3])


class TestSplit:
    @settings(max_examples=25)
    @given(
        counts=st.lists(st.integers(10, 30), min_size=1, max_size=4),
        fraction=st.floats(0.15, 0.5),
        seed=st.integers(0, 2**31),
    )
    def test_parts_are_disjoint_complete_ascending_and_have_each_class_in_proportion(self, counts, fraction, seed):
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        train, held = split(labels, fraction, seed)
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(labels)))
        assert train.tolist() == sorted(train.tolist())
        assert held.tolist() == sorted(held.tolist())
        for number, count in enumerate(counts):
            assert abs(int((labels[held] == number).sum()) - fraction * count) < 2

    @given(
        labels=st.lists(st.integers(-1, 4), min_size=2, max_size=80),
        fraction=st.floats(0.02, 0.9),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_parts_are_those_of_scikit_learn(self, labels, fraction, seed):
        """Numbers and refusals: so what was trained and measured with its splits stays."""
        given_labels = torch.tensor(labels)
        try:
            expected = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
        except ValueError:
            with pytest.raises(DataError, match="cannot be cut from"):
                split(given_labels, fraction, seed)
            return
        assert all(map(np.array_equal, split(given_labels, fraction, seed), map(np.sort, expected)))

    @pytest.mark.parametrize("samples, classes, fraction", [(60_000, 10, 0.05), (50_000, 10, 0.02), (50_000, 100, 0.1)])
    def test_large_sets_are_split_as_by_scikit_learn(self, samples, classes, fraction):
        labels = np.random.default_rng(samples).integers(0, classes, samples)
        expected = train_test_split(np.arange(samples), test_size=fraction, random_state=0, stratify=labels)
        assert all(map(np.array_equal, split(torch.from_numpy(labels), fraction, 0), map(np.sort, expected)))

    def test_a_seed_gives_one_split_and_another_seed_another(self):
        labels = torch.arange(60) % 3
        assert torch.equal(split(labels, 0.2, 1)[1], split(labels, 0.2, 1)[1])
        assert not torch.equal(split(labels, 0.2, 1)[1], split(labels, 0.2, 2)[1])

    def test_a_share_of_nothing_leaves_everything(self):
        train, held = split(torch.arange(6) % 2, 0.0, 0)
        assert train.tolist() == [0, 1, 2, 3, 4, 5]
        assert held.tolist() == []

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
    def test_a_share_outside_its_range_is_refused(self, fraction):
        with pytest.raises(ConfigError, match=r"give 0 <= validation < 1"):
            split(torch.arange(6) % 2, fraction, 0)

    def test_a_share_too_small_for_the_classes_is_refused(self):
        with pytest.raises(DataError, match=r"share of 0\.1 cannot be cut from 9 samples of 3 classes"):
            split(torch.arange(9) % 3, 0.1, 0)
