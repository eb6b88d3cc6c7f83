"""What the search for configurations tries and writes, without a GPU."""

import json

import pytest

pytest.importorskip("triton")

from halfbyte_triton import launch, tune

BUCKETS = tune.buckets((*tune.PRODUCTS, *tune.ELEMENTWISE, *tune.UPDATES))


def test_candidates_set_what_kernels_read():
    """The constants of a candidate are those of the configuration that stands there for any GPU."""
    for bucket in BUCKETS:
        constants = launch.tuned()["any"][bucket.operation][bucket.name]
        candidates = [one for one in tune.candidates(bucket) if one]
        assert candidates, bucket
        assert all(set(one) == set(candidates[0]) for one in candidates), bucket
        assert set(constants) <= set(candidates[0]), bucket


def test_every_bucket_but_those_of_float32_products_is_searched():
    there = {
        (operation, name)
        for operation, entries in launch.tuned()["any"].items()
        for name in entries
        if not name.startswith("float32/")
    }

    assert there == set(BUCKETS)


@pytest.mark.parametrize("bucket", tune.buckets([tune.HOPPER]))
def test_candidates_for_sm_90_fit_its_shared_memory(bucket):
    candidates = [one for one in tune.candidates(bucket) if one]
    there = launch.tuned()["sm_90"][tune.HOPPER][bucket.name]

    assert bool(candidates) == (int(bucket.name) >= 64)
    assert all(tune.hopper_bytes(one) * one["PROGRAMS"] < 227 * 1024 for one in [*candidates, *filter(None, [there])])


def test_result_is_written_beside_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"any": {"a": {"2": {"TILE": 1}}}, "sm_90": {"a": {"2": {"TILE": 2}, "4": {}}}}))
    tune.write(path, {"a": {"2": {"TILE": 3, "num_warps": 4}}})

    assert json.loads(path.read_text()) == {
        "any": {"a": {"2": {"TILE": 1}}},
        "sm_90": {"a": {"2": {"TILE": 3, "num_warps": 4}, "4": {}}},
    }
    assert '      "2": {"TILE": 3, "num_warps": 4},\n' in path.read_text()


def test_tuned_json_is_written_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    path = tmp_path / "tuned.json"
    text = (tune.Path(tune.__file__).with_name("tuned.json")).read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    tune.write(path, {})

    assert path.read_text(encoding="utf-8") == text
