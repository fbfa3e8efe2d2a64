"""The page's modules in a real browser, without a model: Markdown of hostile text, .npy files, routing, events."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from browser import call, needs_browser, open_page
from playwright.sync_api import Browser, Page

pytestmark = needs_browser

HOSTILE = [
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg/onload=window.hit=1><iframe srcdoc='<script>parent.hit=1</script>'>",
    "[click](javascript:window.hit=1)",
    "[click](JaVaScRiPt:window.hit=1) [x](data:text/html,<script>window.hit=1</script>) [y](vbscript:x)",
    "![pixel](https://evil.example/pixel.png)",
    '<https://evil.example/"onmouseover="window.hit=1>',
    '[a](https://ok.example/"onclick="window.hit=1)',
    "```<img src=x onerror=window.hit=1>\n</code></pre><script>window.hit=1</script>\n```",
    '```html" onmouseover="window.hit=1\ncode\n```',
    "| <b>a</b> | b |\n|---|---|\n| <script>window.hit=1</script> | [x](javascript:1) |",
    "# <img src=x onerror=window.hit=1>",
    "> - <object data=javascript:window.hit=1>\n> - **<embed src=x>**",
    "`<script>window.hit=1</script>` and **<script>** and *<style>*{}*",
    "\u202e\u0000 \ud800 &lt;script&gt;",
]


@pytest.fixture(scope="module")
def page(browser: Browser, url: str) -> Iterator[Page]:
    with open_page(browser, url) as opened:
        yield opened


SHAPE = """
(() => {
  const box = document.createElement("div");
  document.body.append(box);
  m.render(box, a[0]);
  const inner = (node) => [node.tagName.toLowerCase(), ...[...node.childNodes].map(shape)];
  const shape = (node) => node.nodeType === 3 ? node.data : inner(node);
  const found = [...box.childNodes].map(shape);
  box.remove();
  return found;
})()
"""


def shape(page: Page, text: str) -> Any:
    """The tree of elements that a text becomes: [tag, children …]."""
    return call(page, "markdown.js", SHAPE, text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_becomes_markup(page: Page, text: str) -> None:
    found = call(
        page,
        "markdown.js",
        """
        (async () => {
          const box = document.createElement("div");
          document.body.append(box);
          m.render(box, a[0]);
          await new Promise((done) => setTimeout(done, 20));
          const nodes = [...box.querySelectorAll("*")];
          const said = {
            tags: [...new Set(nodes.map((node) => node.tagName.toLowerCase()))],
            handlers: nodes.flatMap((node) => node.getAttributeNames()).filter((name) => /^on|^src|^style$/.test(name)),
            links: nodes.filter((node) => node.tagName === "A").map((node) => [node.protocol, node.rel]),
            hit: window.hit ?? 0,
          };
          box.remove();
          return said;
        })()
        """,
        text,
    )
    known = "p h2 h3 h4 h5 ul ol li blockquote hr a code pre strong em s br div span button svg path table thead tbody"
    assert set(found["tags"]) <= {*known.split(), "tr", "th", "td"}
    assert found["handlers"] == []
    assert found["hit"] == 0
    assert all(protocol in ("http:", "https:", "mailto:") and "noopener" in rel for protocol, rel in found["links"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
        ("# Title #\ntext", [["h2", "Title"], ["p", "text"]]),
        ("a **b *c* d** `e*f*`", [["p", "a ", ["strong", "b ", ["em", "c"], " d"], " ", ["code", "e*f*"]]]),
        ("2 * 3 * 4 and snake_case_name", [["p", "2 * 3 * 4 and snake_case_name"]]),
        ("**not closed", [["p", "**not closed"]]),
        (
            "- a\n- b\n  - c\n\n  d\n1. e",
            [["ul", ["li", "a"], ["li", "b", ["ul", ["li", "c"]], ["p", "d"]]], ["ol", ["li", "e"]]],
        ),
        ("3. x\n4. y", [["ol", ["li", "x"], ["li", "y"]]]),
        ("> q\n> - r", [["blockquote", ["p", "q"], ["ul", ["li", "r"]]]]),
        ("a  \nb", [["p", "a", ["br"], "b"]]),
        ("---", [["hr"]]),
        (r"\*plain\* <b>", [["p", "*plain* <b>"]]),
        ("see https://a.example/x.", [["p", "see ", ["a", "https://a.example/x"], "."]]),
    ],
)
def test_markdown(page: Page, text: str, expected: Any) -> None:
    assert shape(page, text) == expected


def test_code_and_tables(page: Page) -> None:
    ((tag, head, (pre, code)),) = shape(page, "```python\nif a < b:\n\n    pass\n```")
    assert (tag, pre, code) == ("div", "pre", ["code", "if a < b:\n\n    pass"])
    assert head[1] == ["span", "python"]
    ((_, _, (_, unfinished)),) = shape(page, "```\nstill written")
    assert unfinished == ["code", "still written"]
    inside = shape(page, "1. first\n   ```\n   x = 1\n   ```\n2. second")
    assert [item[0] for item in inside[0][1:]] == ["li", "li"]
    ((_, table),) = shape(page, "| a | b |\n|:--|--:|\n| 1 \\| 2 | **3** |")
    assert table == [
        "table",
        ["thead", ["tr", ["th", "a"], ["th", "b"]]],
        ["tbody", ["tr", ["td", "1 | 2"], ["td", ["strong", "3"]]]],
    ]


TIMED = """
(() => {
  const began = performance.now();
  m.render(document.createElement("div"), a[0]);
  return performance.now() - began;
})()
"""


def test_a_long_hostile_text_takes_no_time(page: Page) -> None:
    for text in (
        "*" * 20_000,
        "[" * 20_000,
        "`" * 20_000,
        "> " * 5_000,
        "_a" * 10_000,
        "- " * 5_000,
        "|" * 20_000,
        "**a " * 5_000,
    ):
        took = call(
            page,
            "markdown.js",
            TIMED,
            text,
        )
        assert took < 3000, text[:4]


def test_what_has_not_changed_keeps_its_elements(page: Page) -> None:
    kept = call(
        page,
        "markdown.js",
        """(() => {
          const box = document.createElement("div");
          m.render(box, "first\\n\\nsec");
          const first = box.firstChild;
          m.render(box, "first\\n\\nsecond\\n\\n- third");
          return [box.firstChild === first, box.childNodes.length, box.textContent];
        })()""",
    )
    assert kept == [True, 3, "firstsecondthird"]


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> str:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_files(page: Page, dtype: str, version: tuple[int, int]) -> None:
    array = np.random.default_rng(1).integers(0, 200, (5, 3, 2)).astype(dtype)
    parse = "(() => { const r = m.parseNpy(m.fromBase64(a[0])); return [r.shape, [...r.data]]; })()"
    assert call(page, "npy.js", parse, npy(array, version)) == [[5, 3, 2], array.ravel().tolist()]


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), "f4"), np.asfortranarray(np.zeros((2, 3), "u1")), np.zeros((2, 2), ">u2")]
)
def test_other_npy_files_are_refused(page: Page, array: np.ndarray) -> None:
    said = "(() => { try { m.parseNpy(m.fromBase64(a[0])); return null; } catch (e) { return e.message; } })()"
    assert "read here" in call(page, "npy.js", said, npy(array))
    whole = base64.b64decode(npy(np.zeros((40, 3), "u1")))
    assert "cut off" in call(page, "npy.js", said, base64.b64encode(whole[:-1]).decode())
    assert "not a .npy" in call(page, "npy.js", said, base64.b64encode(b"hello, world").decode())


def chunk(tokens: list[bytes], start: int | None, rows: np.ndarray | None, prompt: int | None) -> dict[str, Any]:
    content = [{"token": each.decode("utf-8", "replace"), "bytes": list(each)} for each in tokens]
    choice: dict[str, Any] = {"delta": {}, "logprobs": {"content": content}}
    if rows is not None:
        choice |= {"routed_experts": npy(rows), "routed_experts_start": start}
    return {"choices": [choice], **({} if prompt is None else {"usage": {"prompt_tokens": prompt}})}


def test_routing_by_position(page: Page) -> None:
    """A prompt of 3 tokens, an answer of 4 of which one is half a character; rows come in pieces."""
    rows = np.arange(6 * 2 * 2, dtype="u1").reshape(6, 2, 2)  # positions 0 to 5: the answer's last token has none
    chunks = [
        chunk([b"a"], 0, rows[:2], None),
        chunk([b" \xc3"], 2, rows[2:4], 3),
        chunk([b"\xa4"], None, None, 3),
        chunk([b"."], 4, rows[4:], 3),
    ]
    found = call(
        page,
        "routing.js",
        """(() => {
          const r = new m.Routing();
          const fresh = a[0].map((chunk) => r.take(chunk));
          const total = [...r.counts(24)].reduce((x, y) => x + y);
          return [fresh, r.tokens.map((t) => t.text), [0, 1, 2, 3].map((i) => r.of(i)), total];
        })()""",
        chunks,
    )
    assert found[0] == [0, 1, 0, 2]
    assert found[1] == ["a", " ", "ä", "."]
    assert found[2] == [*rows[3:].tolist(), None]
    assert found[3] == 3 * 2 * 2
    gap = [chunk([b"a"], 0, rows[:2], 1), chunk([b"b"], 3, rows[3:], 1)]
    take = "const r = new m.Routing(); try { a[0].forEach((c) => r.take(c)); } catch (e) { return e.message; }"
    said = f"(() => {{ {take} }})()"
    assert "do not follow" in call(page, "routing.js", said, gap)


def test_server_sent_events_in_any_pieces(page: Page) -> None:
    lines = 'event: x\r\ndata: {"a": "ä"}\r\n\r\n: comment\n\ndata: one\ndata:two\n\ndata: \u2028 kept\r\rdata: cut off'
    stream = lines.encode()
    read = """(async () => {
      const bytes = Uint8Array.from(a[0]);
      const found = [];
      for (const size of a[1]) {
        let at = 0;
        const body = new ReadableStream({ pull(to) {
          if (at >= bytes.length) return to.close();
          to.enqueue(bytes.slice(at, at + size));
          at += size;
        } });
        const events = [];
        for await (const event of m.events(body)) events.push(event);
        found.push(events);
      }
      return found;
    })()"""
    sizes = [1, 2, 3, 7, 1000]
    assert call(page, "sse.js", read, list(stream), sizes) == [['{"a": "ä"}', "one\ntwo", "\u2028 kept"]] * len(sizes)


@pytest.mark.parametrize(
    ("error", "title", "detail"),
    [
        ({"kind": "http", "status": 429, "message": "full", "retryAfter": 2}, "The server is busy", "full"),
        (
            {"kind": "http", "status": 503, "message": "x", "missing": ["Expert1", "Trunk"]},
            "The model is not ready",
            "Missing: Expert1, Trunk.",
        ),
        (
            {"kind": "stream", "status": 0, "message": "no replica of expert 3"},
            "The answer broke off",
            "no replica of expert 3",
        ),
        ({"kind": "network", "status": 0, "message": "x"}, "The connection was lost", "What had arrived is kept."),
        ({"kind": "http", "status": 400, "message": "`top_k` is wrong"}, "The server did not accept this", "`top_k`"),
    ],
)
def test_errors_in_words(page: Page, error: dict[str, Any], title: str, detail: str) -> None:
    told = call(page, "words.js", "m.explain(a[0])", error)
    assert told["title"] == title
    assert told["detail"].startswith(detail)
    assert told["wait"] == error.get("retryAfter")


def test_what_happened_between_two_looks(page: Page) -> None:
    def house(missing: list[str], **replicas: str) -> dict[str, Any]:
        found = [{"replica_id": name, "state": state, "pid": 7} for name, state in replicas.items()]
        return {
            "missing": missing,
            "trunks": [],
            "experts": [{"expert": 3, "deployment": "Expert3", "replicas": found}],
        }

    def told(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        return [each["text"] for each in call(page, "happenings.js", "m.differences(a[0], a[1])", before, after)]

    up = house([], a="running")
    assert told(up, up) == []
    assert told(up, house([], a="running", b="starting")) == ["Expert3: a replica starts (process 7)"]
    assert told(house([], a="running", b="loading"), house([], a="running", b="running")) == [
        "Expert3: the new replica serves (process 7)"
    ]
    assert told(up, house(["Expert3"])) == ["Expert3: a replica died (process 7)", "Missing: Expert3"]
    assert told(house(["Expert3"]), up) == ["Expert3: a replica serves (process 7)", "Everything is up"]
    assert told(up, house([], c="starting")) == [
        "Expert3: a replica died (process 7)",
        "Expert3: a replica starts (process 7)",
    ]
    killed = call(page, "happenings.js", "m.differences(a[0], a[1], new Set(['a']))", up, house([]))
    assert killed == [], "who killed it was told"
    assert told(house([], a="running", b="stopping"), up) == ["Expert3: a replica is gone (process 7)"]


def test_imported_files_are_checked(page: Page) -> None:
    load = "(() => { try { return m.importChats(a[0]); } catch (e) { return e.message; } })()"
    good = {
        "format": "moe-ray-conversations-1",
        "conversations": [{"id": "x1", "messages": [{"role": "user", "content": "hi", "evil": 1}]}],
    }
    assert call(page, "chats.js", load, json.dumps(good)) == 1
    kept = json.loads(page.evaluate("localStorage.getItem('moe-ray.chat.x1')"))
    assert set(kept["messages"][0]) == {"id", "role", "content"}
    for wrong in (
        "no json",
        "{}",
        json.dumps({**good, "conversations": [{"id": "../x", "messages": []}]}),
        json.dumps({**good, "conversations": [{"id": "x", "messages": [{"role": "system", "content": "a"}]}]}),
    ):
        assert isinstance(call(page, "chats.js", load, wrong), str), wrong
    page.evaluate("localStorage.clear()")
