"""The engine in a notebook: the README's example is run as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).resolve().parents[1] / "README.md"


class Denoiser(nn.Module):
    """Images of 3 x 6 x 6 from noise of that shape, with a layer norm, dropout and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(108, 16), nn.LayerNorm(16), nn.Dropout(0.1))
        self.decoder = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 108))

    def forward(self, x):
        return self.decoder(self.encoder(x.flatten(1))).view(x.shape)


def my_net():
    torch.manual_seed(0)
    return Denoiser().eval()


def my_images():
    images = torch.rand(400, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (images * 255).to(torch.uint8)


def my_sampler(net, noise, labels, steps):
    return torch.tanh(net(noise))


def my_loss(net, x, labels):
    return (net(x + torch.randn_like(x)) - x).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the example leaves behind, and its folder; a fifth of its images and lengths."""
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert "6000" in code and "kimg=20" in code and "seed_ledger(1000, 3000)" in code
    code = code.replace("(3, 32, 32)", "(3, 6, 6)").replace("6000", "200")
    code = code.replace("kimg=20", "kimg=0.4").replace("(1000, 3000)", "(100, 120)")
    code = code.replace("evaluations=20", "evaluations=3").replace("0, 2, 21", "0, 2, 5")

    folder = tmp_path_factory.mktemp("example")
    names = {
        "my_net": my_net,
        "my_images": my_images,
        "my_sampler": my_sampler,
        "my_loss": my_loss,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "README.md", "exec"), names)
    return names, folder


def test_a_row_for_every_judge(example):
    names, _ = example
    found = names["scorer"].compare(names["found"].w, names["best"].w)
    assert [*found] == ["random-conv", "pixels"]


def test_the_repaired_network_is_the_formula(example):
    names, folder = example
    repaired = torch.load(folder / "repaired.pt", weights_only=True)
    base, aux = (dict(names[name].named_parameters()) for name in ("base", "aux"))
    w = names["found"].w
    assert set(w) == {"encoder.0", "encoder.1", "decoder.1", "decoder.2"}
    for name, theta_r in base.items():
        want = theta_r - w[name.rpartition(".")[0]] * (aux[name] - theta_r)
        torch.testing.assert_close(repaired[name], want.detach(), rtol=1e-5, atol=1e-6)


def test_variances_of_the_repaired_network_are_not_negative(example):
    _, folder = example
    repaired = torch.load(folder / "repaired.pt", weights_only=True)
    assert bool((repaired["decoder.1.running_var"] >= 0).all())


def test_the_winner_of_the_search_is_at_least_as_good(example):
    names, _ = example
    assert names["found"].fd <= names["best"].fd
