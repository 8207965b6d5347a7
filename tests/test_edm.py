"""edm_neon.py: each stage on tiny networks, in seconds."""
import http.server
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import edm_neon as edm
import neon_ext

SCRIPT = Path(edm.__file__)
torch.set_num_threads(1)  # tiny networks: a second thread only waits
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
        net = edm.EDMPrecond(**edm.MODELS["cifar10"])
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
    whole, parts = (torch.cat(s.map_batches(lambda part: s.sample(net, part)[0], np.arange(10)))
                    for s in (settings(10), settings(3)))
    assert whole.dtype == torch.uint8 and whole.shape == (10, 3, 8, 8)
    assert (whole.int() - parts.int()).abs().max() <= 1  # float32 rounding may move a value across a step


def test_images_that_are_not_finite_are_refused():
    net = network()
    net.model.map_layer0.bias.data[0] = float("nan")
    with pytest.raises(edm.UserError, match="images that are not finite"):
        settings().sample(net, [0, 1])


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


@pytest.mark.parametrize("build", [b"}Vwork\nK\x01sb.", b"N}Vwork\nK\x01s\x86b."], ids=["attributes", "slots"])
def test_pickles_do_not_change_what_reads_them(tmp_path, build):
    (tmp_path / "net.pkl").write_bytes(b"ccollections\nOrderedDict\n" + build)
    with pytest.raises(edm.UserError, match="refused"):
        edm.load_network(tmp_path / "net.pkl")


def test_pickles_that_would_inflate_are_refused(tmp_path):
    net, archive = network(model_channels=64), io.BytesIO()
    for p in net.parameters():
        p.data = torch.zeros(1).expand(p.shape)  # every element of the network from one in the file
    torch.save(torch.zeros(10).untyped_storage(), archive)
    compressed = pickle.dumps({"ema": Evil(torch.storage._load_from_bytes, archive.getvalue())})
    for data, message in ((fake_snapshot(net), "tensors are larger"), (compressed, "compressed storage")):
        (tmp_path / "net.pkl").write_bytes(data)
        with pytest.raises(edm.UserError, match=message):
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
        net = edm.EDMPrecond(**edm.MODELS["cifar10"])
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
    owners = {name: edm.block_of(name, base) for name in base.state_dict()}
    configurations = edm.Configurations(base, aux, owners, settings())
    w = {"enc": 1.25, "mid": 0.0, "dec": -1.0}
    merged = configurations.set(w).state_dict()
    for name, r in base.state_dict().items():
        s, step = aux.state_dict()[name], w[edm.block_of(name, base)]
        torch.testing.assert_close(merged[name], r - step * (s - r), rtol=0, atol=1e-6)
        if step == 0:
            assert torch.equal(merged[name], r)
    assert sum(row["parameters"] for row in configurations.table().values()) == sum(t.numel() for t in merged.values())
    other = network(2, num_blocks=2)  # more layers: in whichever order
    more = {name: edm.block_of(name, other) for name in other.state_dict()}
    for networks in ((base, network(2, model_channels=32), owners), (base, other, owners), (other, base, more)):
        with pytest.raises(edm.UserError, match="first at model"):
            edm.Configurations(*networks, settings())


# ---------------------------------------------------------------- statistics
def row_of(reference, features):
    return dict(zip(("fd", "folds"), edm.distances(reference, features)))


def test_jackknife_against_brute_force_and_null_coverage():
    """Intervals of the difference of two models that are equal: zero lies inside in 90% to 98% of 300 repetitions."""
    rng, d, inside = np.random.default_rng(0), 3, 0
    reference = neon_ext.FrechetReference(torch.zeros(d), torch.eye(d))
    for _ in range(300):
        features = [torch.from_numpy(rng.normal(0.3, 1.2, (400, d))) for _ in range(2)]
        rows = [row_of(reference, f) for f in features]
        result = edm.compare(rows[:1], rows[1:])
        inside += result["low"] <= 0 <= result["high"]
    assert 0.90 * 300 <= inside <= 0.98 * 300
    without = [torch.cat([f[:40], f[60:]]) for f in features]  # fold 2 left out, recomputed from the features
    want = [float(reference.distance_from_features(f)) for f in without]
    assert [row["folds"][2] for row in rows] == pytest.approx(want, rel=1e-10)
    twice = edm.compare(rows[:1] * 2, rows[1:] * 2)  # two seed sets: the same mean, half the variance
    assert twice["difference"] == pytest.approx(result["difference"])
    assert twice["high"] - twice["low"] < 0.75 * (result["high"] - result["low"])


def test_paired_noise_narrows_the_interval_and_names_the_better():
    rng, d = np.random.default_rng(1), 3
    reference = neon_ext.FrechetReference(torch.zeros(d), torch.eye(d))
    noise = torch.from_numpy(rng.normal(size=(600, d)))
    near, far = row_of(reference, noise * 1.1), row_of(reference, noise * 1.15)
    alone = row_of(reference, torch.from_numpy(rng.normal(size=(600, d))) * 1.15)
    paired, unpaired = edm.compare([near], [far]), edm.compare([near], [alone])
    assert paired["verdict"] == "better" and edm.compare([far], [near])["verdict"] == "worse"
    assert paired["high"] - paired["low"] < 0.3 * (unpaired["high"] - unpaired["low"])
    assert edm.compare([near], [near]) == {"difference": 0, "low": 0, "high": 0, "verdict": "no significant difference"}


class FakeScorer:
    """Candidates whose features are Gaussian, on common noise; w is the scale."""

    def __init__(self, seed, d=3):
        self.reference = neon_ext.FrechetReference(torch.zeros(d), torch.eye(d))
        self.rng, self.d, self.settings, self.kimg = np.random.default_rng(seed), d, settings(), 1

    def score_all(self, weights, seeds, desc):
        noise = self.rng.normal(size=(len(seeds), self.d))
        return [{"w": w, **row_of(self.reference, torch.from_numpy(noise * w["a"]))} for w in weights]


def test_race_keeps_the_best_and_drops_the_bad():
    """The stated rate: the true best is dropped in at most about 5% of races; 100 races leave room to 9."""
    weights = [{"a": 1.0}, *({"a": a} for a in (1.04, 1.08, 1.15, 1.3, 1.6))]
    survivors = [edm.race(FakeScorer(seed), weights, np.arange(2000)) for seed in range(100)]
    assert sum(weights[0] not in s for s in survivors) <= 9
    assert not any({"a": 1.6} in s or {"a": 1.3} in s for s in survivors)


def test_placebo_blocks_keep_their_sizes():
    net = network(num_blocks=2)
    owners = {name: edm.block_of(name, net) for name in net.state_dict()}
    sizes = {name: tensor.numel() for name, tensor in net.state_dict().items()}
    layers = lambda o: {b: len({edm.block_of(n, net, "layers") for n in o if o[n] == b}) for b in set(o.values())}
    numel = lambda o: {b: sum(sizes[n] for n in o if o[n] == b) for b in set(o.values())}
    for seed in range(3):
        placebo = edm.placebo_owners(owners, sizes, seed)
        assert placebo != owners and placebo.keys() == owners.keys()
        assert layers(placebo) == layers(owners)
        for block, size in numel(owners).items():
            assert numel(placebo)[block] == pytest.approx(size, rel=0.5)
        for name in placebo:  # a layer moves as a whole
            same = [n for n in placebo if edm.block_of(n, net, "layers") == edm.block_of(name, net, "layers")]
            assert len({placebo[n] for n in same}) == 1
    assert edm.placebo_owners(owners, sizes, 0) == edm.placebo_owners(owners, sizes, 0)


@pytest.mark.parametrize("change, message", [
    ({"features": "digits-cnn-64"}, "of digits-cnn-64, the features are"), ({"mu": np.zeros(3)}, r"has \(3,\)"),
    ({"sigma": np.full((4, 4), np.nan)}, "no usable mu and sigma"), ({"sigma": np.eye(3)}, "no usable mu and sigma")])
def test_statistics_that_do_not_fit_are_refused(tmp_path, change, message):
    features = SimpleNamespace(name="inception-0-tf1", dim=4)
    good = {"mu": np.zeros(4), "sigma": np.eye(4)}
    for content in (good, {**good, **change}):
        np.savez(tmp_path / "ref.npz", **content)
        config = edm.Config(ref=str(tmp_path / "ref.npz"), device="cpu", out=tmp_path)
        if content is good:
            assert edm.Reference(config, features).facts["images"] == 50_000
        else:
            with pytest.raises(edm.UserError, match=message):
                edm.Reference(config, features)


def test_precision_and_recall_limits():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=g)
    assert edm.precision_recall(real, real) == (1.0, 1.0)
    assert edm.precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = edm.precision_recall(real, real[:20].repeat(10, 1) + 1e-4 * torch.randn(200, 4, generator=g))
    assert precision == 1.0 and recall < 0.6  # a few modes only


def inception_shapes():
    """{layer of the public port: weight shape}, written out from the published graph (94 convolutions)."""
    shapes = dict(Conv2d_1a_3x3=(32, 3, 3, 3), Conv2d_2a_3x3=(32, 32, 3, 3), Conv2d_2b_3x3=(64, 32, 3, 3),
                  Conv2d_3b_1x1=(80, 64, 1, 1), Conv2d_4a_3x3=(192, 80, 3, 3))

    def chain(block, branch, into, *layers):
        for i, (out, kernel) in enumerate(layers, 1):
            end = branch if len(layers) == 1 else f"{branch}_{i}"
            height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
            shapes[f"Mixed_{block}.{end}"] = (out, into, height, width)
            into = out

    for block, into, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        chain(block, "branch1x1", into, (64, 1)), chain(block, "branch5x5", into, (48, 1), (64, 5))
        chain(block, "branch3x3dbl", into, (64, 1), (96, 3), (96, 3)), chain(block, "branch_pool", into, (pool, 1))
    shapes["Mixed_6a.branch3x3"] = (384, 288, 3, 3)
    chain("6a", "branch3x3dbl", 288, (64, 1), (96, 3), (96, 3))
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        chain(block, "branch1x1", 768, (192, 1)), chain(block, "branch_pool", 768, (192, 1))
        chain(block, "branch7x7", 768, (c, 1), (c, (1, 7)), (192, (7, 1)))
        chain(block, "branch7x7dbl", 768, (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))
    chain("7a", "branch3x3", 768, (192, 1), (320, 3))
    chain("7a", "branch7x7x3", 768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
    for block, into in (("7b", 1280), ("7c", 2048)):
        chain(block, "branch1x1", into, (320, 1)), chain(block, "branch_pool", into, (192, 1))
        shapes |= {f"Mixed_{block}.branch3x3_1": (384, into, 1, 1), f"Mixed_{block}.branch3x3dbl_1": (448, into, 1, 1),
                   f"Mixed_{block}.branch3x3dbl_2": (384, 448, 3, 3)}
        shapes |= {f"Mixed_{block}.branch3x3{end}": (384, 384, *kernel) for end, kernel in (
            ("_2a", (1, 3)), ("_2b", (3, 1)), ("dbl_3a", (1, 3)), ("dbl_3b", (3, 1)))}
    return shapes


def random_inception(generator):
    weights = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    for name, shape in inception_shapes().items():
        normal = lambda *size: torch.randn(*size, generator=generator)
        weights[f"{name}.conv.weight"] = normal(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        weights |= {f"{name}.bn.weight": 1 + 0.1 * normal(shape[0]), f"{name}.bn.bias": 0.1 * normal(shape[0]),
                    f"{name}.bn.running_mean": 0.1 * normal(shape[0]),
                    f"{name}.bn.running_var": 1 + 0.1 * normal(shape[0]).abs()}
    return weights


def test_inception_structure(tmp_path, generator):
    """Names and shapes of the public port; batch normalisation is folded without a change; bad files are refused."""
    weights = random_inception(generator)
    torch.save(weights, tmp_path / "random.pth")
    features = edm.InceptionFeatures(tmp_path / "random.pth")
    assert len(inception_shapes()) == 94 == sum(name.endswith("_bias") for name in features.state_dict())
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    found = features(images)
    assert found.shape == (2, 2048) and found.isfinite().all() and not torch.equal(found[0], found[1])
    bn = {key: weights[f"Conv2d_1a_3x3.bn.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    x = torch.randn(1, 3, 32, 32, generator=generator)
    want = torch.nn.functional.conv2d(x, weights["Conv2d_1a_3x3.conv.weight"], stride=2)
    want = torch.nn.functional.batch_norm(want, bn["running_mean"], bn["running_var"], bn["weight"], bn["bias"], eps=1e-3)
    torch.testing.assert_close(features.conv(x, "Conv2d_1a_3x3", 2), want.relu(), rtol=1e-4, atol=1e-5)
    damaged = {**weights, "Mixed_7c.branch_pool.conv.weight": weights["Mixed_7b.branch_pool.conv.weight"]}
    missing = {name: w for name, w in weights.items() if "6c.branch7x7_2" not in name}
    for name, content in (("damaged", damaged), ("missing", missing), ("none", {})):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(edm.UserError, match="not the PyTorch port"):
            edm.InceptionFeatures(tmp_path / f"{name}.pth")
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(edm.UserError, match="not the PyTorch port"):
        edm.InceptionFeatures(tmp_path / "bad.pth")


def test_tensorflow_resize():
    x = torch.rand(1, 1, 299, 299)
    torch.testing.assert_close(edm.InceptionFeatures.resize(x), x)
    ramp = edm.InceptionFeatures.resize(torch.arange(32.0).expand(1, 1, 32, 32))[0, 0, 0]
    torch.testing.assert_close(ramp, (torch.arange(299) * 32 / 299).clamp_max(31), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- search
def tiny_scorer(tmp_path, partition="paper", batch=16):
    base, aux = network(1, img_channels=1, augment_dim=0), network(2, img_channels=1, augment_dim=0)
    for p, q in zip(aux.parameters(), base.parameters()):
        p.data.lerp_(q.data, 0.9)
    owners = {name: edm.block_of(name, base, partition) for name in base.state_dict()}
    features = edm.DigitsFeatures(tmp_path / "cnn.pt", epochs=1)
    reference = edm.Reference(edm.Config(preset="digits", device="cpu", out=tmp_path), features)
    how = settings(batch, 3)
    return edm.Scorer(edm.Configurations(base, aux, owners, how), features, reference, how, tmp_path, "key", 1)


@pytest.mark.parametrize("partition", ["paper", "layers"])
def test_gradient_against_central_differences(tmp_path, partition):
    """1% of the largest entry: the network runs in float32, and the difference itself has an error of h^2."""
    scorer, seeds, h = tiny_scorer(tmp_path, partition), np.arange(60), 0.01
    blocks = scorer.configs.blocks

    @torch.no_grad()
    def distance(w):
        latents, labels = edm.draw_latents(scorer.configs.net, seeds, "cpu")
        x = edm.edm_sampler(scorer.configs.set(w), latents, labels, scorer.settings.steps)
        return float(scorer.reference.prepared.distance_from_features(scorer.features((x * 127.5 + 128).clip(0, 255))))
    w = dict(zip(blocks, np.linspace(0.3, 1.2, len(blocks))))
    fd, gradient = scorer.distance_and_gradient(w, seeds, rounding=False)
    assert fd == pytest.approx(distance(w), rel=1e-4)
    for i in {0, len(blocks) // 2, len(blocks) - 1}:
        high, low = (distance(w | {blocks[i]: w[blocks[i]] + step}) for step in (h, -h))
        assert gradient[i] == pytest.approx((high - low) / (2 * h), abs=0.01 * np.abs(gradient).max())
    rounded, _ = scorer.distance_and_gradient(w, seeds)
    assert rounded == pytest.approx(scorer.score(w, seeds)["fd"], rel=1e-9) and rounded != fd


def test_gradient_search_resumes_to_the_same_end(tmp_path):
    config, seeds = edm.Config(preset="digits", evaluations=3, bounds=(-1, 3)), np.arange(50)
    ends = []
    for folder, stops in (("a", ()), ("b", (1, 2))):
        (tmp_path / folder).mkdir()
        for stop in (*stops, None):
            scorer = tiny_scorer(tmp_path / folder)
            real, calls = scorer.distance_and_gradient, []

            def counted(*args, **kwargs):
                calls.append(1)
                if stop is not None and len(calls) > 1:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)
            scorer.distance_and_gradient = counted
            try:
                edm.search_gradient(config, scorer, seeds, 0.5)
            except KeyboardInterrupt:
                assert stop is not None
        rows = [json.loads(line) for line in (tmp_path / folder / "grid.jsonl").read_text().splitlines()]
        ends.append([(row["w"], row["fd"]) for row in rows])
    assert ends[0] == ends[1] and len(ends[0]) == 3
    assert min(fd for _, fd in ends[0]) < scorer.score({"enc": 0.5, "mid": 0.5, "dec": 0.5}, seeds)["fd"]


def test_a_line_that_was_cut_off_is_scored_again(tmp_path):
    scorer, w = tiny_scorer(tmp_path), {"enc": 0.0, "mid": 0.0, "dec": 0.0}
    row, file = scorer.score(w, np.arange(40)), tmp_path / "grid.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:50])
    again = tiny_scorer(tmp_path)
    assert file.read_bytes() == whole and list(again.done.values()) == [row]


# ---------------------------------------------------------------- the script
SMALL = ("--preset", "digits", "--train-base", "2", "--snapshot", "1", "--grid", "0.5,1.0", "--synthetic", "100",
         "--select-images", "80", "--final-images", "80")


def launch(*args, program=(sys.executable,), **kwargs):
    return subprocess.run([*program, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


SEARCHED = (*SMALL, "--sweep", "-1:1:1", "--search", "cobyqa", "--evaluations", "5", "--export-pt")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("edm")
    done = launch(*SEARCHED, "--out", out)
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


def test_killed_at_each_stage_it_ends_with_the_same_bytes(small_run, tmp_path, monkeypatch):
    for owner, name, calls in ((edm, "edm_loss", 20), (edm.Settings, "sample", 0), (edm, "edm_loss", 10),
                               (edm, "distances", 3), (edm, "distances", 8), (edm, "plot_report", 0)):
        real, left = getattr(owner, name), iter(range(calls))

        def dying(*args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(owner, name, dying)
            edm.main([*SEARCHED, "--out", str(tmp_path)])
        assert stop.value.code == 130
    edm.main([*SEARCHED, "--out", str(tmp_path)])
    paths = [p.relative_to(small_run[0]) for p in small_run[0].rglob("*.*")]
    same = [p for p in paths if p.suffix in (".safetensors", ".zip", ".npz", ".pt")]
    assert len(same) == 8 and all((tmp_path / p).read_bytes() == (small_run[0] / p).read_bytes() for p in same)
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*.*")} == set(paths)
    for name in ("grid.jsonl", "final.jsonl"):
        ours, theirs = ([json.loads(line) | {"seconds": 0} for line in (folder / name).read_text().splitlines()]
                        for folder in (tmp_path, small_run[0]))
        assert ours == theirs


def test_a_plan_trains_nothing(tmp_path):
    done = launch("--preset", "digits", "--plan", "--out", tmp_path)
    assert done.returncode == 0 and "not trained yet" in done.stdout and not list(tmp_path.iterdir())


def test_full_disk(tmp_path):
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    done = launch(*SMALL, "--out", tmp_path, preexec_fn=limit)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot be written, is the disk full?" in last and "base-" in last
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_data_and_aux_that_do_not_fit(tmp_path, capsys):
    edm.write_dataset(tmp_path / "plain.zip", torch.zeros(50, 3, 32, 32, dtype=torch.uint8), None)
    edm.write_dataset(tmp_path / "odd.zip", torch.zeros(50, 3, 30, 30, dtype=torch.uint8), torch.arange(50) % 10)
    edm.save_network(network(), tmp_path / "base.safetensors", {})
    (tmp_path / "network-snapshot-best.pkl").touch()
    base = ("--base", str(tmp_path / "base.safetensors"))
    for args, message in ((("--train-base", "1", "--data", str(tmp_path / "plain.zip")), "has no labels"),
                          (("--train-base", "1", "--data", str(tmp_path / "none.zip")), "none.zip cannot be read"),
                          (("--train-base", "1", "--data", str(tmp_path)), "cannot be read"),
                          (("--train-base", "1", "--data", str(tmp_path / "odd.zip")), "30 x 30 images"),
                          ((*base, "--preset", "digits"), "needs a base of 8 x 8 grey images"),
                          ((*base, "--aux", str(tmp_path)), "has snapshots ['best'], not all of")):
        with pytest.raises(SystemExit) as stop:
            edm.main(["--yes", "--device", "cpu", "--out", str(tmp_path / "out"), *args])
        printed = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in printed[-1] and len(printed) == 1


@pytest.mark.parametrize("have", [0, 300, 1000])
def test_downloads_go_on_where_they_stopped(tmp_path, monkeypatch, have):
    data, asked = bytes(range(250)) * 4, []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append(start)
            self.send_response(416 if start >= len(data) else 206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:])

        def log_message(self, *args):
            pass
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "net.pkl.part").write_bytes(data[:have])
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            path = edm.fetch(f"http://127.0.0.1:{server.server_port}/net.pkl", "a network")
        finally:
            server.shutdown()
    assert path.read_bytes() == data and path.name == "net.pkl" and asked == [max(have - 1, 0)]


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
    (("--snapshot", "x"), "--snapshot: give numbers"), (("--grid", ""), "--grid: give numbers"),
    (("--grid", "a,b"), "not 'a,b'"), (("--grid", "nan"), "not 'nan'"),
    (("--grid", ",".join(map(str, range(30)))), "27000 points"),
    (("--base", "/nowhere/net.pkl"), "/nowhere/net.pkl does not exist"), (("--partition", "thirds"), "thirds is not"),
    (("--sweep", "1:2"), "--sweep: give start:stop:step"), (("--synthetic", "20000"), "overlap"),
    (("--preset", "imagenet"), "--preset"), (("--device", "tpu"), "--device"), (("--out", "/proc/no"), "--out /proc/no"),
    (("--final-images", "3"), "at least 40"), (("--placebo", "2", "--partition", "layers"), "--placebo"),
    (("--bounds", "1"), "--bounds"), (("--preset", "cifar10", "--device", "cpu"), "--yes")])
def test_bad_input_is_one_line(args, message, tmp_path):
    done = launch("--preset", "digits", *args, *(() if "--out" in args else ("--out", tmp_path / "out")))
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_no_connection_names_the_file(tmp_path):
    env = dict(os.environ, NEON_CACHE=str(tmp_path / "cache"), https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    done = launch("--yes", "--device", "cpu", "--out", tmp_path / "out", env=env)
    assert done.returncode == 2 and "edm-cifar10-32x32-cond-vp.pkl" in done.stderr and "--preset digits" in done.stderr
    assert str(tmp_path / "cache") in done.stderr and len(done.stderr.strip().splitlines()) == 1
