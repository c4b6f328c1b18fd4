"""The command line: `nybble` and `serve`."""

import os

# OpenMP's threads, in which PyTorch computes what has no kernel of ours, spin while they wait for
# each other. By default they spin so long that, if another process takes a core, most of the time
# goes into waiting for a thread that does not run. It is read when torch loads OpenMP, so it must
# be set before torch is imported. A user's own policy is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
