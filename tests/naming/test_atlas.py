"""The atlas: the command, the page in a browser, and the server that saves its names."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import threading
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nefkern.atlas import chosen, main
from nefkern.naming.atlas_page import AtlasPage
from nefkern.naming.names import Names, fingerprint, read_names, write_names
from nefkern.naming.server import AtlasServer
from nefkern.naming.survey import IMAGES, PATCHES, Cluster, Patch, Survey, survey
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def page(run, pictures, tmp_path_factory) -> AtlasPage:
    from nefkern.data import open_dataset

    folder = tmp_path_factory.mktemp("evil")
    for path in pictures.iterdir():
        shutil.copy(path, folder / f"<b>{path.name}")
    dataset = open_dataset("folder", root=folder)
    found = survey(Segmenter.load(run, "cpu"), dataset, range(3), 3)
    return AtlasPage(f"run {EVIL}", found, dataset, Names(6, {}, {}, fingerprint(run)))


@pytest.fixture
def server(page, run, tmp_path):
    """A server in a thread, with names saved to a file."""
    names = Names(6, {1: EVIL}, {}, fingerprint(run))

    def html(given: Names) -> str:
        return page.html(given, serve=True)

    with AtlasServer(0, html, names, tmp_path / "names.yaml") as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class Blocks(HTMLParser):
    """Scripts by id, as a browser would cut them, and every other element's name."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.elements, self._open = {}, [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self._open = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def handle_endtag(self, tag):
        self._open = None


def parsed(text: str) -> Blocks:
    blocks = Blocks()
    blocks.feed(text)
    return blocks


# ---- the page ----


def test_the_page_is_complete_and_holds_no_foreign_markup(page, run):
    text = page.html(Names(6, {1: EVIL}, {EVIL: "#123456"}, fingerprint(run)))
    blocks = parsed(text)
    names, data = json.loads(blocks.scripts["names"]), json.loads(blocks.scripts["data"])
    assert names["names"] == {"1": EVIL}
    assert len(data["clusters"]) == 6
    assert "img" not in blocks.elements
    assert blocks.elements.count("script") == text.count("</script>")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text), "needs no network"
    assert "connect-src 'none'" in text
    assert "connect-src 'self'" in page.html(Names(6, {}), serve=True)
    for number, cluster in enumerate(data["clusters"]):
        assert (f"s{number}" in blocks.scripts) == (cluster["patches"] > 0)
        for index, _ in cluster["where"]:
            assert f"i{index}" in blocks.scripts
            assert data["images"][str(index)]["name"].startswith("<b>")
    assert sum(cluster["share"] for cluster in data["clusters"]) == pytest.approx(1, abs=1e-5)


# ---- the server ----


def request(server, method="GET", path="/", body=None, **headers):
    """Status, headers and text of an answer; the Host is the server's unless given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    given = {"Host": f"127.0.0.1:{server.server_port}", **headers}
    connection.putrequest(method, path, skip_host=True)
    for key, value in given.items():
        if value is not None:
            connection.putheader(key.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_server_is_for_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    status, headers, text = request(server)
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert json.loads(parsed(text).scripts["names"])["names"] == {"1": EVIL}
    assert json.loads(parsed(text).scripts["data"])["serve"] is True
    assert yaml.safe_load(request(server, path="/names.yaml")[2])["names"] == {1: EVIL}
    assert request(server, path="/../names.yaml")[0] == 404


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:PORT"},
        {"Host": "127.0.0.1"},
        {"Host": None},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:PORT"},
        {"Origin": "http://localhost:PORT"},
    ],
)
def test_other_hosts_and_origins_are_refused(server, method, headers):
    port = str(server.server_port)
    given = {k: v and v.replace("PORT", port) for k, v in headers.items()}
    body = json.dumps({"clusters": 6, "names": {"2": "sky"}}).encode() if method == "POST" else None
    path = "/names" if method == "POST" else "/"
    more = {"Content_Type": "application/json"}
    status, _, text = request(server, method, path, body, **more, **given)
    assert status == 403
    assert "script" not in text
    assert not server.path.exists()


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        (b'{"clusters": 6, "names": {"2": "sky"}}', "text/plain", 415, "expected application/json"),
        (b'{"clusters": 5, "names": {}}', "application/json", 400, "names those of a run of 5"),
        (b'{"clusters": 6, "names": {"6": "a"}}', "application/json", 400, "a cluster, 0 to 5"),
        (b'{"clusters": 6, "checkpoint": "x"}', "application/json", 400, "another training"),
        (b'{"clusters": 6, "names": {"2": "a\\nb"}}', "application/json", 400, "on one line"),
        (b"{", "application/json", 400, ""),
        (b"[" * 100000, "application/json", 400, ""),
        (b"\xff", "application/json", 400, ""),
        (b" " * (1 << 20) + b"{}", "application/json", 413, "expected at most"),
    ],
)
def test_what_is_no_names_is_not_saved(server, body, kind, status, text):
    try:
        found, _, said = request(server, "POST", "/names", body, Content_Type=kind)
    except (BrokenPipeError, ConnectionResetError):  # it did not wait for all of it
        assert status == 413
    else:
        assert found == status
        assert text in said
    assert not server.path.exists()


def test_names_are_saved_and_served_again(server):
    content = {"clusters": 6, "names": {"2": "sky", "4": "sky", "0": EVIL[:40]}}
    body = json.dumps(content).encode()
    origin = f"http://127.0.0.1:{server.server_port}"
    more = {"Content_Type": "application/json", "Origin": origin}
    status, _, text = request(server, "POST", "/names", body, **more)
    assert (status, text) == (200, f"3 clusters named, saved to {server.path}")
    assert read_names(server.path).names == {2: "sky", 4: "sky", 0: EVIL[:40]}
    _, _, text = request(server)
    assert json.loads(parsed(text).scripts["names"])["names"]["2"] == "sky"


# ---- the command ----


def test_the_command_writes_the_page(run, tmp_path, caplog):
    out, names = tmp_path / "a.html", tmp_path / "names.yaml"
    write_names(names, Names(6, {3: "sky"}))
    options = ["--out", str(out), "--names", str(names), "--device", "cpu"]
    assert main([str(run), *options, "--first", "2"]) == 0
    blocks = parsed(out.read_text("utf-8"))
    assert json.loads(blocks.scripts["names"])["names"] == {"3": "sky"}
    assert json.loads(blocks.scripts["names"])["checkpoint"] == fingerprint(run)
    assert len(json.loads(blocks.scripts["data"])["images"]) == 2


def test_serve_prints_the_address_and_ends_by_an_interrupt(run, tmp_path, monkeypatch, capsys):
    """The page it serves can save; the file it wrote cannot."""
    served = []

    def interrupted(server) -> None:
        served.append((server.url, server.page(server.names)))
        raise KeyboardInterrupt

    monkeypatch.setattr(AtlasServer, "serve_forever", interrupted)
    options = ["--out", str(tmp_path / "a.html"), "--names", str(tmp_path / "n.yaml")]
    assert main([str(run), *options, "--serve", "--first", "1"]) == 0
    ((url, text),) = served
    assert f"{url}  saves to {tmp_path / 'n.yaml'}; Ctrl-C ends it" in capsys.readouterr().out
    assert json.loads(parsed(text).scripts["data"])["serve"] is True
    alone = parsed((tmp_path / "a.html").read_text("utf-8"))
    assert json.loads(alone.scripts["data"])["serve"] is False


def test_a_port_that_is_taken_is_one_line(server, page):
    with pytest.raises(UserError, match=f"--port {server.server_port}: cannot be listened at"):
        AtlasServer(server.server_port, page.html, server.names, server.path)


def test_first_is_spread_over_the_set():
    assert chosen(10, 3) == [0, 3, 6]
    assert chosen(3, 10) == chosen(3, None) == [0, 1, 2]


def test_annotated_pictures_vote(run, pictures, tmp_path):
    """Masks that are the run's own clusters, 0 and 1 as one class: the names must be these."""
    folder, names = tmp_path / "few", tmp_path / "names.yaml"
    (folder / "annotations").mkdir(parents=True)
    shutil.copytree(pictures, folder / "images")
    segmenter, used = Segmenter.load(run, "cpu"), set()
    for path in (folder / "images").iterdir():
        clusters = segmenter(path).numpy()
        used |= set(np.unique(clusters).tolist())
        classes = np.maximum(clusters, 1) - 1
        Image.fromarray(classes.astype(np.uint8)).save(folder / "annotations" / f"{path.stem}.png")
    (folder / "classes.txt").write_text("both\nc2\nc3\nc4\nc5\n")
    options = ["--out", str(tmp_path / "a.html"), "--names", str(names)]
    assert main([str(run), *options, "--annotated", str(folder)]) == 0
    found = read_names(names)
    assert found.classes == ["both", "c2", "c3", "c4", "c5"]
    assert len(used) > 2
    for cluster in used:
        assert found.names[cluster] == ("both" if cluster < 2 else f"c{cluster}")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--first", "0"], "--first 0: expected at least 1"),
        (["--port", "80"], "--port 80: expected --serve beside it"),
        (["--port", "70000", "--serve"], "--port 70000: expected 0 to 65535"),
        (["--annotated", "PICTURES"], "expected annotations/ with a mask for each image"),
        (["--out", "no/a.html"], "--out no/a.html: there is no folder no"),
        (["--serve", "--names", "no/n.yaml"], "--names no/n.yaml: there is no folder no"),
    ],
)
def test_mistakes_are_one_line(run, pictures, tmp_path, capsys, options, line):
    options = [str(pictures) if option == "PICTURES" else option for option in options]
    out = ["--out", str(tmp_path / "a.html"), "--names", str(tmp_path / "n.yaml")]
    assert main([str(run), *out, *options]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_names_that_exist_are_not_voted_away(run, pictures, names, tmp_path, capsys):
    before = names.read_text("utf-8")
    assert main([str(run), "--names", str(names), "--annotated", str(pictures)]) == 2
    assert "would replace" in capsys.readouterr().err
    assert names.read_text("utf-8") == before


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window: Playwright's own, or the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra: tools)")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture
def tab(browser):
    """A tab that must end without an error of the page."""
    context, errors = browser.new_context(accept_downloads=True), []
    made = context.new_page()
    made.set_default_timeout(120_000)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    yield made
    context.close()
    assert not errors


def name_input(tab, cluster: int):
    return tab.locator(f"#c{cluster} .head input")


@pytest.mark.browser
def test_open_name_merge_save_reload(tab, server):
    tab.goto(server.url)
    assert tab.locator(".card").count() == 6
    assert tab.title() == f"run {EVIL}"
    assert name_input(tab, 1).input_value() == " ".join(EVIL.split())
    tab.locator("body").click(position={"x": 5, "y": 5})
    tab.select_option("#sort", "number")
    tab.locator("body").press("Escape")
    for cluster in (2, 4):
        name_input(tab, cluster).fill("  sky ")
        name_input(tab, cluster).press("Escape")
    assert "2 clusters" in tab.locator("#classes div", has_text="sky").inner_text()
    tab.keyboard.press("Control+s")
    tab.wait_for_function(
        "() => document.getElementById('status').textContent.includes('saved to')"
    )
    assert read_names(server.path).names == {1: EVIL, 2: "sky", 4: "sky"}
    tab.reload()
    assert [name_input(tab, k).input_value() for k in (1, 2, 4, 5)] == [EVIL, "sky", "sky", ""]
    assert tab.locator("#discard").is_hidden()


@pytest.mark.browser
def test_the_file_alone_downloads_names_and_keeps_drafts(tab, page, run, tmp_path):
    path = tmp_path / "atlas.html"
    path.write_text(page.html(Names(6, {}, {}, fingerprint(run))), "utf-8")
    tab.goto(path.as_uri())
    first = tab.locator(".card .head input").first
    first.fill('a "quoted": name')
    first.press("Enter")  # on to the next one
    tab.keyboard.type("sky #1")
    tab.keyboard.press("Escape")
    tab.reload()
    values = [name_input(tab, k).input_value() for k in range(6)]
    assert sorted(filter(None, values)) == ['a "quoted": name', "sky #1"]
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(tmp_path / "names.yaml")
    found = read_names(tmp_path / "names.yaml")
    assert found.checkpoint == fingerprint(run)
    assert dict(enumerate(values)) == {k: found.names.get(k, "") for k in range(6)}
    assert len({tuple(c) for c in found.palette().tolist()}) == 2


def crowd(clusters: int, images: int, photograph) -> tuple[Survey, object]:
    """A survey of as many clusters and images, with all the patches that are shown, and a data set
    of one photograph."""
    random = np.random.default_rng(0)

    def patches() -> list[Patch]:
        at = random.integers(0, 40, (PATCHES, 2)).tolist()
        return [
            Patch(
                int(random.integers(images)), (y, x, y + 9, x + 9), int(random.integers(clusters))
            )
            for y, x in at
        ]

    def where() -> list[tuple[int, float]]:
        return [(int(i), 0.1) for i in random.choice(images, min(IMAGES, images), replace=False)]

    found = [Cluster(9, 3, 1.0, patches(), patches(), where()) for _ in range(clusters)]
    maps = {i: random.integers(0, clusters, (12, 16)) for c in found for i, _ in c.where}
    pixels = torch.from_numpy(np.array(photograph(160, 120, 0))).permute(2, 0, 1)
    dataset = types.SimpleNamespace(image=lambda _: pixels, paths=[Path("a.png")] * images)
    return Survey(found, np.eye(clusters, dtype=np.float32), maps, images), dataset


@pytest.mark.browser
def test_many_clusters_are_drawn_as_they_come_into_sight(tab, photograph, tmp_path):
    names, path = Names(256, {}, {}, "crowd"), tmp_path / "atlas.html"
    path.write_text(AtlasPage("crowd", *crowd(256, 40, photograph), names).html(names), "utf-8")
    tab.goto(path.as_uri())
    drawn = "document.querySelectorAll('.sheet').length"
    tab.wait_for_function(f"() => {drawn} > 0")
    assert tab.locator(".card").count() == 256
    assert tab.evaluate(drawn) < 32
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    tab.wait_for_function("() => document.querySelectorAll('#c255 .where canvas').length > 0")
    assert tab.evaluate(drawn) < 64


@pytest.mark.browser
def test_keys_search_sort_and_zoom(tab, server):
    tab.goto(server.url)
    data = json.loads(tab.locator("#data").text_content())
    sizes = [cluster["patches"] for cluster in data["clusters"]]

    def shown() -> list[int]:
        ids = tab.locator(".card").evaluate_all("cards => cards.map(c => c.id)")
        return [int(i[1:]) for i in ids]

    assert [sizes[k] for k in shown()] == sorted(sizes, reverse=True)
    tab.keyboard.press("j")
    assert tab.locator(".card.selected").get_attribute("id") == f"c{shown()[1]}"
    tab.keyboard.press("k")
    tab.keyboard.press("s")
    assert shown() == list(range(6))
    tile = "getComputedStyle(document.documentElement).getPropertyValue('--tile')"
    tab.keyboard.press("+")
    assert tab.evaluate(tile) == "80px"
    tab.keyboard.press("-")
    assert tab.evaluate(tile) == "64px"
    tab.keyboard.press("/")
    tab.keyboard.type("4")
    assert shown() == [4]
    used = next(k for k, size in enumerate(sizes) if size)
    tab.fill("#search", str(used))
    tab.wait_for_function(
        "k => { const c = document.querySelector(`#c${k} .sheet canvas`);"
        " return c && c.getContext('2d').getImageData(5, 5, 1, 1).data[3] === 255; }",
        arg=used,
    )
    assert tab.locator(f"#c{used} .like button").count() > 0
    cluster, rivals = next(
        (k, c["segmentRivals"]) for k, c in enumerate(data["clusters"]) if c["segmentRivals"]
    )
    tab.fill("#search", str(cluster))
    where = {"x": 64 * (data["segments"] + 0.5), "y": 64 * 2.5}
    tab.locator(f"#c{cluster} .sheet canvas").click(position=where)
    assert tab.locator(".card.selected").get_attribute("id") == f"c{rivals[0]}"
    if folder := os.environ.get("NEFKERN_SCREENSHOTS"):
        tab.fill("#search", "")
        tab.screenshot(path=f"{folder}/atlas.png")
