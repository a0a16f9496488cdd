"""Readers of event recordings against files that are written here, field by field, after the formats' descriptions."""

import itertools
import struct
import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from spikedistill.data import events as events_module
from spikedistill.data import kept, recordings
from spikedistill.data.events import Binning, Recording, to_frames
from spikedistill.data.images import load_images, load_recordings
from spikedistill.data.recordings import READERS, Recordings, holds_recordings, read_recording
from spikedistill.errors import ConfigError, DataError
from spikedistill.train.recipe import Data

COUNT = 40


def drawn(seed=0, columns=128, rows=128, count=COUNT):
    """Events in order of time, in microseconds."""
    random = np.random.default_rng(seed)
    t = np.sort(random.integers(0, 100_000, count))
    return Recording(
        t, random.integers(0, columns, count), random.integers(0, rows, count), random.integers(0, 2, count)
    )


def as_aedat2(events):
    """Big-endian pairs of address and time; rows and columns counted from the other side, 1 for darker."""
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n"
    words = [
        struct.pack(">II", (127 - int(x)) << 8 | (127 - int(y)) << 1 | 1 - int(p), int(t))
        for t, x, y, p in zip(events.t, events.x, events.y, events.p)
    ]
    return header + b"".join(words)


def packet(kind, pairs, overflow=0):
    head = struct.pack("<HHIIIIII", kind, 1, 8, 4, overflow, len(pairs), len(pairs), len(pairs))
    return head + b"".join(struct.pack("<Ii", *pair) for pair in pairs)


def as_aedat3(events, invalid=()):
    """Packets of polarity events with a packet of another type between them."""
    words = [
        (int(x) << 17 | int(y) << 2 | int(p) << 1 | (n not in invalid), int(t))
        for n, (t, x, y, p) in enumerate(zip(events.t, events.x, events.y, events.p))
    ]
    half = len(words) // 2
    header = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
    return header + packet(1, words[:half]) + packet(3, [(7, 8)]) + packet(1, words[half:])


def as_dat(events, lines=b"% Version 2\n", kind=12):
    header = b"% Data file containing CD events.\n" + lines + bytes([kind, 8])
    words = [
        struct.pack("<II", int(t), int(p) << 28 | int(y) << 14 | int(x))
        for t, x, y, p in zip(events.t, events.x, events.y, events.p)
    ]
    return header + b"".join(words)


def as_bin(events):
    words = [
        bytes([int(x), int(y)]) + (int(p) << 23 | int(t)).to_bytes(3, "big")
        for t, x, y, p in zip(events.t, events.x, events.y, events.p)
    ]
    return b"".join(words)


def as_fields(events):
    """One array with named fields."""
    return np.array([*zip(events.t, events.x, events.y, events.p)], dtype=[(name, np.int64) for name in "txyp"])


BYTES = {"n.bin": as_bin, "two.aedat": as_aedat2, "three.aedat": as_aedat3, "cars.dat": as_dat}


def write(path, events):
    """A file in the format that its name says."""
    fields = {"t": events.t, "x": events.x, "y": events.y, "p": events.p}
    if path.name in BYTES:
        path.write_bytes(BYTES[path.name](events))
    elif path.suffix == ".npz":
        np.savez(path, **fields)
    elif path.suffix == ".npy":
        np.save(path, as_fields(events))
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            if path.stem == "fields":
                file["events"] = as_fields(events)
                return path
            group = file.create_group("events") if path.stem == "group" else file
            for name, values in fields.items():
                group[name] = values
    else:
        savemat(path, {"ts": events.t, "x": events.x, "y": events.y, "pol": events.p})
    return path


def assert_same(found, events):
    for name in "txyp":
        assert np.array_equal(getattr(found, name), getattr(events, name)), name


NAMES = [*BYTES, "some.npz", "some.npy", "some.mat", "top.h5", "group.hdf5", "fields.h5"]


@pytest.mark.parametrize("name", NAMES)
class TestEveryFormat:
    def test_is_read_event_for_event(self, name, tmp_path):
        assert_same(read_recording(write(tmp_path / name, drawn())), drawn())

    @pytest.mark.parametrize("left", [0, 1, 30, -1, -5])
    def test_that_is_cut_is_refused_as_a_whole(self, name, left, tmp_path):
        content = write(tmp_path / name, drawn()).read_bytes()
        (tmp_path / name).write_bytes(content[:left])
        if name == "n.bin" and left in (30, -5):
            return  # six whole events: nothing tells that more were there
        with pytest.raises(DataError, match=name):
            read_recording(tmp_path / name)

    def test_with_other_content_is_refused(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"\x80\x04 this is no recording, and it is not unpickled")
        with pytest.raises(DataError, match=name):
            read_recording(tmp_path / name)

    def test_that_is_missing_is_refused(self, name, tmp_path):
        with pytest.raises(DataError, match=name):
            read_recording(tmp_path / name)


class TestDetails:
    def test_invalid_events_of_aedat_3_are_left_out(self, tmp_path):
        (tmp_path / "a.aedat").write_bytes(as_aedat3(drawn(), invalid={3, 30}))
        kept = np.delete(np.arange(COUNT), [3, 30])
        events = drawn()
        expected = Recording(*(getattr(events, name)[kept] for name in "txyp"))
        assert_same(read_recording(tmp_path / "a.aedat"), expected)

    def test_an_overflow_of_aedat_3_adds_half_a_clock(self, tmp_path):
        header = b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"
        (tmp_path / "a.aedat").write_bytes(header + packet(1, [(1, 5)]) + packet(1, [(1, 2)], overflow=1))
        assert read_recording(tmp_path / "a.aedat").t.tolist() == [5, 2**31 + 2]

    def test_a_clock_that_begins_again_goes_on(self, tmp_path):
        events = Recording(np.array([2**32 - 3, 2**32 + 4]), *np.zeros((3, 2), np.int64))
        wrapped = Recording(events.t % 2**32, events.x, events.y, events.p)
        (tmp_path / "a.dat").write_bytes(as_dat(wrapped))
        assert_same(read_recording(tmp_path / "a.dat"), events)

    def test_events_that_come_late_are_put_in_order(self, tmp_path):
        events = drawn()
        mixed = np.random.default_rng(1).permutation(COUNT)
        np.savez(tmp_path / "a.npz", **{name: getattr(events, name)[mixed] for name in "txyp"})
        assert np.array_equal(read_recording(tmp_path / "a.npz").t, events.t)

    @pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int8, np.float32])
    def test_small_number_formats_do_not_overflow(self, kind, tmp_path):
        fields = {"t": [5, 1, 9, 3], "x": [100, 3, 120, 7], "y": [1, 2, 3, 127], "p": [0, 1, 1, 0]}
        np.savez(tmp_path / "a.npz", **{name: np.array(values, kind) for name, values in fields.items()})
        found = read_recording(tmp_path / "a.npz")
        assert found.t.tolist() == [1, 3, 5, 9]
        assert found.reduced(128, 128, 64).x.tolist() == [1, 3, 50, 60]
        raw = Recording(*(np.array(fields[name], kind) for name in "txyp"))
        assert raw.reduced(128, 128, 64).y.tolist() == [0, 1, 1, 63]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"t": np.array(["a", "b"])}, "t of '.*a.npz' has the dtype"),
            ({"x": np.array([0.0, np.nan])}, "x of '.*a.npz' holds NaN or infinity"),
            ({"y": np.array([0.0, np.inf])}, "y of '.*a.npz' holds NaN or infinity"),
            ({"x": np.array([0.5, 1.0])}, "x of '.*a.npz' holds fractions"),
        ],
    )
    def test_values_without_meaning_are_told_with_their_file(self, change, message, tmp_path):
        fields = {name: np.array([0, 1]) for name in "txyp"} | change
        np.savez(tmp_path / "a.npz", **fields)
        with pytest.raises(DataError, match=message):
            read_recording(tmp_path / "a.npz")

    @pytest.mark.parametrize("field, value", [("x", -1), ("y", -300), ("p", 2), ("p", -2)])
    def test_values_out_of_range_are_told_with_their_file(self, field, value, tmp_path):
        fields = {name: np.array([0, 1]) for name in "txyp"} | {field: np.array([value, 1])}
        np.savez(tmp_path / "a.npz", **fields)
        found = rf"{min(value, 1)}\.\.{max(value, 1)}"
        with pytest.raises(
            DataError, match=rf"The events of '.*a\.npz' lie at .*{found}.*: expected x and y of 0 or more"
        ):
            read_recording(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        "lines, kind, message",
        [
            (b"% Version 2\n", 14, "holds events of type 14 in 8 bytes each: expected type 0 or 12"),
            (b"% Version 1\n", 12, "names version 1 of the format: expected version 2"),
            (b"% Height 240\n% Version 3\n", 0, "names version 3 of the format: expected version 2"),
        ],
    )
    def test_events_of_another_kind_or_version_are_no_pixels(self, lines, kind, message, tmp_path):
        (tmp_path / "a.dat").write_bytes(as_dat(drawn(), lines, kind))
        with pytest.raises(DataError, match=message):
            read_recording(tmp_path / "a.dat")

    @pytest.mark.parametrize(
        "lines", [b"% Version 2\n", b"% Width 640\n% Version 2\n% Date 2020-09-14 14:18:29\n", b""]
    )
    @pytest.mark.parametrize("kind", [0, 12])
    def test_both_kinds_of_pixels_are_read_and_so_is_a_file_that_can_only_be_of_version_2(self, lines, kind, tmp_path):
        (tmp_path / "a.dat").write_bytes(as_dat(drawn(), lines, kind))
        assert_same(read_recording(tmp_path / "a.dat"), drawn())

    def test_a_file_without_version_that_may_be_older_is_refused(self, tmp_path):
        words = [struct.pack("<II", 10 * n, n % 2 << 17 | 5 << 9 | 300) for n in range(4)]
        (tmp_path / "a.dat").write_bytes(b"% Data file containing Event2d events.\n" + bytes([0, 8]) + b"".join(words))
        with pytest.raises(DataError, match=r"The header of '.*a\.dat' names no version"):
            read_recording(tmp_path / "a.dat")

    def test_matlabs_own_entries_are_not_listed(self, tmp_path):
        savemat(tmp_path / "a.mat", {"ts": [1, 2], "column": [3, 4]})
        with pytest.raises(DataError, match="no array of x: it holds ts, column, expected"):
            read_recording(tmp_path / "a.mat")

    def test_a_file_of_matlab_7_3_is_called_so(self, tmp_path):
        with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
            file["ts"] = np.arange(3)
        with (tmp_path / "a.mat").open("r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file".ljust(124) + bytes([0, 2]) + b"IM")
        with pytest.raises(DataError, match=r"a\.mat' is a file of MATLAB 7\.3, which is HDF5 inside: save .* -v7"):
            read_recording(tmp_path / "a.mat")

    @pytest.mark.parametrize("name", ["a.npy", "a.h5"])
    def test_an_array_without_names_is_refused_with_its_shape(self, name, tmp_path):
        if name == "a.npy":
            np.save(tmp_path / name, np.zeros((40, 4)))
        else:
            with h5py.File(tmp_path / name, "w") as file:
                file["events"] = np.zeros((40, 4))
        with pytest.raises(DataError, match=r"holds one array of float64 of shape \(40, 4\): expected .* fields"):
            read_recording(tmp_path / name)

    def test_groups_beside_the_arrays_are_passed_over(self, tmp_path):
        with h5py.File(write(tmp_path / "top.h5", drawn()), "a") as file:
            file.create_group("calibration")["matrix"] = np.eye(3)
        assert_same(read_recording(tmp_path / "top.h5"), drawn())

    def test_addresses_of_another_camera_are_refused(self, tmp_path):
        (tmp_path / "a.aedat").write_bytes(b"#!AER-DAT2.0\r\n" + struct.pack(">II", 1 << 20, 5))
        with pytest.raises(DataError, match="beyond those of a DVS128"):
            read_recording(tmp_path / "a.aedat")

    @pytest.mark.parametrize("missing", "txyp")
    def test_missing_arrays_are_named(self, missing, tmp_path):
        fields = {name: getattr(drawn(), name) for name in "txyp" if name != missing}
        np.savez(tmp_path / "a.npz", **fields)
        with pytest.raises(DataError, match=f"no array of {missing}: it holds"):
            read_recording(tmp_path / "a.npz")

    def test_arrays_of_other_lengths_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", t=np.arange(3), x=np.arange(3), y=np.arange(2), p=np.zeros(3))
        with pytest.raises(DataError, match="3, 3, 2, 3 values"):
            read_recording(tmp_path / "a.npz")

    def test_a_file_without_events_is_refused(self, tmp_path):
        (tmp_path / "a.dat").write_bytes(b"% Version 2\n" + bytes([12, 8]))
        with pytest.raises(DataError, match="holds no event"):
            read_recording(tmp_path / "a.dat")

    def test_other_endings_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"expected a file ending with \.bin"):
            read_recording(tmp_path / "a.txt")

    @pytest.mark.parametrize("ending, package", [("h5", "h5py"), ("mat", "scipy.io")])
    def test_a_format_whose_package_is_missing_says_what_to_install(self, ending, package, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(DataError, match=r"pip install 'spikedistill\[events\]'"):
            read_recording(tmp_path / f"a.{ending}")


class TestBinning:
    @given(count=st.integers(1, 60), steps=st.integers(1, 8))
    def test_by_number_frames_hold_equally_many(self, count, steps):
        counts = to_frames([drawn(count=count)], steps, 128, 128, Binning("number")).sum((0, 2, 3, 4))
        assert counts.sum() == count and counts.max() - counts.min() <= 1

    @pytest.mark.parametrize("unit", [1, 1e-6])
    def test_by_duration_frames_last_so_long_in_any_unit(self, unit):
        t = np.array([0, 9, 10, 19, 20, 39, 40, 95]) * unit
        events = Recording(t, *np.zeros((3, 8), np.int64))
        counts = to_frames([events], 4, 1, 1, Binning(duration=10.0 * unit)).sum((0, 2, 3, 4))
        assert counts.tolist() == [2, 2, 1, 1]  # 40 and 95 lie behind the last frame

    def test_by_duration_frames_behind_the_end_are_empty(self):
        counts = to_frames([drawn()], 5, 128, 128, Binning(duration=60_000.0)).sum((0, 2, 3, 4))
        assert counts.sum() == COUNT and counts[2:].sum() == 0

    @pytest.mark.parametrize("fields", [{"duration": 0.0}, {"by": "number", "duration": 3.0}])
    def test_what_cannot_be_is_refused(self, fields):
        with pytest.raises(ConfigError, match="duration"):
            Binning(**fields)


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        for part, count in (("train", 4), ("test", 2)):
            for label in ("left", "right"):
                (tmp_path / part / label).mkdir(parents=True)
                for number in range(count):
                    events = drawn(10 * number + len(part) + len(label), 30, 34)
                    (tmp_path / part / label / f"{number}.bin").write_bytes(as_bin(events))
        return tmp_path

    def test_are_read_as_frames(self, folder):
        found = load_recordings(str(folder), Recordings(3))
        assert found.train_images.shape == (8, 3, 2, 34, 34) and found.test_images.shape == (4, 3, 2, 34, 34)
        assert found.class_names == ("left", "right") and found.train_images.sum() == 8 * COUNT
        first = to_frames([read_recording(folder / "train" / "left" / "0.bin")], 3, 34, 34)
        assert (found.train_images[0] == first[0]).all()

    def test_are_reduced_to_a_size(self, folder):
        whole, small = (load_recordings(str(folder), Recordings(2, size=size)) for size in (None, 17))
        pooled = whole.train_images.unflatten(-1, (17, 2)).sum(-1).unflatten(-2, (17, 2)).sum(-2)
        assert (small.train_images == pooled).all()

    def test_a_sensor_that_is_too_small_is_refused(self, folder):
        with pytest.raises(DataError, match=r"outside of a sensor of 8 rows and 8 columns: give --sensor"):
            load_recordings(str(folder), Recordings(2, sensor=(8, 8)))

    def test_are_told_from_images(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("images")
        assert holds_recordings(folder) and not holds_recordings(other)
        (other / "a.png").write_bytes(b"")
        (other / "labels.mat").write_bytes(b"")
        assert not holds_recordings(other)

    def test_a_damaged_file_is_named(self, folder):
        (folder / "test" / "right" / "1.bin").write_bytes(b"123")
        with pytest.raises(DataError, match=r"right/1\.bin"):
            load_recordings(str(folder), Recordings(2))

    def test_a_file_whose_times_are_too_coarse_is_named(self, folder):
        fields = {name: np.arange(40) // 20 for name in "txyp"}
        np.savez(folder / "train" / "left" / "5.npz", **fields)
        with pytest.raises(
            DataError, match=r"The 40 events of '.*left/5\.npz' have times from 0 to 1, which cannot be"
        ):
            load_recordings(str(folder), Recordings(4))

    def test_more_frames_than_memory_holds_are_refused_before_all_is_read(self, folder, monkeypatch):
        needed, read = 8 * 3 * 2 * 34 * 34, []
        reader = recordings.read_recording
        monkeypatch.setattr(recordings, "read_recording", lambda file: read.append(file) or reader(file))
        monkeypatch.setattr(recordings, "AT_ONCE", 2)
        monkeypatch.setattr(events_module, "LARGEST", needed - 1)
        with pytest.raises(DataError, match="3 frames of 34 x 34 pixels of 8 recordings need"):
            load_recordings(str(folder), Recordings(3))
        assert len(read) == 2
        monkeypatch.setattr(events_module, "LARGEST", needed)
        assert load_recordings(str(folder), Recordings(3)).train_images.numel() == needed

    @pytest.mark.parametrize("fields", [{"timesteps": 0}, {"timesteps": -1}, {"timesteps": 2, "size": 0}])
    def test_frames_of_no_size_are_refused(self, folder, fields):
        with pytest.raises(ConfigError, match="must be 1 or more"):
            load_recordings(str(folder), Recordings(**fields))


class TestPublishedFolders:
    """Folders with the names that the data sets were published with."""

    @pytest.mark.parametrize("below", ["", "{part}"])
    def test_of_n_cars(self, below, tmp_path):
        root, lines = tmp_path / "Prophesee_Dataset_n_cars", b"% Version 2\n% Date 2017-11-3 14:18:29\n"
        names = itertools.product(("train", "test"), ("background", "cars"), (1, 2, 3))
        for seed, (part, label, number) in enumerate(names):
            file = root / f"n-cars_{part}" / below.format(part=part) / label / f"obj_{number:06d}_td.dat"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(as_dat(drawn(seed, 120, 100), lines, kind=(0, 12)[seed % 2]))
        found = Data(name=str(root), event_frames=4).load()
        assert found.class_names == ("background", "cars") and not found.drawn
        assert found.train_labels.tolist() == found.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = to_frames([drawn(seed, 120, 100) for seed in range(12)], 4, 100, 120)
        assert torch.equal(torch.cat([found.train_images, found.test_images]), expected)

    def test_of_n_caltech_101(self, tmp_path):
        classes, events = ("BACKGROUND_Google", "Faces_easy", "accordion"), []
        for seed, (label, number) in enumerate(itertools.product(range(3), range(1, 6))):
            file = tmp_path / "Caltech101" / classes[label] / f"image_{number:04d}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            events.append(drawn(seed, 240, 180))
            file.write_bytes(as_bin(events[-1]))
        found = Data(name=str(tmp_path / "Caltech101"), event_frames=4).load()
        assert found.class_names == classes and found.drawn
        assert found.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and found.test_labels.tolist() == [0, 1, 2]
        held = torch.cat([found.train_images, found.test_images]), torch.cat([found.train_labels, found.test_labels])
        samples = sorted((int(label), frames.numpy().tobytes()) for frames, label in zip(*held))
        expected = to_frames(events, 4, 180, 240)
        assert samples == sorted((number // 5, frames.numpy().tobytes()) for number, frames in enumerate(expected))


class TestUnits:
    """Times of a folder in microseconds and in seconds, and durations of frames in the one or the other."""

    @pytest.fixture(params=[1, 1e-6], ids=["microseconds", "seconds"])
    def unit(self, request):
        return request.param

    def write(self, folder, unit):
        for number in range(8):
            events = drawn(number, 34, 34, count=400)
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            fields = {name: getattr(events, name) for name in "xyp"}
            np.savez(folder / "ab"[number % 2] / f"{number}.npz", t=events.t * unit, **fields)
        return str(folder)

    def load(self, folder, unit, duration=None):
        return load_recordings(self.write(folder, unit), Recordings(4, Binning(duration=duration and float(duration))))

    @pytest.mark.parametrize("duration", [None, 25_000.0, 10_000.0])
    def test_seconds_give_the_frames_of_microseconds(self, duration, tmp_path):
        whole = self.load(tmp_path / "whole", 1, duration)
        parts = self.load(tmp_path / "parts", 1e-6, duration and duration * 1e-6)
        assert torch.equal(whole.train_images, parts.train_images) and whole.train_images.any()
        assert torch.equal(whole.test_images, parts.test_images)

    def test_frames_that_are_too_long_for_every_recording_are_refused(self, unit, tmp_path):
        typical = np.median([np.ptp(drawn(number, 34, 34, count=400).t) for number in range(8)]) * unit
        with pytest.raises(DataError, match=rf"recording typically lasts {typical:g}: .* in the first frame"):
            self.load(tmp_path / "events", unit, 1e6 * unit)

    def test_frames_that_hold_next_to_nothing_are_refused(self, unit, tmp_path):
        with pytest.raises(DataError, match=rf"4 frames that last {20 * unit:g} each .* less than a thousandth"):
            self.load(tmp_path / "events", unit, 20 * unit)

    def test_the_other_unit_is_refused(self, unit, tmp_path):
        with pytest.raises(DataError, match="Give --event-duration in the unit of the times"):
            self.load(tmp_path / "events", unit, 25_000 * (1 if unit < 1 else 1e-6))

    @pytest.mark.parametrize("duration, share", [(10_000, 0.6), (20_000, 0.2), (23_500, 0.06)])
    def test_many_events_that_are_left_out_are_said(self, unit, duration, share, tmp_path):
        found = self.load(tmp_path / "events", unit, duration * unit)
        left = 1 - int(found.train_images.sum() + found.test_images.sum()) / (8 * 400)
        assert left == pytest.approx(share, abs=0.02)
        said = f"{left:.0%} of the events came after the last frame and are left out"
        assert (said in found.notes) == (left > 0.1)

    def test_one_frame_may_hold_everything(self, unit, tmp_path):
        found = load_recordings(
            self.write(tmp_path / "events", unit), Recordings(1, Binning(duration=float(1e6 * unit)))
        )
        assert found.train_images.sum() + found.test_images.sum() == 8 * 400


class TestSource:
    """Photographs of several sizes as the source beside recordings of another size."""

    @pytest.fixture
    def photos(self, tmp_path):
        random = np.random.default_rng(0)
        for number in range(8):
            place = tmp_path / "photos" / ("train", "test")[number // 4] / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (*random.integers(20, 50, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
        return str(tmp_path / "photos")

    def test_both_get_the_size(self, photos, tmp_path):
        folder = TestUnits().write(tmp_path / "events", 1)
        data = Data(name=folder, source=photos, image_size=16, event_frames=3)
        frames, images = data.load(), data.load_source()
        assert frames.train_images.shape[1:] == (3, 2, 16, 16) and images.train_images.shape[1:] == (3, 16, 16)
        assert torch.equal(images.train_images, load_images(photos, image_size=16).train_images)

    def test_what_is_no_folder_beside_one_is_as_it_is(self, photos):
        data = Data(name="digits", source=photos, image_size=16, events="simulated")
        assert data.load().train_images.shape[-2:] == (8, 8) and data.load_source().train_images.shape[-2:] == (16, 16)
        data = Data(name=photos, source="digits", image_size=16)
        assert data.load().train_images.shape[-2:] == (16, 16) and data.load_source().train_images.shape[-2:] == (8, 8)

    def test_without_a_folder_there_is_nothing_to_resize(self):
        with pytest.raises(ConfigError, match=r"image_size \(=16\) is for folders of images; 'digits' is not one"):
            Data(name="digits", source="digits", image_size=16).load()


def test_every_reader_has_a_format_above():
    assert {f".{name.rpartition('.')[2]}" for name in NAMES} == READERS.keys()


class TestGestures:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "trials_to_train.txt").write_text("one.aedat\ntwo.aedat\n")
        (tmp_path / "trials_to_test.txt").write_text("three.aedat\n")
        (tmp_path / "gesture_mapping.csv").write_text("action,label\nclap,1\nwave,2\nroll,3\n")
        for number, name in enumerate(("one", "two", "three")):
            (tmp_path / f"{name}.aedat").write_bytes(as_aedat3(drawn(number, count=400)))
            lines = "class,startTime_usec,endTime_usec\n1,0,30000\n3,30000,60000\n2,70000,100000\n"
            (tmp_path / f"{name}_labels.csv").write_text(lines)
        return tmp_path

    def test_each_gesture_is_a_sample(self, folder):
        assert holds_recordings(folder)
        found = load_recordings(str(folder), Recordings(5))
        assert found.train_images.shape == (6, 5, 2, 128, 128) and len(found.test_images) == 3
        assert found.class_names == ("clap", "wave", "roll") and found.train_labels.tolist() == [0, 2, 1] * 2
        t = drawn(0, count=400).t
        inside = [(begin <= t) & (t < end) for begin, end in ((0, 30000), (30000, 60000), (70000, 100000))]
        assert found.train_images[:3].flatten(1).sum(1).tolist() == [int(one.sum()) for one in inside]

    def test_without_names_they_are_numbers(self, folder):
        (folder / "gesture_mapping.csv").unlink()
        assert load_recordings(str(folder), Recordings(2, size=32)).class_names == ("1", "2", "3")

    @pytest.mark.parametrize(
        "lines, message",
        [
            ("class,begin,end\n1,0\n", "expected class, begin and end"),
            ("class,begin,end\n0,0,5\n", "with classes from 1"),
            ("class,begin,end\n1,5,5\n", "begin and end"),
            ("class,begin,end\n1,200000,300000\n", "no event of gesture 1 from 200000 to 300000"),
            ("class,begin,end\n1,zero,5\n", "cannot be read"),
        ],
    )
    def test_wrong_labels_are_refused(self, lines, message, folder):
        (folder / "two_labels.csv").write_text(lines)
        with pytest.raises(DataError, match=message):
            load_recordings(str(folder), Recordings(2))

    def test_a_sensor_is_used(self, folder):
        found = load_recordings(str(folder), Recordings(2, sensor=(130, 140)))
        assert found.train_images.shape[-2:] == (130, 140)
        assert torch.equal(
            found.train_images[..., :128, :128], load_recordings(str(folder), Recordings(2)).train_images
        )
        with pytest.raises(DataError, match=r"one\.aedat' has events at x .* outside of a sensor of 64 rows and 64"):
            load_recordings(str(folder), Recordings(2, sensor=(64, 64)))

    def test_a_duration_in_another_unit_is_refused_and_events_that_are_left_out_are_said(self, folder):
        with pytest.raises(DataError, match=r"trials_to_train\.txt'.* first frame"):
            load_recordings(str(folder), Recordings(2, Binning(duration=1e6)))
        notes = load_recordings(str(folder), Recordings(2, Binning(duration=9000.0))).notes
        assert any("of the events came after the last frame" in note for note in notes)

    def test_one_trial_after_the_other_is_in_memory(self, folder):
        def peak(trials):
            for number in range(trials):
                (folder / f"{number}.aedat").write_bytes(content)
                (folder / f"{number}_labels.csv").write_text(lines)
            names = "\n".join(f"{number}.aedat" for number in range(trials))
            (folder / "trials_to_train.txt").write_text(names)
            tracemalloc.start()
            load_recordings(str(folder), Recordings(2, size=8))
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        lines = (folder / "one_labels.csv").read_text()
        content = as_aedat3(drawn(count=20_000))
        assert peak(16) < 1.3 * peak(2)

    def test_large_files_are_kept(self, folder, tmp_path_factory, monkeypatch):
        cache = tmp_path_factory.mktemp("home")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        size = sum(file.stat().st_size for file in folder.iterdir())
        monkeypatch.setattr(kept, "LARGE", size + 1)
        first = load_recordings(str(folder), Recordings(2))
        assert not [*cache.iterdir()]
        monkeypatch.setattr(kept, "LARGE", size)
        load_recordings(str(folder), Recordings(2))
        assert len([*cache.rglob("train_images.npy")]) == 1
        assert torch.equal(load_recordings(str(folder), Recordings(2)).train_images, first.train_images)

    def test_a_missing_trial_is_named(self, folder):
        (folder / "three.aedat").unlink()
        with pytest.raises(DataError, match=r"three\.aedat"):
            load_recordings(str(folder), Recordings(2))
