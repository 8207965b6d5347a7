"""report.html: a run on one page, without a request to anywhere; and the end of a run."""

import dataclasses
from pathlib import Path

from .files import escaped, write_atomically
from .plots import (
    Figure,
    drawn,
    plot_grid,
    plot_judges,
    plot_search,
    plot_seeds,
    plot_snapshots,
    plot_sweep,
    plot_weights,
    sample_pictures,
)
from .report import (
    STUDENT,
    claim_row,
    claims_in_order,
    final_images,
    judge_tables,
    model_rows,
    reference_notes,
    seed_rows,
    seeds_headlines,
    strict,
    verdict_of,
    weights_text,
    write_seeds_tables,
    write_tables,
)
from .seeds import SEARCH_SEED
from .verdicts import mean_and_interval, number, percent

PICTURES = 1_800_000  # characters of all sample pictures together


# -------------------- what a page has
@dataclasses.dataclass(frozen=True)
class Table:
    """Rows {column: cell}; the first column names the row."""

    title: str
    rows: list[dict]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Those with a cell in any row."""
        found: dict[str, None] = {}
        for row in self.rows:
            found |= dict.fromkeys(row)
        return [column for column in found if any(row.get(column) for row in self.rows)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One difference, large."""

    question: str
    value: str
    interval: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """Samples of one model: a picture of whole pixels, or a drawing."""

    name: str
    caption: str
    address: str = ""
    width: int = 0  # pixels before they are enlarged
    figure: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A result with what it rests on: one snapshot, or all training seeds."""

    title: str
    headline: list[str]
    tiles: list[Tile] = dataclasses.field(default_factory=list)
    panels: list[Panel] = dataclasses.field(default_factory=list)
    beside: Figure | None = None  # on the first screen
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Page:
    title: str
    about: str  # one line
    parts: list[Part]
    warnings: list[str]
    trust: dict[str, list[str]]  # {heading: paragraphs} of "How to trust it"
    trust_tables: list[Table]
    command: str
    links: dict[str, str] = dataclasses.field(default_factory=dict)  # {text: address}


def write_page(page: Page, path: Path) -> None:
    """jinja2 escapes every text; what a terminal or a reader could be deceived with (controls,
    reversed writing) is spelled out before."""
    import jinja2

    def shown(value):
        return escaped(value) if type(value) is str else value

    environment = jinja2.Environment(
        autoescape=True, finalize=shown, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    source = (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
    write_atomically(path, environment.from_string(source).render(page=page) + "\n")


# -------------------- one training seed
def write_report(summary, samples, out: Path) -> None:
    """summary.json, table.md, report.html; then, where nothing can be lost any more, the terminal.

    samples: {kimg: {model: uint8 [N, C, H, W]}}, from the same noise."""
    text = write_tables(summary, out)
    write_page(page_of(strict(summary), samples), out / "report.html")
    if summary["config"]["training_seeds"] > 1:
        text = f"Training seed {summary['config']['seed']}"  # what counts is over the seeds
    finish(text, summary, out)


def finish(text, summary, out) -> None:
    seconds = summary["seconds_total"]
    print(f"\n{text}\n\n{seconds:.0f} s. Report: {out / 'report.html'}", flush=True)


def page_of(summary, samples) -> Page:
    c, entries = summary["config"], summary["snapshots"]
    several = len(entries) > 1
    parts, warnings = [], []
    for entry in entries:
        budget = PICTURES // len(entries)
        parts.append(part_of(entry, summary["score"], samples.get(entry["kimg"], {}), budget))
        prefix = f"Snapshot {entry['kimg']:g}: " if several else ""
        warnings += [prefix + warning for warning in entry["warnings"]]
    if several:
        figure = drawn("Snapshots", plot_snapshots, entries, summary["score"])
        parts[0].figures.insert(0, figure)

    told = [f"{summary['score']}, lower is better", final_images(summary)]
    told.append(f"self-training on {' and '.join(part.title for part in parts)}")
    claims = []
    for entry in entries:
        for claim in claims_in_order(entry):
            claims.append(f"{entry['kimg']:g} kimg: " * several + f"{claim['sentence']}.")
    tables = [seeds_table(summary), seconds_table(summary), facts_table(summary), options_table(c)]
    return Page(
        title=Path(c["out"]).name,
        about="; ".join(told),
        parts=parts,
        warnings=warnings,
        trust={
            "What the numbers are": [INTERVALS, *reference_notes(summary)],
            "Every comparison": claims,
        },
        trust_tables=tables,
        command=summary["command"],
    )


def part_of(entry, score, samples, budget) -> Part:
    """One snapshot. samples: {model: images}."""
    panels = []
    pictures = sample_pictures(samples, budget) if samples else {}
    for name, (width, address) in pictures.items():
        final = entry["final"][name]
        caption = f"{number(final['fd'])}, w = {weights_text(final['w'])}"
        panels.append(Panel(name, caption, address, width))

    rows = without_snapshot(model_rows(entry, score))
    note = MODELS_NOTE + MEMORISED_NOTE * any("memorised, %" in row for row in rows)
    tables = [Table("Models", rows, note)]
    tables += [Table(title, rows) for title, rows in judge_tables(entry)]
    if entry["grid"] and len(entry["blocks"]) != 3:
        best = sorted(entry["grid"], key=lambda row: (row["fd"] is None, row["fd"]))[:10]
        rows = [{"w": weights_text(row["w"]), score: number(row["fd"])} for row in best]
        tables.append(Table(f"Best of the grid's {len(entry['grid'])} points", rows))
    return Part(
        title=f"{entry['kimg']:g} kimg",
        headline=[entry["headline"]],
        tiles=[tile_of(claim) for claim in headline_claims(entry)],
        panels=panels,
        beside=drawn("Chosen weights by block", plot_weights, entry),
        tables=tables,
        figures=figures_of(entry, score),
    )


def without_snapshot(rows) -> list[dict]:
    """Rows of one snapshot, which need not say which."""
    return [{key: cell for key, cell in row.items() if key != "snapshot (kimg)"} for row in rows]


def figures_of(entry, score) -> list[Figure]:
    """What was measured, drawn."""
    figures = []
    for against in dict.fromkeys(("base", "global", entry["strongest_control"])):
        if any(claim["against"] == against for claim in claims_in_order(entry)):
            title = f"Against {against}, in every judge; filled where the verdict holds"
            figures.append(drawn(title, plot_judges, entry, score, against))
    title = "Score, precision and recall against one weight for all blocks"
    if not any("precision" in row for row in entry["sweep"]):
        title = "Score against one weight for all blocks"
    figures.append(drawn(title, plot_sweep, entry, score))
    if entry["grid"] and len(entry["blocks"]) == 3:
        title = "Grid: solid frame, the least; dashed, one weight for all blocks"
        figures.append(drawn(title, plot_grid, entry["grid"], score))
    if entry["search"]:
        figures.append(drawn("Search", plot_search, entry, score))
    return figures


def headline_claims(entry) -> list[dict]:
    """The model of the primary claim against the base, the claim's other model, the strongest
    control."""
    primary = claims_in_order(entry)[0]
    found = []
    for other in dict.fromkeys(("base", primary["against"], entry["strongest_control"])):
        for claim in entry["claims"]:
            if (claim["model"], claim["against"]) == (primary["model"], other):
                found.append(claim)
    return found


def tile_of(claim) -> Tile:
    own = claim["own"]
    low, high = percent(own["relative_low"]), percent(own["relative_high"])
    sides = claim["model"], claim["against"]
    question = " against ".join(sides)
    if claim["primary"]:
        question += " (primary)"
    share = percent(own["relative_difference"])
    return Tile(question, share, f"95%: {low} to {high}", verdict_of([claim], *sides))


MODELS_NOTE = (
    "Final comparison, each distance with its standard deviation where it was repeated. Corrected: "
    "without the bias of few images. Verdict: of the corrected difference, with Holm's correction."
)
MEMORISED_NOTE = (
    " Memorised: samples closer to a training image than to a held-out one (50 is no memory)."
)
INTERVALS = (
    "Differences are paired (the same noise, the same real images), without the distance's bias. "
    "The 95% interval covers the noise of samples and of real images. It leaves out the luck of "
    "training, which --training-seeds 5 repeats. The primary claim was named before the run; all "
    "others are one family (Holm's correction). A verdict holds where the kernel distance does not "
    "say the opposite."
)


# -------------------- what it rests on
def seeds_table(summary) -> Table:
    """Which noise and which real images every number saw."""
    c, reference, rows = summary["config"], summary["reference"], []
    firsts = summary["first_seeds"]

    def row(number, first, count, real):
        span = f"{first} to {first + count - 1}"
        rows.append({"number": number, "seeds of the noise": span, "images": f"{count}"} | real)

    def real_images(facts):
        return {"real images": f"{facts['images']}, {facts.get('origin', 'given statistics')}"}

    if not c["aux"]:
        row("self-training", 0, c["synthetic"], {})
    selection = real_images(reference.get("selection", reference))
    row("selection", firsts["selection"], c["select_images"], selection)
    if c["search"] == "gradient":
        row("search", SEARCH_SEED, c["select_images"], selection)
    for first in firsts["final"]:
        row("final comparison", first, c["final_images"], real_images(reference))
    return Table("Seeds and images", rows)


def seconds_table(summary) -> Table:
    rows = []
    for stage, seconds in summary["seconds"].items():
        rows.append({"stage": stage, "seconds": f"{seconds:.1f}"})
    note = "Of the last call; what an earlier one had finished took it no time."
    return Table("Time by stage", rows, note)


def facts_table(summary) -> Table:
    """Machine, precision and versions."""
    c = summary["config"]
    precision = c["precision"]
    if c["confirm_precision"]:
        precision += f", final comparison {c['confirm_precision']}"
    facts = {
        "device": f"{c['device']}: {summary['machine']}",
        "processes x threads": f"{summary['world']} x {summary['threads']}",
        "precision of sampling": precision,
        "precision of training": c["train_precision"],
        "training seed": f"{c['seed']}",
        **{f"version of {name}": version for name, version in summary["versions"].items()},
        **{f"neon_ext: {name}": f"{value}" for name, value in summary["neon_ext"].items()},
    }
    rows = [{"what": what, "value": value} for what, value in facts.items()]
    return Table("Machine and versions", rows)


def options_table(config) -> Table:
    rows = []
    for name, value in config.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
        rows.append({"option": name.replace("_", "-"), "value": text})
    return Table("All options", rows)


# -------------------- several training seeds
def write_seeds(summary, out: Path) -> None:
    """The same over the training seeds, whose own reports lie in their folders."""
    text = write_seeds_tables(summary, out)
    write_page(seeds_page(strict(summary)), out / "report.html")
    finish(text, summary, out)


def seeds_page(summary) -> Page:
    over, c = summary["over_seeds"], summary["config"]
    figure = drawn("One point a training seed, bar: their mean", plot_seeds, over)
    links = {}
    for seed in summary["seeds"]:
        links[f"training seed {seed['seed']}"] = f"{seed['folder']}/report.html"
    claims, models = [claim_row(claim) for claim in over], seed_rows(summary)
    if len(summary["kimg"]) == 1:
        claims, models = without_snapshot(claims), without_snapshot(models)
    tables = [
        Table("Claims over the training seeds", claims, STUDENT),
        Table("Models at every training seed", models),
    ]
    part = Part(
        title="",
        headline=seeds_headlines(summary),
        tiles=[seeds_tile(claim, len(summary["kimg"]) > 1) for claim in tile_claims(over)],
        beside=figure,
        tables=tables,
    )
    return Page(
        title=Path(c["out"]).name,
        about=f"{summary['score']}, lower is better; {len(links)} training seeds",
        parts=[part],
        warnings=[],
        trust={"What the numbers are": [INTERVALS, STUDENT]},
        trust_tables=[facts_table(summary), options_table(c)],
        command=summary["command"],
        links=links,
    )


def tile_claims(over) -> list[dict]:
    """The primary claim of every snapshot, after the same model against the base."""
    found = []
    for claim in over:
        if claim["primary"]:
            for other in over:
                pair = (other["kimg"], other["model"], other["against"])
                if pair == (claim["kimg"], claim["model"], "base") and other is not claim:
                    found.append(other)
            found.append(claim)
    return found


def seeds_tile(claim, several) -> Tile:
    mean, _, interval = mean_and_interval(claim["own_relative"]).partition(" ")
    question = f"{claim['model']} against {claim['against']}"
    if several:
        question += f", {claim['kimg']:g} kimg"
    verdicts = claim["own_verdicts"]
    said = f"seeds that say better: {verdicts.count('better')} of {len(verdicts)}"
    return Tile(question, mean, f"95%: {interval}", said)
