"""Rows of training data as a user writes them, for the tests that read them."""

import json
from types import SimpleNamespace


def settings(path, images=None, **changes):
    values = {"kind": "llava", "template": "vicuna_v1", "max_length": None, "on_bad_row": "error"}
    values |= {"video_fps": 2.0, "video_frames": 4}
    return SimpleNamespace(path=str(path), images=None if images is None else str(images), **{**values, **changes})


def said(question="What is it?", answer="A dog.", image=None):
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    if image is not None:
        row["image"] = image
        row["conversations"][0]["value"] = f"<image>\n{question}"
    return row


def write(path, rows, lines=False):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if lines else json.dumps(rows, indent=2)
    path.write_text(text, encoding="utf-8")
    return path
