"""Kills runs of both scripts at random moments, resumes them, and compares with a run left alone.

    python tests/campaign_runs.py [--kills 50] [--script edm|toy] [--seed 0]

Not part of the test suite: it takes minutes. A killed run is started again with the same command
until it ends by itself; then the next one begins, in a fresh folder, until there were enough kills.
Counted: kills, runs that ended, runs whose results differ from those of the run left alone, and
leftovers of a kill that the next run did not remove.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
EDM = (
    *("--preset", "glyphs", "--train-base", "2", "--snapshot", "1", "--grid", "0.5,1.0"),
    *("--synthetic", "100", "--select-images", "80", "--final-images", "80", "--steps", "6"),
    *("--search", "cobyqa", "--evaluations", "4", "--judge", "random-conv"),
)
TOY = ("--delta", "1.72", "--base-steps", "500", "--points", "2000")
COMMANDS = {"edm": ("edm_neon.py", *EDM), "toy": ("toy_neon.py", *TOY)}
VARYING = ("seconds", "seconds_total", "seconds_per_image", "command", "config", "out")


def start(script, out):
    name, *options = COMMANDS[script]
    command = [sys.executable, str(ROOT / name), *options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(part) for k, part in value.items() if k not in VARYING}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value


def results(folder):
    """What a run leaves, but for times: networks and data to the byte, scores and summary."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".zip", ".csv"):
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            rows = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = rows
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--script", choices=list(COMMANDS), default="edm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as work:
        alone = Path(work) / "alone"
        begin = time.perf_counter()
        process = start(args.script, alone)
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"the run left alone failed: {errors[-500:]}")
        duration = time.perf_counter() - begin
        expected = results(alone)

        kills = ended = different = leftovers = failed = 0
        bar = tqdm(total=args.kills, desc=f"kills of {args.script}")
        while kills < args.kills:
            out = Path(work) / f"run{ended + failed}"
            while True:
                process = start(args.script, out)
                try:
                    _, errors = process.communicate(timeout=rng.uniform(0, duration))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    kills += 1
                    bar.update()
                    continue
                break
            if process.returncode:
                failed += 1
                print(errors[-500:])
                continue
            ended += 1
            different += results(out) != expected
            leftovers += any(out.rglob(".part-*"))
        bar.close()
    print(
        f"{args.script}, seed {args.seed}: {kills} kills in {ended + failed} runs of "
        f"{duration:.0f} s; failed {failed}, other results {different}, leftovers {leftovers}"
    )


if __name__ == "__main__":
    main()
