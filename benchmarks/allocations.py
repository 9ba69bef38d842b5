"""Peak bytes of tensors during a call, beyond those allocated before it.

On the CPU from the events of torch's allocator: exact and reproducible, without memory that
the C library retains or the interpreter uses.  On a GPU from the caching allocator's statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes allocated at once during ``call()``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    raw = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted(
        (event.start_ns(), event.nbytes()) for event in raw if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak
