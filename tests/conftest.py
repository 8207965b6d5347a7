"""The extension must be built; without a GPU the CUDA twins of tests are left out, and counted."""

import signal
from pathlib import Path

import pytest
import torch

from adaptive_neon.extension import Missing, neon_ext

if isinstance(neon_ext, Missing):
    pytest.exit(neon_ext.reason, returncode=2)

if Path(neon_ext.__file__).resolve().parent == Path(__file__).resolve().parent.parent:
    pytest.exit(
        f"{neon_ext.__file__} hides the installed neon_ext: delete it (an editable install of an "
        "earlier release left it)",
        returncode=2,
    )

CUDA = torch.cuda.is_available() and neon_ext.build_config()["cuda"]
left_out = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -m and -k: only those are counted that would have run
def pytest_collection_modifyitems(config, items):
    def on_cuda(item):
        return hasattr(item, "callspec") and item.callspec.params.get("device") == "cuda"

    if CUDA:
        return
    twins = [item for item in items if on_cuda(item)]
    config.stash[left_out] = len(twins)
    if twins:
        items[:] = [item for item in items if not on_cuda(item)]
        config.hook.pytest_deselected(items=twins)


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(left_out, 0)
    if count:
        terminalreporter.write_line(
            f"{count} tests on CUDA were left out: no GPU, or neon_ext is built without CUDA"
        )


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
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
