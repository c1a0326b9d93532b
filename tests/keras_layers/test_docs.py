"""The examples of docs/layers.md run, and print what they say."""

import pathlib
import re

GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "layers.md"


def test_examples_of_the_guide(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 10
    scope = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), scope)
        for line in re.findall(r"^print\(.*\)\n# (.*)$", block, re.MULTILINE):
            assert line in capsys.readouterr().out
    assert scope["logits"].shape == (1, 8, 1000)
    assert scope["ids"].shape == (4, 8)


def test_the_example_of_decoding():
    text = GUIDE.with_name("decoding.md").read_text("utf-8")
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], scope)
    assert scope["limits"].numpy().tolist() == [10, 9]
    assert scope["ids"].shape == (2, 12)
    found = scope["found"]
    assert found.ids.shape == (2, 3, 12) and found.scores.shape == (2, 3)
