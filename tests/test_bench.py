"""tests/bench.py at --quick size: every row runs both sides and says what it found. Nothing here looks at the clock."""
import json

import numpy as np
import pytest
import torch

import diffclassifier
from common.autoencoder import AutoencoderKL
from tests import bench


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """No test touches the records."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_row_runs_both_sides_and_prints_their_ratio(row, results, capsys):
    if row.startswith("stop") and not bench.VOTES.exists():
        pytest.skip("no votes are stored: python -m tests.claims --votes RUN")
    record = bench.main(["--quick", "--only", row])
    assert list(record["rows"]) == [row]
    times = record["rows"][row]
    assert set(times) - {"same_label", "judge_diff"} == {"ours", "theirs", "commit"} and all(0 < times[side] < 1e4 for side in ("ours", "theirs"))
    line = capsys.readouterr().out
    assert row in line and f"ratio {times['theirs'] / times['ours']:6.2f}" in line
    assert not list(results.iterdir()), "only --write writes"


@pytest.mark.parametrize("name", bench.FULL_SIZE)
def test_the_full_size_is_measured_as_rates_and_shares_of_the_peak(name, monkeypatch):
    monkeypatch.setattr(bench, "peak", lambda s: 5e12)                  # a dozen products of large matrices
    monkeypatch.setattr(bench, "AutoencoderKL", lambda: AutoencoderKL(3, 8, (1, 1, 1, 1), 1, 4))
    found = bench.full_size(bench.Setting("cpu", True), bench.FULL_SIZE[name][0], seconds=.1)
    assert {"train images/s", "train TFLOP/s", "peak TFLOP/s", "share of peak", "prediction ms an image"} <= set(found)
    assert all(value > 0 for value in found.values()) and found["peak TFLOP/s"] == 5
    assert found["share of peak"] == pytest.approx(found["train TFLOP/s"] / 5)


def test_quick_is_small_and_otherwise_the_networks_are_the_papers():
    quick = bench.Setting("cpu", True)
    config, nets, x, y = quick.diffmic
    assert x.shape == (8, 3, 64, 64) and sum(p.numel() for p in nets.parameters()) < 3e6 and nets.resnet is None
    assert quick.symmflow[2].shape == (4, 3, 32, 32) and sum(p.numel() for p in quick.symmflow[1].parameters()) < 3e5
    with pytest.MonkeyPatch.context() as patch:                         # without making 200 MB of weights
        seen = []
        for method in bench.diffmic, bench.symmflow:
            patch.setattr(method, "build", lambda config, facts: seen.append((config, facts)) or torch.nn.Identity())
        full = bench.Setting("cpu", False)
        assert full.diffmic[2].shape == (32, 3, 224, 224) and full.symmflow[2].shape == (64, 3, 32, 32)
    (config, facts), (flow, _) = seen
    assert (config.width, config.guide_depth, config.hidden, config.steps) == (64, 50, 6144, 250)
    assert len(facts["classes"]) == 7 and config.recipe == flow.recipe == "paper" and flow.channels == 64
    assert sum(p.numel() for p in bench.latent_flow("meta")[1].unet.parameters()) == 35_767_052


def test_on_the_grid_we_need_a_fifth_of_the_authors_multiply_adds():
    """Counted at the paper's size: the authors' encoder 136, U-Net 6.2 and two decoders 622 (10^9)."""
    ours, theirs = bench.multiply_adds()
    assert ours == pytest.approx(136 + 6.2, abs=1) and theirs == pytest.approx(136 + 6.2 + 622, abs=2)


@pytest.mark.parametrize("stop", ["exact", "1e-2"])
def test_votes_are_stopped_where_the_method_stops_them(stop):
    config = diffclassifier.configure(data="toy", rule="majority", stop=stop, votes=41)
    votes = np.random.default_rng(0).choice(3, (30, 41), p=(.5, .3, .2))
    error = 1. - np.eye(3)[votes]                                       # 0 of the class that is voted for
    kept, alive = diffclassifier.stopped(error, config)
    asked, found = (~np.isnan(kept[:, :, 0])).sum(1), [bench.settled_after(image, 3, stop) for image in votes]
    assert [n for n, _ in found] == asked.tolist() and 5 < asked.mean() < 40
    assert [k for _, k in found] == [np.bincount(image[:n], minlength=3).argmax() for image, n in zip(votes, asked)]
    if stop == "exact":
        assert [k for _, k in found] == [np.bincount(image, minlength=3).argmax() for image in votes]


def test_the_table_has_a_line_for_each_row_of_a_record_with_its_ratio_and_aim():
    record = {"machine": "a machine", "dtype": "float32", "rows": {"prediction": {"ours": .25, "theirs": 5.}, "regions": {"ours": .002, "theirs": .02}}}
    head, rule, prediction, regions = bench.table(record).splitlines()
    assert "a machine, float32" in head and "ours" in head and set(rule) == {"|", "-"} and head.count("|") == rule.count("|") == 6
    cells = [c.strip() for c in prediction.split("|")]
    assert cells[1:5] == [bench.ROWS["prediction"][1], "0.25 s", "5 s", "20.0"] and float(cells[5]) == bench.ROWS["prediction"][2]
    votes = bench.table(record | {"rows": {"stop exact": {"ours": 2., "theirs": 5., "same_label": .9975}}}).splitlines()[-1]
    assert bench.ROWS["stop exact"][1] + ", 99.75 % the same label |" in votes
    removal = bench.table(record | {"rows": {"removal": {"ours": 2., "theirs": 5., "judge_diff": {"ours": -.38, "theirs": -.417}}}}).splitlines()[-1]
    assert bench.ROWS["removal"][1] + "; the judge's answer -0.38 and -0.42 |" in removal
    assert regions.split("|")[1].strip() == bench.ROWS["regions"][1] and regions.split("|")[4].strip() == "10.0"


def test_a_record_that_is_written_can_be_shown_and_keeps_its_other_rows(results, capsys):
    (results / "bench-cpu.json").write_text(json.dumps({"machine": "old", "dtype": "float32", "rows": {"prediction": {"ours": 1., "theirs": 2.},
                                                                                                      "regions": {"ours": 7e9, "theirs": 9.}}}))
    with pytest.MonkeyPatch.context() as patch:                         # the row itself is tested above
        patch.setitem(bench.ROWS, "regions", (lambda s: (.5, 1.5), "regions", None, "s"))
        patch.setattr(bench, "Setting", lambda device, quick: type("Nothing", (), dict(device=torch.device(device), quick=quick))())
        bench.main(["--only", "regions", "--write"])
        record = json.loads((results / "bench-cpu.json").read_text())
        assert record["rows"] == {"prediction": {"ours": 1., "theirs": 2.}, "regions": {"ours": .5, "theirs": 1.5, "commit": bench.run.commit()}}
        assert record["dtype"] == "float32" and "threads" in record["machine"] and record["torch"] == torch.__version__ and "--write" in record["command"]
        capsys.readouterr()
        bench.main(["--table"])
        assert capsys.readouterr().out.strip() == bench.table(record)


def test_a_trial_at_small_sizes_is_not_written(results):
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--write"])
    assert not (results / "bench-cpu.json").exists()


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--only", "nothing"])
