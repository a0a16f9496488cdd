"""Readers of event recordings against files that are written here, field by field, after the formats' descriptions."""

import struct

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from spikedistill.data.events import Binning, Recording, to_frames
from spikedistill.data.images import load_recordings
from spikedistill.data.recordings import READERS, Recordings, holds_recordings, read_recording
from spikedistill.errors import ConfigError, DataError

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


def as_dat(events):
    header = b"% Data file containing CD events.\n% Version 2\n" + bytes([12, 8])
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


BYTES = {"n.bin": as_bin, "two.aedat": as_aedat2, "three.aedat": as_aedat3, "cars.dat": as_dat}


def write(path, events):
    """A file in the format that its name says."""
    fields = {"t": events.t, "x": events.x, "y": events.y, "p": events.p}
    if path.name in BYTES:
        path.write_bytes(BYTES[path.name](events))
    elif path.suffix == ".npz":
        np.savez(path, **fields)
    elif path.suffix == ".npy":
        kinds = [(name, np.int64) for name in fields]
        np.save(path, np.array([*zip(*fields.values())], dtype=kinds))
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            group = file.create_group("events") if path.stem == "group" else file
            for name, values in fields.items():
                group[name] = values
    else:
        savemat(path, {"ts": events.t, "x": events.x, "y": events.y, "pol": events.p})
    return path


def assert_same(found, events):
    for name in "txyp":
        assert np.array_equal(getattr(found, name), getattr(events, name)), name


NAMES = [*BYTES, "some.npz", "some.npy", "some.mat", "top.h5", "group.hdf5"]


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
        (tmp_path / "a.dat").write_bytes(b"% nothing\n" + bytes([12, 8]))
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

    def test_a_missing_trial_is_named(self, folder):
        (folder / "three.aedat").unlink()
        with pytest.raises(DataError, match=r"three\.aedat"):
            load_recordings(str(folder), Recordings(2))
