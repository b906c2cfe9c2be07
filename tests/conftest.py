"""Two threads, the repository on the path, and a cache folder of its own for every test."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402,F401  before torch: how its threads wait
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)


def stay(event, given):
    """Nothing here speaks to another machine, nor do its forks: they inherit this."""
    host = given[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else None
    if event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple):        # no path of a socket on this machine
        host = given[1][0]
    assert host in (None, "", "localhost", "127.0.0.1", "::1"), f"a test would speak to {host}"


sys.addaudithook(stay)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow") and "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: add --slow, or -m slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes on two cores; skipped unless asked for")


@pytest.fixture(scope="module")
def one_thread():
    """For networks of a few channels one thread is as fast as two. Asked for by `pytestmark`, as is `seeded`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """A folder for a data set, with neighbours that are none of its business."""
    (tmp_path / "data" / "isic").mkdir(parents=True)
    return tmp_path / "data" / "isic"
