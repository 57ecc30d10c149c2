"""The page of a gateway: how it is served, what it is made of, and what a browser makes of it; the Grafana file."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from gmel.edge.deciding import Version
from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import Settings
from gmel.edge.keys import add_key
from gmel.edge.plant import Plant, plant_of
from gmel.edge.recent import Recent
from gmel.edge.server.app import server_app
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import Sleeping
from gmel.scenario.load import load_scenario
from headless import BROWSER, Page, browser

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "docs" / "grafana" / "gmel.json"
FOLDER = resources.files("gmel.edge") / "dashboard"
HTML, CSS, JS = ((FOLDER / name).read_text("utf-8") for name in ("index.html", "dashboard.css", "dashboard.js"))
FILES = {"index.html": HTML, "dashboard.css": CSS, "dashboard.js": JS}


@pytest.fixture(scope="module")
def plant() -> Plant:
    return plant_of(load_scenario("live"))


@pytest.fixture
def client(plant: Plant, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(gateway_app(plant, Settings(tmp_path))) as client:
        yield client


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


PAGE = Outline(HTML)
IDS = [attributes["id"] for _, attributes in PAGE.tags if attributes.get("id")]


@pytest.mark.parametrize(
    ("path", "kind", "text"), [("/", "html", HTML), ("/dashboard.css", "css", CSS), ("/dashboard.js", "javascript", JS)]
)
def test_the_page_is_served_under_a_strict_policy(client: TestClient, path: str, kind: str, text: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.text == text
    assert answer.headers["content-type"].startswith(f"text/{kind}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = FILES[name]
    assert not re.findall(r"(?:https?:|wss?:)?//[a-z0-9-]+\.[a-z]", text, re.IGNORECASE)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_the_policy_forbids_nothing_that_the_page_does() -> None:
    for tag, attributes in PAGE.tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not PAGE.all("style")
    assert all(script.get("src") for script in PAGE.all("script"))
    # Text from the network must stay text.
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "localStorage",
    ):
        assert word not in JS, word


def test_the_page_can_be_read_without_seeing_it() -> None:
    (html,) = PAGE.all("html")
    assert html["lang"] == "en"
    assert "<title>GMEL gateway</title>" in HTML
    assert all(len(PAGE.all(name)) == 1 for name in ("h1", "main", "header", "footer"))
    levels = [int(tag[1]) for tag, _ in PAGE.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    labels = {each.get("for") for each in PAGE.all("label")}
    assert all(field["id"] in labels for field in PAGE.all("input", "select"))
    assert all(picture.get("role") == "img" and picture.get("aria-labelledby") for picture in PAGE.all("svg"))
    assert len(PAGE.all("caption")) == len(PAGE.all("table"))
    assert all(cell.get("scope") for cell in PAGE.all("th"))
    assert all("alt" in image for image in PAGE.all("img"))
    assert any(each.get("aria-live") == "polite" for _, each in PAGE.tags)
    assert len(IDS) == len(set(IDS))
    for _, attributes in PAGE.tags:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(IDS)
    assert "prefers-reduced-motion" in CSS
    assert "prefers-color-scheme: dark" in CSS
    assert ":focus-visible" in CSS


def test_the_script_finds_what_it_looks_for() -> None:
    assert set(re.findall(r'\$\("([\w-]+)"\)', JS)) <= set(IDS)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(theme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if theme == "light" else dark))
    for ground in ("page", "card"):
        for ink in ("ink", "soft", "accent", "ready", "resting", "draining", "gone", "late-ink"):
            one, other = sorted((luminance(colours[ground]), luminance(colours[ink])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (theme, ink, ground)


def test_what_happened_lately_is_bounded_and_told_newest_first() -> None:
    recent = Recent()
    for number in range(3000):
        task = {"id": f"t{number}", "device": f"d{number}", "model": "m", "at_s": 1000.0 + number}
        recent.hear({"event": "decided", "server": "s", "scores": {"s": 1.0}, **task})
        recent.hear({"event": "done", "latency_s": 0.5, "deadline_s": 1.0, **task})
        recent.hear({"event": "server", "server": f"s{number}", "alive": True, "at_s": 1000.0 + number})
    said = recent.as_json(4000.0)
    assert [len(said[name]) for name in ("decisions", "incidents", "devices")] == [40, 100, 256]
    assert said["decisions"][0]["id"] == "t2999"
    assert said["incidents"][0]["server"] == "s2999"
    assert said["devices"][0] == {"name": "d2999", "server": "s", "seen_s": 1.0}
    assert recent.decision("t2999") is not None
    assert recent.decision("t0") is None
    rows = said["intervals"]["rows"]
    assert 0 < len(rows) <= said["intervals"]["count"]
    assert sum(row["tasks"] for row in rows) == sum(said["intervals"]["shares"])
    json.dumps(said, allow_nan=False)


def test_latencies_of_an_interval() -> None:
    recent = Recent()
    latencies = [0.02 * 1.03**number for number in range(200)]
    for latency_s in latencies:
        recent.hear({"event": "done", "id": "t", "at_s": 105.0, "latency_s": latency_s, "deadline_s": 1.0})
    # A clock that is put back loses nothing and opens no older interval.
    recent.hear({"event": "done", "id": "t", "at_s": 42.0, "latency_s": 1e-9, "deadline_s": 1.0})
    (row,) = recent.as_json(109.0)["intervals"]["rows"]
    assert row["ago"] == 0
    assert row["tasks"] == 201
    assert row["late"] == sum(latency_s > 1.0 for latency_s in latencies)
    assert row["p50_s"] == pytest.approx(latencies[99], rel=0.1)
    assert row["p95_s"] == pytest.approx(latencies[189], rel=0.1)
    shares = recent.as_json(109.0)["intervals"]["shares"]
    assert sum(shares[10:]) == row["late"]
    assert recent.as_json(10_000.0)["intervals"]["rows"] == []


def test_what_happens_to_many_tasks_at_once_is_one_line() -> None:
    recent = Recent()
    for number in range(30):
        recent.hear({"event": "retried", "id": f"t{number}", "server": "s", "error": "lost", "at_s": 1.0})
    recent.hear({"event": "retried", "id": "t", "server": "s", "error": "refused", "at_s": 1.0})
    assert [each["times"] for each in recent.incidents] == [30, 1]


def test_refusals_are_counted(client: TestClient) -> None:
    assert client.post("/v1/tasks", json={"id": "a", "device": "d", "model": "compose"}).status_code == 503
    assert client.get("/v1/state").json()["turned_away"] == {"503": 1}


class Broken:
    """A policy that cannot decide."""

    def scores(self, row: object, options: object, servers: object) -> list[float]:
        raise ValueError("no idea")


def test_a_state_tells_why_a_task_went_where_it_went(client: TestClient) -> None:
    for name, speed in (("quick", 2.0), ("slow", 0.5)):
        client.put(f"/v1/servers/{name}", json={"url": None, "speed": speed})
    decider = client.app.state.gateway.decider  # type: ignore[attr-defined]
    body = {"id": "a", "device": "camera", "model": "compose"}
    assert client.post("/v1/tasks", json=body).status_code == 202
    decider.history.append(Version(7, "learned", 0.0, Broken()))
    assert client.post("/v1/tasks", json=body | {"id": "b"}).status_code == 202

    failed, fine = client.get("/v1/state").json()["decisions"]
    assert (fine["id"], fine["server"], fine["policy"], fine["fallback"]) == ("a", "quick", "earliest-finish", None)
    assert fine["scores"]["quick"] > fine["scores"]["slow"]
    assert fine["options"] == 2
    assert (failed["id"], failed["policy"], failed["version"]) == ("b", "earliest-finish", 7)
    assert failed["fallback"] == "learned: ValueError: no idea"
    assert client.delete("/v1/tasks/b").json()["state"] == "cancelled"
    ended = client.get("/v1/tasks/b").json()
    assert ended["scores"] == failed["scores"]
    assert ended["fallback"] == failed["fallback"]
    assert client.get("/v1/state").json()["incidents"][0]["event"] == "cancelled"


def series(text: str) -> set[str]:
    """Names that a scrape may hold, those of metrics without a value yet as well."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


def test_grafana_asks_for_metrics_that_there_are(client: TestClient, plant: Plant) -> None:
    dashboard = json.loads(GRAFANA.read_text("utf-8"))
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [each["definition"] for each in variables.values() if each["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"gmel_\w+", query)}

    at_server = TestClient(server_app("s", Runner(Sleeping(plant, 1.0), 1, 1.0))).get("/metrics").text
    there = series(client.get("/metrics").text) | series(at_server)
    assert asked <= there
    # What is measured is shown; `_created` and the buckets beside it are Prometheus' own.
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    measured = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there if not name.endswith("_created")}
    assert measured == shown


# ---------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process of the command line that says its address, and the address."""
    environment = {name: value for name, value in os.environ.items() if name != "GMEL_KEY"}
    command = [sys.executable, "-m", "gmel.cli.main", *arguments]
    with (folder / f"{arguments[0]}.log").open("w") as log:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert started.stdout is not None
    try:
        line = started.stdout.readline()
        assert " at " in line, (line, (folder / f"{arguments[0]}.log").read_text())
        yield line.split()[-1], started
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def submit(address: str, number: int, **more: Any) -> None:
    body = {"id": f"task-{number}", "device": f"camera-{number % 3}", "model": "compose", "images": 4} | more
    assert httpx.post(f"{address}/v1/tasks", json=body, trust_env=False).status_code == 202


def open_page(page: Page, address: str, width: int = 1280) -> None:
    page.size(width, 900)
    page.call("Page.navigate", url=f"{address}/")
    page.wait("document.readyState === 'complete'")


TEXT = "document.querySelector({!r}).innerText"


@needs_browser
def test_a_browser_shows_servers_tasks_and_failures(tmp_path: Path) -> None:
    with (
        process(tmp_path, "gateway", "live", "--folder", str(tmp_path / "gateway"), "--port", "0") as (address, _),
        process(tmp_path, "server", "line-a", "--gateway", address) as (_, server),
        browser(tmp_path / "profile") as page,
    ):
        open_page(page, address)
        page.wait("[...document.querySelectorAll('#servers .state.ready')].length === 1")
        markup = "<b id=evil>stain</b>"
        for number in range(6):
            submit(address, number, label=markup, deadline_s=1e-3 if number == 5 else 60.0)
        page.wait(f"{TEXT.format('#done')} === '6'")
        page.wait("document.querySelectorAll('#tasks .state.done').length === 6")
        page.wait("document.querySelectorAll('#decisions > li').length === 6")
        assert "line-a" in page.run(TEXT.format("#servers"))
        assert page.run("document.querySelectorAll('#decisions .chosen').length") == 6
        assert page.run("document.querySelectorAll('#hall .server').length") == 3
        assert page.run("document.querySelectorAll('#hall .device').length") == 3
        assert page.run("document.querySelectorAll('#histogram .bar').length") > 0
        assert "1 late" in page.run(TEXT.format("#timeline-text"))
        assert "line-a ready" in page.run("document.querySelector('#hall-text').textContent")
        assert markup in page.run(TEXT.format("#tasks"))
        assert page.run("document.querySelector('#evil')") is None

        # The keyboard alone: from a task to its details, and back.
        page.run("document.querySelector('#tasks button').focus()")
        page.press("Enter", 13, "\r")
        page.wait("document.activeElement.id === 'detail'")
        assert "task-5" in page.run(TEXT.format("#detail"))
        assert "chosen" in page.run(TEXT.format("#detail-scores"))
        page.run("document.querySelector('#back').focus()")
        page.press("Enter", 13, "\r")
        assert page.run("document.activeElement.closest('table').id") == "tasks"

        server.send_signal(signal.SIGKILL)
        page.wait(f"{TEXT.format('#incidents')}.includes('line-a is not heard any more')")
        page.wait("document.querySelector('#hall .server.gone, #servers .state.gone') !== null")
        assert "not heard" in page.run("document.querySelector('#summary').textContent")

        for width in (360, 768, 1920):
            page.size(width, 800, dark=width == 768, calm=True)
            time.sleep(0.3)
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), width
        assert page.errors == []
        assert all(url.startswith((address, "data:", "blob:")) for url in page.requests)


@needs_browser
def test_a_browser_asks_for_the_key_and_keeps_it_in_its_tab(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    operator, device = add_key(keys, "operator", "anna"), add_key(keys, "device", "camera-1")
    arguments = ("gateway", "live", "--folder", str(tmp_path / "gateway"), "--port", "0", "--keys", str(keys))
    with process(tmp_path, *arguments) as (address, gateway), browser(tmp_path / "profile") as page:
        open_page(page, address)
        for key, answer in (("wrong", "not known"), (device, "not the key of an operator")):
            page.wait("!document.querySelector('#locked').hidden && document.activeElement.id === 'key'")
            page.call("Input.insertText", text=key)
            page.press("Enter", 13, "\r")
            page.wait(f"{TEXT.format('#key-error')}.includes('{answer}')")
            assert page.run("document.querySelector('#board').hidden")
        page.call("Input.insertText", text=operator)
        page.press("Enter", 13, "\r")
        page.wait("document.querySelector('#connection').dataset.state === 'live'")
        page.wait("!document.querySelector('#board').hidden && document.querySelector('#locked').hidden")
        assert page.run("sessionStorage.length") == 1
        assert page.run("localStorage.length + document.cookie.length") == 0
        page.wait(f"{TEXT.format('#servers')}.includes('never heard')")

        gateway.kill()
        page.wait("document.querySelector('#connection').dataset.state === 'lost'")
        # The browser itself reports requests that were refused or not answered; of our script there is nothing.
        assert not [error for error in page.errors if not error.startswith("Failed to load resource")]
