"""Offline batches: every prompt's output once, whatever is interrupted."""

import json

import pytest
from test_engine import alone, engine

from ladder_jax.config import ConfigError
from ladder_jax.serve import offline


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_batch_goes_on_where_it_was_cut(tmp_path):
    made = engine(max_stop_ids=2)
    rows = [dict(prompt=[i + 1, 2], seed=i, temperature=1.0) for i in range(9)] + [
        dict(prompt=[1], max_tokens=0)
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    assert offline.run(made, source, out, dict(max_tokens=5), show=False) == (10, 0, 1)
    first = sorted(
        out.read_text().splitlines(), key=lambda line: json.loads(line)["index"]
    )
    for i, line in enumerate(first[:9]):
        got = json.loads(line)
        assert got["tokens"] == list(
            alone([i + 1, 2], seed=i, temperature=1.0, max_tokens=5)
        )
        assert got["finish"] == "length"
    assert "max_tokens=0" in json.loads(first[9])["error"]
    out.write_text(
        "\n".join([*first[:4], first[4][:-7]])
    )  # killed while it wrote the fifth
    assert offline.run(made, source, out, dict(max_tokens=5), show=False) == (6, 4, 1)
    assert (
        sorted(out.read_text().splitlines(), key=lambda line: json.loads(line)["index"])
        == first
    )
    assert offline.run(made, source, out, dict(max_tokens=5), show=False) == (0, 10, 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("nonsense\n", "line 1"),
        ('{"prompt": 5}\n', "line 1"),
        ('{"prompt": "a"}\n[]\n', "line 2"),
    ],
)
def test_mistakes_in_the_input_name_the_line(tmp_path, text, says):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        offline.read_prompts(tmp_path / "in.jsonl")


def test_another_file_is_never_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(ConfigError, match="choose a new file"):
        offline.finished(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"
