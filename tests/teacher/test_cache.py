import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError, RunError
from spikedistill.teacher.cache import Cache, Layout

VIEWS, STEPS, BATCH = 2, 3, 4
BATCHES = [(view, step) for view in range(1, VIEWS + 1) for step in range(STEPS)]
KEY = {"teacher": "abc", "augment": {"crop": 4, "flip": True}, "seed": 0}
Usage = namedtuple("Usage", "total used free")


class Cut(Exception):
    """Stands for whatever ends a process."""


def samples_of(view, step):
    return torch.arange(BATCH) + 10 * step + 100 * view


def answer_to(view, step):
    """An answer of its own for every batch: logits, a channels-last map in bfloat16, a map and a vector."""
    generator = torch.Generator().manual_seed(10 * view + step)
    logits = torch.randn(1, BATCH, 5, generator=generator)
    deep = torch.randn(BATCH, 6, 3, 2, generator=generator).bfloat16().to(memory_format=torch.channels_last)
    tall = torch.randn(BATCH, 2, 4, 4, generator=generator)
    neck = torch.randn(BATCH, 7, generator=generator).double()
    return Answer(logits, {"layer1.0": deep[None], "layer2": tall[None], "neck/x": neck[None]})


def spiking_answer_to(view, step):
    """Of a spiking teacher: T = 3 in logits, a channels-last map, a feature that no step changes, and spikes."""
    generator = torch.Generator().manual_seed(10 * view + step)
    logits = torch.randn(3, BATCH, 5, generator=generator)
    deep = torch.randn(3 * BATCH, 6, 3, 2, generator=generator).bfloat16().to(memory_format=torch.channels_last)
    first = torch.randn(BATCH, 7, generator=generator)
    counts = torch.randint(0, 3, (3 * BATCH, 4, 2, 2), generator=generator).float()
    spikes = {"relu.1": counts.to(memory_format=torch.channels_last), "relu": counts[:, :, 0, 0].contiguous()}
    spikes = {path: rows.unflatten(0, (3, BATCH)) for path, rows in spikes.items()}
    return Answer(logits, {"layer1.0": deep.unflatten(0, (3, BATCH)), "stem": first.expand(3, BATCH, 7)}, spikes)


class Asked:
    """A teacher that counts how often it is asked."""

    def __init__(self, teacher=answer_to):
        self.calls, self.teacher = [], teacher

    def __call__(self, view, step):
        self.calls.append((view, step))
        return self.teacher(view, step)


def nobody(view, step):
    raise AssertionError("the teacher was asked")


def opened(folder, key=KEY, example=None, views=VIEWS):
    return Cache(folder, key, example or answer_to(1, 0), views, STEPS)


def get(cache, view, step, ask=answer_to):
    return cache.answer(view, step, samples_of(view, step), lambda: ask(view, step))


def filled(folder, batches=BATCHES):
    cache = opened(folder)
    for view, step in batches:
        get(cache, view, step)
    cache.flush()
    return cache


def named(answer):
    kinds = {kind: getattr(answer, kind) for kind in ("features", "spikes", "potentials")}
    return {"logits": answer.logits, **{(kind, path): x for kind, found in kinds.items() for path, x in found.items()}}


def without_stem(answer):
    """What has an order of memory of its own; a view with stride 0 has none."""
    return replace(answer, features={path: x for path, x in answer.features.items() if path != "stem"})


def order_of(tensor):
    """How a tensor lies in memory; an axis of one step has no stride to speak of."""
    return [tensor.stride(axis) for axis in range(tensor.ndim) if tensor.shape[axis] > 1]


def assert_same_bits(first, second):
    first, second = named(first), named(second)
    assert first.keys() == second.keys()
    for name, one in first.items():
        other = second[name]
        assert (one.dtype, one.shape, order_of(one)) == (other.dtype, other.shape, order_of(other)), name
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


class TestAnswers:
    def test_are_those_of_the_teacher_bit_for_bit_at_every_reading(self, tmp_path):
        cache, asked = opened(tmp_path), Asked()
        for _ in range(3):
            for view, step in BATCHES:
                assert_same_bits(get(cache, view, step, asked), answer_to(view, step))
            cache.flush()
        assert asked.calls == BATCHES

    def test_of_an_earlier_process_are_served_after_one_comparison(self, tmp_path):
        filled(tmp_path)
        cache, asked = opened(tmp_path), Asked()
        for view, step in BATCHES:
            assert_same_bits(get(cache, view, step, asked), answer_to(view, step))
        assert asked.calls == [(1, 0)]

    def test_of_two_processes_at_once_are_shared_and_come_in_any_order(self, tmp_path):
        first, second = opened(tmp_path), opened(tmp_path)
        get(first, 2, 1)
        first.flush()
        assert_same_bits(get(second, 2, 1), answer_to(2, 1))
        get(second, 1, 2)
        second.flush()
        assert_same_bits(get(second, 2, 1, nobody), answer_to(2, 1))
        assert_same_bits(get(first, 1, 2, nobody), answer_to(1, 2))

    def test_may_be_logits_alone(self, tmp_path):
        alone = Answer(answer_to(1, 0).logits)
        cache = opened(tmp_path, example=alone)
        assert_same_bits(cache.answer(1, 0, samples_of(1, 0), lambda: alone), alone)

    def test_of_a_spiking_teacher_keep_every_step_and_its_spikes(self, tmp_path):
        example = spiking_answer_to(1, 0)
        cache, asked = opened(tmp_path, example=example), Asked(spiking_answer_to)
        for _ in range(2):
            for view, step in BATCHES:
                assert_same_bits(
                    without_stem(get(cache, view, step, asked)), without_stem(spiking_answer_to(view, step))
                )
            cache.flush()
        assert asked.calls == BATCHES
        later = opened(tmp_path, example=example)
        assert later.filled == VIEWS * STEPS
        assert_same_bits(get(later, 2, 1, spiking_answer_to), get(cache, 2, 1, nobody))

    def test_keep_what_is_the_same_at_every_step(self, tmp_path):
        cache = opened(tmp_path, example=spiking_answer_to(1, 0))
        kept, wanted = (get(cache, 2, 1, spiking_answer_to).features["stem"], spiking_answer_to(2, 1).features["stem"])
        assert kept.shape == (3, BATCH, 7) and torch.equal(kept, wanted)

    def test_that_are_changed_in_place_stay_as_they_are_on_disk(self, tmp_path):
        cache = filled(tmp_path)
        for tensor in named(get(cache, 1, 1, nobody)).values():
            tensor.zero_()
        assert_same_bits(get(cache, 1, 1, nobody), answer_to(1, 1))

    @pytest.mark.parametrize(
        "change",
        [lambda x: x[:, :, :1], lambda x: x.repeat(2, 1, 1, 1, 1), lambda x: x.double(), lambda x: x[..., None]],
    )
    def test_of_another_shape_or_format_than_the_first_are_refused(self, change, tmp_path):
        cache, known = opened(tmp_path), answer_to(1, 0)
        other = Answer(known.logits, {**known.features, "layer2": change(known.features["layer2"])})
        with pytest.raises(ConfigError, match=r"The teacher's features.layer2 became torch.*; give --views 0"):
            cache.answer(1, 0, samples_of(1, 0), lambda: other)
        cache.flush()
        assert opened(tmp_path).filled == 0


class TestLayout:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x,
            lambda x: x.to(memory_format=torch.channels_last),
            lambda x: x.transpose(0, 3),
            lambda x: x[:, :1].to(memory_format=torch.channels_last),
            lambda x: x.mean((2, 3), keepdim=True).to(memory_format=torch.channels_last),
            lambda x: x.flatten(1),
            lambda x: x.to(memory_format=torch.channels_last)[None],
            lambda x: x.to(memory_format=torch.channels_last).expand(2, -1, -1, -1, -1).contiguous(),
        ],
    )
    def test_gives_back_bits_and_order_of_memory(self, make, dtype):
        tensor = make(torch.randn(3, 4, 5, 2)).to(dtype)
        layout = Layout.of(tensor)
        array = layout.pack(tensor)
        assert array.shape == layout.shape and array.nbytes == layout.nbytes and array.flags.c_contiguous
        again = layout.unpack(array)
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert order_of(again) == order_of(tensor)
        assert torch.equal(again, tensor) and layout.fits(tensor) and layout.fits(tensor.contiguous())

    def test_of_a_view_is_dense(self):
        expanded = torch.randn(3, 1, 2).expand(3, 4, 2)
        layout = Layout.of(expanded)
        assert layout.nbytes == 4 * expanded.numel()
        assert torch.equal(layout.unpack(layout.pack(expanded)), expanded)


class TestFiles:
    def test_are_read_by_numpy_alone(self, tmp_path):
        path = filled(tmp_path).path
        samples, logits = np.load(path / "samples.npy"), np.load(path / "logits.npy", mmap_mode="r")
        maps = np.load(path / "features.layer1.0.npy", mmap_mode="r")
        assert logits.shape == (VIEWS, STEPS, 1, BATCH, 5) and maps.shape == (VIEWS, STEPS, 1, BATCH, 3, 2, 6)
        for view, step in BATCHES:
            wanted = answer_to(view, step)
            for row, sample in enumerate(samples_of(view, step).tolist()):
                ((v, s, r),) = np.argwhere(samples == sample).tolist()
                assert (v, s, r) == (view - 1, step, row)
                assert (logits[v, s, 0, r] == wanted.logits[0, row].numpy()).all()
                bits = wanted.features["layer1.0"][0, row].permute(1, 2, 0).contiguous().view(torch.int16)
                assert (maps[v, s, 0, r] == bits.numpy()).all()

    def test_are_as_large_as_was_said(self, tmp_path):
        cache = filled(tmp_path)
        files = set(cache.path.glob("*.npy")) - {cache.path / "checksums.npy"}
        held = sum(np.load(file, mmap_mode="r").nbytes for file in files)
        row = 8 + 4 * 5 + 2 * 36 + 4 * 32 + 8 * 7
        assert cache.nbytes == held == VIEWS * STEPS * BATCH * row
        said = f"teacher's outputs for 2 views of 3 steps: 6.7 KiB in '{cache.path}', 0 % already computed"
        assert str(cache) == said and str(opened(tmp_path)) == said.replace(" 0 %", " 100 %")

    def test_hold_the_key(self, tmp_path):
        held = json.loads((filled(tmp_path).path / "key.json").read_text())
        assert {name: held[name] for name in KEY} == KEY
        assert (held["views"], held["steps"]) == (VIEWS, STEPS)
        assert held["files"]["features.layer1.0"] == {
            "shape": [1, BATCH, 3, 2, 6],
            "axes": [0, 1, 3, 4, 2],
            "dtype": "bfloat16",
        }


class TestAnotherKey:
    @pytest.mark.parametrize(
        "changes",
        [
            {"key": {**KEY, "teacher": "abd"}},
            {"key": {**KEY, "augment": {"crop": 4, "flip": False}}},
            {"key": {**KEY, "seed": 1}},
            {"views": 3},
            {"example": Answer(answer_to(1, 0).logits)},
            {"example": replace(answer_to(1, 0), logits=answer_to(1, 0).logits.double())},
            {"example": replace(answer_to(1, 0), spikes={"relu": torch.ones(1, BATCH, 2)})},
        ],
    )
    def test_never_meets_an_old_answer(self, changes, tmp_path):
        before = filled(tmp_path)
        cache = opened(tmp_path, **changes)
        assert cache.path != before.path and cache.filled == 0
        example = changes.get("example", answer_to(1, 0))
        other = replace(example, logits=example.logits + 1)
        assert_same_bits(cache.answer(1, 0, samples_of(1, 0), lambda: other), other)
        assert_same_bits(get(opened(tmp_path), 1, 0), answer_to(1, 0))

    def test_of_the_same_content_is_the_same_key(self, tmp_path):
        filled(tmp_path)
        assert opened(tmp_path, key=dict(reversed(KEY.items()))).filled == VIEWS * STEPS


class TestDamage:
    def refused(self, tmp_path, reason):
        with pytest.raises(RunError) as caught:
            opened(tmp_path)
        message = str(caught.value)
        assert reason in message and "delete that directory" in message and "--cache-dir" in message
        shutil.rmtree(re.search(r"in '(.*?)' cannot be used", message)[1])
        assert opened(tmp_path).filled == 0

    @pytest.mark.parametrize(
        "name, content, reason",
        [
            ("key.json", lambda old: old.replace(b"abc", b"xyz"), "key.json belongs to other outputs"),
            ("key.json", lambda old: old[:20], "line 2 column"),
            ("key.json", lambda old: b"\xff", "decode"),
            ("logits.npy", lambda old: old[:-1], "mmap length"),
            ("logits.npy", lambda old: b"", ""),
            ("logits.npy", lambda old: b"PK" + old[2:], "magic string"),
            ("logits.npy", lambda old: old.replace(b"<f4", b"<i4"), "logits.npy is int32[2, 3, 1, 4, 5]"),
            ("samples.npy", lambda old: old.replace(b"(2, 3, 4)", b"(2, 4, 3)"), "samples.npy is int64[2, 4, 3]"),
        ],
    )
    def test_is_one_message_and_deleting_helps(self, name, content, reason, tmp_path):
        file = filled(tmp_path).path / name
        file.write_bytes(content(file.read_bytes()))
        self.refused(tmp_path, reason)

    def test_missing_files_are_one_message(self, tmp_path):
        path = filled(tmp_path).path
        (path / "features.layer2.npy").unlink()
        self.refused(tmp_path, "No such file")
        (path / "key.json").unlink()
        self.refused(tmp_path, "No such file")

    @pytest.mark.parametrize("name", ["logits", "features.layer1.0"])
    def test_answers_that_are_not_the_teachers_are_found_at_the_first_of_them(self, name, tmp_path):
        file = filled(tmp_path).path / f"{name}.npy"
        array = np.load(file, mmap_mode="r+")
        array[0, 0] = array[0, 1]
        array.flush()
        with pytest.raises(RunError, match=rf"the {name} of step 1 of view 1 differ from the teacher's by \d+ %"):
            get(opened(tmp_path), 1, 0)

    @pytest.mark.parametrize(
        "name", ["logits", "features.layer1.0", "features.layer2", "features.neck%2Fx", "checksums"]
    )
    @pytest.mark.parametrize("bit", [0, 13, 62])
    def test_of_one_bit_is_found_when_its_batch_comes(self, name, bit, tmp_path):
        file = filled(tmp_path).path / f"{name}.npy"
        content = bytearray(file.read_bytes())
        size = np.load(file, mmap_mode="r").nbytes // (VIEWS * STEPS)
        place = len(content) - 2 * size  # the last batch but one
        content[place + bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        cache = opened(tmp_path)
        for view, step in BATCHES[:-2]:
            assert_same_bits(get(cache, view, step), answer_to(view, step))
        with pytest.raises(RunError, match=r"step 2 of view 2 does not match its checksum\): delete that dir"):
            get(cache, *BATCHES[-2])

    def test_of_any_bit_of_a_header_is_found_when_it_is_opened_or_a_batch_comes(self, tmp_path):
        path = filled(tmp_path).path
        for file in sorted(path.glob("*.npy")):
            content = file.read_bytes()
            for bit in (*range(0, 8 * 128, 17), 8 * 21, 8 * 21 + 6):  # the last two mean the same order of bytes
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                file.write_bytes(damaged)
                with pytest.raises(RunError, match="cannot be used"):
                    get(opened(tmp_path), 1, 0)
            file.write_bytes(content)
        assert opened(tmp_path).filled == VIEWS * STEPS

    @pytest.mark.parametrize("harm", ["swapped batches", "swapped views", "of another cache", "appended"])
    def test_of_what_lies_in_another_place_is_found(self, harm, tmp_path):
        path = filled(tmp_path / "a").path
        files = {file: np.load(file, mmap_mode="r+") for file in path.glob("*.npy") if file.stem != "samples"}
        other = Cache(tmp_path / "b", {**KEY, "seed": 1}, answer_to(1, 0), VIEWS, STEPS)
        for view, step in BATCHES:
            get(other, view, step, lambda view, step: answer_to(view, step + 50))
        other.flush()
        for file, rows in files.items():
            kept = rows.copy()
            if harm == "swapped batches":
                rows[0, 1], rows[0, 2] = kept[0, 2], kept[0, 1]
            elif harm == "swapped views":
                rows[:] = kept[::-1]
            elif harm == "of another cache":
                shutil.copy(other.path / file.name, file)
            rows.flush()
            if harm == "appended":
                file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(RunError, match="cannot be used"):
            cache = opened(tmp_path / "a")
            cache.trusted = True  # what the comparison with the teacher would not find
            for view, step in BATCHES:
                get(cache, view, step)

    def test_of_a_cache_of_before_is_not_noticed_which_is_said_once(self, tmp_path, caplog):
        (filled(tmp_path).path / "checksums.npy").unlink()
        for _ in range(2):
            cache = opened(tmp_path)
            for view, step in BATCHES:
                assert_same_bits(get(cache, view, step), answer_to(view, step))
        (said,) = caplog.messages
        assert said.startswith(f"note: '{cache.path}' has no checksums, because an earlier version made it")

    def test_rounding_of_other_hardware_is_no_damage(self, tmp_path):
        filled(tmp_path)
        known = answer_to(1, 0)
        near = Answer(known.logits * 1.01, {path: feature * 0.99 for path, feature in known.features.items()})
        cache = opened(tmp_path)
        assert_same_bits(cache.answer(1, 0, samples_of(1, 0), lambda: near), known)

    def test_other_samples_are_refused(self, tmp_path):
        cache = filled(tmp_path)
        with pytest.raises(RunError, match="step 2 of view 1 holds other samples"):
            cache.answer(1, 1, samples_of(1, 1).flip(0), lambda: nobody(1, 1))

    def test_a_directory_that_vanishes_is_one_message(self, tmp_path):
        cache = filled(tmp_path)
        shutil.rmtree(cache.path)
        with pytest.raises(RunError, match="could not be written or read"):
            get(cache, 1, 0)


class TestRoom:
    @pytest.fixture
    def free(self, monkeypatch):
        """Sets how much the disk has free."""

        def leave(count):
            monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, count))

        return leave

    def test_that_is_too_small_is_refused_before_anything_is_written(self, free, tmp_path):
        free(6000)
        with pytest.raises(ConfigError) as caught:
            opened(tmp_path)
        for part in ("2 views need 6.7 KiB", "where 5.9 KiB are free", "--views (each takes 3.3 KiB)", "--cache-dir"):
            assert part in str(caught.value)
        assert "--method kdsnn-response (features take 90 % of it)" in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_of_several_processes_is_sought_for_the_answers_of_all(self, free, tmp_path):
        free(10000)
        opened(tmp_path, key={**KEY, "process": [0, 1]})
        with pytest.raises(ConfigError, match=r"2 views need 13\.3 KiB"):
            opened(tmp_path, key={**KEY, "process": [0, 2]})

    def test_is_not_sought_in_features_where_there_are_none(self, free, tmp_path):
        free(1)
        with pytest.raises(ConfigError) as caught:
            opened(tmp_path, example=Answer(answer_to(1, 0).logits))
        assert "kdsnn-response" not in str(caught.value)

    def test_is_asked_for_what_is_not_there_yet_alone(self, free, tmp_path):
        whole = filled(tmp_path, BATCHES[:4]).nbytes
        free(whole // 3)
        assert opened(tmp_path).filled == 4
        free(whole // 3 - 1)
        with pytest.raises(ConfigError, match=r"2 views need 2\.2 KiB"):
            opened(tmp_path)
        free(whole)
        filled(tmp_path)
        free(0)
        assert opened(tmp_path).filled == VIEWS * STEPS

    def test_that_runs_out_in_mid_run_is_one_message_and_costs_no_answer(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left")

        cache = filled(tmp_path, BATCHES[:1])
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "pack", full)
            with pytest.raises(RunError, match=r"No space left\): free some disk space, then continue with --resume"):
                get(cache, 1, 1)
        again = opened(tmp_path)
        assert again.filled == 1
        assert_same_bits(get(again, 1, 1), answer_to(1, 1))

    def test_a_folder_that_cannot_be_made_is_one_message(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="could not be written or read"):
            opened(tmp_path / "file" / "answers")


class TestKill:
    """Whatever is marked is right, whenever the process ends."""

    def check(self, folder):
        """Every answer that a later process takes from the disk is the teacher's; return how many it took."""
        cache, asked = opened(folder), Asked()
        cache.trusted = True
        for view, step in BATCHES:
            assert_same_bits(get(cache, view, step, asked), answer_to(view, step))
        assert len(asked.calls) == VIEWS * STEPS - cache.filled
        return cache.filled

    @pytest.mark.parametrize("every", [1, 4])
    def test_at_any_write_even_in_its_middle(self, every, tmp_path, monkeypatch):
        counts = []
        for moment in range(2, 200, 3):  # each of the five tensors of an answer, and the last of all
            folder, left = tmp_path / str(moment), [moment]
            write = Cache._write

            def torn(cache, name, view, step, tensor, left=left, write=write):
                if left[0] == 0:  # half of the rows are new, the others hold whatever was there
                    write(cache, name, view, step, torch.cat([tensor[: BATCH // 2], 0 * tensor[BATCH // 2 :] - 1]))
                    raise Cut
                left[0] -= 1
                write(cache, name, view, step, tensor)

            cache = opened(folder)
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(Cache, "_write", torn)
                    for number, (view, step) in enumerate(BATCHES):
                        get(cache, view, step)
                        if number % every == every - 1:
                            cache.flush()
                    cache.flush()
            except Cut:
                counts.append(self.check(folder))
            else:
                break
        assert counts[0] == 0 and max(counts) == VIEWS * STEPS - 1 and counts == sorted(counts)
        assert len(counts) == VIEWS * STEPS * 5 // 3

    def test_marks_follow_when_all_rows_are_on_disk(self, tmp_path, monkeypatch):
        cache, done = opened(tmp_path), []
        get(cache, 1, 0)
        write, sync = Cache._write, Cache._sync
        monkeypatch.setattr(Cache, "_write", lambda *args: done.append(("write", args[1])) or write(*args))
        monkeypatch.setattr(Cache, "_sync", lambda *args: done.append(("sync", args[1])) or sync(*args))
        cache.flush()
        first = done.index(("write", "samples"))
        assert {name for what, name in done[:first] if what == "sync"} >= set(cache.layouts) - {"samples"}
        assert done[first:] == [("write", "samples"), ("sync", "samples")]
        cache.flush()
        assert len(done) == first + 2

    @pytest.mark.parametrize("module, call", [(np.lib.format, "open_memmap"), (os, "rename")])
    def test_while_the_directory_is_made_leaves_none(self, module, call, tmp_path, monkeypatch):
        def cut(*_):
            raise Cut

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(module, call, cut)
            opened(tmp_path)
        assert self.check(tmp_path) == 0

    def test_minus_nine(self, tmp_path):
        """The real thing: a process that fills without end is killed while it does."""
        script = (
            "import sys, test_cache as t\n"
            "from pathlib import Path\n"
            "cache = t.opened(Path(sys.argv[1]))\n"
            "t.get(cache, 1, 0), t.get(cache, 1, 1), cache.flush()\n"
            "while True:\n"
            "    cache._fill(1, 2, t.answer_to(1, 2)), cache._fill(2, 0, t.answer_to(1, 1))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent)
        ends = time.monotonic() + 400
        try:
            while process.poll() is None and time.monotonic() < ends:
                marks = list(tmp_path.glob("*[0-9a-f]/samples.npy"))
                if marks and (np.load(marks[0])[0, 1] >= 0).all():
                    break
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert self.check(tmp_path) == 2
