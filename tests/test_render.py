"""Pictures of an episode: what they show is what was measured, and their files are safe, bounded and whole."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gmel.cli.progress import ConsoleReporter
from gmel.evaluation.render.gantt import gantt_png
from gmel.evaluation.render.hall import MAX_FRAMES, hall_gif
from gmel.evaluation.render.html import FIELDS, scene_html, scene_json
from gmel.evaluation.render.scene import Scene, Server, Task, film, lanes, schematic_m, side_by_side
from gmel.evaluation.render.state import backlog_s, deepest_s, instant, rate_limits_bps
from gmel.evaluation.render.write import render
from gmel.evaluation.simulate import Simulation, simulate
from gmel.physics.random import mix_seed
from gmel.scenario.errors import InputError
from gmel.scenario.schema import Service
from gmel.simulator.environment import seeds
from gmel.simulator.links import draw_positions_m
from small_plants import small_plant


def made(server: int, times: tuple[float, float, float, float], **more: object) -> Task:
    """A task decided at 0 that uploads from `times[0]` to `times[1]` and runs from `times[2]` to `times[3]`."""
    begin, sent, start, end = times
    task = Task(0, server, 0, "", 0.0, 0.0, begin, sent, start, 0.0, end, end + 0.5, 9.0, "done", 8e6, 4e6)
    return replace(task, **more)  # type: ignore[arg-type]


def scene_of(*tasks: Task, name: str = "S0") -> Scene:
    servers = [Server(name, 2.0, 2.0, 2, 1.0, 2), Server("S1", 8.0, 2.0, 1, 1.0, 1)]
    devices_m = np.array([[1.0, 1.0]])
    return Scene("title", "subtitle", 0.0, 10.0, 1.0, (10.0, 4.0), False, False, devices_m, servers, list(tasks))


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(small_plant(catalogue=True, gpus=(2, 1, 1)), "led2", 2, ConsoleReporter(), slots=40)


@pytest.fixture(scope="module")
def scene(simulation: Simulation) -> Scene:
    return film(simulation, 20)


def test_the_picture_shows_the_episode_that_was_measured(simulation: Simulation, scene: Scene) -> None:
    records = simulation.measured.records[0]
    shown = [task for task in scene.tasks if scene.start_s <= task.decided_s < scene.end_s]
    counted = records.where(records.decided_s < scene.end_s)
    assert len(shown) == len(counted) > 20
    assert [task.device for task in shown] == counted.device.tolist()
    assert [task.server + 1 for task in shown] == counted.option.tolist()
    np.testing.assert_allclose([task.start_s for task in shown], counted.start_s, rtol=1e-5)
    # Tasks that were decided before the window and still run in it are in the picture.
    assert any(task.decided_s < scene.start_s for task in scene.tasks)


def test_rates_are_sizes_over_the_time_they_were_sent(scene: Scene) -> None:
    sent = [task for task in scene.tasks if task.server >= 0]
    for task in sent:
        assert task.rate_bps * (task.upload_end_s - task.upload_start_s) == pytest.approx(task.size_bit)
        assert 1e6 <= task.size_bit <= 8e6  # the catalogue's law
    assert {task.rate_bps for task in scene.tasks if task.server < 0} <= {0.0}


def test_no_gpu_runs_two_tasks_at_once(scene: Scene) -> None:
    for number, server in enumerate(scene.servers):
        mine = scene.of_server(number)
        assert {task.lane for task in mine} <= set(range(server.gpus))
        for lane in range(server.gpus):
            row = [task for task in mine if task.lane == lane]
            for one, other in pairwise(row):
                assert other.start_s >= one.end_s - 1e-3


def test_lanes_take_the_gpu_that_is_free_earliest() -> None:
    start, end = np.array([0.0, 1.0, 3.0, 4.0]), np.array([4.0, 3.0, 9.0, 5.0])
    assert lanes(start, end, 2).tolist() == [0, 1, 1, 0]
    assert lanes(start[::-1], end[::-1], 2).tolist() == [0, 1, 1, 0]


def test_tasks_at_once_have_rows_of_their_own() -> None:
    start, end = np.array([0.0, 1.0, 2.0, 3.0, 6.0]), np.array([5.0, 3.0, 6.0, 7.0, 8.0])
    assert side_by_side(start, end).tolist() == [0, 1, 2, 1, 0]
    assert side_by_side(start[::-1], end[::-1]).tolist() == [0, 1, 2, 1, 0]


def test_a_shared_server_shows_all_its_tasks() -> None:
    shared = small_plant(gpus=(2, 1, 1), arrivals="load = 0.9", max_uploads=80, device_speed=0.05)
    shared = shared.model_copy(update={"service": Service(discipline="sharing")})
    scene = film(simulate(shared, "led2", 1, ConsoleReporter(), slots=40), 20)
    assert scene.shared
    for number, server in enumerate(scene.servers):
        mine = scene.of_server(number)
        most = max(sum(other.start_s <= task.start_s < other.end_s for other in mine) for task in mine)
        assert server.lanes >= most
        assert {task.lane for task in mine} <= set(range(server.lanes))
        for lane in range(server.lanes):
            for one, other in pairwise([task for task in mine if task.lane == lane]):
                assert other.start_s >= one.end_s - 1e-3
    assert any(server.lanes > server.gpus for server in scene.servers)
    assert '"shared":true' in scene_json(scene)


@pytest.mark.parametrize("at_once", [1, 3])
def test_bars_at_once_are_drawn_beside_one_another(at_once: int) -> None:
    tasks = [made(0, (0.0, 1.0, 1.0, 9.0), lane=lane) for lane in range(at_once)]
    scene = scene_of(*tasks)
    servers = [replace(scene.servers[0], gpus=1, lanes=at_once)]
    pixels = np.asarray(Image.open(io.BytesIO(gantt_png(replace(scene, shared=True, servers=servers)))).convert("RGB"))
    blue = (pixels == (0, 114, 178)).all(axis=-1)
    # Down the middle of the bars; those of the legend lie above the axes.
    column = blue[pixels.shape[0] // 4 :, 520]
    assert np.count_nonzero(np.diff(column.astype(int)) == 1) == at_once


def test_an_instant_is_told_from_the_times() -> None:
    offloaded = made(0, (1.0, 2.0, 3.0, 5.0))
    dropped = made(1, (0.0, 2.0, 7.0, 7.0), status="dropped", finish_s=6.0)
    local = made(-1, (0.0, 0.0, 0.0, 4.0))
    scene = scene_of(offloaded, dropped, local)
    assert instant(scene, 1.5).sending == [offloaded, dropped]
    assert instant(scene, 2.5).waiting == [offloaded, dropped]
    assert instant(scene, 4.0).running == [offloaded]
    assert instant(scene, 5.2).returning == [offloaded]
    assert instant(scene, 6.5).waiting == []
    assert instant(scene, 3.9).local == [local]
    assert instant(scene, 4.1).local == []


def test_backlog_is_the_work_left_per_gpu() -> None:
    scene = scene_of(made(0, (0.0, 1.0, 1.0, 5.0)), made(0, (0.0, 2.0, 5.0, 6.0)), made(1, (0.0, 1.0, 2.0, 4.0)))
    np.testing.assert_allclose(backlog_s(scene, 0.5), [0.0, 0.0])
    np.testing.assert_allclose(backlog_s(scene, 1.0), [2.0, 2.0])
    np.testing.assert_allclose(backlog_s(scene, 3.0), [(2.0 + 1.0) / 2, 1.0])
    assert deepest_s(scene) == pytest.approx(2.0, abs=0.1)
    # Side by side: until the last has ended.
    np.testing.assert_allclose(backlog_s(replace(scene, shared=True), 3.0), [3.0, 1.0])


@pytest.mark.slow
def test_positions_are_those_the_links_were_drawn_from() -> None:
    simulated = simulate(
        small_plant(radio='model = "inf"\nhall_m = [30.0, 20.0]'), "led2", 1, ConsoleReporter(), slots=20
    )
    shown = film(simulated, 5)
    assert not shown.schematic
    plant = simulated.environments.test.plant
    drawn = draw_positions_m(plant, mix_seed(seeds(simulated.episodes.first_seed, 1)[0]))
    np.testing.assert_allclose(shown.devices_m, drawn)
    np.testing.assert_allclose([[s.x_m, s.y_m] for s in shown.servers], plant.server_position_m)
    given = jnp.ones((6, 2))
    fixed = replace(plant, device_position_m=given)
    assert draw_positions_m(fixed, mix_seed(seeds(0, 1)[0])) is given


@pytest.mark.parametrize(("devices", "servers"), [(1, 1), (20, 5), (500, 32)])
def test_schematic_places_do_not_meet(devices: int, servers: int) -> None:
    spots, centre, (length, width) = schematic_m(devices, servers)
    everything = np.concatenate([spots, centre])
    apart = np.linalg.norm(everything[:, None] - everything[None], axis=-1) + 99 * np.eye(len(everything))
    assert apart.min() >= 2.0
    assert everything.min() > 0 and np.all(everything < [length, width])


class Page(HTMLParser):
    """Elements with their attributes, and what stands in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_the_page_holds_the_data_and_loads_nothing(scene: Scene) -> None:
    text = scene_html(scene)
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert data["fields"] == list(FIELDS)
    assert len(data["tasks"]) == len(scene.tasks)
    column = FIELDS.index("upload_end")
    np.testing.assert_allclose([row[column] for row in data["tasks"]], [t.upload_end_s for t in scene.tasks], atol=6e-4)
    assert {data["models"][row[FIELDS.index("model")]] for row in data["tasks"]} == {t.model for t in scene.tasks}
    assert "https:" not in text and "@import" not in text and "url(http" not in text
    assert re.findall(r"http:[^\s\"']*", text) == ["http://www.w3.org/2000/svg"]
    assert not [attrs for _, attrs in page.elements if {"src", "href"} & set(attrs)]
    policy = next(attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy


def test_the_page_can_be_used_without_a_mouse_and_without_eyes(scene: Scene) -> None:
    text = scene_html(scene)
    named = {attrs["id"]: attrs for _, attrs in Page(text).elements if "id" in attrs}
    for picture in ("hall", "gantt"):
        assert named[picture]["role"] == "img"
        assert named[picture]["aria-label"]
    assert named["time"]["aria-label"] == "Time"
    script = Page(text).scripts[1]
    for name in ("prefers-reduced-motion", "prefers-color-scheme", "ArrowLeft", "ArrowDown", '" "'):
        assert name in script
    # Every element that the script asks for is there.
    assert set(re.findall(r'find\("(\w+)"\)', script)) - {"cursor"} <= set(named)


def test_names_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script>&\u2028"
    scene = replace(scene_of(made(0, (0.0, 1.0, 2.0, 3.0), model=evil), name=evil), title=evil, subtitle=evil)
    assert not set(scene_json(scene)) & set("<>&\u2028")
    text = scene_html(scene)
    assert "alert(1)</script>" not in text
    page = Page(text)
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0])["servers"][0]["name"] == evil


def test_gif_is_bounded_and_moves() -> None:
    scene = scene_of(made(0, (0.0, 4.0, 5.0, 8.0)), made(1, (2.0, 6.0, 6.0, 9.0), status="late"))
    told: list[tuple[int, int]] = []
    data = hall_gif(scene, 4, lambda done, total: told.append((done, total)))
    image = Image.open(io.BytesIO(data))
    assert (image.n_frames, image.size) == (4, (800, 640))  # type: ignore[attr-defined]
    assert told[-1] == (4, 4)
    image.seek(0)
    first = np.asarray(image.convert("RGB"), np.int64)
    image.seek(2)
    assert np.abs(np.asarray(image.convert("RGB"), np.int64) - first).max() > 100
    assert MAX_FRAMES <= 100


@pytest.mark.parametrize("tasks", [0, 2])
def test_gantt_is_a_picture_800_pixels_wide(tasks: int) -> None:
    made_tasks = [made(0, (0.0, 1.0, 2.0, 6.0), switch_s=1.0), made(1, (0.0, 1.0, 2.0, 3.0), status="dropped")]
    image = Image.open(io.BytesIO(gantt_png(scene_of(*made_tasks[:tasks]))))
    assert image.width == 800
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert ((0, 114, 178) in colours) is (tasks > 0)


def test_an_empty_window_has_a_scale_all_the_same() -> None:
    low, high = rate_limits_bps(scene_of())
    assert 0 < low < high
    assert json.loads(scene_json(scene_of()))["tasks"] == []


def test_files_appear_whole(simulation: Simulation, tmp_path: Path) -> None:
    for name, start in (("film.html", b"<!DOCTYPE html>"), ("gantt.png", b"\x89PNG")):
        render(simulation, tmp_path / name, ConsoleReporter())
        assert (tmp_path / name).read_bytes().startswith(start)
    assert not list(tmp_path.glob(".*"))


def test_too_large_a_plant_is_refused(simulation: Simulation) -> None:
    crowd = replace(simulation, scenario=small_plant(devices=501))
    with pytest.raises(InputError, match="501 devices"):
        film(crowd)
