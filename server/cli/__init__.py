"""The command line: `nybble` and `serve`."""

import os
import sys

# OpenMP's threads spin while they wait for each other, by default for so long that where another
# process has a processor they mostly spin for one that does not run. This is long enough to bridge
# what lies between two kernels of a decode step. Read when torch loads OpenMP, so before any import
# of it; who sets a policy of their own keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Progress bars in a log file: a line now and then. tqdm's own setting, read when it is imported.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")
