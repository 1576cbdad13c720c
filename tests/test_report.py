"""The HTML page: its drawings and charts, and the page in a real headless browser."""

import html
import io
import itertools
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from descompiler.captured import Captured
from descompiler.layout.border import IdsIn, ValuesOut
from descompiler.planning import summary
from descompiler.planning.cluster import Cluster
from descompiler.planning.explain import whole
from descompiler.report import charts, drawing, graphs, render
from descompiler.report import page as report
from examples.models import MODELS, make_inputs
from tests.harness.cases import cases

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return Captured.of(MODELS["deepfm"]("fields", vocab_sizes=[5000] * 6), make_inputs("deepfm", "fields", 8))


@pytest.fixture(scope="module")
def plan(captured):
    # forms that are computed in the region, which tables that fetch unique ids don't need
    return captured.plan(ranks=4, batch=64, pins={"first_order.*": "column_wise", "embeddings.*": "table_wise"})


@pytest.fixture(scope="module")
def page(captured, plan, tmp_path_factory):
    over_ranks = [captured.plan(ranks=n, batch=64) for n in (2, 4, 8)]
    over_rows = [captured.plan(ranks=4, batch=b) for b in (16, 64, 256)]
    text = report.page(
        captured, plan, over_ranks, over_rows, title="a <model> & more", cluster=Cluster.builtin("ethernet-25g", 4)
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


# --- names are the user's, or a file's

EVIL = "a<script>alert(1)</script>\x1b[31m[red]|%_&"


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables, self.top = torch.nn.ModuleDict({EVIL: torch.nn.Embedding(50, 4)}), torch.nn.Linear(4, 1)

    def forward(self, ids):
        return self.top(self.tables[EVIL](ids).sum(1))


def test_names_are_text_in_every_rendering():
    found = Captured.of(Named(), (torch.randint(50, (6, 2)),))
    plan = found.plan(ranks=2)
    sheets = list(whole(plan))
    console = Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)
    render.print_rich(sheets, console)
    terminal = console.file.getvalue()
    page = report.page(found, plan, [plan], [plan], title=EVIL, cluster=Cluster.builtin("ethernet-25g", 2))
    texts = {
        "html": page,
        "markdown": "".join(map(render.to_markdown, sheets)),
        "latex": "".join(map(render.to_latex, sheets)),
        "text": plan.explain(),
        "terminal": terminal,
    }
    for kind, text in texts.items():
        assert "\x1b[31m" not in text, kind
        assert "alert(1)" in text, kind
    assert "<script>alert" not in texts["html"] + texts["markdown"]
    assert r"\%\_\&" in texts["latex"] and "[red]" in terminal


# --- drawings


@pytest.mark.parametrize("seed", range(8))
def test_boxes_do_not_overlap_and_edges_go_down(seed):
    rng = random.Random(seed)
    d = graphs.Drawing()
    for i in range(25):
        d.boxes[str(i)] = graphs.Box("outside", ["x" * rng.randint(1, 30)] * rng.randint(1, 3))
    for a, b in itertools.combinations(range(25), 2):
        if rng.random() < 0.08:
            d.connect(str(a), str(b))
    places, paths = drawing._arrange(d)
    for p, q in itertools.combinations(places.values(), 2):
        apart_x = abs(p.x - q.x) >= (p.width + q.width) / 2 - 1e-6
        apart_y = p.y + p.height <= q.y or q.y + q.height <= p.y
        assert apart_x or apart_y
    for points in paths.values():
        assert all(a[1] < b[1] for a, b in itertools.pairwise(points))


def test_the_drawing_after_has_every_transfer_and_the_one_before_none(captured, plan):
    cut = captured.partition(plan).cut
    before, after = (graphs.drawing(captured.program, captured.operators, plan, cut, after=x) for x in (False, True))
    wires = [b for b in after.boxes.values() if b.kind == "wire"]
    assert wires and not any(b.kind == "wire" for b in before.boxes.values())
    assert {b.lines[0].removesuffix(" out, gradients back") for b in wires} <= {
        "ids to owners",
        "partial sums",
        "values",
    }
    # nothing leaves the region, and no ids enter it, but through a transfer; terms of own rows are added as they are
    for a, b in after.edges:
        first, second = after.boxes[a].kind, after.boxes[b].kind
        assert first != "region" or second in ("region", "wire")
        assert second != "region" or first in ("region", "wire", "outside", "input")
    assert len(after.boxes) < 25 < sum(n.op == "call_function" for n in captured.program.graph.nodes)


def test_tables_that_fetch_rows_say_what_they_send(captured):
    plan = captured.plan(ranks=4, batch=64, pins={"*": "unique_rows"})
    cut = captured.partition(plan).cut
    d = graphs.drawing(captured.program, captured.operators, plan, cut, after=True)
    fetching = [b for b in d.boxes.values() if b.kind == "fetch"]
    assert {b.lines[2] for b in fetching} == {"unique_rows on 4 of 4 ranks"}
    assert all(b.lines[3].startswith("unique ids out, rows back, gradients out: ") for b in fetching)


def test_bytes_on_the_wire_are_those_that_the_plan_predicts(captured, plan):
    cut = captured.partition(plan).cut
    drawn = sum(size for _, size in graphs._wires(captured.program, plan).values())
    exchanged = 0.0
    for rank in range(plan.ranks):
        sent = plan.traffic(rank).bytes_by_collective
        exchanged += float(sum(sent.get(name, 0) for name in (IdsIn.SEND, ValuesOut.SEND, ValuesOut.BACK)))
    assert drawn == pytest.approx(exchanged / plan.ranks, abs=len(cut.exits) + len(plan.crossings))
    sheet = summary.crossings(plan)
    at = [c.title for c in sheet.columns].index("bytes")
    assert sum(row[at] for row in sheet.rows) == pytest.approx(drawn, abs=len(plan.crossings))


def test_crossovers_are_where_the_curves_meet():
    # 3 x and 48 / x meet at x = 4, y = 12
    xs = (1.0, 2.0, 8.0)
    lines = [charts.Line("rising", tuple(3 * x for x in xs)), charts.Line("falling", tuple(48 / x for x in xs))]
    (mark,) = charts.cheapest_changes(xs, lines, "ranks", lambda x: f"{x:.0f}")
    assert (mark.x, mark.y) == (pytest.approx(4), pytest.approx(12))
    assert mark.text == "from about 4 ranks: falling below rising"


def test_axes_are_logarithmic_or_even():
    logarithmic, even = charts.Axis(1, 100, False), charts.Axis(-1, 3, True)
    assert [logarithmic.at(x) for x in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
    assert [even.at(x) for x in (-1, 0, 3)] == [0, 0.25, 1]
    assert even.ticks() == [-1, 0, 1, 2, 3] and charts.Axis(0.61, 0.74, True).ticks()[0] == pytest.approx(0.62)
    assert even.shows(-1) and not logarithmic.shows(-1) and not even.shows(math.nan)
    room = charts.Axis.of([5.0, 5.0], True)
    assert room.low < 5 < room.high


def test_charts_stand_alone():
    line = charts.Line("a <line>", (0.0, math.nan, 2.0), True)
    drawn = charts.draw_lines("x", (0.0, 5.0, 10.0), [line], format_x=str, format_y=str, even="xy")
    (points,) = re.findall(r"polyline class='curve c0 strong' points='(.*?)'", drawn)
    assert [float(p.split(",")[0]) for p in points.split()] == [charts.LEFT, charts.WIDTH - charts.RIGHT]
    file = ElementTree.fromstring(charts.standing_alone("two & more", {"one": drawn, "a < b": drawn}))
    assert [float(x) for x in file.get("viewBox").split()] == [0, 0, charts.WIDTH, 2 * (charts.HEIGHT + charts.HEADING)]
    assert [t.text for t in file.iter() if t.get("class") == "strong"] == ["one", "a < b"]
    assert "--c0: #" in file.find("{*}style").text


def _contrast(a, b):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_every_theme():
    style = (ROOT / "descompiler" / "report" / "report.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", theme))
        for name in ("text", "soft", *(f"c{i}" for i in range(charts.COLOURS))):
            assert _contrast(colours[name], colours["bg"]) >= 4.5, name
        for box in ("region", "table", "outside", "wire", "ids"):
            assert _contrast(colours["text"], colours[box]) >= 4.5, box


# --- the page as text


def test_page_is_self_contained(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text
    assert re.findall(r"(?:src|href)='?\"?([^'\" >]*)", text) == ["data:,"]
    assert set(re.findall(r"url\((.*?)\)", text)) <= {f"#{i}" for i in re.findall(r"<marker id='([\w-]+)'", text)}
    # namespaces are the only addresses, and nothing is fetched from them
    assert all("w3.org" in address for address in re.findall(r"https?://[^'\" <]+", text))
    assert "a &lt;model&gt; &amp; more" in text and "<model>" not in text


# --- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome found: apt-get install chromium")


OWN = re.compile(r"https?://[\w.-]+\.(google|googleapis|gvt1)\.com/")
"""What the browser asks for by itself: the time, updates, accounts, dictionaries."""


def run_browser(path, folder, *arguments, dark=False):
    """Headless, its own profile, no network: what it prints, console messages, and addresses that it asked for."""
    log = folder / "net.json"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",  # containers have no user namespaces, and root can't use the sandbox
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *arguments,
        f"file://{path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = {url for url in re.findall(r'"url":"(https?:[^"]*)"', log.read_text()) if not OWN.match(url)}
    return done.stdout, console, asked


@browser
def test_browser_shows_the_texts_without_errors_or_requests(page, plan, tmp_path):
    dom, console, asked = run_browser(page, tmp_path, "--dump-dom")
    assert console == [] and asked == set()
    text = html.unescape(re.sub(r"<[^>]+>", " ", dom))
    text = " ".join(text.replace("\u200b", "").split())
    headings = ("Before", "After", "Bytes against ranks", "Time against bandwidth", "Memory per rank", "Strategies")
    for expected in ("a <model> & more", "ids to owners", "TorchRec row-wise", *headings):
        assert expected in text, expected
    assert f"Plan for 4 ranks, 64 rows a rank; {len(plan.tables)} tables" in text
    assert dom.count("<svg") == 6 and "<mfrac>" in dom


@browser
def test_a_request_or_an_error_would_be_seen(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><img src='http://elsewhere.example/x.png'><script>undefined_name()</script>")
    _, console, asked = run_browser(bad, tmp_path, "--dump-dom")
    assert any("undefined_name" in line for line in console)
    assert asked == {"http://elsewhere.example/x.png"}


def pixels(path):
    """Rows of pixels of an 8-bit PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, body, header = 8, b"", None
    while position < len(data):
        (size,), kind = struct.unpack(">I", data[position : position + 4]), data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + size]
        header = struct.unpack(">IIBBBBB", content) if kind == b"IHDR" else header
        body += content if kind == b"IDAT" else b""
        position += 12 + size
    width, height, depth, colour, *_ = header
    assert depth == 8 and colour in (2, 6)
    step = 3 if colour == 2 else 4
    raw, rows, above = zlib.decompress(body), [], [0] * (width * step)
    for y in range(height):
        line = raw[y * (width * step + 1) : (y + 1) * (width * step + 1)]
        kind, row = line[0], list(line[1:])
        for i in range(len(row)):
            left = row[i - step] if i >= step else 0
            up, corner = above[i], above[i - step] if i >= step else 0
            if kind == 1:
                row[i] += left
            elif kind == 2:
                row[i] += up
            elif kind == 3:
                row[i] += (left + up) // 2
            elif kind == 4:
                guess = left + up - corner
                row[i] += min((left, up, corner), key=lambda v: abs(guess - v))
            row[i] &= 255
        rows.append([tuple(row[i : i + 3]) for i in range(0, len(row), step)])
        above = row
    return rows


@browser
@pytest.mark.parametrize("dark", cases([False, True], [True]))
def test_screenshots_have_content_in_the_theme_that_the_reader_wants(page, tmp_path, dark):
    picture = tmp_path / "page.png"
    run_browser(page, tmp_path, f"--screenshot={picture}", "--window-size=900,700", dark=dark)
    rows = pixels(picture)
    background = rows[0][0]
    assert max(background) < 40 if dark else min(background) > 240
    everything = [p for row in rows for p in row]
    share = sum(p == background for p in everything) / len(everything)
    assert 0.3 < share < 0.95  # neither blank nor a mess
    assert len(set(everything)) > 100
