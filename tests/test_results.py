"What is recorded is what the plan says, and the pages show what is recorded."
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gated_symile.core import DataError
from gated_symile.runs.plan import (as_spec, draw_settings, lines_of, Plan, planned, PlannedRun, progress_table,
                                    run_planned, runs_of)
from gated_symile.runs.record import COLUMNS, differences, read_record, summary
from gated_symile.runs.spec import NEUTRAL, RunSpec

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLAN = ROOT/"nbs"/"results", ROOT/"workflow"/"plan.yaml"
RECORDS = sorted(RESULTS.glob("*.parquet"))
KEY = ["data", "objective", "variant", "p", "seed"]
RECORDED = dict(tuning=384, report=300, defaults=45, weak_start=5, robustness=27, views=90, kinds=36, scale=45,
                diversity=36, ablations=108, course=24)


def spec_in(text):
    "The specification that a record holds as JSON; what there was not yet, has its neutral value."
    given = {name: value for name, value in json.loads(text).items()
             if name not in ("bank_size", "standardise", "fingerprint", "code")}
    prefix = f"objective_options.{given['objective']}."
    later = {name.removeprefix(prefix): value for name, value in NEUTRAL.items() if name.startswith(prefix)}
    return RunSpec(**{"encoder": NEUTRAL["encoder"], **given,
                      "objective_options": {**later, **given["objective_options"]}})


def faults(record, plan, stage, tuning):
    "What a record of a stage holds that it should not, as sentences."
    if stage not in plan.stages: return [f"{stage} is no stage of the plan"]
    runs = [run for pair in plan.stages[stage].pairs for run in runs_of(plan, stage, *pair, tuning) or []]
    found, own = [], lines_of(runs, record)
    strange = record.merge(own[KEY + ["digest"]].drop_duplicates(), how="left",
                           indicator=True).query("_merge == 'left_only'")
    found += [f"not what the plan says: {key}"
              for key in strange[KEY].drop_duplicates().itertuples(index=False, name=None)]
    if (record["stage"] != stage).any(): found.append("lines of another stage")
    if record.duplicated([*KEY, "metric", "rows"]).any(): found.append("a value is recorded twice")
    if stage != "tuning" and set(record["seed"]) & set(plan.stages["tuning"].seeds):
        found.append("seeds of the tuning are reported")
    if stage == "tuning" and set(record["rows"]) - {"training"}: found.append("the tuning looked at test rows")
    for r in record.itertuples():
        if r.by_row is not None and r.rows != "training" and not np.isclose(np.mean(r.by_row), r.value):
            found.append(f"{r.metric} of {r.rows} rows is not the mean of its rows: {r.value}")
    if any(spec_in(text).digest != digest
           for text, digest in record[["spec", "digest"]].drop_duplicates().itertuples(index=False)):
        found.append("a digest that is not that of its settings")
    if not record["commit"].str.fullmatch(r"[0-9a-f]{40}").all(): found.append("run from code that is not committed")
    return found


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_holds_what_the_plan_says(path):
    assert faults(read_record(path), Plan.load(PLAN), path.stem, read_record(RESULTS/"tuning.parquet")) == []


@pytest.mark.parametrize("path", sorted((RESULTS/"information").glob("*.parquet")), ids=lambda p: p.stem)
def test_a_table_of_information_says_where_it_comes_from(path):
    "Each value once, within its interval, by a seed that was not tuned on, from code that is committed."
    table = pd.read_parquet(path)
    key = ["method", "seed", "arm", "kind", "view", "without", "probe", "metric"]
    assert len(table) and not table.duplicated(key).any() and table["seed"].max() < 100
    settings = table["settings"].map(json.loads)
    for name in ("data", "method", "seed", "arm"): assert (settings.map(lambda s: s[name]) == table[name]).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).mean() > 0.99
    assert table["commit"].str.fullmatch(r"[0-9a-f]{40}").all() and table["n_test"].min() > 100


def test_no_recorded_run_is_lost():
    "Each is found by the digest of what the plan says now."
    standing = progress_table(Plan.load(PLAN), RESULTS).groupby("stage")["recorded"].sum()
    assert {stage: standing[stage] for stage in RECORDED} == RECORDED and sum(RECORDED.values()) == 1100


def test_the_main_table_is_what_it_was():
    "To the last digit, intervals and differences too, as computed when it was first shown."
    frozen, record = pd.read_csv(ROOT/"tests"/"main_table.csv",
                                 float_precision="round_trip"), read_record(RESULTS/"report.parquet")
    tables = {("summary", rows): summary(record, rows) for rows in ("all", "clean", "corrupted")}
    tables |= {(name, "all"): differences(record, name) for name in ("GatedSymile", "SubsetSymile")}
    for (kind, rows), table in tables.items():
        before = frozen[(frozen["kind"] == kind) & (frozen["rows"] == rows)].reset_index(drop=True)
        names = [name for name in ("data", "objective", "p", "seeds", "value", "low", "high")]
        pd.testing.assert_frame_equal(table[names], before[names], check_exact=True)
    assert len(frozen) == sum(map(len, tables.values()))


@pytest.fixture(scope="module")
def tiny():
    "A plan with one run, and its record."
    stages = {"tuning": dict(objectives=["Symile"], data=["mfeat"], p=[0.5], seeds=[100], draws=1)}
    stages["report"] = {**stages["tuning"], "draws": 0, "seeds": [0]}
    plan = Plan.load(dict(space={"learning_rate": {"choice": [1e-3]}}, base={"epochs": 1, "dim": 8}, stages=stages))
    tuning = run_planned(runs_of(plan, "tuning", "mfeat", "Symile",
                                 pd.DataFrame(columns=COLUMNS))[0]).assign(commit="0"*40)
    report = run_planned(runs_of(plan, "report", "mfeat", "Symile", tuning)[0]).assign(commit="0"*40)
    return plan, tuning, report


@pytest.mark.parametrize("change, problem", [
    (lambda r: r, None),
    (lambda r: r.assign(spec=r["spec"].str.replace('"epochs": 1', '"epochs": 2')), "not that of its settings"),
    (lambda r: r.assign(digest="0"*64), "not what the plan says"),
    (lambda r: r.assign(seed=100), "seeds of the tuning are reported"),
    (lambda r: r.assign(value=r["value"] + 0.01), "not the mean of its rows"),
    (lambda r: pd.concat([r, r]), "recorded twice"),
    (lambda r: r.assign(commit=r["commit"] + "-dirty"), "not committed")])
def test_a_wrong_record_is_noticed(tiny, change, problem):
    plan, tuning, report = tiny
    found = faults(change(report).reset_index(drop=True), plan, "report", tuning)
    assert (found == []) if problem is None else any(problem in f for f in found), found


def test_test_rows_in_the_tuning_are_noticed(tiny):
    plan, tuning, report = tiny
    assert faults(tuning, plan, "tuning", tuning) == []
    assert "the tuning looked at test rows" in faults(tuning.assign(rows="all"), plan, "tuning", tuning)


def test_several_variants_of_a_method_are_not_mixed_up(tiny):
    "Of each seed there is one line; else the last one would stand for all."
    report = tiny[2]
    better = report.assign(variant="better",
                           by_row=[None if rows is None else [1.]*len(rows) for rows in report["by_row"]])
    other, both = report.assign(objective="CLIP"), pd.concat([report, better])
    for record, objective in ((pd.concat([both, other]), "CLIP"), (pd.concat([both, other]), "Symile"),
                              (pd.concat([report, report, other]), "CLIP")):
        with pytest.raises(DataError,
                           match=r"record: data mfeat, p 0.5, .* objective Symile: a seed comes twice, .*'chosen'.*"):
            differences(record, objective)
    assert differences(pd.concat([better, other]), "CLIP")["seeds"].tolist() == [1]
    between = differences(both.assign(objective=both["variant"]), "better")                         # one with the other
    assert between["objective"].tolist() == ["chosen"] and between["value"][0] > 0


@pytest.mark.parametrize("objective", ["GatedSymile", "SubsetSymile"])
def test_what_is_missing_needs_no_detector(objective):
    "Weights are recorded, but not how well they name what is known."
    settings = {"data_options.corruption": "missing", "epochs": 1, "dim": 8}
    record = run_planned(PlannedRun("kinds", "missing", as_spec("mfeat", objective, 0.5, 0, settings), settings))
    assert record["metric"].str.startswith("weight of").any() and not record["metric"].str.startswith("AUROC").any()


def test_every_study_of_the_plan_can_be_planned():
    "All parameters of all stages are known and in range, with whatever the tuning may choose."
    plan = Plan.load(PLAN)
    for stage, part in plan.stages.items():
        for data, objective in part.pairs:
            chosen = draw_settings(plan.space | plan.own_space.get(objective, {}), objective, 0)
            assert all(len(run.digest) == 64 for run in planned(plan, stage, data, objective, chosen))


def snakemake(out, *options):
    pytest.importorskip("snakemake")
    done = subprocess.run([sys.executable, "-m", "snakemake", "-s", str(ROOT/"workflow"/"Snakefile"), "--cores", "1",
                           "--rerun-triggers", "mtime", *options,
                           "--config", "plan=workflow/small.yaml", f"out={out}", f"record={out}/record"], cwd=ROOT,
                           capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_snakemake_plans_every_part(tmp_path):
    counts = dict(re.findall(r"^(tune|choose|report|collect)\s+(\d+)", snakemake(tmp_path, "-n"), re.M))
    assert counts == {"tune": "2", "choose": "2", "report": "2", "collect": "2"}
