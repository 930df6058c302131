"""Give records the fingerprint of today's rule: python -m benchmarks.table.restamp CHECKOUT [RECORDS]

For when the rule of `benchmarks.table.fingerprint` changes. CHECKOUT is a checkout of the commit before. It must accept
every record as that of a run that it would make, and its configuration of that run must equal today's in all that
changes a result. If one differs, nothing is written.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.table.fingerprint import changes_result, fingerprint
from benchmarks.table.plan import DEFAULT, ROOT
from benchmarks.table.reproduce_table import table_named
from benchmarks.table.table import as_json

# Run with a folder and options, in one checkout after the other: what each makes of the records in the folder.
EXAMINE = """
import json, os, sys
import yaml
from benchmarks.table.plan import UNTRAINED
from benchmarks.table.reproduce_table import make_plan, open_folder, parse
from benchmarks.table.table import Table

plan = make_plan(parse(["--out", *sys.argv[1:]]))
os.environ["IAPO_DATA_DIR"] = str(plan.out / "data")
open_folder(plan)
table, found = Table(plan), {}
for name in sorted([UNTRAINED, *plan.methods], key=len):
    for file in (plan.out / "records").glob(f"{name}-*.json"):
        value, seed = file.stem.removeprefix(f"{name}-").rpartition("seed")[::2]
        job = plan.job(name, yaml.safe_load(value.rstrip("-")), int(seed))
        if job.name == file.stem:
            found[job.name] = {"accepted": table.recorded(job) is not None, "config": table.config(job)}
print(json.dumps(found))
"""


def examine(checkout: Path, folder: Path, table: str) -> dict[str, dict]:
    """By run of a table: whether a checkout accepts its record, and the configuration that it makes of it."""
    named = [] if table == DEFAULT else ["--table", table]  # an older checkout has no other
    result = subprocess.run(
        [sys.executable, "-c", EXAMINE, str(folder), *named],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    for entry in found.values():
        entry["config"] = yaml.safe_load(entry["config"].replace(str(checkout), "ROOT").replace(str(folder), "OUT"))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all are stamped, 2 none is, with the reasons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("records", type=Path, nargs="?", default=ROOT / "benchmarks/table/results/records")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(options.records, folder / "records")
        shutil.copy(options.records.parent / "settings.json", folder)
        settings = table_named(json.loads((folder / "settings.json").read_text()))
        table = settings.pop("table")  # the fingerprint knows it by the configuration
        before, now = (examine(checkout.resolve(), folder, table) for checkout in (options.checkout, ROOT))
    files = {path.stem: path for path in sorted(options.records.glob("*.json"))}
    problems = [f"{name}: no run of the table" for name in files.keys() - before.keys() | files.keys() - now.keys()]
    for run in before.keys() & now.keys():
        if not before[run]["accepted"]:
            problems.append(f"{run}: {options.checkout} doesn't accept its record")
        old, new = (changes_result(found[run]["config"]) for found in (before, now))
        problems += [f"{run}: {key} was {old.get(key)}, now {new.get(key)}" for key in old.keys() | new.keys()
                     if old.get(key) != new.get(key)]  # fmt: skip
    if problems:
        print("\n".join(f"restamp: {problem}" for problem in sorted(problems)), file=sys.stderr)
        return 2
    for run, path in files.items():
        record = json.loads(path.read_text()) | {"fingerprint": fingerprint(now[run]["config"], settings, {})}
        path.write_text(as_json(record))
    print(f"restamp: {len(files)} records are stamped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
