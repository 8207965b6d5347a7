"""Shared fixtures: the extension must be built, and CUDA cases skip visibly where there is no GPU."""

import pytest
import torch

try:
    import neon_ext
except ImportError as error:
    pytest.exit(
        f"neon_ext is not built ({error}): run `pip install --no-build-isolation .` first",
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
