"""A meeting of the ranks of one machine on the device: what is queued behind it on a rank's stream begins once all have come.

For work that reads and writes memory of other ranks without a protocol of its own: copies. One warp, which takes no
multiprocessor from the kernels beside it; peer_buffers.py says what all ranks must do, and what ends a wait.
"""

from __future__ import annotations

from .peer_buffers import PeerBuffers, launch


def meet(buffers: PeerBuffers) -> None:
    """On the current stream. What this rank's stream did before is seen by what is queued behind, on all ranks.

    Raises:
        loader.BuildError: the kernel cannot be compiled here.
    """
    launch("meet", (), buffers, (), total_units=1, chunk_units=1, early_start=False)
