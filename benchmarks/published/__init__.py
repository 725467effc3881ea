"""Estimates against published figures of other engines.

python -m benchmarks.published            # prints the table of docs/estimate.md
python -m benchmarks.published --write    # puts it there

No run is repeated. What each one computed is counted op by op as its program does it (``counted``): its kernels of
attention, what it recomputes, whether a compiler joins its operations. The step is then that of this engine's hosts for
the same layers, batch and machines, with the figures of ``configs/hardware`` as they stand. One file for each source,
named there with the file or page in which batch, machines and figures were read.
"""
