"""Shared fixtures: the extension must be built; CUDA cases skip visibly where there is no GPU."""

import signal
from pathlib import Path

import pytest
import torch

try:
    import neon_ext
except ImportError as error:
    command = "pip install --no-build-isolation ."
    pytest.exit(f"neon_ext is not built ({error}): run `{command}` first", returncode=2)

if Path(neon_ext.__file__).resolve().parent == Path(__file__).resolve().parent.parent:
    pytest.exit(
        f"{neon_ext.__file__} hides the installed neon_ext: delete it (an editable install of an "
        "earlier release left it)",
        returncode=2,
    )


def has_cuda() -> bool:
    return torch.cuda.is_available() and neon_ext.build_config()["cuda"]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not has_cuda():
        pytest.skip("no GPU, or neon_ext built without CUDA")
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def signals():
    """edm_neon.main() in this process takes the signals over."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
