"""Interrupts runs of both scripts, resumes them, and compares with a run left alone.

    python tests/campaign_runs.py [--kills 50] [--limits 0] [--script edm|toy] [--seed 0]

Not part of the test suite: it takes minutes. Kills: at random moments; a killed run is started
again with the same command until it ends by itself; then the next one begins, in a fresh folder,
until there were enough kills. Limits: in a small file system (tmpfs, which only root may mount)
that has too little space, or too few inodes, for the run; then it is enlarged and the command given
again. Counted: results that differ from those of the run left alone, leftovers that the next run
did not remove, and ends other than exit code 2 with a line that says why.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from adaptive_neon.files import load_state

ROOT = Path(__file__).resolve().parents[1]
EDM = (
    *("--preset", "glyphs", "--train-base", "2", "--snapshot", "1", "--grid", "0.5,1.0"),
    *("--synthetic", "100", "--select-images", "80", "--final-images", "80", "--steps", "6"),
    *("--search", "cobyqa", "--evaluations", "4", "--judge", "random-conv"),
)
TOY = ("--delta", "1.72", "--base-steps", "500", "--points", "2048")
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
        if path.suffix in (".zip", ".csv"):
            found[name] = path.read_bytes()
        elif path.suffix == ".safetensors":
            # A part of the toy holds its seconds beside its tensors.
            tensors, facts = load_state(path)
            values = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
            found[name] = values, without_times(facts)
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            rows = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = rows
    return found


def kill(args, rng, work, alone, duration):
    """Kills until there were enough of them -> the report's line."""
    kills = ended = different = leftovers = failed = 0
    bar = tqdm(total=args.kills, desc=f"kills of {args.script}")
    while kills < args.kills:
        out = work / f"run{ended + failed}"
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
        different += results(out) != results(alone)
        leftovers += any(out.rglob(".part-*"))
    bar.close()
    return (
        f"{kills} kills in {ended + failed} runs of {duration:.0f} s; failed {failed}, "
        f"other results {different}, leftovers {leftovers}"
    )


def limit(args, rng, work, alone):
    """Runs in file systems that are too small, half of them in space and half in inodes -> the
    report's line."""
    kilobytes = sum(path.stat().st_size for path in alone.rglob("*")) // 1024
    files = sum(1 for _ in alone.rglob("*"))
    stopped = different = leftovers = failed = 0
    for k in tqdm(range(args.limits), desc=f"small file systems for {args.script}"):
        out = work / f"limited{k}"
        out.mkdir()
        size = f"size={rng.randint(8, kilobytes)}k"
        if k % 2:
            size = f"size=1g,nr_inodes={rng.randint(2, files)}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", out], check=True)
        try:
            process = start(args.script, out)
            _, errors = process.communicate()
            stopped += process.returncode == 2
            sound = process.returncode in (0, 2) and "Traceback" not in errors
            larger = "remount,size=1g,nr_inodes=10000"
            subprocess.run(["mount", "-o", larger, out], check=True)

            process = start(args.script, out)
            _, again = process.communicate()
            sound = sound and process.returncode == 0
            if not sound:
                failed += 1
                print(size, errors[-500:], again[-500:])
                continue
            different += results(out) != results(alone)
            leftovers += any(out.rglob(".part-*"))
        finally:
            subprocess.run(["umount", out], check=True)
    return (
        f"{args.limits} runs in file systems of 8 to {kilobytes} kB or 2 to {files} inodes: "
        f"{stopped} stopped with a line; failed {failed}, other results {different}, "
        f"leftovers {leftovers}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--limits", type=int, default=0, help="runs in small file systems (root)")
    parser.add_argument("--script", choices=list(COMMANDS), default="edm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.limits and os.geteuid() != 0:
        parser.error("--limits mounts file systems: only root may")
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        alone = work / "alone"
        begin = time.perf_counter()
        process = start(args.script, alone)
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"the run left alone failed: {errors[-500:]}")
        duration = time.perf_counter() - begin

        lines = [kill(args, rng, work, alone, duration)] if args.kills else []
        if args.limits:
            lines.append(limit(args, rng, work, alone))
    for line in lines:
        print(f"{args.script}, seed {args.seed}: {line}")


if __name__ == "__main__":
    main()
