"""Files of others: recognised by their header, imported, and refused with one line when they are at fault."""

import json
from pathlib import Path

import numpy as np
import pytest

from gmel.scenario.errors import InputError
from gmel.scenario.importers import (
    RawTrace,
    detect,
    import_azure_llm,
    import_genai,
    import_places,
    import_vidur,
)
from gmel.scenario.load import load_scenario, parse_scenario, to_toml
from gmel.scenario.positions import place
from gmel.scenario.trace import read_trace

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
GENAI = DATA / "genai-requests" / "lora_request_trace.csv"
AZURE = DATA / "azure-llm"
PLACES = DATA / "edge-positions"

HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora"
)
ROWS = [
    "2024-11-15 16:57:52,TXT_2_IMG,SUCCEED,32.0,G1,63.0,26.0,4.0,30.0,M1,0",
    "2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,1.0,30.0,M0,0",
    "2024-11-15 16:57:51,TXT_2_IMG,FAILED,32.0,G0,63.0,26.0,1.0,30.0,M0,0",
    "2024-11-15 16:57:52,TXT_2_IMG,SUCCEED,32.0,G2,63.0,,1.0,40.0,M0,0",
    "2024-11-15 16:57:53,TXT_2_IMG,SUCCEED,32.0,G2,63.0,,1.0,,M0,0",
    "2024-11-15 16:57:54,TXT_2_IMG,PENDING,0.0,G2,63.0,,1.0,30.0,M0,0",
]


def written(folder: Path, *lines: str, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_genai_is_sorted_filtered_and_counted(tmp_path: Path) -> None:
    raw = read_trace(written(tmp_path, HEADER, *ROWS))
    assert raw.columns["time_s"].tolist() == [0.0, 2.0, 2.0]
    assert raw.columns["device"].tolist() == ["G0", "G1", "G2"]  # G1 before G2: ties keep their order
    assert raw.columns["model"].tolist() == ["M0", "M1", "M0"]
    assert raw.columns["images"].tolist() == [1, 4, 1]
    assert raw.columns["steps"].tolist() == [30, 30, 40]
    (note,) = raw.notes
    assert "3 of 6 rows" in note
    assert "1 failed" in note
    assert "1 unfinished" in note
    assert "1 with an empty cell" in note
    assert "Lin et al." in raw.attribution
    assert "not to be redistributed" in raw.attribution


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("2024-11-15 16:57,T,SUCCEED,1,G,1,1,1.0,30.0,M,0".replace("2024-11-15 16:57", "soon"), "'gmt_create'"),
        ("2024-11-15 16:57:52,T,SUCCEED,1,G,1,1,0.0,30.0,M,0", "'num_images_per_prompt'"),
        ("2024-11-15 16:57:52,T,SUCCEED,1,G,1,1,1.0,many,M,0", "'num_inference_steps'"),
    ],
)
def test_genai_names_the_cell_at_fault(tmp_path: Path, row: str, named: str) -> None:
    # The failed row in front makes the number of the row in the file differ from that among the kept ones.
    path = written(tmp_path, HEADER, ROWS[2], ROWS[0], row)
    with pytest.raises(InputError) as caught:
        import_genai(path)
    assert named in str(caught.value)
    assert "data row 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_genai_without_a_success_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'predict_status'"):
        import_genai(written(tmp_path, HEADER, ROWS[2]))


def test_importer_names_the_missing_column(tmp_path: Path) -> None:
    path = written(tmp_path, "TIMESTAMP,ContextTokens", "2023-11-16 18:17:03.9799600,5")
    with pytest.raises(InputError, match="'GeneratedTokens'"):
        import_azure_llm(path)


def test_azure_is_recognised_and_keeps_a_tenth_of_a_microsecond(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319601,3180,8",
    )
    raw = read_trace(path)
    np.testing.assert_allclose(raw.columns["time_s"], [0.0, 0.0520001], atol=1e-9)
    assert raw.columns["context_tokens"].tolist() == [4808, 3180]
    assert "CC-BY" in raw.attribution


def test_azure_of_a_later_year_says_its_zone(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:00.009930+00:00,2162,5",
        "2024-05-10 00:00:01.017335+00:00,2399,6",
    )
    np.testing.assert_allclose(import_azure_llm(path).columns["time_s"], [0.0, 1.007405], atol=1e-9)


@pytest.mark.parametrize("cell", ["-1", "1.5", "x", ""])
def test_azure_names_the_cell_at_fault(tmp_path: Path, cell: str) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        f"2023-11-16 18:17:04.0319600,{cell},8",
    )
    with pytest.raises(InputError, match=r"'ContextTokens', data row 2"):
        import_azure_llm(path)


def test_other_headers_are_not_taken_for_known_files() -> None:
    assert detect(["time_s", "device"]) is None
    assert detect(["TIMESTAMP", "ContextTokens"]) is None
    assert detect(HEADER.split(",")) is import_genai


def test_raw_trace_checks_what_code_hands_it() -> None:
    with pytest.raises(InputError, match="'steps' has shape"):
        RawTrace({"time_s": np.arange(3.0), "steps": np.ones(2)}, "mine")
    with pytest.raises(InputError, match="'device', data row 2"):
        RawTrace({"time_s": np.arange(2.0), "device": np.array([0, -1])}, "mine")
    with pytest.raises(InputError, match="'images' holds"):
        RawTrace({"time_s": np.arange(2.0), "images": np.array(["1", "2"])}, "mine")


@pytest.mark.skipif(not GENAI.exists(), reason="shared/data/genai-requests is absent (GenTD26 must not be shipped)")
def test_genai_has_its_published_statistics() -> None:
    raw = read_trace(GENAI)
    (note,) = raw.notes
    assert "of 26,823 rows" in note
    assert "398 failed (1.48%)" in note
    # 398 failed, 33 that never finished (25 of them with empty cells).
    assert len(raw) == 26_823 - 398 - 33
    assert np.mean(raw.columns["steps"] == 30) == pytest.approx(0.907, abs=0.001)
    assert np.mean(raw.columns["images"] == 1) == pytest.approx(0.58, abs=0.01)
    assert raw.columns["time_s"][-1] / 86400 == pytest.approx(23.0, abs=0.1)
    same = np.mean(raw.columns["model"][1:] == raw.columns["model"][:-1])
    assert same == pytest.approx(0.253, abs=0.01)


@pytest.mark.skipif(not AZURE.exists(), reason="shared/data/azure-llm is absent")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("AzureLLMInferenceTrace_code.csv", "azure-code-2023"),
        ("AzureLLMInferenceTrace_conv.csv", "azure-conversation-2023"),
    ],
)
def test_shipped_traces_are_the_source_to_a_millisecond(file: str, name: str) -> None:
    source, shipped = read_trace(AZURE / file), read_trace(name)
    np.testing.assert_allclose(shipped.columns["time_s"], source.columns["time_s"], rtol=0, atol=0.5001e-3)
    for tokens in ("context_tokens", "generated_tokens"):
        np.testing.assert_array_equal(shipped.columns[tokens], source.columns[tokens])


VIDUR = ["arrived_at,num_prefill_tokens,num_decode_tokens", "0.052,3180,8", "0.0,4808,10", "0.098189,110,27"]


def test_vidur_is_recognised_and_sorted(tmp_path: Path) -> None:
    raw = read_trace(written(tmp_path, *VIDUR))
    assert raw.columns["time_s"].tolist() == [0.0, 0.052, 0.098189]
    assert raw.columns["context_tokens"].tolist() == [4808, 3180, 110]
    assert raw.columns["generated_tokens"].tolist() == [10, 8, 27]
    assert raw.notes == ("Vidur request trace: 3 rows",)


@pytest.mark.parametrize(
    ("row", "named"),
    [("-1,1,1", "'arrived_at', data row 2"), ("1,1.5,1", "'num_prefill_tokens', data row 2"), ("1,1,x", "'num_decode")],
)
def test_vidur_names_the_cell_at_fault(tmp_path: Path, row: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        import_vidur(written(tmp_path, VIDUR[0], "0,1,1", row))


LLMSERVINGSIM = [(10, 70, 46926808), (22, 104, 347938952), (16, 69, 479613521)]


def test_llmservingsim_reads_the_same_from_both_its_formats(tmp_path: Path) -> None:
    lines = ["\t".join(map(str, row)) for row in LLMSERVINGSIM]
    table = written(tmp_path, "input_toks\toutput_toks\tarrival_time_ns", *lines, name="file.tsv")
    names = ("input_toks", "output_toks", "arrival_time_ns")
    objects = [json.dumps({**dict(zip(names, row, strict=True)), "input_tok_ids": [1, 2]}) for row in LLMSERVINGSIM]
    for path in (table, written(tmp_path, objects[0], "", *objects[1:], name="file.jsonl")):
        raw = read_trace(path)
        np.testing.assert_allclose(raw.columns["time_s"], [0.046926808, 0.347938952, 0.479613521], rtol=0, atol=1e-12)
        assert raw.columns["context_tokens"].tolist() == [10, 22, 16]
        assert raw.columns["generated_tokens"].tolist() == [70, 104, 69]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"input_toks": 1, "output_toks": 1}', "'arrival_time_ns', data row 2: None"),
        ('{"input_toks": true, "output_toks": 1, "arrival_time_ns": 1}', "'input_toks', data row 2: True"),
        ('{"input_toks": [1], "output_toks": 1, "arrival_time_ns": 1}', "'input_toks', data row 2"),
        ('{"input_toks": 1, "output_toks": 1, "arrival_time_ns": -5}', "'arrival_time_ns', data row 2: -5"),
        ("[1, 2, 3]", "data row 2: holds no JSON object"),
        ("{", "data row 2: not JSON"),
        ("[" * 100_000, "data row 2: not JSON"),
    ],
)
def test_json_lines_at_fault_are_named(tmp_path: Path, line: str, named: str) -> None:
    first = '{"input_toks": 1, "output_toks": 1, "arrival_time_ns": 1}'
    with pytest.raises(InputError) as caught:
        read_trace(written(tmp_path, first, line, name="file.jsonl"))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_lines_of_sessions_are_refused(tmp_path: Path) -> None:
    line = '{"session_id": 0, "arrival_time_ns": 1, "sub_requests": [{"input_toks": 1, "output_toks": 1}]}'
    with pytest.raises(InputError, match="no column 'time_s'"):
        read_trace(written(tmp_path, line, name="file.jsonl"))


SITES = [
    "SITE_ID,LATITUDE,LONGITUDE,NAME",
    '1,-37.81517,144.97476,"Corner, Flinders St"',
    "2,-37.81524,144.95256,Spencer",
]
USERS = ["Latitude,Longitude", "-37.8146,144.9744", "-37.8101,144.9704", "-37.8199,144.9573"]


def test_places_become_metres(tmp_path: Path) -> None:
    sites = import_places(written(tmp_path, *SITES, name="sites.csv"))
    users = import_places(written(tmp_path, *USERS, name="users.csv"))
    placed = place(load_scenario("factory"), sites, users, 2).scenario
    assert placed.devices.count == 3
    assert placed.devices.positions_m is not None
    spots = np.array([server.position_m for server in placed.servers])
    # 0.0222 degrees of longitude at 37.8 degrees south.
    assert spots[0, 0] - spots[1, 0] == pytest.approx(0.0222 * 111_195 * np.cos(np.radians(37.815)), rel=1e-3)
    assert spots[0, 1] - spots[1, 1] == pytest.approx(7e-5 * 111_195, abs=0.15)
    everything = np.concatenate([spots, placed.devices.positions_m])
    np.testing.assert_allclose(everything.min(axis=0), 10.0, atol=0.11)
    np.testing.assert_allclose(everything.max(axis=0), np.array(placed.radio.hall_m) - 10.0, atol=0.21)
    assert parse_scenario(to_toml(placed), "again") == placed


def test_places_with_more_sites_than_servers_repeat_the_hardware(tmp_path: Path) -> None:
    rows = [f"{-37.8 - 0.001 * k},144.9" for k in range(7)]
    sites = import_places(written(tmp_path, "latitude,longitude", *rows))
    before = load_scenario("factory")
    placed = place(before, sites, None, 7).scenario
    assert [server.name for server in placed.servers][5:] == ["orin-2", "l4-2"]
    assert placed.servers[5].speed == before.servers[0].speed
    assert placed.devices == before.devices


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["latitude,lon", "1,2"], "'longitude'"),
        (["latitude,longitude", "91,2"], "'latitude', data row 1: 91"),
        (["latitude,longitude", "9,"], "'longitude', data row 1"),
        (["latitude,longitude"], "0 rows"),
    ],
)
def test_places_at_fault_are_named(tmp_path: Path, lines: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        import_places(written(tmp_path, *lines))


def test_places_need_geometry_and_one_town(tmp_path: Path) -> None:
    sites = import_places(written(tmp_path, "latitude,longitude", "0,0", "1,0"))
    with pytest.raises(InputError, match="uniform-snr"):
        place(load_scenario("hall-20x5"), sites, None, 1)
    with pytest.raises(InputError, match="km apart"):
        place(load_scenario("factory"), sites, None, 2)
    with pytest.raises(InputError, match="--count 5"):
        place(load_scenario("factory"), sites, None)


@pytest.mark.skipif(not PLACES.exists(), reason="shared/data/edge-positions is absent")
def test_eua_places_are_all_read() -> None:
    sites = import_places(PLACES / "edge-servers_site-optus-melbCBD.csv")
    users = import_places(PLACES / "users_users-melbcbd-generated.csv")
    assert (len(sites), len(users)) == (125, 816)
    placed = place(load_scenario("factory"), sites, users, 125).scenario
    assert len({server.name for server in placed.servers}) == 125
    assert all(side < 3000 for side in placed.radio.hall_m)
