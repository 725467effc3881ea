"""Shares out the samples of a global batch, so that every replica gets the same visual work.

Shapes: R replicas, B samples of each, K = R * B samples.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from omnivl.data.sizes import InputSizes


def visual_work(sizes: InputSizes, is_video: bool, pictures: NDArray[np.int64]) -> NDArray[np.float64]:
    """What encoding each picture or clip takes, in units of one token without attention, ``[K]``.

    A block takes 24 D operations times D for a token, and 4 D more for each token that it attends to.

    Args:
        sizes: Of the model's inputs.
        is_video: Whether they are clips.
        pictures: Widths and heights in pixels, int64 ``[K, 2]``, 0 where they are not known.
    """
    tokens = 1 + sizes.grids(is_video, pictures).prod(axis=1)
    frames = sizes.time_positions(sizes.num_frames) if is_video else 1
    work: NDArray[np.float64] = frames * tokens * (1 + tokens / (6 * sizes.visual_width))
    return work


def shares(work: NDArray[np.float64], replicas: int) -> NDArray[np.int64]:
    """Which samples each replica gets, int64 ``[R, B]``, rising in each row; all get equally many.

    The largest sample that is left goes to the replica that has least, among those with room for one. Samples of equal
    work stay in their order.

    Source: Graham, Bounds on multiprocessing timing anomalies (SIAM J. Appl. Math. 17, 1969): longest processing time
        first, here with equal numbers.
    """
    each = len(work) // replicas
    assert each * replicas == len(work), "the samples are a multiple of the replicas"
    if (work == work[0]).all():
        return np.arange(len(work)).reshape(replicas, each)
    given: list[list[int]] = [[] for _ in range(replicas)]
    lightest = [(0.0, replica) for replica in range(replicas)]
    for sample in np.argsort(-work, kind="stable").tolist():
        total, replica = heapq.heappop(lightest)
        given[replica].append(sample)
        if len(given[replica]) < each:
            heapq.heappush(lightest, (total + float(work[sample]), replica))
    return np.sort(np.array(given, dtype=np.int64).reshape(replicas, each), axis=1)
