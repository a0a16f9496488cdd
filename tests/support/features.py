"""Features in all orders of memory that networks hand on."""

import torch


def draw_feature(name, dtype):
    """A feature ``[T, B, ...]`` of three steps, in one of the orders of memory that networks hand on."""
    rows = torch.randn(3 * 2, 4, 6, 5).to(dtype)
    return {
        "channels first": lambda: rows.unflatten(0, (3, 2)),
        "channels last": lambda: rows.contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2)),
        "vectors": lambda: rows[:, :, 0, 0].contiguous().unflatten(0, (3, 2)),
        "cut out of a larger map": lambda: rows.unflatten(0, (3, 2))[..., 1:4, ::2],
        "time behind the batch": lambda: rows.unflatten(0, (2, 3)).transpose(0, 1),
    }[name]()
