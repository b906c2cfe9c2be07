"""README and records hold together; every command in it runs."""
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffmic
from tests import bench, claims, counterfactuals

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", claims.RESULTS / "README.md"]              # the second has the tables
README = "\n".join(page.read_text() for page in PAGES)
METHODS = "diffmic|symmflow|diffclassifier|mediffusion"
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"(?s)```\n(.*?)```", README) for line in block.splitlines()]
COMMANDS += re.findall(rf"`(python (?:{METHODS})\.py[^`]*)`", README)


OWN_TABLE = ["diffmic-toy", "diffmic-toy-paper", "diffmic-ham10000-small", "symmflow-toy", "symmflow-toy-paper", "symmflow-retinamnist-small", "symmflow-retinamnist-small-paper",
             "diffclassifier-toy", "mediffusion-toy", "mediffusion-toy-no-diffusion"]


@pytest.mark.parametrize("name", OWN_TABLE)
def test_the_table_in_the_readme_is_the_one_made_from_the_records(name):
    assert claims.table(name) in README


def test_the_other_tables_in_the_readme_are_made_from_the_records():
    assert claims.ideas_table("diffmic") in README and claims.regions_table("diffmic-toy") in README and claims.few_table() in README
    assert claims.steps_table("symmflow-toy") in README and claims.coverage_table("symmflow-toy") in README
    assert claims.drawn_table("symmflow-toy") in README and claims.ideas_table("symmflow") in README and claims.steps_table("symmflow-toy-raw") in README
    judged = json.loads((claims.RESULTS / "mediffusion-counterfactuals.json").read_text())
    assert counterfactuals.counterfactuals_table(judged) in README and counterfactuals.samples_table(judged) in README
    assert ", ".join(f"{row['judge']['diff']:+.2f}" for row in judged["arms"]["another classifier"]["rows"].values()) in README
    assert claims.labels_table() in README
    assert claims.votes_table() in README and claims.by_votes_table() in README and claims.stops_table() in README
    cpu, cuda = (json.loads((claims.RESULTS / f"bench-{device}.json").read_text()) for device in ("cpu", "cuda"))
    assert bench.table(cpu) in README and bench.table(cuda) in README and bench.full_table(cuda) in README
    shares = {name: f"{100 * cuda[f'full size, {name}']['share of peak']:.0f}" for name in ("dit", "joint", "unet", "latents")}
    assert "is met by none: {dit} % (DiT-B/4), {joint}, {unet} and {latents} % (U-Nets)".format(**shares) in README


@pytest.mark.parametrize("data", claims.REAL)
def test_what_is_said_of_real_images_is_recorded(data):
    first, page = (page.read_text() for page in PAGES[:2])
    if not claims.records(f"resnet-{data}"):
        return
    assert claims.side_table(data) in page and claims.differences_table(data) in page and f"({data}-coverage.png)" in page
    assert claims.all_sides_table() in first and claims.verdicts_table() in first
    assert claims.sentences() in page and claims.papers_table() in page and claims.choices_table() in page
    for cell in ("diffmic-retinamnist", "diffmic-retinamnist-paper"):
        assert claims.reverse_table(cell) in page
    assert claims.by_votes_table("diffclassifier-retinamnist") in page and claims.stops_table("diffclassifier-retinamnist") in page
    assert claims.priors_table("diffclassifier-retinamnist") in page
    assert not claims.records("joint-pneumoniamnist-0.1") or claims.shares_table() in page


SAID = {"diffmic": ("f1_macro", "retinamnist"), "symmflow": ("auroc", "retinamnist"), "diffclassifier": ("balanced_accuracy", "retinamnist")}


@pytest.mark.parametrize("method", SAID)
def test_the_docstrings_last_lines_have_the_numbers_of_the_records(method):
    key, data = SAID[method]
    line = importlib.import_module(method).__doc__.strip().splitlines()[-1]
    for pattern, cell in (r"plus (\.\d{3})", f"{method}-{data}"), (r"paper (\.\d{3})", f"{method}-{data}-paper"), (r"ResNet-18 (\.\d{3})", f"resnet-{data}"):
        found = [r["test"][key] for r in claims.records(cell)]
        assert len(found) == 3 and re.search(pattern, line)[1] == f"{np.mean(found):.3f}"[1:], pattern
    assert method != "diffmic" or f"guide alone (--variant dcg) {np.mean([r['test'][key] for r in claims.records('diffmic-retinamnist-dcg')]):.3f},".replace(" 0.", " .") in line


def test_mediffusions_docstring_has_the_numbers_of_the_records():
    line = importlib.import_module("mediffusion").__doc__.strip().splitlines()[-1]
    joint, alone = claims.records("mediffusion-toy"), claims.records("mediffusion-toy-no-diffusion")
    found = [r["test"]["auroc"] for r in joint], [r["test"]["auroc"] for r in alone], [r["baselines"]["resnet"]["auroc"] for r in joint]
    assert re.findall(r"\.\d{3}", line) == [f"{np.mean(v):.3f}"[1:] for v in found]


def test_differences_are_those_of_the_records():
    """One of each kind computed again, with fewer draws: its mean is the file's."""
    found = json.loads((claims.RESULTS / "differences.json").read_text())
    for row in found["claims"]:
        again = claims.difference(claims.said(row["one"]), claims.said(row["other"]), claims.SCORES[row["score"]], n=2)
        assert again["mean"] == pytest.approx(row["mean"], abs=1e-9) and again["by_seed"] == pytest.approx(row["by_seed"], abs=1e-9) and row["low"] <= row["high"], row


def test_what_the_pages_say_in_words_is_in_the_records():
    claimed = {(row["claim"], row["one"]): row["mean"] for row in json.loads((claims.RESULTS / "differences.json").read_text())["claims"]}
    one, five = (claimed[f"is ahead of {words} whose classes are taken to be equally frequent, too", "diffclassifier-pneumoniamnist"] for words in ("a ResNet-18", "five ResNets"))
    assert f"it is ahead by {one:+.3f} (one) and {five:+.3f} (five)".replace("+0", "+") in README
    few = [claimed["is ahead of a ResNet-18 of the same labels", f"joint-pneumoniamnist-{share}"] for share in claims.SHARES]
    assert f"is ahead of Mediffusion by {-min(few):.3f} to {-max(few):.3f} in AUROC".replace("0.", ".") in README and few[0] == min(few) and few[-1] == max(few)
    changes = [mean for (claim, cell), mean in claimed.items() if claim == "is ahead of its classifier without the diffusion" and "pneumoniamnist" in cell]
    assert len(changes) == 5 and f"{min(changes):+.3f} to {max(changes):+.3f}, cannot be told".replace("0.", ".") in README
    ours, guides = (np.array([of(r)["f1_macro"] for end in ("", "-paper") for data in ("retinamnist", "pneumoniamnist") for r in claims.records(f"diffmic-{data}{end}")])
                    for of in (lambda r: r["test"], lambda r: r["baselines"]["guide"]))
    large = [r["test"]["f1_macro"] > r["baselines"]["guide"]["f1_macro"] for r in claims.records("diffmic-ham10000")]
    assert "`plus` is below its own guide in five of six runs at 32 px, above it in two of three on HAM10000; `paper` is far below" in README
    assert (ours < guides)[:6].sum() == 5 and (guides - ours)[6:].min() > .05 and len(large) == 3 and sum(large) == 2
    behind = [np.mean([of(r)["accuracy"] for r in claims.records("diffclassifier-ham10000")]) for of in (lambda r: r["test"], lambda r: r["baselines"]["majority"])]
    assert "({:.3f}, {:.3f})".format(*behind).replace("0.", ".") in README
    rules = [r["baselines"] | {f"rule {'majority' if end else 'learned'}": r["test"]} for end in ("", "-paper") for data in ("retinamnist", "pneumoniamnist")
             for r in claims.records(f"diffclassifier-{data}{end}")]
    assert "[means are ahead on RetinaMNIST and PneumoniaMNIST, votes on HAM10000]" in README and all(r["rule mean"]["accuracy"] > r["rule majority"]["accuracy"] for r in rules) and len(rules) == 12
    assert all(r["baselines"]["rule mean"]["accuracy"] < r["baselines"]["rule majority"]["accuracy"] for r in claims.records("diffclassifier-ham10000"))
    weak, strong = ([f"{r['val_auroc']:.3f}"[1:] for r in claims.records(f"joint-pneumoniamnist-0.1{end}")] for end in ("-weak", ""))
    assert f"({', '.join(weak)} to {', '.join(strong)})" in README and all(a > b for a, b in zip(weak, strong))
    arms = json.loads((claims.RESULTS / "mediffusion-counterfactuals.json").read_text())["arms"]
    moved = {arm: [abs(row["judge"]["diff"]) for row in arms[arm]["rows"].values()] for arm in ("plus", "the paper's")}
    assert "the judge's farther in three of six rows" in README and sum(theirs > ours for ours, theirs in zip(*moved.values())) == 3
    assert "own answer to its aim in every image" in README and all(row["flipped"] == 1 for row in arms["the paper's"]["rows"].values())
    slower = [row["seconds_an_image"] / arms["plus"]["rows"][what]["seconds_an_image"] for what, row in arms["the paper's"]["rows"].items()]
    assert f"which take {min(slower):.0f} to {max(slower):.0f} times as long" in README


def test_what_the_page_says_of_few_labels_and_of_few_images_is_recorded():
    seconds = {arm: np.median([r["seconds"] for share in claims.SHARES for r in claims.records(f"{arm}-pneumoniamnist-{share}")]) for arm in claims.ARMS.values()}
    rounded = {arm: f"{round(s, -1):.0f}" for arm, s in seconds.items()}
    assert "in {resnet} seconds, FixMatch".format(**rounded) in README and "with one, in {fixmatch})".format(**rounded) in README
    assert "without; {joint} seconds, its classifier alone {alone})".format(**rounded) in README
    views = [claims.records(f"joint-pneumoniamnist-0.1{end}")[2]["val_auroc_of_strong_views"] for end in ("", "-paper")]
    assert "an AUROC of {:.3f}, with recipe paper {:.3f} (seed 2)".format(*views) in README
    judged, rare = claims.said("diffclassifier-ham10000"), []
    score = {}
    for name in ("resnet", "resnets"):
        found = []
        for seed, (ids, labels, p) in claims.said(f"{name}-ham10000").items():
            rows = np.isin(ids, judged[seed][0])
            assert rows.sum() == 300
            found.append(claims.SCORES["balanced accuracy"](labels[rows], p[rows]))
            rare = sorted(np.bincount(labels[rows]))[:2]
        score[name] = np.mean(found)
    assert "(one ResNet has a balanced accuracy of {resnet:.3f} there, five {resnets:.3f})".format(**score) in README
    assert f"rarest two, {rare[0]} and {rare[1]} of test" in README and f"the two rarest classes {rare[0]} and {rare[1]})" in README
    ends = [at for r in claims.records("resnets-ham10000") for at in r["selected"]]
    assert "validation picks their last passes" in README and np.mean([at > .9 for at in ends]) > .9
    base, level, added = ({"val": r["method_specific"]["validation_by_votes"][-1]["majority"], "auroc": r["baselines"]["rule majority"]["auroc"]}
                          for r in (claims.records(f"diffclassifier-toy-{name}")[0] for name in ("base", "level", "added")))
    worth = lambda other, key: f"{base[key] - other[key]:.2f}"[1:]
    assert f"{worth(level, 'val')} behind on validation and {worth(level, 'auroc')} in AUROC on test" in README and f"cost {worth(added, 'val')} and {worth(added, 'auroc')}." in README


@pytest.mark.parametrize("method", [diffmic], ids=lambda m: m.METHOD)
def test_the_ideas_in_the_docstring_have_the_numbers_of_their_records(method):
    given = re.findall(r"  (plus|picked|its base|--\S+(?: [a-z0-9.]+)?) +(\.\d{3})  (\.\d{3})", method.__doc__)
    name = method.METHOD
    cells = {"plus": f"{name}-toy", "picked": f"{name}-toy-picked"}
    cells |= {claims.changed(f"{name}-toy-{idea}").strip("`"): f"{name}-toy-{idea}" for idea in ("base", *claims.IDEAS[name])}
    assert {option for option, *_ in given} == set(cells)
    for option, accuracy, nll in given:
        val = claims.records(cells[option])[0]["method_specific"]["validation_by_steps_and_samples"][-1]
        assert (f"{val['accuracy']:.3f}"[1:], f"{val['nll']:.3f}"[1:]) == (accuracy, nll), option


def test_what_the_readme_says_of_the_regions_without_weights_is_recorded():
    uniform = claims.records("diffmic-toy-uniform")[0]["regions"]["all"]
    whole = claims.records("diffmic-toy-roi")[0]["regions"]["all"]
    assert f"covers {uniform['covered']:.2f}, by chance {uniform['chance']:.2f}" in README
    assert f"cover {whole['covered']:.2f}, by chance {whole['chance']:.2f}" in README
    plus = claims.records("diffmic-toy-uncalibrated")[0]                 # the training of the base
    assert f"scores {plus['guide_in_training']:.3f} on the augmented images it learns from and {plus['val_guide_accuracy']:.3f} on validation" in README


@pytest.mark.parametrize("name", [n for n in claims.CELLS if claims.records(n)])
def test_a_record_says_how_it_was_made(name):
    for record in claims.records(name):
        assert record["command"] == claims.command(name, record["seed"])
        assert record.get("selected_epoch", 0) <= claims.CELLS[name][1].get("pretrain_epochs", 2) + claims.CELLS[name][1].get("epochs", 22) and record["test"]["n"] > 0 and record["seconds"] > 0
        trained = claims.CELLS[name][0] not in ("resnet", "fixmatch") and claims.CELLS[name][1].get("baseline", True)
        assert {"majority", *["resnet"] * trained} | ({"guide"} if name.startswith("diffmic") and not name.endswith(("basic", "c1", "dcg")) else set()) <= set(record["baselines"])


def test_numbers_outside_the_tables_are_in_the_records():
    for name, key, text in re.findall(r"<!-- (\S+) (\S+) -->([\d.]+)", README):
        values = [r["test"][key] if key in r["test"] else r[key] / 60 for r in claims.records(name)]
        assert float(text) == pytest.approx(sum(values) / len(values), abs=.5 * 10 ** -len(text.partition(".")[2])), (name, key)


def test_the_first_table_has_each_methods_accuracy_its_resnets_and_the_optimum():
    for method in METHODS.split("|"):
        key, found = "auroc" if method == "mediffusion" else "accuracy", claims.records(f"{method}-toy")
        mean = [np.mean([of(r)[key] for r in found]) for of in (lambda r: r["test"], lambda r: r["baselines"]["resnet"], lambda r: r["bayes"])]
        row = re.search(rf"(?m)^\| `{method}\.py` \|.*$", PAGES[0].read_text())[0]
        assert re.findall(r"(?:-->|\| )(0\.\d{3})", row) == [f"{v:.3f}" for v in mean], method


def test_one_draw_and_twenty_score_as_the_readme_says():
    for name in ("diffmic-toy-base", "diffmic-toy-eps"):
        table = claims.records(name)[0]["method_specific"]["validation_by_steps_and_samples"]
        by_samples = {row["samples"]: row["accuracy"] for row in table if row["steps"] == 20}
        assert f"one draw scores {by_samples[1]:.3f} on validation, 20 score {by_samples[20]:.3f}" in README


def test_the_diffusion_beside_its_controls_is_as_the_readme_says():
    for control, sentence in (("guide", r"own guide by (.+?) in the three"), ("resnet", r"ResNet-18 on the same batches by (.+?):")):
        said = [float(x) for x in re.search(sentence, README)[1].split(", ")]
        assert said == pytest.approx([r["test"]["accuracy"] - r["baselines"][control]["accuracy"] for r in claims.records("diffmic-toy")], abs=5.1e-4)
    base = [r["test"]["accuracy"] for r in claims.records("diffmic-toy-base")]
    picked = [r["test"]["accuracy"] for r in claims.records("diffmic-toy-picked")]
    both = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in (picked, base)]
    assert f"(epoch picked by accuracy, one view) it scored {both[0]}, without prior dropout {both[1]}" in README


def test_at_the_default_budget_toy_accuracy_is_within_seven_points_of_bayes():
    records = claims.records("diffmic-toy")
    assert len(records) == 3
    for record in records:
        assert record["test"]["accuracy"] > record["bayes"]["accuracy"] - .07


def test_at_the_default_budget_the_flow_is_within_eight_points_of_bayes_on_average():
    records = claims.records("symmflow-toy")
    assert len(records) == 3 and np.mean([r["bayes"]["accuracy"] - r["test"]["accuracy"] for r in records]) < .08


def test_one_hot_codes_set_the_right_images_aside():
    """Toy, mean of three seeds: the curve does not fall beyond noise, two standard errors of a step's own images."""
    curves = np.array([[accuracy for _, accuracy in record["accuracy_by_coverage"]["symmflow"]] for record in claims.records("symmflow-toy")]).mean(0)
    kept = 3000 * (1 - .05 * np.arange(20))
    noise = 2 * np.sqrt(curves * (1 - curves) / kept)
    assert (np.maximum.accumulate(curves) - curves <= noise + 1e-9).all()


def test_the_flow_beside_its_controls_is_as_the_readme_says():
    records = claims.records("symmflow-toy")
    for sentence, of in ((r"ResNet on the same batches by (.+?) in the three seeds, and below", lambda r: r["baselines"]["resnet"]),
                         (r"and below the Bayes optimum by\s(.+?)\. The paper", lambda r: r["bayes"])):
        said = [float(x) for x in re.search(sentence, README)[1].split(", ")]
        assert said == pytest.approx([of(r)["accuracy"] - r["test"]["accuracy"] for r in records], abs=5.1e-4)
    assert f"MedSymmFlow's accuracy by seed: {', '.join(format(r['test']['accuracy'], '.3f') for r in claims.records('symmflow-retinamnist-small'))}" in README


def test_on_retinamnist_three_seeds_have_48_percent_on_average():
    records = claims.records("symmflow-retinamnist-small")
    assert len(records) == 3 and np.mean([r["test"]["accuracy"] for r in records]) >= .48


def test_the_evidence_lies_in_the_lesions_box_at_more_than_twice_the_boxs_share_of_the_area():
    for record in claims.records("diffclassifier-toy"):
        assert record["evidence"]["in_box"] > 2 * record["evidence"]["area"]


def test_at_the_default_budget_votes_are_within_fourteen_points_of_bayes_and_the_learned_weighting_within_ten():
    """The latter in balanced accuracy: it takes classes for equally frequent, the Bayes optimum knows how frequent they are."""
    records = claims.records("diffclassifier-toy")
    assert len(records) == 3
    for most, key, of in ((.14, "accuracy", lambda r: r["baselines"]["rule majority"]), (.10, "balanced_accuracy", lambda r: r["test"])):
        assert np.mean([r["bayes"][key] - of(r)[key] for r in records]) < most


def test_what_the_readme_says_of_the_diffusion_classifier_is_recorded():
    records = claims.records("diffclassifier-toy")
    said = [float(x) for x in re.search(r"ResNet on the same batches is ahead\s+by (.+?) in the three seeds, the Bayes optimum by (.+?);", README).groups() for x in x.split(", ")]
    assert said == pytest.approx([of["accuracy"] - r["test"]["accuracy"] for name in ("resnet", "bayes") for r in records
                                  for of in [r["bayes"] if name == "bayes" else r["baselines"][name]]], abs=5.1e-4)
    found = [np.mean([r["evidence"][k] for r in records]) for k in ("in_box", "square_in_box", "area")]
    assert "has {:.2f} of its sum, and {:.2f} of its square, in the lesion's box, which is {:.2f} of the area".format(*found) in README


def test_what_the_readme_says_of_the_diffusion_in_mediffusion_is_recorded():
    joint, alone = claims.records("mediffusion-toy"), claims.records("mediffusion-toy-no-diffusion")
    assert [r["seed"] for r in joint] == [r["seed"] for r in alone] == [0, 1, 2]
    of = lambda r: r["test"]["auroc"]
    assert "by " + ", ".join(f"{of(a) - of(b):+.3f}" for a, b in zip(joint, alone)) + " in the three seeds: on these films" in README
    assert "has " + ", ".join(f"{of(a) - a['baselines']['resnet']['auroc']:+.3f}" for a in joint) + ", and the one without diffusion as much" in README
    base, consistent, times = (of(claims.records(f"mediffusion-toy-{name}")[0]) for name in ("base", "consistent", "times"))
    assert f"costs {base - consistent:.3f}, features".replace("0.", ".") in README and f"(`--feature-times`) {base - times:.3f}, a".replace("0.", ".") in README
    assert f"({base:.3f} against {of(joint[0]):.3f})" in README


def test_by_the_judge_guidance_does_more_than_the_control_spares_the_other_findings_and_changes_the_box():
    for row in json.loads((claims.RESULTS / "mediffusion-counterfactuals.json").read_text())["arms"]["plus"]["rows"].values():
        assert abs(row["judge"]["diff"]) > .2 and row["judge"]["other_abs"] < abs(row["judge"]["diff"]) / 2 and row["in_box"] > 2.5 * row["in_random_box"]


def test_the_pictures_and_pages_of_the_readme_are_there():
    for page in PAGES:
        for path in re.findall(r"\[[^]]*\]\(((?!http)[^\s#]+)\S*\)", page.read_text()):
            assert (page.parent / path).exists()
            if path.endswith(".png"):
                with Image.open(page.parent / path) as image:
                    assert min(image.size) > 200


def test_the_readme_is_a_page_that_a_reader_finishes():
    assert len(PAGES[0].read_text().splitlines()) <= 170


def make_lesions(root):
    """A user's folder, as the README makes it: two classes, mixed sizes and modes; and other pictures of theirs."""
    for k, name in enumerate(("benign", "malignant")):
        (root / "lesions" / name).mkdir(parents=True)
        for i in range(16):
            Image.effect_noise((40 + i, 60 - i), 20 + 100 * k).convert("RGB" if i % 2 else "L").save(root / "lesions" / name / f"{i}.png")
    Image.effect_noise((50, 50), 90).save(root / "new.jpg")
    Image.effect_noise((50, 50), 20).save(root / "a.jpg")
    Image.effect_noise((50, 50), 20).save(root / "b.png")
    (root / "folder").mkdir()
    Image.effect_noise((50, 50), 20).save(root / "folder" / "c.png")
    (root / "lesions" / "groups.csv").write_text("file,group\n")


def words(command):
    first, file, *rest = shlex.split(command)
    return [sys.executable, str(ROOT / file), *rest]


def run(command, cwd):
    return subprocess.run(words(command), cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_what_was_tried_to_break_it_names_tests_that_are_there_and_the_record_of_damaged_files():
    section, record = re.search(r"(?s)## What was tried to break it\n(.*?)(?:\n## |\Z)", README)[1], json.loads((claims.RESULTS / "fuzz.json").read_text())
    ends = {code: sum(count.get(code, 0) for count in record["exit_codes"].values()) for code in "012"}
    assert f"{record['files']:,} damaged files: {ends['0']:,} are read, {ends['1'] + ends['2']:,} refused" in section
    assert sum(ends.values()) == record["files"] == 3000 and record["finds"] == 0
    slow = json.loads((claims.RESULTS / "slow.json").read_text())
    assert {f"tests/test_{name}.py" for name in ("faults", "metrics", "promises", "run")} < slow.keys()
    assert all(count.keys() <= {"passed", "xfailed", "commit"} for file, count in slow.items() if file != "command")
    assert all((ROOT / "tests" / name).exists() or (claims.RESULTS / name).exists() for name in re.findall(r"`(\w+\.(?:py|json))`", section))
    assert [int(n) for n in re.findall(r"(?m)^\| (\d+) \|", section)] == list(range(1, 15))


def shortened():
    """Each command of the README -> what is run in its place: with --limit 64 --epochs 1 where it trains, of few pictures where it draws, on a stand-in
    where it names a file. First those that train."""
    less = {"symmflow": " --generated 8", "diffclassifier": " --votes 5 --judged 16", "mediffusion": " --explained 2 --draw-steps 5"}   # what comes after training
    train, use = {f"python {method}.py": f" --output RUN-{method}" for method in METHODS.split("|")}, {}
    for command in (c[re.search(rf"python ({METHODS})\.py", c).start():] for c in COMMANDS if re.search(rf"({METHODS})\.py", c) and "torchrun" not in c):
        if "--data" in command and "DIR" in command or " eval " in command and "--root" in command:
            continue                                                    # needs the data; the folder's twin does without
        trains = not re.search(r" (eval|predict|explain|sample) |--help|--resume", command)
        few = " --limit 2" * (" explain " in command and "--tsne" not in command and "--limit" not in command)
        (train if trains else use).setdefault(command, f" --output out{len(train)}" if trains and "--output" not in command else few)
    return {c: c.replace("RUN/", f"RUN-{m}/").replace("--resume RUN", f"--resume RUN-{m}").replace("-n 64", "-n 8") + (f" --limit 64 --epochs 1{less.get(m, '')}" if c in train else "") + more
            for c, more in (train | use).items() for m in [re.search(METHODS, c)[0]]}


@functools.cache
def begun():
    """The folder, and the shell that runs the commands there, one after the other. tests/conftest.py calls this first of all: they run beside the tests
    that come before, most of which leave a core idle."""
    root = Path(tempfile.mkdtemp())
    make_lesions(root)
    script = "\n".join(f"{shlex.join(words(command))} >{i}.out 2>{i}.err; echo $? >{i}.code" for i, command in enumerate(shortened().values()))
    return root, subprocess.Popen(["sh", "-c", script], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def over():
    """Ends what `begun` began, and its folder."""
    if begun.cache_info().currsize:
        root, shell = begun()
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
        shutil.rmtree(root, ignore_errors=True)


def test_the_commands_of_the_readme_run():
    root, shell = begun()
    shell.wait(timeout=900)
    for i, command in enumerate(shortened().values()):
        said = (root / f"{i}.err").read_text()
        assert (root / f"{i}.code").read_text() == "0\n" and "Traceback" not in said, (command, said)
    given = shortened()
    assert any("--data folder" in c for c in given) and any("predict" in c for c in given) and any("--resume RUN" in c for c in given)
    assert any("symmflow.py sample" in c for c in given) and any("symmflow.py explain" in c for c in given)


def test_the_ham10000_commands_of_the_readme_run_where_the_data_are(tmp_path):
    root = ROOT.parent / "shared" / "data" / "ham10000"
    if not root.exists():
        pytest.skip("no HAM10000 beside the repository")
    result = run(f"python diffmic.py --data ham10000 --root {root} --scale small --limit 64 --epochs 1 --output {tmp_path / 'run'}", tmp_path)
    assert result.returncode == 0 and "resnet" in result.stdout, result.stderr


def test_the_retinamnist_command_of_the_readme_runs_where_the_data_are(tmp_path):
    root = ROOT.parent / "shared" / "data" / "medmnist"
    if not root.exists():
        pytest.skip("no MedMNIST beside the repository")
    with ThreadPoolExecutor(2) as pool:                                 # its folder, or the file
        for result in pool.map(lambda path: run(f"python symmflow.py --data retinamnist --root {path} --scale small --limit 64 --epochs 1 --generated 8 "
                                                f"--output {tmp_path / path.stem}", tmp_path), (root, root / "retinamnist.npz")):
            assert result.returncode == 0 and "resnet" in result.stdout, result.stderr


def test_what_the_page_says_of_preconditioning_is_recorded():
    found = [f"{claims.validation(r)['accuracy']:.3f}" for name in ("raw", "base") for r in claims.records(f"symmflow-toy-{name}")[:2]]
    assert f"`--no-precondition` ({found[0]})" in README and f"the base ({found[2]})" in README and f"`--no-precondition` has {found[1]} against {found[3]}" in README
