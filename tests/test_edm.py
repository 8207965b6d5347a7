"""edm_neon.py: each stage on tiny networks, in seconds."""
import io
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import edm_neon as edm
import neon_ext

SCRIPT = Path(edm.__file__)
TINY = dict(img_resolution=8, img_channels=3, label_dim=10, augment_dim=9, model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4], dropout=0.0)
NCSN = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = edm.EDMPrecond(**{**TINY, **changes})
    for p in net.parameters():  # initial output layers are almost zero; make every parameter matter
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def settings(batch=16, steps=4):
    return edm.Settings("cpu", batch, steps)


# ---------------------------------------------------------------- network and preconditioning
@pytest.mark.parametrize("options", [{}, NCSN, {"label_dim": 0, "augment_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"])
def test_preconditioning_identities(options):
    net = network(**options)
    x, labels = torch.randn(3, 3, 8, 8), torch.eye(10)[:3] if net.label_dim else None
    small = net(x, torch.tensor([1e-6]), labels)
    torch.testing.assert_close(small, x, rtol=0, atol=1e-4)  # sigma -> 0: D = x
    sigma = torch.tensor([0.5, 2.0, 30.0])
    inner = net.model(x / (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1), sigma.log() / 4, labels)
    skip, out = (v.view(-1, 1, 1, 1) for v in (0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()))
    torch.testing.assert_close(net(x, sigma, labels), skip * x + out * inner, rtol=1e-5, atol=1e-5)


def test_cifar_network_has_edm_size_and_names():
    with torch.device("meta"):
        net = edm.EDMPrecond(**edm.PRESETS["cifar10"].model)
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 55_735_299 - 0 and len(state) == 427
    assert sum(name.endswith("resample_filter") for name in state) == 8
    assert list(state)[:2] == ["model.map_label.weight", "model.map_label.bias"]
    for name in ("model.enc.16x16_down.skip.weight", "model.dec.8x8_in0.qkv.weight", "model.dec.32x32_aux_conv.bias"):
        assert name in state


def test_missing_labels_are_zeros():
    net, x = network(), torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x, torch.ones(2)), net(x, torch.ones(2), torch.zeros(1, 10)))


# ---------------------------------------------------------------- sampler, seeds, schedule
def test_schedule_values():
    want = [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334, 1.08817, 0.585348,
            0.296442, 0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002, 0]
    np.testing.assert_allclose(edm.sigma_steps(network()), want, rtol=1e-5)


def test_seeds_and_labels_are_edms():
    net = network(img_resolution=32)
    latents, labels = edm.draw_latents(net, [0, 1, 2, 3, 2**32], "cpu")
    assert labels.argmax(1).tolist() == [7, 9, 4, 3, 7]
    np.testing.assert_allclose(latents[:2].flatten(1)[:, :2], [[-1.1258398, -1.1523602], [-1.5255959, -0.7502318]])
    alone, _ = edm.draw_latents(net, [3], "cpu")
    assert torch.equal(alone[0], latents[3])


def test_sampler_against_a_rederivation():
    """Heun's method for dx/dt = (x - D(x; t)) / t in float64, written out."""
    class Gaussian(torch.nn.Module):  # denoiser of N(0.3, 0.2^2) data
        sigma_min, sigma_max = 0, float("inf")
        round_sigma = staticmethod(torch.as_tensor)

        def forward(self, x, sigma, labels=None):
            return (0.04 * x.double() + sigma**2 * 0.3) / (0.04 + sigma**2)
    latents, net = torch.randn(500, 1, 2, 2), Gaussian()
    t = edm.sigma_steps(net, 18)
    x = latents.double() * t[0]
    for now, nxt in zip(t[:-1], t[1:]):
        d = (x - net(x.float(), now)) / now
        ahead = x + (nxt - now) * d
        x = ahead if nxt == 0 else x + (nxt - now) * (d + (ahead - net(ahead.float(), nxt)) / nxt) / 2
    got = edm.edm_sampler(net, latents)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)
    assert float(got.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(got.std()) == pytest.approx(0.2, rel=0.1)  # 18 steps leave the width 6 % too large


def test_images_do_not_depend_on_the_batch():
    net = network()
    whole = torch.cat([images for _, images, _ in edm.sample_batches(net, np.arange(10), settings(10))])
    parts = torch.cat([images for _, images, _ in edm.sample_batches(net, np.arange(10), settings(3))])
    assert (whole.int() - parts.int()).abs().max() <= 1  # float32 rounding may move a value across a step
    assert edm.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0])).tolist() == [0, 0, 128, 255, 255]


# ---------------------------------------------------------------- augmentation, loss, training
def test_augmentation_identity_and_labels():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    warped = edm.warp(images, torch.eye(3).repeat(4, 1, 1))
    torch.testing.assert_close(warped, images, rtol=0, atol=1e-5)  # wavelet filters reconstruct exactly
    torch.manual_seed(0)
    same, labels = edm.augment(images, 0.0)
    assert labels.shape == (4, 9) and not labels.any()
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    _, labels = edm.augment(images.repeat(200, 1, 1, 1), 0.12)
    active = (labels != 0).double().mean(0)
    assert active[0] == pytest.approx(0.5, abs=0.07) and active[1] == pytest.approx(0.06, abs=0.04)
    assert all(a == pytest.approx(0.12, abs=0.05) for a in active[[2, 4, 5, 7, 8]])


def test_augmentation_moves_as_its_labels_say():
    images = torch.zeros(1, 1, 16, 16)
    images[0, 0, 8, 5] = 1
    moved = edm.warp(images, torch.tensor([[[1.0, 0, -2], [0, 1, 3], [0, 0, 1]]]))  # output (x, y) reads input (x-2, y+3)
    assert divmod(int(moved.flatten().argmax()), 16) == (5, 7)


def test_loss_of_a_perfect_denoiser_is_zero():
    images = torch.randn(6, 3, 8, 8)
    assert float(edm.edm_loss(lambda x, *_: images, images, None, 0).abs().max()) == 0
    torch.manual_seed(1)
    loss = edm.edm_loss(lambda x, *_: images + 1, images, None, 0)
    torch.manual_seed(1)
    sigma = (torch.randn(6, 1, 1, 1) * 1.2 - 1.2).exp()
    torch.testing.assert_close(loss, ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).expand_as(loss))


def test_ema_and_order():
    assert edm.ema_beta(512, 500_000) == pytest.approx(0.99929047, abs=1e-8)
    assert edm.ema_beta(64, 500_000, seen=6400, ramp_ratio=0.05) == pytest.approx(0.5 ** (64 / 320))
    order = edm.shuffled(torch.arange(30), 10, 1).view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in order) and not torch.equal(order[0], order[1])
    assert torch.equal(edm.shuffled(torch.arange(13, 17), 10, 1), order.flatten()[13:17])


def test_training_resumes_to_the_same_bytes(tmp_path):
    images, labels = torch.randint(0, 255, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 10
    plan = dict(name="t", lr=1e-3, ramp_kimg=1, ema_kimg=0.1, augment=0.12, batch=20, seed=3)

    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        real, calls = edm.edm_loss, []

        def loss(*args):
            calls.append(1)
            if stop_after and len(calls) > stop_after:
                raise KeyboardInterrupt
            return real(*args)
        edm.edm_loss, saved = loss, {}
        try:
            edm.train(network(1), images, labels, plan, settings(), folder / "state.pt", [1],
                      lambda ema, k: saved.update(ema.state_dict()))
        finally:
            edm.edm_loss = real
        return saved
    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_after=30)
    resumed = run(tmp_path / "b")
    assert straight and all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(not torch.equal(straight[name], tensor) for name, tensor in network(1).state_dict().items())


# ---------------------------------------------------------------- pickles
def fake_snapshot(net, class_name="EDMPrecond", model_type="SongUNet"):
    """Bytes of a snapshot as EDM's persistence writes them: reduce of one global with inert meta dicts."""
    class Persistent:
        def __init__(self, name, state):
            self.meta = dict(type="class", version=6, module_src="raise SystemExit('executed')", class_name=name,
                             state=state)

        def __reduce__(self):
            return _reconstruct_persistent_obj, (self.meta,)

    def convert(module, name, extra=None):
        state = dict(training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers),
                     _modules={k: convert(m, type(m).__name__) for k, m in module._modules.items()}, **(extra or {}))
        return Persistent(name, state)
    kwargs = dict(net.config, model_type=model_type, use_fp16=False)
    ema = convert(net, class_name, {"_init_args": (), "_init_kwargs": kwargs})
    buffer = io.BytesIO()
    module = type(sys)("torch_utils.persistence")
    global _reconstruct_persistent_obj

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("never called")
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    parent = type(sys)("torch_utils")
    sys.modules.update({"torch_utils": parent, "torch_utils.persistence": module})
    try:
        pickle.dump({"ema": ema, "augment_pipe": None}, buffer, protocol=4)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, NCSN, {"label_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"])
def test_pickled_networks_load(tmp_path, options):
    net = network(**options)
    (tmp_path / "net.pkl").write_bytes(fake_snapshot(net))
    loaded = edm.load_network(tmp_path / "net.pkl")
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(10)[:2] if net.label_dim else None
    assert torch.equal(loaded(x, torch.ones(2), labels), net(x, torch.ones(2), labels))
    edm.save_network(loaded, tmp_path / "net.safetensors", {})
    again = edm.load_network(tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))


class Evil:
    def __init__(self, call, *args):
        self.parts = call, args

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("payload, wanted", [
    (lambda mark: Evil(os.system, f"touch {mark}"), "system"), (lambda mark: Evil(eval, "1 + 1"), "builtins.eval"),
    (lambda mark: Evil(getattr, OrderedDict, "fromkeys"), "builtins.getattr"),
    (lambda mark: OrderedDict(a=[Evil(exec, "import os")]), "builtins.exec"),
    (lambda mark: Evil(bytearray, 10**12), "builtins.bytearray"), (lambda mark: Evil(__import__, "os"), "__import__"),
    (lambda mark: Evil(torch.load, str(mark)), "torch.serialization.load"),
    (lambda mark: Evil(torch.zeros, 10**12), "builtins.getattr")], ids=lambda p: "" if callable(p) else p)
def test_malicious_pickles_are_refused_without_effect(tmp_path, payload, wanted):
    path, mark = tmp_path / "evil.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"ema": payload(mark)}, protocol=4))
    with pytest.raises(edm.UserError, match=f"refused.*{wanted}"):
        edm.load_network(path)
    assert not mark.exists()


@pytest.mark.parametrize("data", [b"\x80\x04\x96" + (2**40).to_bytes(8, "little"), b"\x80\x04Nr\xff\xff\xff\x7f.",
                                  b"", b"not a pickle", b"\x80\x04\x8e" + (2**40).to_bytes(8, "little")])
def test_huge_or_broken_pickles(tmp_path, data):
    (tmp_path / "net.pkl").write_bytes(data)
    with pytest.raises(edm.UserError):
        edm.load_network(tmp_path / "net.pkl")


def test_truncated_and_foreign_networks(tmp_path):
    data = fake_snapshot(network())
    for name, content in (("short.pkl", data[:-1000]), ("vp.pkl", fake_snapshot(network(), "VPPrecond")),
                          ("adm.pkl", fake_snapshot(network(), model_type="DhariwalUNet")), ("x.safetensors", b"abc")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(edm.UserError, match=name.replace(".", r"\.")):
            edm.load_network(tmp_path / name)
    bad = network()
    bad.model.map_layer0.bias.data[0] = float("nan")
    edm.save_network(bad, tmp_path / "nan.safetensors", {})
    with pytest.raises(edm.UserError, match="map_layer0.bias has weights that are not finite"):
        edm.load_network(tmp_path / "nan.safetensors")


# ---------------------------------------------------------------- blocks and merging
@pytest.mark.parametrize("partition", ["paper", "structural", "layers"])
def test_every_parameter_has_one_block(partition):
    net = network()
    blocks = {name: edm.block_of(name, net, partition) for name in net.state_dict()}
    if partition == "layers":
        assert len(set(blocks.values())) == 1 + len(net.model.enc) + len(net.model.dec)
        return
    assert set(blocks.values()) == {"enc", "mid", "dec"}
    assert blocks["model.map_layer0.weight"] == blocks["model.dec.4x4_in0.conv0.weight"] == "mid"
    assert blocks["model.dec.4x4_block0.conv0.weight"] == ("mid" if partition == "paper" else "dec")
    assert blocks["model.enc.8x8_conv.weight"] == "enc" and blocks["model.dec.8x8_aux_conv.bias"] == "dec"


def test_paper_partition_of_the_cifar_network():
    with torch.device("meta"):
        net = edm.EDMPrecond(**edm.PRESETS["cifar10"].model)
    sizes = {}
    for name, tensor in net.state_dict().items():
        sizes.setdefault(edm.block_of(name, net), []).append(tensor.numel() if "resample" not in name else 0)
    assert {b: (len(v), sum(v)) for b, v in sizes.items()} == {
        "mid": (147, 20_019_200), "enc": (122, 12_674_560), "dec": (158, 23_041_539)}


def test_custom_partition():
    net = network()
    assert edm.block_of("model.enc.8x8_conv.weight", net, {"*.enc.*": "e", "*": "rest"}) == "e"
    with pytest.raises(edm.UserError, match="no pattern owns model.dec"):
        edm.block_of("model.dec.8x8_aux_conv.bias", net, {"*.enc.*": "e"})


def test_merge_is_the_formula():
    base, aux = network(1), network(2)
    configurations = edm.Configurations(base, aux, "paper", "cpu")
    w = {"enc": 1.25, "mid": 0.0, "dec": -1.0}
    merged = configurations.set(w).state_dict()
    for name, r in base.state_dict().items():
        s, step = aux.state_dict()[name], w[edm.block_of(name, base)]
        torch.testing.assert_close(merged[name], r - step * (s - r), rtol=0, atol=1e-6)
        if step == 0:
            assert torch.equal(merged[name], r)
    assert sum(row["parameters"] for row in configurations.table().values()) == sum(t.numel() for t in merged.values())
    with pytest.raises(edm.UserError, match="first at model"):
        edm.Configurations(base, network(2, model_channels=32), "paper", "cpu")


# ---------------------------------------------------------------- statistics
def test_jackknife_against_brute_force_and_null_coverage():
    """Intervals of the difference of two models that are equal: zero lies inside in 90% to 98% of 300 repetitions."""
    rng, d, inside = np.random.default_rng(0), 3, 0
    reference = neon_ext.FrechetReference(torch.zeros(d), torch.eye(d))
    for _ in range(300):
        sums = []
        for _ in range(2):
            m = neon_ext.Moments(d, edm.FOLDS)
            f = torch.from_numpy(rng.normal(0.3, 1.2, (400, d)))
            for k, part in enumerate(f.split(20)):
                m.update(part, k)
            sums.append((m, f))
        result = edm.jackknife(reference, sums[0][0], sums[1][0])
        inside += result["low"] <= 0 <= result["high"]
    assert 0.90 * 300 <= inside <= 0.98 * 300
    without = [torch.cat([f[:40], f[60:]]) for _, f in sums]  # fold 2 left out, recomputed from the features
    want = [float(reference.distance_from_features(f)) for f in without]
    folds = [k for k in range(edm.FOLDS) if k != 2]
    got = [float(reference.distance(m.mean(folds), m.cov(folds))) for m, _ in sums]
    assert got == pytest.approx(want, rel=1e-10)


def test_precision_and_recall_limits():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=g)
    assert edm.precision_recall(real, real) == (1.0, 1.0)
    assert edm.precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = edm.precision_recall(real, real[:20].repeat(10, 1) + 1e-4 * torch.randn(200, 4, generator=g))
    assert precision == 1.0 and recall < 0.6  # a few modes only


def test_inception_structure(tmp_path):
    """Names and shapes of the public port; the stride-1 resize of a 299-pixel image is the identity."""
    shapes = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Mixed_5b.branch5x5_2": (64, 48, 5, 5), "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
              "Mixed_6e.branch7x7dbl_4": (192, 192, 7, 1), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
              "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1), "Mixed_7b.branch_pool": (192, 1280, 1, 1)}
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(edm.UserError, match="not the PyTorch port"):
        edm.InceptionFeatures(tmp_path / "bad.pth")
    hollow = edm.InceptionFeatures.__new__(edm.InceptionFeatures)
    original, torch.load = torch.load, lambda *args, **kwargs: {}
    try:
        with pytest.raises(edm.UserError):
            hollow.__init__(tmp_path / "bad.pth")
    finally:
        torch.load = original
    state = hollow.state_dict()
    for name, shape in shapes.items():
        assert tuple(state[f"{name}.conv.weight"].shape) == shape
    assert len([k for k in state if k.endswith("conv.weight")]) == 94
    torch.save(state, tmp_path / "random.pth")
    features = edm.InceptionFeatures(tmp_path / "random.pth")(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 2048) and features.isfinite().all()
    x = torch.rand(1, 1, 299, 299)
    torch.testing.assert_close(edm.InceptionFeatures.resize(x), x)
    ramp = edm.InceptionFeatures.resize(torch.arange(32.0).expand(1, 1, 32, 32))[0, 0, 0]
    torch.testing.assert_close(ramp, (torch.arange(299) * 32 / 299).clamp_max(31), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the script
SMALL = ("--preset", "digits", "--train-base", "2", "--snapshot", "1", "--grid", "0.5,1.0", "--synthetic", "100",
         "--select-images", "80", "--final-images", "80")


def launch(*args, program=(sys.executable,), **kwargs):
    return subprocess.run([*program, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("edm")
    done = launch(*SMALL, "--sweep", "-1:1:1", "--search", "cobyqa", "--evaluations", "5", "--export-pt", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_end_to_end(small_run):
    out, done = small_run
    summary = json.loads((out / "summary.json").read_text())
    entry, = summary["snapshots"]
    assert set(entry) >= {"kimg", "base", "collapsed", "global", "blockwise", "final", "searched"}
    assert set(entry["blockwise"]["w"]) == {"enc", "mid", "dec"} and len(entry["grid"]) == 8
    assert set(entry["final"]) == {"base", "collapsed", "global", "blockwise", "searched"}
    lines = [json.loads(line) for line in (out / "grid.jsonl").read_text().splitlines()]
    assert all(set(line) >= {"snapshot", "w", "images", "fd", "seconds"} for line in lines)
    assert len({json.dumps(line["w"]) for line in lines}) == len(lines) >= 10
    merged = edm.load_network(out / "adaptive-neon-000001.safetensors").state_dict()
    exported = torch.load(out / "adaptive-neon-000001.pt")
    assert all(torch.equal(merged[name], exported[name]) for name in merged)
    for name in ("scores.png", "grid_000001.png", "samples_000001.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "FID" not in done.stdout and "digits CNN" in done.stdout


def test_rerun_skips_what_is_there(small_run):
    out, _ = small_run
    before = (out / "grid.jsonl").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in [*out.glob("base-*"), *out.glob("synthetic-*"), *out.glob("self-*/*")]}
    done = launch(*SMALL, "--plan", "--out", out)
    assert done.returncode == 0 and "drift" in done.stdout and "hours" in done.stdout
    assert launch(*SMALL, "--out", out).returncode == 0
    assert (out / "grid.jsonl").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps and len(stamps) >= 4


def test_two_ranks_score_as_one_process(small_run, tmp_path):
    out, _ = small_run
    base, aux = next(out.glob("base-*.safetensors")), next(out.glob("self-*/network-snapshot-*.safetensors"))
    args = ("--preset", "digits", "--base", base, "--aux", aux, "--snapshot", "1", "--grid", "0.5", "--synthetic", "100",
            "--select-images", "80", "--final-images", "80", "--sample-batch", "20")
    scores = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        (folder / "digits-cnn.pt").write_bytes((out / "digits-cnn.pt").read_bytes())
        program = (sys.executable,) if world == 1 else (sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                        "--nproc_per_node=2")
        done = launch(*args, "--out", folder, program=program)
        assert done.returncode == 0, done.stderr[-2000:]
        entry, = json.loads((folder / "summary.json").read_text())["snapshots"]
        scores.append([row["fd"] for row in entry["sweep"]] + [entry["final"]["blockwise"]["fd"]])
    assert scores[0] == pytest.approx(scores[1], rel=1e-10)


@pytest.mark.parametrize("args, message", [
    (("--snapshot", "x"), "--snapshot 'x'"), (("--grid", ""), "--grid ''"), (("--grid", "a,b"), "--grid 'a,b'"),
    (("--grid", "nan"), "--grid 'nan'"), (("--grid", ",".join(map(str, range(30)))), "27000 points"),
    (("--base", "/nowhere/net.pkl"), "/nowhere/net.pkl does not exist"), (("--partition", "thirds"), "--partition thirds"),
    (("--sweep", "1:2"), "--sweep '1:2'"), (("--synthetic", "20000"), "overlap"), (("--preset", "imagenet"), "--preset"),
    (("--device", "tpu"), "--device tpu"), (("--out", "/proc/no"), "--out /proc/no"), (("--final-images", "3"), "at least 40"),
    (("--preset", "cifar10", "--device", "cpu"), "--yes")])
def test_bad_input_is_one_line(args, message, tmp_path):
    done = launch("--preset", "digits", *args, *(() if "--out" in args else ("--out", tmp_path / "out")))
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_no_connection_names_the_file(tmp_path):
    env = dict(os.environ, NEON_CACHE=str(tmp_path / "cache"), https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    done = launch("--yes", "--device", "cpu", "--out", tmp_path / "out", env=env)
    assert done.returncode == 2 and "edm-cifar10-32x32-cond-vp.pkl" in done.stderr and "--preset digits" in done.stderr
    assert str(tmp_path / "cache") in done.stderr and len(done.stderr.strip().splitlines()) == 1
