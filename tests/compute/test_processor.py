from types import SimpleNamespace

import pytest

from spikedistill.compute import processor


@pytest.mark.parametrize(
    "text, flags",
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 avx2\n\nflags\t\t: other\n", {"fpu", "amx_bf16", "avx2"}),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("model name\t: Something\n", set()),
        (None, set()),
    ],
)
def test_flags_are_read_from_the_first_processor(monkeypatch, text, flags):
    file = SimpleNamespace(exists=lambda: text is not None, read_text=lambda encoding: text)
    monkeypatch.setattr(processor, "Path", lambda name: file)
    assert processor.processor_flags() == flags


@pytest.mark.parametrize("flags, long", [("fpu avx2 avx512f", True), ("fpu avx2 avx512", False), ("", False)])
def test_vectors_are_long_with_avx512(monkeypatch, flags, long):
    monkeypatch.setattr(processor, "processor_flags", lambda: set(flags.split()))
    assert processor.has_long_vectors() is long
