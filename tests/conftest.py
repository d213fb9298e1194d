"""The processes of pytest-xdist share the cores, and so do the runs that their tests start."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    cores, workers = os.cpu_count() or 1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, cores) // workers)))
