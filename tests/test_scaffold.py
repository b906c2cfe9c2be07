"""The house: where things stand, what imports what, and that the method files read alike."""
import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = [ROOT / f"{name}.py" for name in ("diffmic", "mediffusion", "symmflow", "diffclassifier") if (ROOT / f"{name}.py").exists()]
SOURCES = [*METHODS, *(ROOT / "common").glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "tests").glob("*.py")]
SECTIONS = ["imports", "settings", "the method", "networks", "evaluation", "setup", "training loop", "end", "commands"]
NETWORK = {"socket", "socketserver", "ssl", "select", "selectors", "asyncio", "http", "urllib", "xmlrpc", "ftplib", "smtplib", "imaplib", "poplib",
           "webbrowser", "requests"}
UNPICKLERS = {"marshal", "shelve", "dill", "joblib", "code", "runpy", "importlib", "ctypes"}
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "pytest", "common", "data", "tests", *(m.stem for m in METHODS)}
ids = [str(p.relative_to(ROOT)) for p in SOURCES]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def section(path, first, last):
    """The text from the banner of section `first` to the banner behind section `last`."""
    return re.search(rf"(?ms)^ *# =+ {first} .*?(?=^# =+ {last + 1} )", path.read_text())[0]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.name)
def test_a_method_file_has_the_ten_sections_in_order(path):
    assert ast.get_docstring(ast.parse(path.read_text()))               # section 1
    assert re.findall(r"(?m)^ *# =+ \d+ (.+)$", path.read_text()) == SECTIONS
    assert re.findall(r"(?m)^ *# =+ (\d+) .+$", path.read_text()) == [str(n) for n in range(2, 11)]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.name)
def test_a_method_file_is_one_sitting(path):
    assert 400 <= path.read_text().count("\n") <= (750 if path.stem == "mediffusion" else 650)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.name)
def test_setup_loop_and_end_are_the_same_in_every_method_file(path):
    assert section(path, 7, 9) == section(METHODS[0], 7, 9)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.name)
def test_method_files_share_their_first_settings_in_the_same_order(path):
    common = [re.findall(r"(?m)^    (\w+): .*  # ", section(p, 3, 3).split("# --- method ---")[0]) for p in (path, METHODS[0])]
    assert common[0] == common[1]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_the_five_packages_are_imported(path):
    assert set(imports(path)) <= PACKAGES | set(sys.stdlib_module_names)


def test_arrows_point_from_methods_to_common_and_data():
    for path in (ROOT / "common").glob("*.py"):
        assert not set(imports(path)) & {"data", *(m.stem for m in METHODS)}, path
    for path in (ROOT / "data").glob("*.py"):
        assert not set(imports(path)) & {"common", *(m.stem for m in METHODS)}, path


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "tests"], ids=[i for i in ids if not i.startswith("tests")])
def test_nothing_unpickles_or_runs_what_it_reads(path):
    text = path.read_text()
    for word in ("allow_pickle=True", "weights_only=False", "urllib", "requests"):
        assert word not in text
    assert not set(imports(path)) & (NETWORK | UNPICKLERS)
    assert set(re.findall(r"\bpickle\.\w+|from pickle\b", text)) <= {"pickle.UnpicklingError"}, "the error alone is known here, to tell of it"
    calls = {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & {"eval", "exec", "__import__"}
    for call in re.findall(r"torch\.load\(.*", text):
        assert "weights_only=True" in call


def test_what_would_leave_this_machine_fails_in_every_test_and_its_forks():
    """192.0.2.1 is nobody's, and no packet goes there: the hook of conftest.py is asked first. What torch opens for its own processes it does not see."""
    for call in lambda: socket.create_connection(("192.0.2.1", 80), .1), lambda: socket.getaddrinfo("example.org", 80), \
            lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)):
        with pytest.raises(AssertionError, match="would speak to"):
            call()


def test_requirements_name_five_packages_with_torch_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines == ["torch==2.13.0", "numpy", "pillow", "tqdm", "pytest"]


def test_nothing_else_is_kept_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    allowed = {"README.md", "requirements.txt", "LICENSE", *(m.name for m in METHODS), "common", "data", "tests"}
    assert {name.split("/")[0] for name in listed if not name.startswith(".")} <= allowed
