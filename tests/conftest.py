"""The processes of pytest-xdist share the cores, and so do the runs that their tests start."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    cores, workers = os.cpu_count() or 1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, cores) // workers)))


def no_network(name: str) -> None:
    raise ConnectionError("tests have no network")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """Datasets and ensembles of tests that do not say where they want them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for variable in ("MINARI_DATASETS_PATH", "OFFLINE_MBRL_CACHE"):
            monkeypatch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        monkeypatch.setattr("minari.download_dataset", no_network)
        yield
