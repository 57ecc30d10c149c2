"""The report: one file that opens offline, honest words, every figure, and what there is of an unfinished run.

All numbers here are SYNTHETIC TEST DATA: made up by formulas in this file, measured nowhere.
"""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmel.evaluation.manifest import RUN_FORMAT
from gmel.evaluation.report import read_evaluation, render_report
from gmel.evaluation.schema import interval_of, metric_of, write_evaluation
from gmel.evaluation.statistics import Interval, gap_closed, t_interval
from gmel.evaluation.table import (
    COLUMNS,
)
from gmel.scenario.errors import InputError

EPISODES = 8
SCENARIO = """# SYNTHETIC TEST DATA, not a plant. <script>alert("scenario")</script> & more
name = "synthetic"
slot_s = 1.0

[[servers]]
name = "S1"
speed = 2.0
"""

# name, label, ladder, information, mode, trained, mean latency (s), done in time
POLICIES = [
    ("local", "Local only", None, "none", "decentralised", False, 60.0, 0.009),
    ("proportional", "Random proportional", "L0", "none", "decentralised", False, 1.823, 0.930),
    ("greedy", "Greedy", None, "own, stale broadcast", "decentralised", False, 2.395, 0.849),
    ("led2", "LED(2)", "L1", "own, stale broadcast", "decentralised", False, 1.522, 0.9775),
    ("softmax", "Tuned softmax", "L2", "own, stale broadcast", "decentralised", False, 1.502, 0.9866),
    ("softmax7", "7-parameter softmax", "L3", "own, stale broadcast", "decentralised", False, 1.442, 0.9865),
    ("eft", "Sequential EFT", "L4", "everything", "central", False, 1.132, 0.9995),
    ("coordinated", "Coordinated", "L4", "in-slot messages", "communicating", False, 1.035, 0.9999),
    ("nash", "Nash", "L4", "everything", "central", False, 0.956, 0.99995),
    ("optimum", "Per-slot optimum", "L5", "everything", "central", False, 0.916, 0.99997),
    ("amarl", "AMARL", None, "own, stale broadcast", "decentralised", True, 1.360, 0.9910),
]


def episode_values(name: str, mean: float) -> np.ndarray:
    """Episodes share their traffic, so all policies go up and down together; a little noise is their own."""
    traffic = np.random.default_rng(7).normal(0.0, 0.015, EPISODES)
    own = np.random.default_rng(sum(map(ord, name))).normal(0.0, 0.006, EPISODES)
    return mean * (1.0 + (traffic - traffic.mean()) + (own - own.mean()))


def backlogs(herd: bool, slots: int = 60, servers: int = 5) -> list[list[float]]:
    """Server backlogs of a toy plant whose tasks all rush to the emptiest server of the last slot, or spread out."""
    rng, speeds = np.random.default_rng(3), np.arange(2.0, 2.0 + servers)
    now = before = np.full(servers, 1.0)
    rows = []
    for _ in range(slots):
        rows.append([float(value) for value in now])
        added = np.zeros(servers)
        for work in rng.uniform(1.0, 4.0, rng.poisson(5.6)):
            target = int(np.argmin(before)) if herd else int(np.argmin(now + added + work / speeds))
            added[target] += work / speeds[target]
        before, now = now, np.maximum(now + added - 1.0, 0.0)
    return rows


def synthetic_evaluation(amarl: float = 1.36, training_seeds: int = 1, **changes: Any) -> dict[str, Any]:
    """An evaluation like the real one; `amarl` is the mean latency of the trained policy."""
    means = {name: mean for name, *_, mean, _ in POLICIES} | {"amarl": amarl}
    values = {name: episode_values(name, mean) for name, mean in means.items()}
    policies = []
    for name, label, ladder, information, mode, trained, _, done in POLICIES:
        own, unstable = values[name], name == "local"
        seeds = None
        if trained and training_seeds > 1:
            offsets = np.random.default_rng(5).normal(0.0, 0.01, training_seeds)
            seeds = own[None, :] + (offsets - offsets.mean())[:, None]
            own = seeds.mean(axis=0)
        over = t_interval(own if seeds is None else seeds.mean(axis=1))

        def scaled(factor: float, over: Interval = over, own: np.ndarray = own) -> dict[str, Any]:
            return metric_of(Interval(over.mean * factor, over.low * factor, over.high * factor), list(own * factor))

        latency = metric_of(over, list(own), None if seeds is None else [list(row) for row in seeds])
        gap = gap_closed(values["softmax7"], own if seeds is None else seeds, values["optimum"])
        service = 0.34 + 0.02 * len(name)
        mean = float(own.mean())
        grid = np.linspace(0.0, 9.0 * mean, 60)
        policies.append(
            {
                "name": name,
                "label": label,
                "ladder": ladder,
                "information": information,
                "mode": mode,
                "trained": trained,
                "unstable": unstable,
                "metrics": {
                    "mean_latency_s": latency,
                    "p95_latency_s": scaled(2.4),
                    "p99_latency_s": scaled(3.6),
                    "completion_rate": metric_of(
                        Interval(done, done - 0.02 * (1 - done), done + 0.02 * (1 - done)), [done] * EPISODES
                    ),
                    "energy_j": scaled(110.0 / mean),
                    "switches_per_offloaded_task": None,
                    "gap_closed": None if unstable else metric_of(gap, [gap.mean] * EPISODES),
                },
                "decomposition_s": {
                    "wait_to_slot": 0.0,
                    "upload": 0.16,
                    "queue": mean - service - 0.16 - 0.07 - 0.03,
                    "switch": 0.07,
                    "service": service,
                    "download": 0.03,
                },
                "ccdf": {"latency_s": list(grid), "probability": list(np.exp(-((grid / mean) ** 1.3)))},
            }
        )
    evaluation = {
        "schema": 1,
        "scenario": "synthetic",
        "load": 0.7,
        "slot_s": 1.0,
        "episodes": EPISODES,
        "slots": 500,
        "warmup_slots": 50,
        "training_seeds": training_seeds,
        "deadline": "late",
        "deadline_s": 4.0,
        "latency_from": "generated",
        "policies": policies,
        "herding": {
            "slots": 60,
            "slot_s": 1.0,
            "servers": ["S1", "S2", "S3", "S4", "S5"],
            "series": {"amarl": backlogs(herd=False), "greedy": backlogs(herd=True)},
        },
    }
    return evaluation | changes


def synthetic_metrics(seeds: int = 1, validated: bool = True) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "seed",
            "update",
            "decisions",
            "wall_s",
            "validation_latency_s",
            "validation_completion_rate",
            "reward",
        )
    }
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        for update in range(0, 121):
            check = validated and update % 5 == 0
            latency = 1.36 + 2.6 * math.exp(-update / 14.0) + float(rng.normal(0, 0.015)) if check else None
            done = None if latency is None else 1.0 - 0.01 * latency
            row = (seed, update, update * 51_200, 0.55 * update + 3.0, latency, done, -1.0)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return pa.table(columns)


def write_run(folder: Path, evaluation: dict[str, Any] | None, metrics: pa.Table | None, **manifest: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.toml").write_text(SCENARIO, encoding="utf-8")
    facts = {
        "note": "SYNTHETIC TEST DATA",
        "run_format": RUN_FORMAT,
        "gmel": "0.1.0",
        "seed": 0,
        "git_commit": "0" * 40,
        "device": "cpu",
        "wall_s": 71.25,
        "versions": {"jax": "0.10", "numpy": "2.4"},
    }
    (folder / "manifest.json").write_text(json.dumps(facts | manifest), encoding="utf-8")
    if evaluation is not None:
        write_evaluation(folder / "evaluation.json", evaluation)
    if metrics is not None:
        pq.write_table(metrics, folder / "metrics.parquet")
    return folder


FIGURES = ("herding", "learning", "ccdf", "decomposition", "completion")


class Page(HTMLParser):
    """What a browser would load, show and number of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one training seed, SYNTHETIC TEST DATA, with its report."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "synthetic", synthetic_evaluation(), synthetic_metrics())
    assert render_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def without(evaluation: dict[str, Any], *names: str) -> dict[str, Any]:
    return evaluation | {"policies": [p for p in evaluation["policies"] if p["name"] not in names]}


def the(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    return next(policy for policy in evaluation["policies"] if policy["name"] == name)


# --- the page


def test_page_loads_nothing_from_outside(run: Path, page: Page):
    loading = {"script", "link", "iframe", "object", "embed", "img", "video", "audio", "source", "base", "image"}
    assert not loading & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                local = f"{value}".startswith(("#", "figures/"))
                assert local, f"<{tag} {name}={value}>"
            assert not name.startswith("on")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_figure_is_inline_and_beside(run: Path, page: Page):
    svgs = page.having("svg")
    assert len(svgs) == len(FIGURES)
    for name in FIGURES:
        assert any(attributes.get("id") == f"figure-{name}" for attributes in page.having("figure"))
        assert (run / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        lines = (run / "figures" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        assert len({line.count(",") for line in lines}) == 1 and len(lines) > 5
    assert (run / "figures" / "herding.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(run.rglob("*.part"))


def test_figures_have_words_and_no_id_twice(page: Page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a.get("xlink:href") or a.get("href") for a in page.having("use")]
    assert targets and all(f"{target}".removeprefix("#") in ids for target in targets)
    for attributes in page.having("svg"):
        assert attributes["role"] == "img" and "viewbox" in attributes
        assert all(label in ids for label in f"{attributes['aria-labelledby']}".split())
    assert any("Mean difference between the fullest and the emptiest server: Greedy" in text for text in page.text)


def test_table_of_the_page_has_headers_and_numbers(page: Page):
    assert [a for a in page.having("th") if a.get("scope") == "col"].__len__() == len(COLUMNS)
    assert len([a for a in page.having("th") if a.get("class") == "policy" and a.get("scope") == "row"]) == len(
        POLICIES
    )
    for number in ("1.442 ± 0.015", "unstable: load 0.70", "99.10"):
        assert number in page.text


def test_scenario_is_shown_as_text(run: Path, page: Page):
    assert not page.having("script")
    assert SCENARIO in page.text
    assert "&lt;script&gt;alert" in (run / "report.html").read_text(encoding="utf-8")


def test_names_from_files_are_escaped(tmp_path: Path):
    evaluation = synthetic_evaluation(scenario="<script>a</script>")
    the(evaluation, "amarl")["label"] = "<script>b</script>"
    the(evaluation, "amarl")["information"] = '"><script>c</script>'
    folder = write_run(tmp_path / "run", evaluation, None, device="<script>d</script>")
    parsed = Page(render_report(folder).read_text(encoding="utf-8"))
    assert not parsed.having("script")
    assert "<script>d</script>" in parsed.text


def test_page_suits_phone_dark_and_print(run: Path, page: Page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert any(a.get("name") == "viewport" for a in page.having("meta"))
    assert page.having("html")[0]["lang"] == "en"


def test_report_is_the_same_every_time(run: Path):
    first = (run / "report.html").read_bytes()
    render_report(run)
    assert (run / "report.html").read_bytes() == first


def test_csv_holds_the_numbers_that_are_drawn(run: Path):
    herd = (run / "figures" / "herding.csv").read_text(encoding="utf-8").splitlines()
    assert herd[0] == "policy,time_s,server,backlog_s" and len(herd) == 1 + 2 * 60 * 5
    parts = (run / "figures" / "decomposition.csv").read_text(encoding="utf-8").splitlines()
    for line in parts[1:]:
        *lengths, total = (float(value) for value in line.split(",")[1:])
        assert sum(lengths) == pytest.approx(total)
    assert not any(line.startswith("local,") for line in parts)
    curve = (run / "figures" / "learning.csv").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("seed 0,") for line in curve) == 25
    assert [line.split(",")[0][:2] for line in curve[-4:]] == ["L0", "L2", "L3", "L5"]


def test_several_seeds_get_a_band(tmp_path: Path):
    folder = write_run(tmp_path / "run", synthetic_evaluation(1.4, 3), synthetic_metrics(3))
    text = render_report(folder).read_text(encoding="utf-8")
    assert "95 % t-interval" in text and "Interval over 3 training seeds" in text


# --- what a run has not reached yet


def test_interrupted_run_still_has_a_report(tmp_path: Path):
    folder = write_run(tmp_path / "run", None, synthetic_metrics(), interrupted=True)
    parsed = Page(render_report(folder).read_text(encoding="utf-8"))
    notices = [a for a in parsed.having("p") if a.get("class") == "notice"]
    assert len(notices) == 2
    assert any("interrupted" in text for text in parsed.text)
    assert any("no evaluation yet" in text for text in parsed.text)
    assert len(parsed.having("svg")) == 1
    assert SCENARIO in parsed.text


def test_evaluation_without_training(tmp_path: Path):
    folder = write_run(tmp_path / "run", synthetic_evaluation(herding=None, deadline_s=None), None)
    text = render_report(folder).read_text(encoding="utf-8")
    assert "no training metrics" in text and "backlogs were not recorded" in text
    assert len(Page(text).having("svg")) == 3
    assert not (folder / "figures" / "herding.png").exists()


def test_training_without_a_validation_yet(tmp_path: Path):
    folder = write_run(tmp_path / "run", None, synthetic_metrics(validated=False))
    assert "not reached its first validation" in render_report(folder).read_text(encoding="utf-8")


def test_one_validation_only(tmp_path: Path):
    folder = write_run(tmp_path / "run", synthetic_evaluation(), synthetic_metrics().slice(0, 1))
    assert len(Page(render_report(folder).read_text(encoding="utf-8")).having("svg")) == len(FIGURES)


# --- files that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", None, "manifest.json: missing"),
        ("manifest.json", b"[1]", "must be a JSON object"),
        ("manifest.json", b"{", "not JSON"),
        ("manifest.json", b'{"run_format": 99}', "run_format is 99, this gmel reads 1"),
        ("scenario.toml", None, "scenario.toml: missing"),
        ("scenario.toml", b"= 1", "not TOML"),
        ("scenario.toml", b"\xff\xfe", "UTF-8"),
        ("metrics.parquet", b"PAR1 and no more", "not a readable Parquet file"),
        ("evaluation.json", b"{", "not JSON"),
        ("evaluation.json", b"[]", "must be a JSON object"),
        ("evaluation.json", b'{"schema": 2}', "schema is 2, this gmel reads 1"),
        ("evaluation.json", b'{"schema": 1}', "Field required"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes | None, words: str):
    folder = write_run(tmp_path / "run", synthetic_evaluation(), synthetic_metrics())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        render_report(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_metrics_without_a_column_are_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", None, synthetic_metrics().drop_columns(["wall_s"]))
    with pytest.raises(InputError, match="column wall_s is missing"):
        render_report(folder)
    words = pa.table({name: ["a"] for name in ("seed", "decisions", "wall_s", "validation_latency_s")})
    pq.write_table(words, folder / "metrics.parquet")
    with pytest.raises(InputError, match="column seed holds string"):
        render_report(folder)


def test_no_run_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        render_report(tmp_path / "nothing")


def spoil(evaluation: dict[str, Any], where: str) -> None:
    latency = the(evaluation, "greedy")["metrics"]["mean_latency_s"]
    if where == "values":
        latency["values"].pop()
    elif where == "null":
        latency["values"][0] = None
    elif where == "type":
        latency["mean"] = "fast"
    elif where == "seeds":
        latency["by_training_seed"] = [latency["values"]] * 3
    elif where == "names":
        the(evaluation, "greedy")["name"] = "led2"
    elif where == "ccdf":
        the(evaluation, "greedy")["ccdf"]["latency_s"].pop()
    elif where == "herding":
        evaluation["herding"]["series"]["greedy"][3].pop()
    elif where == "mode":
        the(evaluation, "greedy")["mode"] = "psychic"
    elif where == "policies":
        evaluation["policies"] = []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("values", "greedy.metrics.mean_latency_s: 7 values, must be one per episode (8)"),
        ("null", "allowed only where unstable"),
        ("type", "valid number"),
        ("seeds", "3 training seeds, must be training_seeds (1)"),
        ("names", "each must occur once"),
        ("ccdf", "differ in length"),
        ("herding", "herding.series.greedy: must be 60 slots of 5 servers"),
        ("mode", "'decentralised', 'communicating' or 'central'"),
        ("policies", "policies: empty"),
    ],
)
def test_evaluations_that_do_not_hold_together(tmp_path: Path, where: str, words: str):
    evaluation = synthetic_evaluation()
    spoil(evaluation, where)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(words)):
        read_evaluation(path)


def test_evaluation_survives_the_file(tmp_path: Path):
    evaluation = synthetic_evaluation(training_seeds=2)
    the(evaluation, "local")["metrics"]["mean_latency_s"]["mean"] = math.inf
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    text = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    back = read_evaluation(tmp_path / "evaluation.json")
    assert math.isnan(interval_of(the(back, "local")["metrics"]["mean_latency_s"]).mean)
    assert the(back, "amarl") == the(evaluation, "amarl")
    broken = copy.deepcopy(evaluation)
    the(broken, "amarl")["metrics"]["mean_latency_s"]["values"].pop()
    with pytest.raises(ValueError, match="must be one per episode"):
        write_evaluation(tmp_path / "evaluation.json", broken)
