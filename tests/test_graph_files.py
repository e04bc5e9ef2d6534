"""Graphs as files: what is written is read back, by networkx or by the rules of the format."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens.errors import MoeLensError, UsageError
from moe_lens.figures.formats import GRAPH_FORMATS
from moe_lens.figures.graphs.graph_file import MOST_EDGES, write_graph

NASTY = [
    'say "hi"',
    "<b>&amp; & </script><!--",
    "two\nlines",
    "你好 ✓",
    "$x^2$ \\n \\",
    "]]> #quot; `code`",
    "-->|end",
    "tab\there",
]
TITLE, DEFINITION = 'A "title" <i>&</i> $x$', "What {it} means,\nin two lines; 100 % of it."


def pipeline(layers: int = 3, width: int = 4) -> networkx.DiGraph:
    graph = networkx.DiGraph(weight_name="flow")
    for layer in range(layers):
        for expert in range(width):
            name = NASTY[(layer * width + expert) % len(NASTY)] if expert else None
            graph.add_node(
                f"L{layer}E{expert}",
                layer=layer,
                expert=expert,
                name=name,
                share=np.float32(0.1 * expert),
                group="a" if expert % 2 else None,
            )
    for layer in range(layers - 1):
        for one in range(width):
            for two in range(width):
                graph.add_edge(
                    f"L{layer}E{one}",
                    f"L{layer + 1}E{two}",
                    weight=(one + 1) / (two + 1),
                    count=np.int64(one * two),
                    claimed=np.bool_(one == two),
                    q=float("nan"),
                )
    return graph


def pairs() -> networkx.Graph:
    graph = networkx.Graph()
    for layer in (1, 2):
        for expert in range(5):
            graph.add_node((layer, expert), layer=layer, expert=expert, group=expert % 2)
        graph.add_edge((layer, 4), (layer, 0), weight=2.5, lift=2.5)
        graph.add_edge((layer, 2), (layer, 3), weight=1e-7)
    return graph


def written(graph: Any, folder: Path, ending: str, **options: Any) -> str:
    path = write_graph(
        graph, folder / f"graph.{ending}", title=TITLE, definition=DEFINITION, **options
    )
    return path.read_text(encoding="utf-8")


def kept(data: dict[str, Any]) -> dict[str, Any]:
    """What a file should hold of the attributes of a node or edge."""
    return {key: value for key, value in data.items() if value is not None and value == value}


def same(found: Any, graph: Any) -> None:
    """Nodes by their text, all attributes, edges whichever way round."""
    assert found.is_directed() == graph.is_directed()
    assert {node: kept(data) for node, data in found.nodes(data=True)} == {
        str(node): pytest.approx(kept(data)) if "name" not in data else kept(data)
        for node, data in graph.nodes(data=True)
    }
    assert found.number_of_edges() == graph.number_of_edges()
    for one, two, data in graph.edges(data=True):
        assert kept(found.edges[str(one), str(two)]) == kept(data)


@pytest.mark.parametrize("make", [pipeline, pairs])
class TestReadBack:
    def test_node_link(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        content = json.loads(written(make(), tmp_path, "json"))
        found = networkx.node_link_graph(content, edges="edges")
        same(found, make())
        assert (found.graph["title"], found.graph["definition"]) == (TITLE, DEFINITION)

    def test_graphml(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        text = written(make(), tmp_path, "graphml")
        found = networkx.read_graphml(io.BytesIO(text.encode()))
        same(found, make())
        assert found.graph["title"] == TITLE

    def test_dot(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        graph = make()
        found = parsed_dot(written(graph, tmp_path, "dot"))
        assert found["directed"] == graph.is_directed()
        assert found["graph"]["label"] == TITLE
        assert found["graph"]["comment"] == DEFINITION
        assert set(found["nodes"]) == {str(node) for node in graph}
        for node, data in graph.nodes(data=True):
            drawn = found["nodes"][str(node)]
            name = data.get("name") or str(data["expert"])
            # Graphviz reads entities in labels, so what looks like one is escaped.
            assert drawn["label"].replace("&amp;", "&") == name
            assert int(drawn["expert"]) == data["expert"]
        assert len(found["edges"]) == graph.number_of_edges()
        for one, two, attributes in found["edges"]:
            ends = {str(node): node for node in graph}
            data = graph.edges[ends[one], ends[two]]
            assert float(attributes["weight"]) == data["weight"]

    def test_mermaid(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        graph = make()
        head, title, end, kind, *lines = written(graph, tmp_path, "mmd").splitlines()
        assert (head, end, kind) == ("---", "---", "flowchart LR")
        assert json.loads(title.removeprefix("title: ")) == TITLE
        texts: dict[str, str] = {}
        edges, styles, depth = [], 0, 0
        arrow = "-->" if graph.is_directed() else "---"
        for line in lines:
            said = line.strip()
            if said.startswith("subgraph "):
                assert re.fullmatch(r'subgraph layer\d+\["layer \d+"\]', said)
                depth += 1
            elif said == "end":
                depth -= 1
            elif said.startswith("linkStyle "):
                styles += 1
            elif node := re.fullmatch(r'(n\d+)\(\["([^"]*)"\]\)', said):
                assert not re.search(r'["`<>{}\[\]$|\\]', node[2].replace("<br/>", ""))
                text = node[2].replace("<br/>", "\n")
                texts[node[1]] = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), text)
            elif edge := re.fullmatch(rf'(n\d+) {arrow}\|"([\d.e+-]+)"\| (n\d+)', said):
                edges.append((edge[1], edge[3], float(edge[2])))
            else:
                assert re.fullmatch(r"(%% [^{}]*|classDef \w+ \S+|class [\w,]+ \w+)", said)
        assert depth == 0
        names = [
            (data.get("name") or str(data["expert"])).replace("\t", " ")
            for _, data in graph.nodes(data=True)
        ]
        assert sorted(texts.values()) == sorted(names)
        assert len(edges) == styles == graph.number_of_edges()
        assert {end for edge in edges for end in edge[:2]} <= set(texts)
        weights = [data["weight"] for *_, data in graph.edges(data=True)]
        assert sorted(w for *_, w in edges) == pytest.approx(sorted(weights), rel=5e-3)

    def test_page(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        graph = make()
        page = Page(written(graph, tmp_path, "html"))
        assert page.texts["h1"] == [TITLE] and page.texts["title"] == [TITLE]
        data = json.loads(page.texts["script"][0])
        assert len(data["nodes"]) == len(graph)
        assert len(data["edges"]) == graph.number_of_edges()
        nodes = [attributes for attributes in page.attributes if "data-node" in attributes]
        edges = [attributes for attributes in page.attributes if "data-edge" in attributes]
        assert [int(each["data-node"]) for each in nodes] == list(range(len(graph)))
        assert [int(each["data-edge"]) for each in edges] == list(range(len(data["edges"])))
        for node, each in zip(graph, data["nodes"], strict=True):
            name = graph.nodes[node].get("name")
            assert each["title"].startswith(name or f"expert {graph.nodes[node]['expert']},")
        for edge, drawn in zip(data["edges"], edges, strict=True):
            ends = [str(list(graph)[edge[end]]) for end in ("source", "target")]
            by_text = {str(node): node for node in graph}
            assert graph.edges[by_text[ends[0]], by_text[ends[1]]]["weight"] == edge["weight"]
            assert float(drawn["stroke-width"]) > 0
        assert ("flow" if graph.is_directed() else "weight") == data["weight"]

    def test_equal_graphs_are_equal_bytes(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        graph = make()
        other = graph.__class__()
        other.graph.update(graph.graph)
        other.add_nodes_from(reversed(list(graph.nodes(data=True))))
        turned = [
            edge if graph.is_directed() else (edge[1], edge[0], edge[2])
            for edge in graph.edges(data=True)
        ]
        other.add_edges_from(reversed(turned))
        for ending in GRAPH_FORMATS:
            for style in (None, "light", "dark"):
                one = written(graph, tmp_path, ending, style=style)
                assert one == written(other, tmp_path, ending, style=style)


class Page(HTMLParser):
    """A page of ours, and what is wrong with it."""

    ALONE = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[dict[str, Any]] = []
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert self.open == []
        # Nothing is fetched, and the browser is told so.
        assert not re.search(r"(https?:)?//[a-z]|url\(\s*['\"]?(?!#)|@import", text.lower())
        policies = [each["content"] for each in self.attributes if "http-equiv" in each]
        assert policies and policies[0].startswith("default-src 'none'; style-src 'sha256-")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in names)
        self.attributes.append(dict(attrs))
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def parsed_dot(text: str) -> dict[str, Any]:
    """DOT by the grammar of Graphviz, as far as we write it."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    token = re.compile(rf"\s*({quoted}|->|--|[A-Za-z_][\w]*|-?[\d.]+|[{{}}\[\];,=])", re.S)
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = token.match(text, at)
        assert match, text[at : at + 40]
        tokens.append(match[1])
        at = match.end()
    found: dict[str, Any] = {"graph": {}, "nodes": {}, "edges": []}
    found["directed"] = tokens[0] == "digraph"
    assert tokens[1] == "{" and tokens[-1] == "}"
    depth, place = 1, 2

    def plain(part: str) -> str:
        if not part.startswith('"'):
            return part
        return re.sub(
            r"\\(.)", lambda each: "\n" if each[1] == "n" else each[1], part[1:-1], flags=re.S
        )

    def attributes() -> dict[str, str]:
        nonlocal place
        values: dict[str, str] = {}
        if tokens[place] == "[":
            place += 1
            while tokens[place] != "]":
                name, equals, value = tokens[place : place + 3]
                assert equals == "="
                values[plain(name)] = plain(value)
                place += 3
                place += tokens[place] == ","
            place += 1
        assert tokens[place] == ";" or tokens[place] == "]" or tokens[place]
        return values

    while place < len(tokens) - 1:
        part = tokens[place]
        if part == "subgraph":
            depth += 1
            place += 3
        elif part == "}":
            depth -= 1
            place += 1
        elif part == ";":
            place += 1
        elif tokens[place + 1] == "=":
            if depth == 1:
                found["graph"][part] = plain(tokens[place + 2])
            place += 3
        elif tokens[place + 1] in ("->", "--"):
            assert (tokens[place + 1] == "->") == found["directed"]
            one, two = plain(part), plain(tokens[place + 2])
            place += 3
            found["edges"].append((one, two, attributes()))
        else:
            place += 1
            values = attributes()
            if part not in ("node", "edge"):
                found["nodes"][plain(part)] = values
    assert depth == 1
    return found


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.text(min_size=1, max_size=12), value=st.floats(0, 1e9))
def test_any_name(tmp_path: Path, name: str, value: float) -> None:
    """Control characters become symbols, surrogates the sign for what cannot be read."""
    graph = networkx.DiGraph()
    graph.add_node(1, layer=0, expert=0, name=name)
    graph.add_edge(1, "two", weight=value)
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in name)
    shown = re.sub(r"[\x80-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", shown).replace("\x7f", "␡")
    content = json.loads(written(graph, tmp_path, "json"))
    assert content["nodes"][0]["name"] == shown
    text = written(graph, tmp_path, "graphml")
    assert networkx.read_graphml(io.BytesIO(text.encode())).nodes["1"]["name"] == shown
    assert parsed_dot(written(graph, tmp_path, "dot"))["edges"][0][:2] == ("1", "two")
    data = json.loads(Page(written(graph, tmp_path, "html")).texts["script"][0])
    assert data["nodes"][0]["title"] == f"{shown}, layer 0"
    assert data["edges"][0]["weight"] == value
    written(graph, tmp_path, "mmd")


def test_drawings_hold_the_strongest_edges(tmp_path: Path) -> None:
    graph = pipeline(layers=5, width=30)
    total = graph.number_of_edges()
    assert total > MOST_EDGES["html"] > MOST_EDGES["mmd"]
    data = json.loads(Page(page := written(graph, tmp_path, "html")).texts["script"][0])
    weights = sorted((data["weight"] for *_, data in graph.edges(data=True)), reverse=True)
    assert sorted((edge["weight"] for edge in data["edges"]), reverse=True) == weights[:1500]
    assert f"{total - 1500:,} of {total:,} edges, the weakest" in page
    assert "of 150 nodes are left out" in page
    mermaid = written(graph, tmp_path, "mmd")
    assert mermaid.count("-->") == 200 and "are left out" in mermaid
    assert len(json.loads(written(graph, tmp_path, "json"))["edges"]) == total
    assert len(json.loads(written(graph, tmp_path, "json", most_edges=7))["edges"]) == 7


def test_columns_and_circles(tmp_path: Path) -> None:
    """Experts of one layer share their x in columns, and their distance to a centre on circles."""

    def places(graph: Any) -> list[tuple[float, float]]:
        page = Page(written(graph, tmp_path, "html"))
        moves = [each["transform"] for each in page.attributes if "data-node" in each]
        return [tuple(map(float, re.findall(r"[\d.]+", move))) for move in moves]

    flow = places(pipeline())
    assert len({x for x, _ in flow}) == 3 and len(set(flow)) == 12
    assert sorted({x for x, _ in flow}) == [x for x, _ in flow[::4]]
    circle = np.array(places(pairs())[:5])
    distances = np.linalg.norm(circle - circle.mean(axis=0), axis=1)
    np.testing.assert_allclose(distances, distances[0], atol=0.2)


def test_a_column_is_ordered_so_that_lines_do_not_cross(tmp_path: Path) -> None:
    graph = networkx.DiGraph()
    for expert in range(6):
        graph.add_edge(f"a{expert}", f"b{5 - expert}", weight=1)
        graph.nodes[f"a{expert}"].update(layer=0, expert=expert)
        graph.nodes[f"b{5 - expert}"].update(layer=1, expert=5 - expert)
    page = Page(written(graph, tmp_path, "html"))
    moves = [each["transform"] for each in page.attributes if "data-node" in each]
    rows = [float(move.split()[1].rstrip(")")) for move in moves]
    assert rows[:6] == rows[:5:-1]


def test_arrows_only_where_an_edge_does_not_lead_on(tmp_path: Path) -> None:
    graph = pipeline()
    assert "marker-end" not in written(graph, tmp_path, "html")
    graph.add_edge("L2E0", "L0E0", weight=1)
    assert "marker-end" in written(graph, tmp_path, "html")


def test_style(tmp_path: Path) -> None:
    """A page follows its reader unless it is told not to; the rest is light by itself."""
    assert 'data-theme="auto"' in written(pairs(), tmp_path, "html")
    assert 'data-theme="dark"' in written(pairs(), tmp_path, "html", style="dark")
    assert "#ffffff" in written(pairs(), tmp_path, "dot")
    assert "#15171c" in written(pairs(), tmp_path, "dot", style="dark")
    with pytest.raises(UsageError, match="picture style"):
        written(pairs(), tmp_path, "html", style="blue")


@pytest.mark.parametrize("ending", GRAPH_FORMATS)
def test_small_graphs(tmp_path: Path, ending: str) -> None:
    for graph in (networkx.Graph(), networkx.DiGraph()):
        assert written(graph, tmp_path, ending)
        graph.add_node("alone")
        assert "alone" in written(graph, tmp_path, ending)
        graph.add_edge("alone", "alone", weight=0)
        assert written(graph, tmp_path, ending)


def test_the_graph_stays_as_it_is(tmp_path: Path) -> None:
    graph = pairs()
    before = (dict(graph.graph), list(graph.nodes(data=True)), list(graph.edges(data=True)))
    for ending in GRAPH_FORMATS:
        written(graph, tmp_path, ending)
    assert before == (dict(graph.graph), list(graph.nodes(data=True)), list(graph.edges(data=True)))


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    good = networkx.path_graph(3)
    networkx.set_edge_attributes(good, 1.0, "weight")
    with pytest.raises(UsageError, match=r"graph\.html"):
        write_graph(good, tmp_path / "graph.txt", title="t")
    bad = good.copy()
    for weight in (None, -1.0, float("nan"), float("inf"), "2", True):
        bad.edges[0, 1]["weight"] = weight
        with pytest.raises(UsageError, match="edge 0 to 1 has no weight"):
            write_graph(bad, tmp_path / "graph.dot", title="t")
    bad = good.copy()
    bad.nodes[0]["list"] = [1]
    with pytest.raises(UsageError, match="node 0 has a list of type list"):
        write_graph(bad, tmp_path / "graph.json", title="t")
    bad = good.copy()
    bad.add_node("1")
    with pytest.raises(UsageError, match="written alike"):
        write_graph(bad, tmp_path / "graph.json", title="t")
    with pytest.raises(UsageError, match="parallel"):
        write_graph(networkx.MultiGraph(), tmp_path / "graph.json", title="t")
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeLensError, match="cannot be written"):
        write_graph(good, tmp_path / "file" / "graph.json", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
