"""Two threads, the repository on the path, and a cache folder of its own for every test."""
import collections
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402,F401  before torch: how its threads wait
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)
SLOW = Path(__file__).resolve().parent / "results" / "slow.json"


def stay(event, given):
    """Nothing here speaks to another machine, nor do its forks: they inherit this."""
    host = given[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else None
    if event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple):        # no path of a socket on this machine
        host = given[1][0]
    assert host in (None, "", "localhost", "127.0.0.1", "::1"), f"a test would speak to {host}"


sys.addaudithook(stay)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--record", action="store_true", help="keep what came of the slow ones in tests/results/slow.json")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow") and "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: add --slow, or -m slow"))


def pytest_collection_finish(session):
    """The README's commands take a minute or two in processes of their own: they begin now, beside the other tests."""
    for item in session.items:
        if item.name == "test_the_commands_of_the_readme_run" and not session.config.option.collectonly:
            item.module.begun()


def pytest_sessionfinish(session):
    if readme := sys.modules.get("tests.test_readme"):
        readme.over()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes on two cores; skipped unless asked for")


def pytest_terminal_summary(terminalreporter, config):
    """--record: by test file, how many slow tests passed, failed and were skipped, and the commit that they tried; what was not run stays as it was."""
    if config.getoption("--record"):
        found = json.loads(SLOW.read_text()) if SLOW.exists() else {}
        counts = collections.defaultdict(collections.Counter)
        for outcome in ("passed", "failed", "xfailed", "xpassed", "skipped", "error"):
            for report in terminalreporter.stats.get(outcome, []):
                if "slow" in report.keywords:
                    counts[report.nodeid.partition("::")[0]][outcome] += 1
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SLOW.parent, capture_output=True, text=True).stdout.strip()
        found |= {file: dict(sorted(count.items())) | {"commit": commit} for file, count in counts.items()}
        SLOW.write_text(json.dumps({"command": "python -m pytest -m slow --record"} | dict(sorted(found.items())), indent=1) + "\n")


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
