"""`python -m benchmarks [NAME...]`: test, measure and record operations against their peers.

Each operation's own tests run first, in the same call; speed is measured and written only if they pass.
Results go to benchmarks/results/NAME.json (NAME.cuda.json for a GPU), with device and versions beside them.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenbook")


def names() -> list[str]:
    """Every benchmark in this folder."""
    found = (m.name for m in pkgutil.iter_modules([str(ROOT / "benchmarks")]))
    return sorted(name for name in found if name != "harness" and not name.startswith("_"))


def run_tests(paths: list[str]) -> dict[str, int]:
    """Run the operation's tests in a child process; returns how many passed, failed (errors too), skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *paths], cwd=ROOT, capture_output=True, text=True
        )
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if report.exists():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                counts = {key: n + int(suite.get(key, 0)) for key, n in counts.items()}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    if child.returncode != 0 or passed == 0:
        print(child.stdout[-4000:] + child.stderr[-2000:], file=sys.stderr)
        failed = max(failed, 1)
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def benchmark(name: str, device: torch.device, seconds: float) -> bool:
    """Test, measure, print and write one benchmark; returns whether its tests passed."""
    module = importlib.import_module(f"benchmarks.{name}")
    paths = getattr(module, "TESTS", [f"tests/kernels/test_{name}.py"])
    print(f"\n{name}: testing {' '.join(paths)}", flush=True)
    tests = run_tests(paths)
    skipped = f", {tests['skipped']} skipped" if tests["skipped"] else ""
    print(f"{name}: {tests['passed']} passed, {tests['failed']} failed{skipped}", flush=True)
    rows = []
    if tests["failed"]:
        print(f"{name}: its tests fail, so no speed is measured", file=sys.stderr)
    elif hasattr(module, "measure"):
        rows = list(module.measure(device))
        print_table(rows)
    else:
        for case in module.cases(device):
            measured = harness.measure_case(case, device, seconds)
            print_table(measured)
            rows += measured
    write(name, device, tests, rows)
    return not tests["failed"]


def write(name: str, device: torch.device, tests: dict[str, int], rows: list[harness.Row]) -> None:
    """Write the record of one benchmark, in one piece."""
    record = {
        "operation": name,
        "measured_on": datetime.date.today().isoformat(),
        "device": describe_device(device),
        "versions": versions(),
        "command": f"python -m benchmarks {name}" + (" --device cuda" if device.type == "cuda" else ""),
        "tests": tests,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}.cuda.json" if device.type == "cuda" else f"{name}.json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(f"{name}: {len(rows)} rows in {path.relative_to(ROOT)}", flush=True)


def describe_device(device: torch.device) -> dict[str, object]:
    """What was measured on: kind, name, cores and threads or GPU memory. No host name."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        gib = round(facts.total_memory / 2**30)
        return {"kind": "cuda", "name": facts.name, "memory_gib": gib, "cuda": torch.version.cuda}
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        facts = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        model = next((value.strip() for key, _, value in facts if key.strip() == "model name"), model)
    return {"kind": "cpu", "name": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """The versions that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_table(rows: list[harness.Row]) -> None:
    """Print the rows of one or more cases, each case under its own heading."""
    for case in dict.fromkeys((row.case, row.dtype, row.direction) for row in rows):
        mine = [row for row in rows if (row.case, row.dtype, row.direction) == case]
        shape = " ".join(f"{key}={value}" for key, value in mine[0].shape.items())
        print(f"\n  {case[0]}, {case[1]}, {case[2]}  [{shape}]")
        print(f"    {'variant':<34}{'median ms':>11}{'quartiles':>20}{'x floor':>9}{'peak MiB':>10}")
        for row in mine:
            if row.median_ms is None:
                print(f"    {row.variant:<34}{row.note}")
                continue
            spread = f"{row.low_ms:.4g} to {row.high_ms:.4g}"
            floor = f"{row.median_ms / row.floor_ms:.2f}" if row.floor_ms else ""
            peak = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
            line = f"    {row.variant:<34}{row.median_ms:>11.4g}{spread:>20}{floor:>9}{peak:>10}  {row.note}"
            print(line.rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names())}; default all")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per variant and case (default: 1)")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"NAME must be one of {', '.join(names())}; got {', '.join(unknown)}")
    if not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds must be positive, got {options.seconds}")
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {wanted}")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {wanted}: torch sees no CUDA device here")
    chosen = dict.fromkeys(options.names or names())
    passed = [benchmark(name, torch.device(wanted), options.seconds) for name in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
