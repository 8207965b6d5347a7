"""Whether a run on the GPU found what the same run on the CPU found; exit code 1 if not.

    python tests/gpu_compare.py toy CPU GPU       folders of toy_neon.py
    python tests/gpu_compare.py glyphs CPU GPU    folders of edm_neon.py

The toy trains on the CPU and scores the same points on both devices: the same weights must win, and
distances agree to a thousandth, which is what its table prints. edm_neon.py draws other noise on a
GPU, in training too: the base may differ as much as training seeds differ (results/README.md: 10.5
to 14.9, a factor of 1.4; 1.5 is allowed). Of the self-trained network against the base both must
say the same, of the global weight no two opposite things: what five training seeds gain differs by
more than its intervals too.
"""

import argparse
import json
import sys
from pathlib import Path


def toy_differences(cpu: dict, gpu: dict) -> list[str]:
    found = []
    rows = {name: (cpu[name], gpu[name]) for name in ("base", "collapsed", "global")}
    for ours, theirs in zip(cpu["layerwise"], gpu["layerwise"], strict=True):
        rows[f"delta {ours['delta']}"] = (ours, theirs)
    for name, (ours, theirs) in rows.items():
        if ours["w"] != theirs["w"]:
            found.append(f"{name}: weights {ours['w']} on the CPU, {theirs['w']} on the GPU")
        if abs(theirs["fd"] / ours["fd"] - 1) > 1e-3:
            found.append(f"{name}: distance {ours['fd']:g} on the CPU, {theirs['fd']:g} on the GPU")
    return found


VERDICTS = {-1: "better", 0: "undecided", 1: "worse"}


def sign_of(comparison: dict) -> int:
    """Of a difference whose interval excludes zero: -1 lower, 1 higher; else 0."""
    return int(comparison["low"] > 0) - int(comparison["high"] < 0)


def glyphs_differences(cpu: dict, gpu: dict) -> list[str]:
    found = []
    ours, theirs = (summary["snapshots"][-1]["final"] for summary in (cpu, gpu))

    ratio = theirs["base"]["fd"] / ours["base"]["fd"]
    if not 1 / 1.5 < ratio < 1.5:
        found.append(f"base: the GPU's distance is {ratio:g} times the CPU's")

    allowed = {"collapsed": 0, "global": 1}  # steps between better, undecided and worse
    for name, most in allowed.items():
        signs = [sign_of(final[name]["against_base"]) for final in (ours, theirs)]
        if abs(signs[0] - signs[1]) > most:
            words = [VERDICTS[sign] for sign in signs]
            found.append(f"{name} against base: {words[0]} on the CPU, {words[1]} on the GPU")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["toy", "glyphs"])
    parser.add_argument("cpu", type=Path)
    parser.add_argument("gpu", type=Path)
    args = parser.parse_args()
    cpu, gpu = (json.loads((d / "summary.json").read_text("utf-8")) for d in (args.cpu, args.gpu))
    differences = {"toy": toy_differences, "glyphs": glyphs_differences}[args.kind](cpu, gpu)
    print("\n".join(differences) or "the same")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
