"""The HTML page: complete, escaped, and alive in a browser without a network."""

import dataclasses
import html
import html.parser
import re
import shutil
import subprocess

import plan_samples
import pytest

from gshard_tf.planning.html.page import page
from gshard_tf.planning.html.weight_map import weight_map
from gshard_tf.planning.records import Pipeline

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Checker(html.parser.HTMLParser):
    """Nesting, ids, and what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.ids, self.text = [], [], [], []
        self.tags = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.wrong and not checker.open
    assert len(set(checker.ids)) == len(checker.ids)
    return checker


@pytest.mark.parametrize("name", plan_samples.ALL)
def test_one_file_that_loads_nothing(name):
    text = page([plan_samples.ALL[name]()])
    checker = read(text)
    for tag, attrs in checker.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert "src" not in attrs, (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert not any(key.startswith("on") for key in attrs)
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(text) < 600_000


def test_it_says_what_the_plan_says():
    plan = plan_samples.moe()
    said = " ".join("".join(read(page([plan])).text).split())
    for text in (
        *plan.complaints,
        plan.reshards[0].advice,
        *plan.time.assumptions,
        "8.69 GB",
        "estimate, not a measurement",
        "13.1 G",
        *plan.inputs,
        "128 cores on 64 chips v3 (8x8)",
    ):
        assert text in said, text  # fmt: skip
    names = "\n".join(
        attrs.get("data-names", "") for _, attrs in read(page([plan])).tags
    )
    assert {w.path for w in plan.weights} <= set(names.split("\n"))


def test_pipelines_and_their_bubbles():
    pipeline = Pipeline("encoder", stages=4, microbatches=13)
    plan = dataclasses.replace(plan_samples.moe(), pipelines=[pipeline])
    said = " ".join("".join(read(page([plan])).text).split())
    assert "pipeline encoder4 stages13 microbatches, 18.8 % of bubbles" in said


def test_out_of_memory_is_an_answer():
    plan = plan_samples.out_of_memory()
    said = " ".join("".join(read(page([plan])).text).split())
    assert "30.2 GB too much" in said
    for buffer in plan.out_of_memory.buffers:
        assert buffer.shape in said
    for text in plan.advice:
        assert text in said
    assert plan.out_of_memory.message in said


def test_names_cannot_become_markup():
    evil = "</script><script>alert(1)</script>\"'><img src=x>"
    plan = plan_samples.moe()
    buffer = dataclasses.replace(plan_samples.out_of_memory().out_of_memory.buffers[0],
                                 shape=evil, layer=evil, operation=evil)  # fmt: skip
    changes = {
        "model": evil,
        "topology": evil,
        "mesh": {evil: 128},
        "rules": {evil: evil},
        "inputs": [evil],
        "complaints": [evil],
        "advice": [evil],
        "versions": {evil: evil},
        "key": evil,
        "chip": plan.chip | {"name": evil},
        "flops_by_layer": {evil: 1.0},
        "weights": [
            dataclasses.replace(w, path=evil, rule=evil, dtype=evil)
            for w in plan.weights[:1]
        ],
        "communication": [
            dataclasses.replace(c, kind=evil, layer=evil, axis=evil)
            for c in plan.communication[:1]
        ],
        "reshards": [
            dataclasses.replace(r, **dict.fromkeys(
                ("kind", "layer", "operation", "shape", "axis", "advice"), evil))
            for r in plan.reshards
        ],
        "time": dataclasses.replace(plan.time, assumptions=[evil]),
    }  # fmt: skip
    bad = dataclasses.replace(plan, **changes)
    oom = dataclasses.replace(
        bad,
        memory=None,
        out_of_memory=dataclasses.replace(
            plan_samples.out_of_memory().out_of_memory, buffers=[buffer], message=evil
        ),
    )
    for plans in ([bad], [oom], [bad, oom]):
        tags = [tag for tag, _ in read(page(plans)).tags]
        assert tags.count("script") == 1
        assert "img" not in tags


def test_several():
    text = page([plan_samples.moe(), plan_samples.out_of_memory()])
    checker = read(text)
    assert {"plan-0", "plan-1"} <= set(checker.ids)
    assert "B / A" in "".join(checker.text)
    three = page([plan_samples.moe(), plan_samples.cpu(), plan_samples.two_axes()])
    assert "B / A" not in "".join(read(three).text)
    with pytest.raises(ValueError, match="at least one plan"):
        page([])


def cells(svg):
    grid = svg[svg.index('class="grid"') :]
    return re.findall(r'class="cell"[^>]*fill="([^"]*)"(?:><title>([^<]*)<)?', grid)


def test_a_weight_over_two_axes():
    mesh = {"data": 4, "model": 2}
    found = cells(weight_map((8, 5, 6), ("data", None, "model"), mesh))
    assert len(found) == 8
    assert len({fill for fill, _ in found}) == 8
    assert found[0][1] == "data 0, model 0: [0:2, :, 0:3]"
    assert found[5][1] == "data 2, model 1: [4:6, :, 3:6]"


def test_cores_of_one_colour_hold_the_same():
    mesh = {"data": 4, "model": 2}
    found = cells(weight_map((8, 6), (None, "model"), mesh))
    assert [fill for fill, _ in found[:2]] * 4 == [fill for fill, _ in found]
    held = {}
    for fill, title in found:
        held.setdefault(fill, set()).add(title.split(": ")[1])
    assert all(len(parts) == 1 for parts in held.values())
    assert len(held) == 2


def test_axes_joined():
    mesh = {"data": 2, "model": 2}
    found = cells(weight_map((8,), ("data+model",), mesh))
    assert [title.split(": ")[1] for _, title in found] == [
        "[0:2]", "[2:4]", "[4:6]", "[6:8]"
    ]  # fmt: skip


def test_many_cores_share_cells():
    svg = weight_map((2048, 8), ("expert", None), {"expert": 2048})
    assert len(cells(svg)) == 64
    assert "32 neighbouring cores" in svg
    svg = weight_map((64, 8), ("a", None), {"a": 64, "b": 32})
    assert len(cells(svg)) == 32 * 32
    assert len(svg) < 150_000


def test_a_scalar_and_an_unsplit_weight():
    assert "every core holds it" in weight_map((), (), {"expert": 4})
    found = cells(weight_map((3, 3), (None, None), {"expert": 4}))
    assert {fill for fill, _ in found} == {"var(--whole)"}


# -- in a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("chromium")

    def browse(text, *arguments):
        path = folder / "page.html"
        path.write_text(text, "utf-8")
        done = subprocess.run(  # noqa: S603
            [found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync",
             # Whatever the page asked for would fail, and be an error in the console.
             "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={folder / 'profile'}", *arguments, path.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)

    return browse


# Appended to the page's own script: what a person would do, and what they then see.
# Its findings are in the title, which `--dump-dom` shows.
TOUCH = """
<script>
const box = document.querySelector(".weights");
const seen = [];
const look = () => {
  const shown = [...box.querySelectorAll(".map [data-map]")].filter((m) => !m.hidden);
  seen.push([
    shown.length,
    box.querySelector("figcaption b").textContent,
    shown[0].querySelectorAll(".grid .cell").length,
    new Set([...shown[0].querySelectorAll(".grid .cell")]
      .map((c) => c.getAttribute("fill"))).size,
  ].join(" "));
};
look();
for (const name of ["/norm/gamma", "/mlp/wo/kernel", "/moe/wi"]) {
  const rows = [...box.querySelectorAll("tbody tr")];
  rows.find((r) => !r.hidden && r.dataset.name.endsWith(name))
    .querySelector("button").click();
  look();
}
const find = box.querySelector("input");
const count = () => box.querySelectorAll("tbody tr:not([hidden])").length;
find.value = "ENCODER_3/moe"; find.dispatchEvent(new Event("input"));
seen.push("found " + count());
const role = box.querySelector("select");
find.value = ""; role.value = "optimizer"; role.dispatchEvent(new Event("change"));
seen.push("optimizer " + count());
role.value = ""; role.dispatchEvent(new Event("change"));
const order = () => box.querySelector("tbody tr").dataset.name;
const sort = box.querySelector("thead button[data-key=bytes]");
sort.click(); seen.push(order());
sort.click(); seen.push(order());
document.title = seen.join("|");
</script></body>"""


def test_choosing_a_weight_changes_the_map(chromium):
    text = page([plan_samples.moe()])
    # The policy of the page allows no script from elsewhere; this one is in the page.
    dom, errors = chromium(text.replace("</body>", TOUCH), "--dump-dom")
    assert errors == []
    seen = re.search(r"<title>([^<]*)</title>", dom)[1].split("|")
    assert seen == [
        "1 lm/encoder_*/moe/wi 64 64",
        "1 lm/encoder_*/norm/gamma 64 1",
        "1 lm/encoder_*/mlp/wo/kernel 64 1",
        "1 lm/encoder_*/moe/wi 64 64",
        "found 3",
        "optimizer 21",
        "lm/encoder_*/moe/wi",
        "adam/iteration",
    ]


def test_no_complaints_from_the_browser(chromium, tmp_path):
    plans = [make() for make in plan_samples.ALL.values()]
    picture = tmp_path / "page.png"
    _, errors = chromium(
        page(plans), f"--screenshot={picture}", "--window-size=1280,900"
    )
    assert errors == []
    assert picture.stat().st_size > 20_000


# A page in a frame of a phone's width; the title is how many numbers are out of sight.
PHONE = """<!DOCTYPE html><iframe width="390" height="800" srcdoc="{}"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  const cells = [...page.querySelectorAll("td.n")].filter((c) => c.offsetParent);
  const out = cells.filter((c) => c.getBoundingClientRect().right > 390);
  const wide = page.documentElement.scrollWidth > 390;
  document.title = [cells.length, out.length, wide].join(" ");
}});
</script>"""


@pytest.mark.parametrize("name", plan_samples.ALL)
def test_numbers_are_in_sight_on_a_phone(name, chromium):
    plans = [plan_samples.ALL[name](), plan_samples.moe()]
    text = page(plans)

    def numbers(text):
        dom, _ = chromium(PHONE.format(html.escape(text)), "--dump-dom")
        return re.search(r"<title>(.*)</title>", dom)[1].split()

    count, out, is_wide = numbers(text)
    assert int(count) > 50 and (out, is_wide) == ("0", "false")
    if name == "moe":  # what is counted is there when something is wrong
        without = text.replace("@media (max-width: 700px)", "@media (max-width: 1px)")
        assert int(numbers(without)[1]) > 20


def test_the_browser_would_complain(chromium):
    """What the two tests above look for is there when something is wrong."""
    text = page([plan_samples.cpu()])
    broken = text.replace("</body>", "<script>nothing.here</script></body>")
    _, errors = chromium(broken, "--dump-dom")
    assert len(errors) == 1 and "nothing is not defined" in errors[0]
    outside = text.replace("</body>", '<img src="http://192.0.2.1/x.png"></body>')
    _, errors = chromium(outside, "--dump-dom")
    assert any("Content Security Policy" in line for line in errors)
