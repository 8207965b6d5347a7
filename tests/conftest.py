"""The extension must be built; without a GPU the CUDA twins of tests are left out, and counted."""

import http.server
import pickle
import threading
from pathlib import Path

import pytest
import torch

from adaptive_neon.extension import Missing, neon_ext
from adaptive_neon.processes import Processes

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


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks, each in a thread: what `share` gives or raises on each of them. Networks are made
    before, since threads share torch's generator."""
    meeting = threading.Barrier(2, timeout=20)
    local, said = threading.local(), {}

    def exchange(mine):
        said[local.rank] = pickle.dumps(mine)  # nobody shares an object
        meeting.wait()
        everything = [pickle.loads(said[rank]) for rank in (0, 1)]
        meeting.wait()
        return everything

    def gather(gathered, mine):
        gathered[:] = exchange(mine)

    def broadcast(outcome):
        outcome[:] = exchange(list(outcome))[0]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)

    def run(share):
        found = [None, None]

        def on_rank(rank):
            local.rank = rank
            try:
                found[rank] = share(Processes("cpu", rank, 2))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server, and an empty cache: answers[path] = a function of the handler; .asked: the
    paths of the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            web.answers[self.path.partition("?")[0]](self)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.asked, web.answers, web.daemon_threads = [], {}, True
        web.url = f"http://127.0.0.1:{web.server_port}"
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        yield web
        web.shutdown()
