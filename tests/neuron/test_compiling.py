"""What is said while neurons are compiled."""

import logging
import threading

import pytest
import torch

from spikedistill.neuron import fused
from spikedistill.neuron.dynamics import Neuron


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(fused, "SAID", threading.Event())


def test_says_once_that_it_compiles(monkeypatch, caplog):
    counts = iter([5, 5, 6, 7])
    monkeypatch.setattr(fused, "_not_in_cache", lambda: next(counts))
    fused._say_if_compiled(5)
    fused._say_if_compiled(5)
    assert caplog.messages == ["note: compiling neurons, once, about 10 s"]


def test_says_nothing_where_the_cache_has_the_kernel(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_not_in_cache", lambda: 5)
    monkeypatch.setattr(fused, "PATIENCE", 0.15)
    fused._say_if_compiled(5)
    assert not caplog.messages and not fused.SAID.is_set()


def test_a_new_kernel_is_watched_from_beside_until_it_was_said(monkeypatch):
    watched, begun = [], threading.Event()
    monkeypatch.setattr(fused, "_say_if_compiled", lambda before: (watched.append(before), begun.set()))
    monkeypatch.setattr(fused, "_not_in_cache", lambda: 3)
    fused._compiled.__wrapped__(fused._probe, Neuron())
    assert begun.wait(5) and watched == [3]
    fused.SAID.set()
    fused._compiled.__wrapped__(fused._probe, Neuron())
    assert watched == [3]


def test_kernels_that_are_not_on_disk_are_counted(monkeypatch):
    from torch._dynamo.utils import counters

    before = fused._not_in_cache()
    for event in ("fxgraph_cache_miss", "fxgraph_cache_bypass", "fxgraph_cache_hit"):
        monkeypatch.setitem(counters["inductor"], event, counters["inductor"][event] + 1)
    assert fused._not_in_cache() == before + 2


def test_torch_does_not_remark_on_cuda_and_keeps_its_other_warnings():
    fused.works("cpu")
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(handler)
    try:
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
        logger.warning("The detected CUDA version mismatches")
    finally:
        logger.removeHandler(handler)
    assert said == ["The detected CUDA version mismatches"]


@pytest.mark.parametrize("change", ["vectors", "threads", "nothing"])
def test_a_kernel_for_other_vectors_or_threads_is_not_taken_from_the_cache_on_disk(change, monkeypatch):
    """A kernel for vectors of 8 numbers, run on a processor with 16, writes beyond the end of its results."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_inductor_cache

    def misses():
        torch._dynamo.reset()
        before = counters["inductor"]["fxgraph_cache_miss"]
        fused._compiled.__wrapped__(fused._probe, Neuron())(torch.zeros(1, 8), 1)
        return counters["inductor"]["fxgraph_cache_miss"] - before

    assert fused.works("cpu")
    with fresh_inductor_cache():
        assert misses() == 1
        if change == "vectors":
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
        torch.set_num_threads(2 if change == "threads" else 1)
        assert misses() == (change != "nothing")
