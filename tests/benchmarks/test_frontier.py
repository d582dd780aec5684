import json

import frontier_points


def test_the_first_text_of_each_prompt_is_taken(tmp_path):
    records = [("a", "one"), ("a", "two"), ("b", "three")]
    lines = "".join(json.dumps({"prompt": prompt, "text": text}) + "\n" for prompt, text in records)
    (tmp_path / "texts.jsonl").write_text(lines)
    assert frontier_points.read_texts(f"twin={tmp_path}/texts.jsonl") == {"a": "one", "b": "three"}


def test_the_chart_is_drawn(tmp_path):
    figures = {"perplexity": 100.0, "entropy_within_text": 5.0}
    points = [{"kind": kind, "label": kind, **figures} for kind in ("temperature", "other", "real")]
    frontier_points.draw(points, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
