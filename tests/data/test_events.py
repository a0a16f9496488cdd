from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Generator

from spikedistill.data import events
from spikedistill.data.events import Recording, read_nmnist, to_frames
from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, corrupt
from spikedistill.errors import ConfigError, DataError

NAMES = [name for name, corruption in CORRUPTIONS.items() if corruption.kind == "event"]


def recording(t, x=0, y=0, p=0):
    t = np.asarray(t)
    return Recording(t, *(np.broadcast_to(np.asarray(value), t.shape) for value in (x, y, p)))


def drawn(count=40, mean=0.3):
    counts = torch.poisson(torch.full((count, 5, 2, 12, 16), mean), generator=Generator().manual_seed(4))
    return counts.to(torch.uint8)


class TestReading:
    def test_five_bytes_an_event_by_hand(self, tmp_path: Path):
        path = tmp_path / "1.bin"
        path.write_bytes(bytes([3, 33, 0x80 | 0x01, 0x02, 0x03, 0, 1, 0x7F, 0xFF, 0xFF]))
        found = read_nmnist(path)
        assert found.x.tolist() == [3, 0] and found.y.tolist() == [33, 1] and found.p.tolist() == [1, 0]
        assert found.t.tolist() == [0x010203, 2**23 - 1]

    @pytest.mark.parametrize("content", [b"", b"1234", b"123456"])
    def test_files_of_other_lengths_are_refused(self, tmp_path: Path, content):
        path = tmp_path / "1.bin"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"has {len(content)} bytes: expected five per event"):
            read_nmnist(path)
        with pytest.raises(DataError, match="cannot be read"):
            read_nmnist(tmp_path / "none.bin")

    def test_a_clock_that_goes_round_is_followed_and_is_no_event(self, tmp_path: Path):
        path = tmp_path / "1.bin"
        path.write_bytes(bytes([1, 2, 0, 0, 9, 0, 240, 0, 0, 0, 3, 4, 0x80, 0, 5, 0, 240, 0, 0, 0, 5, 6, 0, 0, 7]))
        found = read_nmnist(path)
        assert found.t.tolist() == [9, 2**13 + 5, 2**14 + 7]
        assert (found.x.tolist(), found.y.tolist(), found.p.tolist()) == ([1, 3, 5], [2, 4, 6], [0, 1, 0])

    @pytest.mark.parametrize(
        "content, message",
        [
            (bytes([1, 2, 0, 0, 9, 1, 2, 0, 0, 8]), "its times decrease"),
            (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00", "its times decrease"),
            (bytes([0, 240, 0, 0, 0]), "it holds no event"),
        ],
        ids=["swapped", "a picture", "clock alone"],
    )
    def test_files_of_another_format_are_refused(self, tmp_path: Path, content, message):
        (tmp_path / "1.bin").write_bytes(content[: len(content) // 5 * 5])
        with pytest.raises(DataError, match=rf"1\.bin' is not a recording with five bytes per event \({message}\)"):
            read_nmnist(tmp_path / "1.bin")


class TestFrames:
    def test_by_hand(self):
        frames = to_frames([recording([10, 14, 15, 19], [0, 1, 1, 2], [0, 0, 0, 1], [0, 1, 1, 1])], 2, 2, 3)
        expected = torch.zeros(1, 2, 2, 2, 3, dtype=torch.uint8)
        expected[0, 0, 0, 0, 0] = expected[0, 0, 1, 0, 1] = expected[0, 1, 1, 0, 1] = expected[0, 1, 1, 1, 2] = 1
        assert torch.equal(frames, expected)

    @given(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 3), st.integers(0, 1)), min_size=1),
        st.integers(1, 7),
    )
    def test_no_event_is_lost_and_each_lies_at_its_pixel(self, found, timesteps):
        t, x, y, p = map(np.array, zip(*found))
        timesteps = min(timesteps, int(np.ptp(t)) + 1)  # fewer times than frames cannot be divided
        (frames,) = to_frames([Recording(t, x, y, p)], timesteps, 4, 5)
        assert frames.sum() == len(found)
        assert frames[0].sum() > 0
        for column, row, polarity in zip(x, y, p):
            same = (x == column) & (y == row) & (p == polarity)
            assert frames[:, polarity, row, column].sum() == same.sum()

    def test_a_count_stops_at_255(self):
        assert to_frames([recording(np.zeros(300, int))], 1, 1, 1).flatten().tolist() == [255, 0]

    def test_what_does_not_fit_is_refused_with_its_values(self):
        with pytest.raises(
            DataError, match=r"The events of recording 1 lie at x 0\.\.7.*expected x below 5 and y below 4"
        ):
            to_frames([recording([0]), recording([0, 1], [0, 7])], 2, 4, 5)
        with pytest.raises(
            DataError, match=r"The events of 'a\.npz' lie at x 0\.\.7.*expected x below 5 and y below 4"
        ):
            to_frames([recording([0]), recording([0, 1], [0, 7])], 2, 4, 5, names=["'b.npz'", "'a.npz'"])
        with pytest.raises(DataError, match=r"polarities 2\.\.2: expected"):
            to_frames([recording([0], p=2)], 2, 4, 5)
        with pytest.raises(DataError, match="0, 0, 0, 0 values of t, x, y and p are in recording 0"):
            to_frames([recording([])], 2, 4, 5)
        with pytest.raises(DataError, match="2, 1, 1, 1 values of t, x, y and p are in recording 0"):
            to_frames([Recording(np.arange(2), *[np.zeros(1, int)] * 3)], 2, 4, 5)
        with pytest.raises(ConfigError, match=r"\(=0, 4, 5\) must be 1 or more"):
            to_frames([recording([0])], 0, 4, 5)


class TestUnits:
    """What a recording's numbers may be: only their meaning counts, and what has none is refused."""

    @given(
        st.lists(st.integers(0, 60) | st.integers(0, 10**6), min_size=2, max_size=30, unique=True),
        st.integers(1, 9),
        st.sampled_from([0, -(10**9), 1_700_000_000_000_000]),
    )
    @example([0, 1, 2], 2, 0)
    def test_seconds_give_the_frames_of_their_microseconds_wherever_time_begins(self, found, timesteps, start):
        t, x = np.array(found), np.arange(len(found)) % 5
        expected = to_frames([recording(t, x)], timesteps, 1, 5)
        assert torch.equal(to_frames([recording(t + start, x)], timesteps, 1, 5), expected)
        assert torch.equal(to_frames([recording(t.astype(float), x)], timesteps, 1, 5), expected)
        assert torch.equal(to_frames([recording(t / 1e6, x)], timesteps, 1, 5), expected)
        assert torch.equal(to_frames([recording((t / 1e6 + 3).tolist(), x)], timesteps, 1, 5), expected)
        order = np.random.default_rng(0).permutation(len(t))
        assert torch.equal(to_frames([recording(t[order], x[order])], timesteps, 1, 5), expected)

    def test_seconds_fill_all_frames(self):
        frames = to_frames([recording(np.linspace(0.0, 0.3, 600).astype(np.float32))], 6, 1, 1)
        assert frames[0, :, 0, 0, 0].tolist() == [100] * 6

    def test_fractions_finer_than_microseconds_too(self):
        t = np.random.default_rng(0).random(800) * 1e-7
        frames = to_frames([recording(np.sort(t))], 4, 1, 1)
        assert frames.sum() == 800 and (frames[0, :, 0, 0, 0] > 150).all()

    def test_nanoseconds_since_1970_do_not_overflow(self):
        t = np.array([0, 1_700_000_000_000_000_000], np.uint64)
        assert to_frames([recording(t)], 1000, 1, 1)[0, :, 0, 0, 0].nonzero().flatten().tolist() == [0, 999]

    @pytest.mark.parametrize("p", [[-1, 1, 1, -1], [False, True, True, False], [-1.0, 1.0, 1.0, -1.0]], ids=str)
    def test_polarities_may_be_signs_or_booleans(self, p):
        t = np.arange(4)
        assert torch.equal(
            to_frames([recording(t, t, p=p)], 2, 1, 4), to_frames([recording(t, t, p=[0, 1, 1, 0])], 2, 1, 4)
        )

    @pytest.mark.parametrize("p", [[-1, -1], [1, 1]], ids=str)
    def test_signs_that_are_all_alike_keep_their_meaning(self, p):
        assert to_frames([recording([0, 1], p=p)], 1, 1, 1)[0, 0, :, 0, 0].tolist() == ([2, 0] if p[0] < 0 else [0, 2])

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"x": [0.5, 1]}, r"x of recording 0 holds fractions \(0\.5\): round to pixels.*np\.floor"),
            ({"y": [0, 1e-3]}, r"y of recording 0 holds fractions \(0\.001\)"),
            ({"p": [0.25, 1]}, r"p of recording 0 holds fractions \(0\.25\): round to 0 and 1"),
            ({"p": [-1, 0]}, r"polarities -1\.\.0: expected"),
            ({"p": [-1, 2]}, r"polarities -1\.\.2: expected"),
            ({"p": [1, 2]}, r"polarities 1\.\.2: expected"),
            ({"x": [-1, 0]}, r"x -1\.\.0"),
            ({"y": [0, 3]}, r"y 0\.\.3.*y below 3"),
            ({"t": [0.0, np.nan]}, "t of recording 0 holds NaN or infinity"),
            ({"x": [0.0, np.inf]}, "x of recording 0 holds NaN or infinity"),
            ({"t": ["1", "2"]}, r"t of recording 0 has the dtype <U1: give numbers"),
            ({"t": np.array([1, 2], "datetime64[us]")}, r"dtype datetime64\[us\]: give numbers"),
            ({"t": np.array([1, 2], object)}, "dtype object"),
            ({"t": np.array([1, 2], complex)}, "dtype complex128"),
            ({"t": np.array([0, 2**63], np.uint64)}, r"goes up to 9223372036854775808"),
            ({"t": [7, 7]}, "The 2 events of recording 0 have times from 7 to 7, .* divided into 2 frames: were"),
            ({"t": [0.25, 0.25]}, r"have times from 0\.25 to 0\.25"),
            ({"t": [False, True]}, "t of recording 0 has the dtype bool: give numbers"),
            ({"x": [False, True]}, "x of recording 0 has the dtype bool"),
            ({"y": [False, True]}, "y of recording 0 has the dtype bool"),
            ({"x": [[0, 1]]}, r"2, \(1, 2\), 2, 2 values"),
        ],
        ids=str,
    )
    def test_what_has_no_meaning_is_refused_with_its_values(self, fields, message):
        sound = {"t": [0, 1], "x": [0, 1], "y": [0, 1], "p": [0, 1], **fields}
        with pytest.raises(DataError, match=message):
            to_frames([Recording(**{name: np.asarray(values) for name, values in sound.items()})], 2, 3, 4)

    @pytest.mark.parametrize("seconds", [2, 3, 9])
    def test_whole_times_fewer_than_frames_are_refused(self, seconds):
        t = np.random.default_rng(0).uniform(0, seconds, 500)
        with pytest.raises(DataError, match=rf"times from 0 to {seconds - 1}, which cannot be divided into 10 frames"):
            to_frames([recording(np.floor(t))], 10, 4, 5)
        assert to_frames([recording(t)], 10, 4, 5).sum((0, 2, 3, 4)).min() > 0
        assert to_frames([recording([0, 2, 3])], 10, 4, 5).sum() == 3, "a few events may come within few ticks"


class TestDisturbances:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_same_for_the_same_seed_and_more_from_severity_to_severity(self, name):
        frames = drawn()
        moved = []
        for severity in SEVERITIES:
            changed = corrupt(frames, name, severity, seed=3)
            assert changed.dtype == torch.uint8 and changed.shape == frames.shape
            assert torch.equal(changed, corrupt(frames, name, severity, seed=3))
            moved.append(float((changed.float() - frames.float()).abs().mean()))
        assert moved[0] > 0 and moved[0] < moved[-1]
        assert not torch.equal(changed, corrupt(frames, name, 5, seed=4))
        assert corrupt(frames[:0], name, 1).shape == frames[:0].shape

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_rates_and_shares_are_the_stated_ones(self, severity):
        frames = drawn(200, 2.0)
        level = {name: CORRUPTIONS[name].levels[severity - 1] for name in NAMES}
        added = corrupt(frames, "background-activity", severity).float() - frames
        assert added.min() >= 0
        assert float(added.mean()) == pytest.approx(level["background-activity"], rel=0.05)
        left = corrupt(frames, "dropped-events", severity)
        assert (left <= frames).all()
        assert float(left.sum() / frames.sum()) == pytest.approx(1 - level["dropped-events"], rel=0.05)
        hot = (corrupt(frames, "hot-pixels", severity)[:, :, 1] == frames.amax((1, 2, 3, 4)).view(-1, 1, 1, 1)).all(1)
        assert int(hot.all(0).sum()) == max(1, round(level["hot-pixels"] * 12 * 16))

    def test_jitter_moves_as_far_as_the_normal_law_says_and_only_along_its_axes(self):
        frames = torch.zeros(400, 9, 2, 41, 41)
        frames[:, 4, 1, 20, 20] = 5
        generator = Generator().manual_seed(0)
        places = torch.arange(41.0) - 20
        moved = events.space_jitter(frames, 3.0, generator)
        assert moved.sum() == frames.sum() and moved[:, 4, 1].sum() == moved.sum()
        for axis in (3, 4):
            shares = moved.sum([other for other in range(5) if other != axis]) / moved.sum()
            assert float((shares * places**2).sum()) == pytest.approx(9 + 1 / 12, rel=0.1)  # rounding adds a twelfth
        moved = events.time_jitter(frames, 1.0, generator)
        assert moved[:, :, 1, 20, 20].sum() == moved.sum()
        shares = moved.sum((0, 2, 3, 4)) / moved.sum()
        assert float((shares * (torch.arange(9.0) - 4) ** 2).sum()) == pytest.approx(13 / 12, rel=0.1)

    def test_events_that_leave_are_lost(self):
        frames = torch.full((3, 1, 2, 2, 2), 50.0)
        assert 0 < events.space_jitter(frames, 5.0, Generator().manual_seed(0)).sum() < 0.1 * frames.sum()

    def test_images_and_event_frames_are_not_mistaken_for_each_other(self):
        with pytest.raises(ConfigError, match=r"'hot-pixels' was given the shape \(2, 3, 8, 8\): expected event"):
            corrupt(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "hot-pixels", 1)
        with pytest.raises(ConfigError, match=r"'fog' was given the shape \(2, 4, 2, 8, 8\): expected images"):
            corrupt(torch.zeros(2, 4, 2, 8, 8, dtype=torch.uint8), "fog", 1)


def test_frames_that_no_memory_holds_are_refused():
    one = Recording(*np.zeros((4, 2), np.int64))
    with pytest.raises(DataError, match=r"50000000 frames of 128 x 128 pixels .* GiB, more than 16: give fewer"):
        to_frames([one], 50_000_000, 128, 128)
