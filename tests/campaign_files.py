"""A campaign against the readers of model files: damaged and hostile files, in processes with
limits.

    PYTHONPATH=. python tests/campaign_files.py --mutated 3000 --seed 0 --minutes 40

Each file may use 20 s of processor time and, beyond what the process has, twice its size and 500
MB. Counted are: executed (an audit hook saw a call, an import or a connection), hung (out of time),
crashed (a signal or out of memory), wrong (it loads, but not as an independent reader has it),
traceback (anything but a network or one line). Not collected by pytest. Prints a Markdown section;
exit code 1 if anything but refused and loaded was seen."""

import argparse
import io
import itertools
import json
import multiprocessing
import pickle
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import edm_pickles as t
import numpy as np
import safetensors
import safetensors.torch
import torch

import adaptive_neon as neon
import edm_neon as edm

SMALL = dict(model_channels=4, channel_mult=[1, 1], augment_dim=0)
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pickle.find_class",
    "import",
    "exec",
    "compile",
)
ALLOWED = ("os.listdir", "os.scandir")
SEEN = []  # audit events while a file is read; None outside


def watch(event, args):
    if SEEN and event.startswith(FORBIDDEN) and event not in ALLOWED:
        SEEN.append(f"{event} {str(args)[:60]}")


# ---------------------------------------------------------------- files
def mutate(data, rng):
    """One flipped bit or, in every second file, one to four pieces that are deleted, drawn, copied
    or zero."""
    data = bytearray(data)
    if rng.integers(2):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        return bytes(data)
    for _ in range(rng.integers(1, 5)):
        at, other = (int(rng.integers(len(data) + 1)) for _ in range(2))
        length = int(rng.integers(1, 65))
        piece = (b"", rng.bytes(length), bytes(data[other : other + length]), bytes(length))
        end = at + length * int(rng.integers(2))  # in the place of what is there, or before it
        data[at:end] = piece[int(rng.integers(4))]
    return bytes(data)


def originals(folder):
    """(family, bytes) of undamaged files."""
    files = []
    for options, protocol in itertools.product(({}, t.NCSN), (2, 3, 4, 5)):
        files.append(("EDM pickle", t.snapshot(t.network(**SMALL, **options), protocol)))
    for options in ({}, t.NCSN):
        edm.save_network(t.network(**SMALL, **options), folder / "net", {"w": {"enc": 1.5}})
        files += [("own .safetensors", (folder / "net").read_bytes())] * 2
    return files


def mutated(count, seed, folder):
    files, rng = originals(folder), np.random.default_rng(seed)
    for i in range(count):
        family, data = files[i % len(files)]
        yield f"{family}, mutated", f"mutation {i}", mutate(data, rng), data


VALUES = [None, True, -1, 0, 10**9, 10**300, 0.5, 1e308, float("nan")]
VALUES += ["", "standard", [], [[1]], {"a": 1}]
NAMES = """os.system posix.system subprocess.Popen builtins.eval builtins.exec builtins.open
builtins.getattr builtins.__import__ builtins.list builtins.bytearray builtins.object
importlib.import_module runpy.run_path shutil.rmtree pathlib.Path socket.socket ctypes.CDLL
pickle.loads marshal.loads types.FunctionType functools.partial operator.attrgetter torch.load
torch.hub.load torch.zeros numpy.load numpy.core.multiarray._reconstruct
torch.storage.UntypedStorage torch.nn.modules.linear.Linear edm_neon.save_network""".split()


def handwritten():
    for name in t.HOSTILE:
        yield "hostile pickle", name, t.content(name), None
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        call = f"c{module}\n{attribute}\n".encode() + b"X\4\0\0\0true\x85R."
        yield "name in a pickle", name, b"\x80\x02" + call, None
    net = t.network(**SMALL)
    weights = net.state_dict()
    for option, value in itertools.product([*edm.NUMBERS, *edm.WORDS], VALUES):
        label = f"{option} = {value!r}"
        if option in ("sigma_min", "sigma_max", "sigma_data"):
            yield "option in a pickle", label, t.snapshot(net, **{option: value}), "any"
        elif net.config.get(option) != value:
            yield "option in a pickle", label, t.snapshot(net, kwargs={option: value}), "any"
        config = json.dumps(net.config | {option: value})
        yield (
            "option in .safetensors",
            label,
            safetensors.torch.save(weights, {"config": config}),
            "any",
        )


# ---------------------------------------------------------------- an independent reader
class Plain:
    def __init__(self, meta=None, *_):
        self.state = meta["state"] if isinstance(meta, dict) else None

    def __setstate__(self, state):
        self.state = state


class Reader(pickle.Unpickler):
    """Python's own unpickler, with torch's own functions for tensors."""

    def find_class(self, module, name):
        if module.startswith("torch_utils") or "ModuleDict" in name or module.startswith("numpy"):
            return Plain
        if name == "_load_from_bytes":
            return lambda blob: torch.load(io.BytesIO(blob), weights_only=True)
        return super().find_class(module, name)


def tensors_of(module, prefix=""):
    found = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in module.state[kind].items():
            if value is not None and kind == "_modules":
                found |= tensors_of(value, f"{prefix}{name}.")
            elif value is not None:
                found[prefix + name] = value.detach()
    return found


def as_torch_reads(data):
    ema = Reader(io.BytesIO(data)).load()["ema"]
    options = {
        k: v for k, v in ema.state["_init_kwargs"].items() if k not in ("model_type", "use_fp16")
    }
    return options, tensors_of(ema)


def right(family, path, result, original):
    """Whether what was loaded is what the file says or, where torch refuses the file, what was
    damaged."""
    if original == "any":  # an option: the network was built with it, its shapes were compared
        return True
    if "safetensors" in family:
        tensors = safetensors.torch.load(original)
        return all(torch.equal(result.state_dict()[name], tensors[name]) for name in tensors)
    try:
        return same_network(result, *as_torch_reads(path.read_bytes()))
    except Exception:  # torch's reader refuses what ours does not need: a device, a version
        return same_network(result, *as_torch_reads(original))


def same_network(net, options, tensors):
    mine = net.state_dict()
    same = mine.keys() == tensors.keys() and all(
        torch.equal(mine[n], tensors[n].float()) for n in mine
    )
    return same and all(net.config.get(name, value) == value for name, value in options.items())


# ---------------------------------------------------------------- processes
def limit(size):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 21
    hard = resource.RLIM_INFINITY
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * size + (500 << 20), hard)
    )
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


def unlimit():
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def try_file(path, family, data, original):
    path.write_bytes(data)
    begin = time.process_time()
    limit(len(data))
    SEEN.append("reading")
    try:
        result = edm.load_network(path)
        outcome = "loaded"
    except neon.files.UserError as error:
        outcome = "refused" if str(error).isprintable() and len(str(error)) < 700 else "traceback"
    except BaseException as error:
        outcome = f"traceback {type(error).__name__}: {error}"[:200]
    events, SEEN[:] = SEEN[1:], []
    unlimit()
    seconds = time.process_time() - begin
    if events:
        return f"executed {sorted(set(events))}"[:200], seconds
    if outcome == "loaded":
        try:
            outcome = "loaded" if right(family, path, result, original) else "wrong"
        except Exception as error:
            outcome = f"wrong: the independent reader has {type(error).__name__}: {error}"[:200]
    return outcome, seconds


def work(cases, path, results):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    for family, _, data, original in cases:
        results.send(try_file(path, family, data, original))


def run(cases, folder, deadline):
    """(case, outcome, seconds) of each; a process serves 50 files, or less if one of them kills
    it."""
    context, cases = multiprocessing.get_context("fork"), list(cases)
    while cases and time.monotonic() < deadline:
        batch = cases[:50]
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(batch, folder / "file", theirs))
        child.start()
        theirs.close()
        done = 0
        for case in batch:
            try:
                if not ours.poll(600):
                    child.kill()
                    raise EOFError
                outcome, seconds = ours.recv()
            except EOFError:
                child.join()
                hung = child.exitcode in (-24, -9)  # SIGXCPU; killed above
                outcome, seconds = ("hung" if hung else f"crashed {child.exitcode}"), 20.0
            yield case, outcome, seconds
            done += 1
            if outcome.startswith(("hung", "crashed")):
                break
        child.join()
        cases = cases[done:]


KINDS = ("executed", "hung", "crashed", "wrong", "traceback")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutated", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--no-handwritten", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    table, slowest, findings = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # Everything is imported before the hook.
        for data in {data for _, data in originals(folder)}:
            (folder / "first").write_bytes(data)
            edm.load_network(folder / "first")
        written = [] if args.no_handwritten else handwritten()
        cases = itertools.chain(written, mutated(args.mutated, args.seed, folder))
        for (family, name, _, _), outcome, seconds in run(cases, folder, deadline):
            kind = outcome.split(" ")[0].rstrip(":")
            table.setdefault(family, Counter())[kind] += 1
            slowest[family] = max(slowest.get(family, 0), seconds)
            if kind in KINDS:
                findings.append(f"{family}, {name}: {outcome}")
                print(findings[-1], file=sys.stderr, flush=True)

    print("## Model files\n")
    print(
        f"`PYTHONPATH=. python tests/campaign_files.py {' '.join(sys.argv[1:])}`; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"safetensors {safetensors.__version__}, {platform.machine()}.\n"
    )
    print(
        "| files | tries | refused | loaded | executed | hung | crashed | wrong | traceback | "
        "slowest, CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    total = Counter()
    for family, counts in table.items():
        total.update(counts)
        cells = [sum(counts.values()), *(counts[kind] for kind in ("refused", "loaded", *KINDS))]
        print(f"| {family} | {' | '.join(map(str, cells))} | {slowest[family]:.1f} |")
    cells = [sum(total.values()), *(total[kind] for kind in ("refused", "loaded", *KINDS))]
    print(f"| all | {' | '.join(map(str, cells))} | {max(slowest.values()):.1f} |")
    for finding in findings:
        print(f"* {finding}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
