"""What adaptive_neon/page.py and its template promise, as text and in a real browser."""

import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from made import BLOCKS, entry_of, finals_of, summary_of

import adaptive_neon as neon

CONFIG = {
    "out": "runs/mine",
    "aux": "",
    "search": "gradient",
    "synthetic": 300,
    "select_images": 50,
    "final_images": 100,
    "precision": "fp32",
    "confirm_precision": "tf32",
    "train_precision": "bf16",
    "device": "cpu",
    "seed": 3,
    "training_seeds": 1,
}
FIRSTS = {"selection": 10_000, "final": [50_000, 50_100]}


def summary_for_a_page(*kimgs, **changes):
    """As it lies in summary.json."""
    summary = summary_of(
        kimgs or (5,),
        config=CONFIG,
        first_seeds=FIRSTS,
        seconds={"grid": 12.34, "search": 5.0},
        versions={"torch": "9.9"},
        command="python edm_neon.py --seed 3",
        seconds_total=17.3,
    )
    for entry in summary["snapshots"]:
        entry["search"] = entry["grid"][:4]
    return neon.report.strict(summary | changes)


def samples_of(*kimgs, models=("base", "collapsed", "global", "searched")):
    generator = torch.Generator().manual_seed(0)
    found: dict = {}
    for kimg in kimgs or (5,):
        found[kimg] = {}
        for name in models:
            noise = torch.randint(0, 256, (16, 1, 6, 6), dtype=torch.uint8, generator=generator)
            found[kimg][name] = noise
    return found


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.elements: list[tuple] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def says(self, text):
        return text in " ".join(self.texts)


def written(folder, summary, samples):
    neon.page.write_report(summary, samples, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def summary():
    found = summary_for_a_page(7, 5)
    found["snapshots"][0]["final"]["global"]["fd"] = 9.5  # a digit less, in the middle
    return found


@pytest.fixture(scope="module")
def text(folder, summary):
    """The report of two snapshots."""
    return written(folder, summary, samples_of(7, 5))


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(neon.page, "drawn", lambda *rest: None)


# -------------------- what is on the page


def test_a_page_asks_for_nothing_from_elsewhere(read, text):
    """No address but data and places on the page, and a policy that forbids the rest."""
    for tag, attributes in read.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, name)
    assert not re.findall(r"url\(\s*['\"]?(?!#)", text) and "@import" not in text
    (policy,) = [m for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_every_snapshot_has_its_headline(read, summary):
    for entry in summary["snapshots"]:
        (claim,) = [claim for claim in entry["claims"] if claim["primary"]]
        assert read.says(f"P{claim['sentence'][1:]}.") and read.says(f"{entry['kimg']} kimg")


def test_tiles_are_the_primary_claim_and_what_it_stands_against():
    entry = neon.report.strict(entry_of())
    entry["strongest_control"] = "blockwise"
    tiles = [neon.page.tile_of(claim) for claim in neon.page.headline_claims(entry)]
    assert [tile.question for tile in tiles] == [
        "searched against base",
        "searched against global (primary)",
        "searched against blockwise",
    ]
    own = next(c for c in entry["claims"] if c["primary"])["own"]
    assert tiles[1].value == f"{100 * own['relative_difference']:+.3g}%"
    ends = [f"{100 * own[key]:+.3g}%" for key in ("relative_low", "relative_high")]
    assert tiles[1].interval == "95%: {} to {}".format(*ends)
    assert [tile.verdict for tile in tiles] == ["better", "better", "better"]


def test_a_primary_claim_against_the_base_is_one_tile():
    claims = neon.verdicts.claims_of(finals_of(), "global")
    (claim,) = neon.page.headline_claims(entry_of() | {"claims": claims})
    assert (claim["model"], claim["against"]) == ("global", "base")


def test_samples_of_every_model_with_a_text_in_their_place(read):
    images = read.all("img")
    names = ["base", "collapsed", "global", "searched"] * 2
    for image, name in zip(images, names, strict=True):
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"].startswith(f"Samples: {name}, ")
    views = [(i["name"], i["value"]) for i in read.all("input")]
    wanted = ["", "0", "1", "2", "3"]
    assert views == [(f"view-{k}", value) for k in (1, 2) for value in wanted]


def test_a_run_without_samples_has_a_page(tmp_path):
    read = Reader(written(tmp_path, summary_for_a_page(), {}))
    assert read.all("img") == read.all("input") == [] and len(read.all("svg")) > 4


def test_every_table_has_heads_and_a_name_for_each_row(read):
    heads = [attributes.get("scope") for attributes in read.all("th")]
    assert set(heads) == {"col", "row"}
    assert heads.count("row") == len(read.all("tr")) - len(read.all("table"))
    assert len(read.all("caption")) == len(read.all("table"))


def test_figures_are_told_in_words(read):
    figures = read.all("svg")
    # Of each snapshot weights, two forests, sweep, grid, search; and one over snapshots.
    assert len(figures) == 2 * 6 + 1
    for figure in figures:
        assert figure["role"] == "img" and len(figure["aria-label"]) > 30


@pytest.mark.parametrize(
    "change, missing",
    [
        ({"grid": []}, "Grid"),
        ({"search": []}, "Search"),
        (
            {"sweep": [{"w_global": 0.0, "fd": 3.0, "low": 2.0, "high": 4.0}]},
            "Score, precision and recall",
        ),
    ],
    ids=["grid", "search", "shares"],
)
def test_what_was_not_measured_is_not_drawn(monkeypatch, change, missing):
    monkeypatch.setattr(neon.page, "drawn", lambda title, *rest: title)
    entry = neon.report.strict(entry_of() | {"search": entry_of()["grid"]})
    titles = neon.page.figures_of(entry, "FD")
    fewer = neon.page.figures_of(entry | change, "FD")
    (gone,) = set(titles) - set(fewer)
    assert gone.startswith(missing)


def test_a_grid_over_other_blocks_is_a_table(monkeypatch, tmp_path):
    """One that no picture of three blocks can show: its best points."""
    monkeypatch.setattr(neon.page, "drawn", lambda *rest: None)
    entry = neon.report.strict(entry_of())
    entry["blocks"] = {"a": {}, "b": {}}
    entry["grid"] = [{"w": {"a": k / 10, "b": 1.0}, "fd": 20.0 - k} for k in range(12)]
    entry["grid"][5]["fd"] = None
    part = neon.page.part_of(entry, "FD (x)", {}, 0)
    (table,) = [table for table in part.tables if table.title == "Best of the grid's 12 points"]
    assert [row["FD (x)"] for row in table.rows[:3]] == ["9", "10", "11"]
    assert table.rows[0]["w"] == "a 1.1, b 1" and len(table.rows) == 10


# -------------------- how to trust it


def test_seeds_and_real_images_of_every_number():
    reference = {
        "images": 900,
        "origin": "the last",
        "selection": {"images": 800, "origin": "others"},
    }
    table = neon.page.seeds_table(summary_for_a_page(reference=reference))
    assert [[*row.values()] for row in table.rows] == [
        ["self-training", "0 to 299", "300"],
        ["selection", "10000 to 10049", "50", "800, others"],
        ["search", "10000000 to 10000049", "50", "800, others"],
        ["final comparison", "50000 to 50099", "100", "900, the last"],
        ["final comparison", "50100 to 50199", "100", "900, the last"],
    ]


@pytest.mark.parametrize(
    "option, gone", [({"aux": "x.pkl"}, "self-training"), ({"search": "cobyqa"}, "search")]
)
def test_numbers_that_took_no_seeds_have_none(option, gone):
    table = neon.page.seeds_table(summary_for_a_page(config=CONFIG | option))
    names = [row["number"] for row in table.rows]
    assert gone not in names and len(names) == 4


@pytest.mark.parametrize(
    "said",
    [
        "python edm_neon.py --seed 3",
        "Snapshot 7: mind the 7",
        "fp32, final comparison tf32",
        "version of torch",
        "9.9",
        "12.3",
        "It leaves out the luck of training",
        "Floor: 50 real images",
    ],
)
def test_what_a_number_rests_on_is_on_the_page(read, said):
    assert read.says(said)


def test_every_claim_is_on_the_page(read, summary):
    for entry in summary["snapshots"]:
        for claim in entry["claims"]:
            said = read.says(f"{entry['kimg']} kimg: {claim['sentence']}.")
            assert said == (claim["model"] != "collapsed")


# -------------------- names stay text

HOSTILE = (
    "<script>hacked=1</script>",
    "\"'><img src=x onerror=hacked=1>&amp;",
    "{{ 7 * 7 }}",
    "x" * 300,
    "\u202eolleh",
    "\u0633\u0644\u0627\u0645",
    "a\nb\x00c",
)


def hostile_summary(name):
    """The name in the folder, a judge, its score, a block, a warning and the command."""
    finals = finals_of(judges=("own", name, "a"))
    entry = entry_of(finals=finals) | {"warnings": [name]}
    for model, final in entry["final"].items():
        w = dict(zip((name, *BLOCKS[1:]), final["w"].values(), strict=True))
        entry["final"][model] = final | {"w": w}
        entry[model] = entry[model] | {"w": w}
    entry["blocks"] = dict.fromkeys((name, *BLOCKS[1:]), {})
    for row in entry["grid"]:
        row["w"] = dict(zip((name, *BLOCKS[1:]), row["w"].values(), strict=True))
    return summary_for_a_page(
        snapshots=[entry],
        score=f"FD ({name})",
        config=CONFIG | {"out": f"runs/{name.replace('/', '')}"},
        command=f"python edm_neon.py --out {name}",
    )


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(tmp_path, no_figures, name):
    """Those in figures: test_plots.py."""
    text = written(tmp_path, hostile_summary(name), samples_of())
    read = Reader(text)
    tags = {tag for tag, _ in read.elements}
    assert read.says(neon.files.escaped(name))
    assert len(read.all("script")) == 1 and "hacked" not in read.all("script")[0].values()
    assert all("onerror" not in attributes for _, attributes in read.elements)
    assert len(read.all("img")) == 4 and not tags & {"iframe", "object", "link"}
    assert "\u202e" not in text and "\x00" not in text


# -------------------- size


def test_a_page_of_large_colour_images_stays_below_3_megabytes(tmp_path, no_figures):
    """Five models at two snapshots, of noise that nothing compresses."""
    noise = torch.randint(0, 256, (9, 3, 100, 100), dtype=torch.uint8)
    models = ("base", "collapsed", "global", "blockwise", "searched")
    samples = {kimg: dict.fromkeys(models, noise) for kimg in (7, 5)}
    text = written(tmp_path, summary_for_a_page(7, 5), samples)
    assert text.count("<img ") == 10 and len(text) < 3_000_000


# -------------------- files first, then the terminal


def test_a_terminal_that_left_costs_nothing(tmp_path, monkeypatch, no_figures):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with neon.files.unfailing_terminal():
            neon.page.write_report(summary_for_a_page(), {}, tmp_path)
            print("and what follows", flush=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"table.md", "summary.json", "report.html"}


def test_a_terminal_without_accents_costs_nothing(tmp_path, monkeypatch, no_figures):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    with neon.files.unfailing_terminal():
        neon.page.write_report(summary_for_a_page(score="FD (Grüße)"), {}, tmp_path)
    assert b"FD (Gr\\xfc\\xdfe)" in screen.getvalue()
    assert "FD (Grüße)" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "FD (Grüße)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_terminal_ends_with_the_reports_place(tmp_path, capsys, no_figures):
    neon.page.write_report(summary_for_a_page(), {}, tmp_path)
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n17 s. Report: {tmp_path / 'report.html'}\n")
    assert len(printed.splitlines()) <= 25


def test_one_of_several_training_seeds_says_one_line(tmp_path, capsys, no_figures):
    neon.page.write_report(summary_for_a_page(config=CONFIG | {"training_seeds": 2}), {}, tmp_path)
    first, *rest = capsys.readouterr().out.split("\n\n")
    assert first.strip() == "Training seed 3" and len(rest) == 1


# -------------------- several training seeds


@pytest.fixture(scope="module")
def over_seeds(tmp_path_factory):
    """Two seeds that do not agree -> summary, page."""
    out = tmp_path_factory.mktemp("seeds")
    summaries = [summary_of((5,), seed, shift) for seed, shift in ((11, 0.0), (3, 0.4))]
    c = neon.config.Config(out=out, seed=11)
    summary = neon.verdicts.summarise_seeds(c, ["--seed", "11"], summaries, 0.0)
    neon.page.write_seeds(summary, out)
    return summary, Reader((out / "report.html").read_text(encoding="utf-8"))


def test_report_over_seeds_links_to_every_seed(over_seeds):
    _, read = over_seeds
    links = [link["href"] for link in read.all("a")]
    assert links == ["seed-0/report.html", "seed-1/report.html"]
    assert read.says("training seed 11") and read.says("training seed 3")


def test_report_over_seeds_says_what_the_primary_claim_came_to(over_seeds):
    summary, read = over_seeds
    (primary,) = [row for row in summary["over_seeds"] if row["primary"]]
    assert read.says(summary["headlines"][0])
    tile = neon.page.seeds_tile(primary, several=False)
    shares = 100 * torch.tensor(primary["own_relative"])
    assert tile.value == f"{shares.mean():+.3g}%" and tile.question == "searched against global"
    said = primary["own_verdicts"].count("better")
    assert tile.verdict == f"seeds that say better: {said} of 2"


def test_report_over_seeds_has_every_claim_and_model(over_seeds):
    summary, read = over_seeds
    rows = sum(len(finals) for one in summary["final"] for finals in one)
    first, second = len(summary["over_seeds"]) + 1, rows + 1
    assert len(read.all("tr")) >= first + second
    (figure,) = read.all("svg")
    assert "searched against global" in figure["aria-label"]


# -------------------- in a real browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium (apt-get install chromium)"
)

SCRIPT = """
const told = {};
const flip = document.querySelector(".flip"), panels = [...flip.querySelectorAll("figure")];
const seen = () => panels.map((p, i) => p.getBoundingClientRect().width > 0 ? i : "").join("");
const press = key =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const place = () => {
  const box = panels.find(p => !p.hidden).querySelector("img").getBoundingClientRect();
  return [box.left, box.top, box.width, box.height].join();
};
told.first = seen();
press("ArrowRight"); told.right = seen(); const there = place();
press("ArrowRight"); told.again = seen(); told.in_place = place() === there;
press("ArrowLeft"); told.left = seen(); press("ArrowLeft"); told.around = seen();
panels[3].click(); told.click = seen();
told.checked = flip.querySelector("input:checked").value;
flip.querySelector("input").click(); told.back = seen();
panels[2].click(); told.chosen = seen();
flip.querySelector("input").click();

const image = panels[0].querySelector("img");
told.zoom = image.getBoundingClientRect().width / image.naturalWidth;
told.rendering = getComputedStyle(image).imageRendering;

const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex(h => h.textContent.startsWith("final"));
const cells = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
heads[column].querySelector("button").click();
told.up = cells(); told.sorted = heads[column].getAttribute("aria-sort");
heads[column].querySelector("button").click();
told.down = cells();

told.requests = performance.getEntriesByType("resource").map(r => r.name.slice(0, 40));
told.scripts = document.scripts.length;
told.hacked = typeof hacked;
told.text = document.body.innerText;
told.width = [innerWidth, document.documentElement.scrollWidth];
told.title = document.title;
const pre = document.createElement("pre");
pre.id = "told"; pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(told))));
document.body.append(pre);
"""


def browsed(text, folder, width=1280, script=SCRIPT):
    """The page, opened by Chromium -> what the script found there, lines of the console."""
    import base64

    page = folder / f"opened-{width}.html"
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="told">([^<]*)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(base64.b64decode(found[1])), console


@pytest.fixture(scope="module")
def opened(text, folder):
    return browsed(text, folder)


@needs_browser
def test_browser_finds_no_fault_and_asks_nobody(opened):
    told, console = opened
    assert console == [] and told["requests"] == []


@needs_browser
def test_models_flip_in_place(opened):
    told, _ = opened
    assert told["first"] == told["back"] == "0123"
    assert (told["right"], told["again"]) == ("0", "1")
    assert (told["left"], told["around"]) == ("0", "3")
    assert told["in_place"] and told["click"] == "0" and told["checked"] == "0"
    assert told["chosen"] == "2"


@needs_browser
def test_pixels_are_whole(opened):
    told, _ = opened
    assert told["zoom"] == int(told["zoom"]) > 1 and told["rendering"] == "pixelated"


@needs_browser
def test_tables_sort_by_a_click(opened):
    told, _ = opened
    values = [float(cell.split()[0]) for cell in told["up"]]
    assert values == sorted(values) and len(values) == 5 and told["sorted"] == "ascending"
    assert told["down"] == told["up"][::-1]


@needs_browser
def test_nothing_sticks_out_on_a_phone(text, folder):
    told, console = browsed(text, folder, width=500)  # Chromium's narrowest window
    inner, scroll = told["width"]
    assert inner == 500 >= scroll and console == []


@needs_browser
def test_hostile_names_do_nothing_in_a_browser(tmp_path):
    name = " ".join(HOSTILE[:3])
    told, console = browsed(written(tmp_path, hostile_summary(name), samples_of()), tmp_path)
    assert console == [] and told["hacked"] == "undefined" and told["scripts"] == 2
    assert name in told["text"] and name.replace("/", "") in told["title"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_screenshot_of_a_report(text, folder, width):
    picture = folder / f"{width}.png"
    page = folder / "shot.html"
    page.write_text(text, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},900", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 10_000
